"""Which router the flags choose, and what it does with every MoE option of Megatron's.

One table says what ReLU routing does with a field of Megatron's TransformerConfig, and smaller ones
what the other routers do otherwise: it is honored, refused with the reason, or irrelevant. Nothing
is silently ignored: a test fails on a field that is not here, `check_router` refuses at the start,
and the tables in `docs/options.md` are printed from this module.
"""

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from typing import Any, Literal

from remoe.config import ROUTINGS, AnyRouting
from remoe.settings import settings_of

# Published flags that choose a router, and which; `moe_routing` names any.
PUBLISHED = {"moe_relu_routing": "relu", "moe_soft_routing": "soft"}

Answer = Literal["honored", "refused", "irrelevant"]


def router_name(values: Mapping[str, Any]) -> str:
    """Return the name of the router in `ROUTINGS` that flags choose, "topk" if they say nothing.

    Args:
        values: Megatron's arguments, or the flags of a config, which may lack some.

    Raises:
        ValueError: the flags choose different routers.
    """
    named = values.get("moe_routing")
    found = {"moe_routing": named} if named else {}
    found |= {flag: name for flag, name in PUBLISHED.items() if values.get(flag)}
    if len(set(found.values())) > 1:
        said = [f"{flag} is {named}" if flag == "moe_routing" else flag for flag in found]
        raise ValueError(f"{said[0]} and {said[1]} are both set; choose one router")
    return str(next(iter(found.values()), "topk"))


def name_of(routing: AnyRouting | type[AnyRouting]) -> str:
    """Return the name of a router in `ROUTINGS`."""
    cls = routing if isinstance(routing, type) else type(routing)
    return next(name for name, known in ROUTINGS.items() if known is cls)


@dataclass(frozen=True)
class Option:
    """The answer for one field.

    Attributes:
        answer: "refused" means every value but the allowed ones.
        why: how it is honored, why it is refused (with the remedy), or why it does not matter.
        allowed: values that pass although the option is refused; () means the field's default.
    """

    answer: Answer
    why: str
    allowed: tuple[Any, ...] = ()


_honored = partial(Option, "honored")
_refused = partial(Option, "refused")
_irrelevant = partial(Option, "irrelevant")


def _each(option: Option, prefix: str, names: str) -> dict[str, Option]:
    """Return one answer for several fields, whose names begin alike."""
    return {f"{prefix}{name}": option for name in names.split()}


_NO_SELECTION = "ReLU routing selects no top-k, so there is nothing to restrict; leave it out"
_NO_CAPACITY = "every active assignment is computed; leave it out"
_UNVERIFIED = "has not been run with a varying number of assignments; leave it out"
_WITH_GRAPHS = _irrelevant("only with CUDA graphs, which are refused")

OPTIONS: dict[str, Option] = {
    # the layer
    "num_moe_experts": _honored("E, after granularity"),
    "moe_router_topk": _honored("k of the target sparsity 1 - k/E and of the load weights"),
    "moe_ffn_hidden_size": _honored("expert width, after granularity"),
    "moe_layer_freq": _honored("which layers have experts; sparsity is the mean over those"),
    "moe_grouped_gemm": _honored(
        "grouped experts: ours in torch with the local backend, or Transformer Engine's"
    ),
    "moe_use_grouped_tensor": _refused(
        "padding every expert's rows to a multiple of 256 (use_transformer_engine_op_fuser sets it "
        f"too) {_UNVERIFIED}"
    ),
    **_each(
        _honored(
            "layout of Transformer Engine's grouped experts; 0.20 has it only with "
            "moe_use_grouped_tensor, which is refused"
        ),
        "moe_single_grouped_", "weight bias",
    ),
    "moe_layer_recompute": _honored("recomputes the layer; statistics are counted once"),
    "moe_grad_scale_func": _honored("scales the penalty's gradient"),
    "expert_model_parallel_size": _honored("experts split over ranks"),
    "expert_tensor_parallel_size": _honored(
        "each expert split over ranks; on gloo with the all-gather dispatcher only"
    ),
    # shared experts
    "moe_shared_expert_intermediate_size": _honored("shared experts beside the routed ones"),
    "moe_shared_expert_gate": _honored("gate of the shared experts"),
    "moe_shared_expert_overlap": _honored("overlaps shared experts with the all-to-all"),
    "use_grouped_gemm_for_shared_expert": _honored("implementation of the shared experts"),
    "moe_shared_expert_glu_interleave_size": _refused(f"interleaved gate and up {_UNVERIFIED}"),
    # the router
    "moe_router_dtype": _honored("fp32 when not given, or fp64"),
    "moe_z_loss_coeff": _honored(
        "Megatron's z-loss on the logits; unless the loss is per token, Megatron averages it over "
        "each rank's real tokens first, so that with a padding mask it is the micro-batch's mean "
        "only where the ranks of tensor and context parallelism have equally many"
    ),
    "moe_input_jitter_eps": _honored("Megatron's noise on the router's input"),
    "moe_per_layer_logging": _honored("for the z-loss; sparsity is always logged by layer"),
    "moe_router_load_balancing_type": _refused(
        "these balance a top-k router; ReLU routing balances by its weighted L1 penalty "
        "(--moe-relu-load-balancing)",
        ("none", "aux_loss", "seq_aux_loss", "global_aux_loss"),
    ),
    "moe_aux_loss_coeff": _irrelevant(
        "weight of a top-k router's loss; the published ReMoE scripts pass it and ignore it"
    ),
    "moe_router_pre_softmax": _irrelevant("there is no softmax"),
    "moe_router_score_function": _refused(
        "the score of ReLU routing is the ReLU; leave it out", ("softmax",)
    ),
    "moe_router_topk_scaling_factor": _refused(
        "the router's output is the weight, unscaled; leave it out"
    ),
    **_each(_refused(_NO_SELECTION), "moe_router_", "num_groups group_topk topk_limited_devices"),
    "moe_router_enable_expert_bias": _refused(
        "a bias for selection only has no meaning where the score is also the gate; leave it out"
    ),
    "moe_router_bias_update_rate": _irrelevant("only with the expert bias, which is refused"),
    "moe_router_quantile_balancing_ema": _irrelevant(
        "only with quantile balancing, which is refused"
    ),
    **_each(
        _refused("random logits would activate half of all experts; benchmark with real routing"),
        "moe_router_force_", "load_balancing biased",
    ),
    "moe_router_fusion": _refused("Megatron's fused router selects top-k; leave it out"),
    "moe_enable_routing_replay": _refused("replays top-k indices; leave it out"),
    "moe_router_padding_for_quantization": _refused(f"padding for fp8 and fp4 {_UNVERIFIED}"),
    "moe_router_padding_for_fp8": _refused(f"padding for fp8 {_UNVERIFIED}"),
    # dispatch
    "moe_token_dispatcher_type": _refused(
        "flex selects the top-k experts again; use alltoall or allgather",
        ("alltoall", "allgather"),
    ),
    "moe_permute_fusion": _refused(f"Transformer Engine's fused permutation {_UNVERIFIED}"),
    "moe_apply_probs_on_input": _refused(
        "Eq. 1 weights the experts' outputs; weighting inputs is another model; leave it out"
    ),
    **_each(
        _refused(_NO_CAPACITY),
        "moe_", "expert_capacity_factor pad_expert_input_to_capacity expert_rank_capacity_factor "
        "token_dropping pad_experts_for_cuda_graph_inference",
    ),
    "moe_token_drop_policy": _irrelevant("only with a capacity, which is refused"),
    "moe_latent_size": _refused(f"the latent projection (Transformer Engine) {_UNVERIFIED}"),
    "moe_mlp_glu_interleave_size": _refused(f"interleaved gate and up {_UNVERIFIED}"),
    "moe_enable_deepep": _refused("part of the flex dispatcher; use alltoall or allgather"),
    **_each(
        _irrelevant("of the flex dispatcher, which is refused"),
        "moe_", "flex_dispatcher_backend permute_fusion_into_hybridep "
        "hybridep_pad_uneven_dispatch_inputs flex_dispatcher_num_sms deepep_num_sms "
        "hybridep_num_sms hybridep_num_blocks_permute hybridep_num_blocks_unpermute "
        "hybridep_num_sms_preprocessing ncclep_static_shape ncclep_zero_copy "
        "dispatch_fwd_dtype combine_bwd_dtype",
    ),
    "moe_paged_stash": _refused(f"the paged stash {_UNVERIFIED}"),
    **_each(
        _irrelevant("only with the paged stash, which is refused"),
        "moe_paged_stash_", "page_size buffer_size_factor_cuda buffer_size_factor_cpu",
    ),
    "overlap_moe_expert_parallel_comm": _refused(f"the overlapped schedule {_UNVERIFIED}"),
    "overlap_dispatch_backward_with_experts_wgrad": _refused(f"the overlap {_UNVERIFIED}"),
    # multi-token prediction and CUDA graphs
    **_each(_refused(f"multi-token prediction {_UNVERIFIED}"), "mtp_", "num_layers standalone"),
    **_each(
        _irrelevant("only with multi-token prediction, which is refused"),
        "mtp_", "grad_scale_func loss_scaling_factor use_repeated_layer detach_heads "
        "hybrid_override_pattern hsm",
    ),
    **_each(
        _refused("buffer sizes change with every step; leave it out"),
        "", "enable_cuda_graph external_cuda_graph cuda_graph_impl",
    ),
    **_each(
        _WITH_GRAPHS,
        "cuda_graph_", "modules scope use_single_mempool retain_backward_graph warmup_steps",
    ),
    "inference_cuda_graph_scope": _WITH_GRAPHS,
    **_each(
        _irrelevant("of Megatron's inference engine"),
        "inference_moe_", "token_dispatcher_type disable_fused_quant_kernels",
    ),
    "delay_offload_until_cuda_graph": _WITH_GRAPHS,
}  # fmt: skip

# Options that only one of the versions in `compat.VERSIONS` has, and which.
ONLY_IN: dict[str, str] = {
    "moe_ncclep_static_shape": "0.19",
    **dict.fromkeys(
        ("moe_use_grouped_tensor", "moe_dispatch_fwd_dtype", "moe_combine_bwd_dtype", "mtp_hsm"),
        "0.20",
    ),
}


def fields_of(version: str) -> set[str]:
    """Return the options with an answer that a version such as "0.20.0" has."""
    minor = ".".join(version.split(".")[:2])
    return {name for name in OPTIONS if ONLY_IN.get(name, minor) == minor}


# Megatron's logs that mean something else, or nothing, under ReLU routing: flag and what to know.
LOGS: dict[str, str] = {
    "log_throughput": "TFLOP/s are of k experts per token, in the line of a step, in TensorBoard "
    "and in W&B: too few while more are active (`active_experts` and `tokens_per_second` of "
    "`metrics.jsonl` are measured)",
    "log_progress": "the same FLOPs, summed up in `progress.txt`; a checkpoint has that sum too "
    "(`num_floating_point_operations_so_far`)",
    "log_straggler": "the same FLOPs, in its TFLOP/s of the slowest and fastest ranks",
    "enable_one_logger": "the same FLOPs, in its throughput",
    "log_interval": "the first two logged steps also print a theoretical memory, whose active "
    "parameters are those of k experts",
    "moe_router_load_balancing_type": "set to `none`, so that no auxiliary loss is logged; the "
    "penalty is `l1_coeff` times `l1_reg` of `metrics.jsonl`",
    "moe_routing_trace_path": "refused, since it traces the k experts of TopK routers only",
    "save_tokens_per_expert_interval": "refused with the local backend, since Megatron reads "
    "Transformer Engine's layers only; so are `save_activations_interval` and "
    "`save_dgrads_interval`",
}


def moe_fields() -> dict[str, Any]:
    """Return the fields of Megatron's TransformerConfig that need an answer, with defaults."""
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

_WHY_NOT_RECURRENT: dict[str, str] = {
    **dict.fromkeys(
        (*NEEDS_KNOWN_COUNT, "moe_latent_size"),
        "our MoE layer, which hands the state on, does not have it; leave it out",
    ),
    "moe_token_dispatcher_type": "our MoE layer, which hands the state on, has other dispatchers; "
    "use alltoall or allgather",
    **dict.fromkeys(
        ("mtp_num_layers", "mtp_standalone"),
        "layers of multi-token prediction get no state; leave it out",
    ),
    "fp32_residual_connection": "the state has columns for the dtype of the weights; leave it out",
    "fused_residual_rmsnorm": "the fused norm hands on residuals without the state; leave it out",
    "fine_grained_activation_offloading": "it has not been run with hidden states that carry a "
    "state; leave it out",
}
# What a recurrent router refuses with every selection of experts, for reasons of its own.
RECURRENT: dict[str, Option] = {
    name: replace(OPTIONS.get(name, _refused(why)), why=why)
    for name, why in _WHY_NOT_RECURRENT.items()
}


def check(
    config: Any, *, answers: Mapping[str, Option] = OPTIONS, by: str = "ReLU routing"
) -> None:
    """Refuse what a varying number of assignments cannot do.

    Args:
        config: a TransformerConfig, or Megatron's arguments, which have the same names.
        answers: the options that matter, with their answers.
        by: who refuses, for the message.

    Raises:
        ValueError: naming the option, its value, the reason and the remedy.
    """
    defaults = moe_fields()
    for name, option in answers.items():
        if option.answer != "refused":
            continue
        allowed = option.allowed or (defaults.get(name, False), None)
        value = getattr(config, name, allowed[0])
        if not all(v in allowed for v in (value if isinstance(value, list) else [value])):
            said = " ".join(map(str, value)) if isinstance(value, list) else value
            raise ValueError(f"{name} is {said}, which {by} refuses: {option.why}")


def check_recurrent(config: Any) -> None:
    """Refuse what would take the state of a recurrent router away, as `check` does."""
    check(config, answers=RECURRENT, by="a recurrent router")


# Why a router that is not causal is refused in every model that is.
_WHY_NOT_CAUSAL = {
    "soft": "a slot of Soft MoE is a mean of all tokens, so that every token would see those after "
    "it; use moe_routing relu, which is causal and as differentiable, or train an encoder with "
    "masked_lm",
    "expert_choice": "an expert of Expert Choice compares all tokens of a sequence, so that what a "
    "token gets depends on those after it; use moe_routing expert_threshold, which is causal, or "
    "train an encoder with masked_lm",
}


def not_causal(routing: AnyRouting | type[AnyRouting]) -> str:
    """Return why a router that is not causal is refused in a causal model, and the remedy."""
    name = name_of(routing)
    return f"moe_routing is {name}, but the model is causal: {_WHY_NOT_CAUSAL[name]}"


_NO_ROUTER = "the router of Soft MoE selects no experts, and has no such option; leave it out"
_NOT_RUN = "it has not been run with slots; leave it out"
_APART = "a slot would mix the documents of a sequence, which this keeps apart; leave it out"
# What Soft MoE refuses for reasons of its own.
OWN_OF_SOFT: dict[str, Option] = {
    "moe_router_topk": _refused(
        "every token is in every slot, so that there is no k; leave it out", (1, 2)
    ),
    "moe_router_load_balancing_type": _refused(
        "nothing has to be balanced, since every expert has as many slots as any other; leave it "
        "out",
        ("none", "aux_loss"),  # the second is Megatron's default
    ),
    "moe_z_loss_coeff": _refused(_NO_ROUTER, (None, 0)),
    "moe_input_jitter_eps": _refused(_NO_ROUTER, (None,)),
    "moe_router_dtype": _refused("its router computes in fp32; leave it out", (None, "fp32")),
    "moe_shared_expert_overlap": _refused(
        "slots are exchanged without a dispatcher to overlap with; leave it out", (None, False)
    ),
    "moe_token_dispatcher_type": _refused(
        "slots are exchanged by all-to-all; leave it out",
        ("alltoall", "allgather"),  # the second is Megatron's default
    ),
    "expert_tensor_parallel_size": _refused(
        "an expert of Soft MoE is on one rank; use 1, or leave it out", (None, 1)
    ),
    "context_parallel_size": _refused(
        "a slot is a mean of a whole sequence, and its parts on the ranks are not summed; use 1",
        (1,),
    ),
    "reset_attention_mask": _refused(_APART, (None, False)),
    "reset_position_ids": _refused(_APART, (None, False)),
}
# All that Soft MoE refuses: these, and what a varying number of assignments cannot do.
SOFT: dict[str, Option] = {
    name: replace(option, why=_NO_ROUTER if name.startswith("moe_router_") else _NOT_RUN)
    for name, option in OPTIONS.items()
    if option.answer == "refused"
} | OWN_OF_SOFT


_NO_LOGITS = "hash routing has no logits; leave it out"
_COMPARED = (
    "an expert would compare tokens of documents that this keeps apart; leave it out",
    (None, False),
)
_ANOTHER = "it has not been run with null experts; leave it out"
# What the other routers refuse for reasons of their own.
OWN: dict[str, dict[str, Option]] = {
    "hash": {
        "pipeline_model_parallel_size": _refused(
            "the ids of the tokens reach the first stage only, and one micro-batch at a time; use "
            "1",
            (1,),
        ),
        "moe_z_loss_coeff": _refused(_NO_LOGITS, (None, 0)),
        "moe_input_jitter_eps": _refused(_NO_LOGITS, (None,)),
        "moe_router_dtype": _refused(_NO_LOGITS, (None, "fp32")),
    },
    "expert_choice": {
        "context_parallel_size": _refused(
            "experts choose among all tokens of a sequence, whose parts on the ranks are not "
            "gathered; use 1",
            (1,),
        ),
        "reset_attention_mask": _refused(*_COMPARED),
        "reset_position_ids": _refused(*_COMPARED),
    },
    "null_experts": {
        "moe_router_load_balancing_type": _refused(
            "it has not been run with null experts; use aux_loss",
            ("none", "aux_loss", "seq_aux_loss", "global_aux_loss"),
        ),
        "moe_router_score_function": _refused(
            "gates are a softmax over the chosen experts; leave it out", ("softmax",)
        ),
        **dict.fromkeys(
            (
                "moe_router_topk_scaling_factor", "moe_router_num_groups",
                "moe_router_group_topk", "moe_router_topk_limited_devices",
                "moe_router_enable_expert_bias", "moe_router_force_load_balancing",
                "moe_router_force_biased", "moe_router_fusion", "moe_apply_probs_on_input",
                "moe_latent_size", "mtp_num_layers", "mtp_standalone",
            ),
            _refused(_ANOTHER),
        ),
    },
}  # fmt: skip


def refusals_of(name: str) -> dict[str, Option]:
    """Return the options that matter to a router, by its name in `ROUTINGS`, with their answers.

    They are those of ReLU routing, where a router has no other reason, and only those of a varying
    number of assignments for the routers that are Megatron's own.
    """
    if name == "relu":
        return OPTIONS
    if name == "soft":
        return SOFT
    if name in ("topk", "null_experts"):
        return {n: OPTIONS[n] for n in NEEDS_KNOWN_COUNT} | OWN.get(name, {})
    why = f"{ROUTINGS[name].title} has no such option; leave it out"
    return {
        option: replace(answer, why=why)
        if option.startswith("moe_router_") and answer.answer == "refused"
        else answer
        for option, answer in OPTIONS.items()
    } | OWN.get(name, {})


def check_router(config: Any, routing: AnyRouting) -> None:
    """Refuse what a router cannot do; the errors are those of `check`.

    Args:
        config: a TransformerConfig, or Megatron's arguments.
        routing: settings of the router.
    """
    if type(routing) not in ROUTINGS.values():
        return  # a router of another package answers for itself
    name, by = name_of(routing), routing.title
    if name == "topk":
        if not routing.varies:
            return
        by = "TopK with near-dense warm-up"
    check(config, answers=refusals_of(name), by=by)
    if name == "soft":
        _check_shares(config)


def _check_shares(config: Any) -> None:
    """Refuse ranks that cannot share the experts of Soft MoE equally."""
    if hasattr(config, "num_moe_experts"):
        experts = config.num_moe_experts
    else:  # arguments, which are checked before granularity
        experts = config.num_experts and config.num_experts * config.moe_granularity
    if isinstance(config.moe_layer_freq, list) and not any(config.moe_layer_freq):
        raise ValueError(
            f"moe_layer_freq is {config.moe_layer_freq}, with which no layer is a Soft MoE; give a "
            f"layer experts, or leave num_experts out for a dense model"
        )
    for name in ("expert_model_parallel_size", "tensor_model_parallel_size"):
        ranks = getattr(config, name)
        if experts is not None and experts % ranks:
            raise ValueError(
                f"{name} is {ranks}, and {experts} experts cannot be shared by so many ranks "
                f"equally; choose one that divides the number of experts"
            )


def layers_with_experts(frequency: int | str | list[int] | None, num_layers: int) -> list[int]:
    """List the layers with experts for a `moe_layer_freq`.

    Args:
        frequency: every n-th layer, a pattern of 0 and 1, or the text of either, as a flag has it.
        num_layers: of the model.

    Raises:
        ValueError: the text is neither.
    """
    if isinstance(frequency, str):
        frequency = _pattern(frequency)
    if isinstance(frequency, list):
        return [i for i in range(num_layers) if frequency[i]]
    return list(range(0, num_layers, int(frequency or 1)))


def _pattern(text: str) -> Any:
    """Return what `[0]*2+[1]` is, as Megatron reads it, without importing Megatron for it."""

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int()):
                return node.value
            case ast.List():
                return [value(element) for element in node.elts]
            case ast.BinOp(op=ast.Add()):
                return value(node.left) + value(node.right)
            case ast.BinOp(op=ast.Mult()):
                return value(node.left) * value(node.right)
        raise ValueError(f"moe_layer_freq is {text}; write a number, or a list such as [0]*2+[1]*2")

    return value(ast.parse(text, mode="eval").body)


_SETTINGS_TITLE = """## The settings of the routers

Each is a field of a class in `remoe/selections/`. A YAML config has the flag's name with
underscores. The last column says what happens to a run whose checkpoint was trained with another
value."""
_RECURRENT_TITLE = """## What a recurrent router refuses

TopK routing with `--moe-router-recurrence` refuses these options, and ReLU routing with it refuses
them and those above."""
_SOFT_TITLE = """## What Soft MoE refuses

Beside these it refuses the options that ReLU routing refuses."""
_OWN_TITLE = """## What the other routers refuse

Beside these, null experts refuse what TopK with warm-up refuses, and the others what ReLU routing
refuses."""
_LOGS_TITLE = """## Megatron's logs under ReLU routing

Megatron counts k experts per token wherever it counts experts."""


def to_markdown() -> str:
    """Return the tables of `docs/options.md`."""
    options = [
        (f"`{name}`" + (f" ({ONLY_IN[name]})" if name in ONLY_IN else ""), o.answer, _describe(o))
        for name, o in OPTIONS.items()
    ]
    settings = {s.dest: s for routing in ROUTINGS.values() for s in settings_of(routing)}
    routers = [
        (
            f"`{s.flag}`",
            f"`{s.name}`" if s.exported else "",
            "" if s.default is None else str(s.default).lower(),
            s.help,
            s.on_resume,
        )
        for s in settings.values()
    ]
    soft = [
        (f"`{name}`", ", ".join(str(v).lower() for v in o.allowed if v is not None), o.why)
        for name, o in OWN_OF_SOFT.items()
    ]
    others = [
        (f"`{router}`", f"`{name}`", ", ".join(str(v).lower() for v in o.allowed if v is not None),
         o.why)
        for router, options in OWN.items()
        for name, o in options.items()
    ]  # fmt: skip
    logs = [(f"`{name}`", text) for name, text in LOGS.items()]
    parts = (
        _table(("option", "ReLU routing", "reason"), options),
        _RECURRENT_TITLE,
        _table(
            ("option", "reason"), [(f"`{name}`", option.why) for name, option in RECURRENT.items()]
        ),
        _SETTINGS_TITLE,
        _table(("flag", "exported `config.json`", "default", "meaning", "on resume"), routers),
        _SOFT_TITLE,
        _table(("option", "accepted, beside leaving it out", "reason"), soft),
        _OWN_TITLE,
        _table(("router", "option", "accepted, beside leaving it out", "reason"), others),
        _LOGS_TITLE,
        _table(("flag", "what to know"), logs),
    )
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return "\n".join([next(lines), "|" + "---|" * len(head), *lines])


def _describe(option: Option) -> str:
    allowed = f" (allowed: {', '.join(map(str, option.allowed))})" if option.allowed else ""
    return option.why + allowed


if __name__ == "__main__":
    print(to_markdown())
