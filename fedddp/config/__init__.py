"""The configuration of a run: its schema, and the way from YAML and flags to it and back."""
