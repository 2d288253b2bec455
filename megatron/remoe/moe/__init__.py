"""The MoE layer in Megatron: router, dispatch, experts, and the specs that place them."""
