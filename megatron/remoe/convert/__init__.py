"""Checkpoints to Hugging Face and back, on any machine, in one process, tensor by tensor."""
