"""A training step, and what surrounds a run in its ranks: metrics, checkpoints, resuming."""
