"""Arguments in checkpoints of the published implementation: thu-ml/ReMoE, a Megatron of 2024.

Granularity is not applied to them yet, and later arguments are missing. Its tensors are renamed in
`names`.
"""

from argparse import Namespace
from typing import Any

from remoe.config import apply_granularity

# Arguments that its Megatron did not have, or that hold what its own defaults are.
_DEFAULTS: dict[str, Any] = {
    "group_query_attention": False,
    "num_query_groups": 1,
    "init_method_std": 0.02,
    "rotary_base": 10000,
    "moe_router_pre_softmax": False,
    "untie_embeddings_and_output_weights": False,
    "num_experts": None,
    "moe_granularity": 1,
    "consumed_train_samples": 0,
    "data_path": None,
    "train_data_path": None,
    "mock_data": False,
    "tokenizer_type": None,
    "tokenizer_model": None,
    "vocab_file": None,
    "merge_file": None,
    "vocab_size": None,
    "moe_router_topk": 2,
    "moe_relu_l1_reg_coeff_init": 1e-8,
    "moe_relu_l1_reg_coeff_multiplier": 1.2,
}


def is_fork(args: Namespace) -> bool:
    """Whether the arguments are the fork's: it has our oldest flags, and not the later ones."""
    given = vars(args)
    return "moe_relu_routing" in given and "moe_relu_load_balancing" not in given


def translated(args: Namespace) -> Namespace:
    """The fork's arguments as ours: complete, and with granularity applied."""
    args = Namespace(**(_DEFAULTS | vars(args)))
    if getattr(args, "kv_channels", None) is None:
        args.kv_channels = args.hidden_size // args.num_attention_heads
    if not hasattr(args, "layernorm_epsilon"):
        args.layernorm_epsilon = args.norm_epsilon
    # The fork's logits are in the dtype of the parameters; ours are in fp32, as in training.
    args.moe_router_dtype = "fp32" if args.moe_relu_routing else None
    if args.num_experts is not None:
        width = getattr(args, "moe_ffn_hidden_size", None) or args.ffn_hidden_size
        shape = apply_granularity(
            num_experts=args.num_experts,
            topk=args.moe_router_topk,
            ffn_hidden_size=width,
            granularity=args.moe_granularity,
        )
        args.num_experts, args.moe_router_topk = shape.num_experts, shape.topk
        args.moe_ffn_hidden_size = shape.ffn_hidden_size
    return args
