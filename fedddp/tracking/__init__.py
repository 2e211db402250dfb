"""What a run shows while it lasts: progress, wandb and other trackers."""
