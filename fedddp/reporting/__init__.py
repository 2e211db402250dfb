"""What is shown of runs: comparisons, dry runs, tables."""
