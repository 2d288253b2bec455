"""ReMoE on unmodified Megatron."""
