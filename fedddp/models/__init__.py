"""Models: names to modules, weights, normalisation layers, and state as flat vectors."""
