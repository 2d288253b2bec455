"""A training step, and what a run does around it in its ranks: metrics, checkpoints, resuming."""
