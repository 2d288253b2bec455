"""Files that checkpoints and models are stored in, read without running what they hold."""
