"""The commands of `fedddp`, a function for each; it takes the words after the command."""
