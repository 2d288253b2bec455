"""What ReLU routing does with every MoE option of Megatron's TransformerConfig.

One table: an option is honoured, refused with the reason, or irrelevant. Nothing is silently
ignored: a test fails on a field that is not here, `check` refuses at the start, and the table in
`docs/options.md` is printed from this one.
"""

from collections.abc import Collection
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

Answer = Literal["honoured", "refused", "irrelevant"]


@dataclass(frozen=True)
class Option:
    """The answer for one field.

    Attributes:
        answer: "refused" means every value but the allowed ones.
        why: how it is honoured, why it is refused (with the remedy), or why it does not matter.
        allowed: values that pass although the option is refused; None is the field's default.
    """

    answer: Answer
    why: str
    allowed: tuple[Any, ...] | None = None


def _honoured(why: str) -> Option:
    return Option("honoured", why)


def _refused(why: str, *allowed: Any) -> Option:
    return Option("refused", why, allowed or None)


def _irrelevant(why: str) -> Option:
    return Option("irrelevant", why)


_NO_SELECTION = "ReLU routing selects no top-k, so there is nothing to restrict; leave it out"
_NO_CAPACITY = "every active assignment is computed; leave it out"
_UNVERIFIED = "has not been run with a varying number of assignments; leave it out"
_FLEX = "of the flex dispatcher, which is refused"
_GRAPHS = "buffer sizes change with every step under ReLU routing; leave it out"

OPTIONS: dict[str, Option] = {
    # the layer
    "num_moe_experts": _honoured("E, after granularity"),
    "moe_router_topk": _honoured("k of the target sparsity 1 - k/E and of the load weights"),
    "moe_ffn_hidden_size": _honoured("expert width, after granularity"),
    "moe_layer_freq": _honoured("which layers have experts; sparsity is the mean over those"),
    "moe_grouped_gemm": _honoured(
        "grouped experts: ours in torch with the local backend, or Transformer Engine's"
    ),
    "moe_single_grouped_weight": _honoured("layout of Transformer Engine's grouped experts"),
    "moe_single_grouped_bias": _honoured("layout of Transformer Engine's grouped experts"),
    "moe_layer_recompute": _honoured("recomputes the layer; statistics are counted once"),
    "moe_grad_scale_func": _honoured("scales the penalty's gradient"),
    "expert_model_parallel_size": _honoured("experts split over ranks"),
    "expert_tensor_parallel_size": _honoured(
        "each expert split over ranks; on gloo with the all-gather dispatcher only"
    ),
    # shared experts
    "moe_shared_expert_intermediate_size": _honoured("shared experts beside the routed ones"),
    "moe_shared_expert_gate": _honoured("gate of the shared experts"),
    "moe_shared_expert_overlap": _honoured("overlaps shared experts with the all-to-all"),
    "use_grouped_gemm_for_shared_expert": _honoured("implementation of the shared experts"),
    "moe_shared_expert_glu_interleave_size": _refused(f"interleaved gate and up {_UNVERIFIED}"),
    # the router
    "moe_router_dtype": _honoured("fp32 when not given, or fp64"),
    "moe_z_loss_coeff": _honoured(
        "Megatron's z-loss on the logits; unless the loss is per token, Megatron averages it over "
        "each rank's real tokens first, so that with a padding mask it is the micro-batch's mean "
        "only where the ranks of tensor and context parallelism have equally many"
    ),
    "moe_input_jitter_eps": _honoured("Megatron's noise on the router's input"),
    "moe_per_layer_logging": _honoured("for the z-loss; sparsity is always logged by layer"),
    "moe_router_load_balancing_type": _refused(
        "these balance a top-k router; ReLU routing balances by its weighted L1 penalty "
        "(--moe-relu-load-balancing)",
        "none", "aux_loss", "seq_aux_loss", "global_aux_loss",
    ),
    "moe_aux_loss_coeff": _irrelevant(
        "weight of a top-k router's loss; the published ReMoE scripts pass it and ignore it"
    ),
    "moe_router_pre_softmax": _irrelevant("there is no softmax"),
    "moe_router_score_function": _refused(
        "the score of ReLU routing is the ReLU; leave it out", "softmax"
    ),
    "moe_router_topk_scaling_factor": _refused(
        "the router's output is the weight, unscaled; leave it out"
    ),
    "moe_router_num_groups": _refused(_NO_SELECTION),
    "moe_router_group_topk": _refused(_NO_SELECTION),
    "moe_router_topk_limited_devices": _refused(_NO_SELECTION),
    "moe_router_enable_expert_bias": _refused(
        "a bias for selection only has no meaning where the score is also the gate; leave it out"
    ),
    "moe_router_bias_update_rate": _irrelevant("only with the expert bias, which is refused"),
    "moe_router_quantile_balancing_ema": _irrelevant("only with quantile balancing, refused"),
    "moe_router_force_load_balancing": _refused(
        "random logits would activate half of all experts; benchmark with real routing"
    ),
    "moe_router_force_biased": _refused(
        "random logits would activate half of all experts; benchmark with real routing"
    ),
    "moe_router_fusion": _refused("Megatron's fused router selects top-k; leave it out"),
    "moe_enable_routing_replay": _refused("replays top-k indices; leave it out"),
    "moe_router_padding_for_quantization": _refused(f"padding for fp8 and fp4 {_UNVERIFIED}"),
    "moe_router_padding_for_fp8": _refused(f"padding for fp8 {_UNVERIFIED}"),
    # dispatch
    "moe_token_dispatcher_type": _refused(
        "flex selects the top-k experts again; use alltoall or allgather",
        "alltoall", "allgather",
    ),
    "moe_permute_fusion": _refused(f"Transformer Engine's fused permutation {_UNVERIFIED}"),
    "moe_apply_probs_on_input": _refused(
        "Eq. 1 weights the experts' outputs; weighting inputs is another model; leave it out"
    ),
    "moe_expert_capacity_factor": _refused(_NO_CAPACITY),
    "moe_pad_expert_input_to_capacity": _refused(_NO_CAPACITY),
    "moe_expert_rank_capacity_factor": _refused(_NO_CAPACITY),
    "moe_token_dropping": _refused(_NO_CAPACITY),
    "moe_token_drop_policy": _irrelevant("only with a capacity, which is refused"),
    "moe_pad_experts_for_cuda_graph_inference": _refused(_NO_CAPACITY),
    "moe_latent_size": _refused(f"the latent projection (Transformer Engine) {_UNVERIFIED}"),
    "moe_mlp_glu_interleave_size": _refused(f"interleaved gate and up {_UNVERIFIED}"),
    "moe_enable_deepep": _refused("part of the flex dispatcher; use alltoall or allgather"),
    "moe_flex_dispatcher_backend": _irrelevant(_FLEX),
    "moe_permute_fusion_into_hybridep": _irrelevant(_FLEX),
    "moe_hybridep_pad_uneven_dispatch_inputs": _irrelevant(_FLEX),
    "moe_flex_dispatcher_num_sms": _irrelevant(_FLEX),
    "moe_deepep_num_sms": _irrelevant(_FLEX),
    "moe_hybridep_num_sms": _irrelevant(_FLEX),
    "moe_hybridep_num_blocks_permute": _irrelevant(_FLEX),
    "moe_hybridep_num_blocks_unpermute": _irrelevant(_FLEX),
    "moe_hybridep_num_sms_preprocessing": _irrelevant(_FLEX),
    "moe_ncclep_static_shape": _irrelevant(_FLEX),
    "moe_ncclep_zero_copy": _irrelevant(_FLEX),
    "moe_paged_stash": _refused(f"the paged stash {_UNVERIFIED}"),
    "moe_paged_stash_page_size": _irrelevant("only with the paged stash, which is refused"),
    "moe_paged_stash_buffer_size_factor_cuda": _irrelevant("only with the paged stash, refused"),
    "moe_paged_stash_buffer_size_factor_cpu": _irrelevant("only with the paged stash, refused"),
    "overlap_moe_expert_parallel_comm": _refused(f"the overlapped schedule {_UNVERIFIED}"),
    "overlap_dispatch_backward_with_experts_wgrad": _refused(f"the overlap {_UNVERIFIED}"),
    # multi-token prediction and CUDA graphs
    "mtp_num_layers": _refused(f"multi-token prediction {_UNVERIFIED}"),
    "mtp_standalone": _refused(f"multi-token prediction {_UNVERIFIED}"),
    "mtp_grad_scale_func": _irrelevant("only with multi-token prediction, which is refused"),
    "mtp_loss_scaling_factor": _irrelevant("only with multi-token prediction, refused"),
    "mtp_use_repeated_layer": _irrelevant("only with multi-token prediction, refused"),
    "mtp_detach_heads": _irrelevant("only with multi-token prediction, refused"),
    "mtp_hybrid_override_pattern": _irrelevant("only with multi-token prediction, refused"),
    "enable_cuda_graph": _refused(_GRAPHS),
    "external_cuda_graph": _refused(_GRAPHS),
    "cuda_graph_impl": _refused(_GRAPHS),
    "cuda_graph_modules": _irrelevant("only with CUDA graphs, which are refused"),
    "cuda_graph_scope": _irrelevant("only with CUDA graphs, which are refused"),
    "cuda_graph_use_single_mempool": _irrelevant("only with CUDA graphs, which are refused"),
    "cuda_graph_retain_backward_graph": _irrelevant("only with CUDA graphs, which are refused"),
    "cuda_graph_warmup_steps": _irrelevant("only with CUDA graphs, which are refused"),
    "inference_cuda_graph_scope": _irrelevant("only with CUDA graphs, which are refused"),
    "inference_moe_token_dispatcher_type": _irrelevant("of Megatron's inference engine"),
    "inference_moe_disable_fused_quant_kernels": _irrelevant("of Megatron's inference engine"),
    "delay_offload_until_cuda_graph": _irrelevant("only with CUDA graphs, which are refused"),
}  # fmt: skip


def moe_fields() -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig that need an answer, with their defaults."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    parts = ("moe_", "mtp_", "cuda_graph")
    extra = ("expert_model_parallel_size", "expert_tensor_parallel_size",
             "use_grouped_gemm_for_shared_expert",
             "overlap_dispatch_backward_with_experts_wgrad")  # fmt: skip
    return {
        f.name: None if f.default is MISSING else f.default
        for f in fields(TransformerConfig)
        if f.name in extra or any(part in f.name for part in parts)
    }


# Options that hold only for a number of assignments known in advance.
NEEDS_KNOWN_COUNT = (
    "moe_token_dispatcher_type", "moe_permute_fusion", "moe_expert_capacity_factor",
    "moe_pad_expert_input_to_capacity", "moe_expert_rank_capacity_factor",
    "moe_router_padding_for_quantization", "moe_enable_routing_replay", "moe_paged_stash",
    "overlap_moe_expert_parallel_comm", "enable_cuda_graph", "external_cuda_graph",
    "cuda_graph_impl",
)  # fmt: skip


def check(
    config: Any, *, names: Collection[str] = tuple(OPTIONS), by: str = "ReLU routing"
) -> None:
    """Refuse what a varying number of assignments cannot do.

    Args:
        config: a TransformerConfig, or Megatron's arguments, which have the same names.
        names: the options that matter.
        by: who refuses, for the message.

    Raises:
        ValueError: naming the option, its value, the reason and the remedy.
    """
    defaults = moe_fields()
    for name in names:
        option = OPTIONS[name]
        if option.answer != "refused":
            continue
        allowed = option.allowed or (defaults.get(name), None)
        value = getattr(config, name, allowed[0])
        if not all(v in allowed for v in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{name} is {value}, which {by} refuses: {option.why}")


def to_markdown() -> str:
    """The table of `docs/options.md`."""
    rows = [f"| `{name}` | {o.answer} | {_describe(o)} |" for name, o in OPTIONS.items()]
    return "\n".join(["| option | ReLU routing | |", "|---|---|---|", *rows])


def _describe(option: Option) -> str:
    allowed = f" (allowed: {', '.join(map(str, option.allowed))})" if option.allowed else ""
    return option.why + allowed


if __name__ == "__main__":
    print(to_markdown())
