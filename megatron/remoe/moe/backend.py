"""Torch-native modules for `--transformer-impl local`: SDPA attention, norms that shard, grouped
experts.

Shapes: sq, sk query and key lengths; b micro-batch; n heads, g query groups of this rank; d head.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron.remoe.moe.experts import GroupedExperts


def torch_norm(*, config: TransformerConfig, hidden_size: int, eps: float) -> torch.nn.Module:
    """Torch's RMSNorm or LayerNorm, also under sequence parallelism.

    Every tensor-parallel rank then normalises its own part of the sequence, so the gradients of the
    weights must be summed; Megatron does so for parameters marked `sequence_parallel`, and without
    the mark the ranks drift apart silently.

    Raises:
        ValueError: a normalisation that torch does not have.
    """
    norms: dict[str, type[torch.nn.RMSNorm] | type[torch.nn.LayerNorm]]
    norms = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
    if config.normalization not in norms or config.layernorm_zero_centered_gamma:
        raise ValueError(
            f"normalization {config.normalization!r} (zero-centered gamma: "
            f"{config.layernorm_zero_centered_gamma}) is not available with transformer_impl "
            f"local; use RMSNorm or LayerNorm without zero-centered gamma, or transformer_engine"
        )
    norm = norms[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


class SDPAttention(DotProductAttention):
    """Causal attention by torch's scaled_dot_product_attention, without a `[sq, sk]` matrix.

    What SDPA does not cover (sliding windows, softmax offsets, layer scaling, dropout with the
    random state of its tensor-parallel rank, a cache of keys) runs in Megatron's implementation.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.plain = (
            config.softmax_type == "vanilla"
            and config.window_size is None
            and not config.apply_query_key_layer_scaling
            and self.attention_dropout.p == 0
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """`[sq, b, n, d]`, `[sk, b, g, d]` twice, to `[sq, b, n * d]`."""
        causal = (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        if not (
            self.plain
            and causal
            and attention_mask is None
            and attention_bias is None
            and packed_seq_params is None
            and query.shape[0] == key.shape[0]
        ):
            context: Tensor = super().forward(
                query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params
            )
            return context
        context = scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            is_causal=True,
            enable_gqa=query.shape[2] != key.shape[2],
            scale=self.softmax_scale,
        )
        return context.permute(2, 0, 1, 3).flatten(start_dim=2)


class TorchSpecProvider(LocalSpecProvider):
    """Megatron's local backend with the modules above."""

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> Callable[..., torch.nn.Module]:
        return torch_norm

    def core_attention(self) -> type:
        return SDPAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        if moe_use_grouped_gemm:
            return GroupedExperts
        return super().grouped_mlp_modules(moe_use_grouped_gemm)
