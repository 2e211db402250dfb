"""Ranks: the launcher's environment, process groups, and how ranks fail and stop."""
