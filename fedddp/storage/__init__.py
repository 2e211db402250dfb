"""What a run writes to disk: checkpoints, client states, histories."""
