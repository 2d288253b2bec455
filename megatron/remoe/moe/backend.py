"""Torch-native modules for `--transformer-impl local`: SDPA attention, norms, grouped experts.

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
    """Return torch's RMSNorm or LayerNorm, also for sequence parallelism.

    There every tensor-parallel rank normalizes its own part of the sequence, so the gradients of
    the weights must be summed. Megatron sums them for parameters that are marked
    `sequence_parallel`; without the mark the ranks would silently drift apart.

    Raises:
        ValueError: a normalization that torch does not have.
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
    """Attention by torch's scaled_dot_product_attention, without a `[sq, sk]` matrix.

    It is causal, or bidirectional with a mask of padding that is not given.

    Megatron's implementation runs what SDPA does not cover: sliding windows, softmax offsets, layer
    scaling, dropout with the random state of its tensor-parallel rank, and a cache of keys.
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
        """Attend: queries `[sq, b, n, d]`, keys and values `[sk, b, g, d]`, to `[sq, b, n * d]`."""
        mask_type = attn_mask_type or self.attn_mask_type
        if not (
            self.plain
            and mask_type in (AttnMaskType.causal, AttnMaskType.padding)
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
            is_causal=mask_type == AttnMaskType.causal,
            enable_gqa=query.shape[2] != key.shape[2],
            scale=self.softmax_scale,
        )
        return context.permute(2, 0, 1, 3).flatten(start_dim=2)


class TorchSpecProvider(LocalSpecProvider):
    """Megatron's local backend with the modules above."""

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> Callable[..., torch.nn.Module]:
        """Return the builder of norms."""
        return torch_norm

    def core_attention(self) -> type:
        """Return the class of attention."""
        return SDPAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        """Return the builder of experts."""
        if moe_use_grouped_gemm:
            return GroupedExperts
        return super().grouped_mlp_modules(moe_use_grouped_gemm)
