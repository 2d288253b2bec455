"""File formats of checkpoints and models, read without running any code that they hold."""
