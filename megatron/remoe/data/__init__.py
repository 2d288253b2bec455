"""Training data: a corpus from the local installation, and text to Megatron's token files."""
