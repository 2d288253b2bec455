"""Conversion of checkpoints to Hugging Face and back, in one process and tensor by tensor."""
