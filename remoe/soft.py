"""Soft MoE (arXiv 2308.00951): experts work on slots, which are means of all tokens of a sequence.

    z = normalize(x) . scale normalize(mu)      logits of tokens and slots
    D = softmax of z over the tokens            slots = D^T x       what the experts get
    C = softmax of z over the slots             y = C f(slots)      what the tokens get

Nothing is selected or dropped, and no loss balances the experts. A slot has seen the whole
sequence, the future of every token included, so that a causal model cannot use this layer.

Time depends on the number of slots, whatever number of experts shares them. With as many slots as
tokens the experts cost what a dense MLP costs, and the logits, D^T x and C f(slots) cost 2TSH each.
No tensor of `[tokens, slots, hidden]` is made.

Shapes: B sequences, T tokens of a sequence, S slots, H hidden, E experts, p slots of an expert
(S = E p, those of an expert are neighbors), F expert width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from remoe.config import Activation, SoftMoELayerConfig

NORMALIZE_EPS = 1e-6


def normalize(x: Tensor, eps: float = NORMALIZE_EPS) -> Tensor:
    """Return `x / sqrt(sum of x^2 + eps)` over the last dimension, as the published code does.

    The paper (Sec. 2.3) has `x / (norm + eps)` instead.
    """
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + eps)


def soft_logits(x_BTH: Tensor, router_SH: Tensor, scale: Tensor) -> Tensor:
    """Return the logits of every token and slot, `[B, T, S]`, in fp32 or wider (Sec. 2.3).

    Both sides are normalized, because logits of unnormalized tokens grow with the width, until the
    softmax selects single tokens.

    Args:
        x_BTH: tokens.
        router_SH: parameters of the slots, mu.
        scale: trained factor, with one element.
    """
    dtype = torch.promote_types(x_BTH.dtype, torch.float32)
    # A cast is not enough under autocast, which would cast it back.
    with torch.autocast(x_BTH.device.type, enabled=False):
        router_SH = scale.to(dtype) * normalize(router_SH.to(dtype))
        return F.linear(normalize(x_BTH.to(dtype)), router_SH)


def soft_routing(
    logits_BTS: Tensor, padding_mask_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the dispatch weights D and the combine weights C, both `[B, T, S]` (Eq. 1, 2).

    The weights of a slot in D add up to 1 over the tokens, and those of a token in C over the
    slots. A padding token is in no slot and receives nothing: its weights are zero. So are all
    weights of a sequence that is padding only.

    Args:
        logits_BTS: logits.
        padding_mask_BT: bool, True for padding tokens.

    Raises:
        ValueError: a mask of another shape, which torch might repeat without a word.
    """
    combine_BTS = torch.softmax(logits_BTS, dim=2)
    if padding_mask_BT is None:
        return torch.softmax(logits_BTS, dim=1), combine_BTS
    if padding_mask_BT.shape != logits_BTS.shape[:2]:
        raise ValueError(
            f"padding_mask is {list(padding_mask_BT.shape)}; it must be "
            f"{list(logits_BTS.shape[:2])}, the sequences and their tokens"
        )
    padding_BT1 = padding_mask_BT.unsqueeze(2)
    dispatch_BTS = torch.softmax(logits_BTS.masked_fill(padding_BT1, -torch.inf), dim=1)
    return dispatch_BTS.masked_fill(padding_BT1, 0), combine_BTS.masked_fill(padding_BT1, 0)


def mass_of_slots(logits_BTS: Tensor, padding_mask_BT: Tensor | None = None) -> Tensor:
    """Return the logarithm of the sum that a slot's weights are divided by, `[B, S]`.

    It is minus infinity where all tokens are padding. Ranks that have parts of a sequence exchange
    it (`share_of_part`).
    """
    if padding_mask_BT is not None:
        logits_BTS = logits_BTS.masked_fill(padding_mask_BT.unsqueeze(2), -torch.inf)
    return torch.logsumexp(logits_BTS, dim=1)


def share_of_part(masses_RBS: Tensor, part: int) -> Tensor:
    """Return the share that a part of the tokens has in every slot, `[B, S]`.

    The softmax over all tokens is that over the part times this share, so that the slots are the
    sum over parts of `share * D^T x`. A sequence that is padding only has a share of zero.

    Args:
        masses_RBS: `mass_of_slots` of all R parts.
        part: index of the part.
    """
    nothing_BS = masses_RBS.isneginf().all(dim=0)
    return torch.softmax(masses_RBS, dim=0)[part].masked_fill(nothing_BS, 0)


def slots_of_tokens(dispatch_BTS: Tensor, x_BTH: Tensor) -> Tensor:
    """Return the experts' inputs, `D^T x` in the dtype of x, `[B, S, H]` (Eq. 1)."""
    return torch.bmm(dispatch_BTS.to(x_BTH.dtype).transpose(1, 2), x_BTH)


def tokens_of_slots(combine_BTS: Tensor, y_BSH: Tensor) -> Tensor:
    """Return the tokens' outputs, `C y` in the dtype of y, `[B, T, H]` (Eq. 2)."""
    return torch.bmm(combine_BTS.to(y_BSH.dtype), y_BSH)


def by_expert(slots_BSH: Tensor, num_experts: int) -> Tensor:
    """Return the slots of every expert one after the other, `[E, B p, H]`."""
    batch, num_slots, hidden = slots_BSH.shape
    slots_BEpH = slots_BSH.reshape(batch, num_experts, num_slots // num_experts, hidden)
    return slots_BEpH.transpose(0, 1).reshape(num_experts, -1, hidden)


def by_sequence(slots_ERH: Tensor, num_slots: int) -> Tensor:
    """Return the slots of every sequence one after the other, `[B, S, H]`; undoes `by_expert`."""
    num_experts, _, hidden = slots_ERH.shape
    slots_EBpH = slots_ERH.reshape(num_experts, -1, num_slots // num_experts, hidden)
    return slots_EBpH.transpose(0, 1).reshape(-1, num_slots, hidden)


def batched_experts(
    x_ERH: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: Activation,
) -> Tensor:
    """Compute experts that all have the same number of rows, R, `[E, R, H]`.

    Args:
        x_ERH: their inputs.
        up: `[E, 2F, H]` with "swiglu", the gate first; `[E, F, H]` with "gelu".
        down: `[E, H, F]`.
        up_bias, down_bias: `[E, 2F]` or `[E, F]`, and `[E, H]`.
        activation: "swiglu", or the tanh form of GELU, which the published code has.
    """

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return torch.bmm(x, weight.transpose(1, 2))
        return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))

    hidden = product(x_ERH, up, up_bias)
    if activation == "swiglu":
        gate, linear = hidden.chunk(2, dim=-1)
        hidden = F.silu(gate) * linear
    else:
        hidden = F.gelu(hidden, approximate="tanh")
    return product(hidden, down, down_bias)


def slots_for_equal_flops(num_tokens: int, num_experts: int) -> int:
    """Return the slots per expert with which the experts cost as much as a dense MLP.

    Raises:
        ValueError: the tokens cannot be divided equally among the experts.
    """
    if num_experts < 1 or num_tokens < 1 or num_tokens % num_experts:
        raise ValueError(
            f"{num_experts} experts cannot share as many slots as a sequence of {num_tokens} "
            f"tokens has; choose a number of experts that divides the number of tokens"
        )
    return num_tokens // num_experts


def check_padding_mask(padding_mask: Tensor, shape: torch.Size) -> None:
    """Refuse a padding mask that does not fit the tokens. This waits for the device once.

    Args:
        padding_mask: the mask, which must be bool `[..., T]` and True for padding tokens.
        shape: of the tokens without their last dimension, `[..., T]`.

    Raises:
        ValueError: another shape or dtype, or a sequence without a token.
    """
    if padding_mask.dtype != torch.bool or padding_mask.shape != shape:
        raise ValueError(
            f"padding_mask is {padding_mask.dtype} {list(padding_mask.shape)}; it must be "
            f"torch.bool {list(shape)}, True for padding tokens"
        )
    if shape[-1] and bool(padding_mask.all(dim=-1).any()):
        raise ValueError(
            "padding_mask leaves a sequence without a token, so that its slots would be means of "
            "nothing; leave such sequences out of the batch"
        )


class SoftMoELayer(nn.Module):
    """Mixture of experts behind a soft router, in place of the MLP of a bidirectional transformer.

        layer = SoftMoELayer(SoftMoELayerConfig(hidden_size=256, ffn_hidden_size=1024))
        y = layer(x)                   # [batch, tokens, 256]
        y = layer(x, padding_mask)     # bool [batch, tokens], True for padding

    It has no loss of its own. In a causal model it would let tokens see those after them.

    Weights:
        router: `[S, H]`, mu, of unit length at first; scale: `[1]`, 1 at first; up: `[E, 2F, H]`
            with "swiglu" (gate first), `[E, F, H]` with "gelu"; down: `[E, H, F]`; up_bias and
            down_bias: `[E, F]` and `[E, H]`, with "gelu" only.

    Args:
        config: sizes and settings.
        device, dtype: of the parameters.
    """

    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        config: SoftMoELayerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        experts, hidden, width = config.num_experts, config.hidden_size, config.ffn_hidden_size
        rows = 2 * width if config.activation == "swiglu" else width

        def weight(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*size, device=device, dtype=dtype))

        self.router = weight(config.num_slots, hidden)
        self.scale = weight(1)
        self.up = weight(experts, rows, hidden)
        self.down = weight(experts, hidden, width)
        has_bias = config.activation == "gelu"
        self.register_parameter("up_bias", weight(experts, rows) if has_bias else None)
        self.register_parameter("down_bias", weight(experts, hidden) if has_bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights with `init_std`, slots of unit length, no bias, and a scale of 1."""
        for weight in (self.router, self.up, self.down):
            nn.init.normal_(weight, std=self.config.init_std)
        with torch.no_grad():
            self.router.copy_(F.normalize(self.router, dim=1))
        nn.init.ones_(self.scale)
        for bias in (self.up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Return the mean of the slots' outputs that every token takes, `[..., T, H]`.

        Args:
            hidden_states: `[..., T, H]`; every `[T, H]` is a sequence of its own.
            padding_mask: bool `[..., T]`, True for padding tokens, whose outputs are zero.

        Raises:
            ValueError: inputs of another shape, or a sequence of padding only.
        """
        hidden = self.config.hidden_size
        if hidden_states.ndim < 2 or hidden_states.shape[-1] != hidden:
            raise ValueError(
                f"hidden_states is {list(hidden_states.shape)}; it must be [..., tokens, {hidden}]"
            )
        x_BTH = hidden_states.reshape(
            math.prod(hidden_states.shape[:-2]), *hidden_states.shape[-2:]
        )
        if padding_mask is not None:
            check_padding_mask(padding_mask, hidden_states.shape[:-1])
            padding_mask = padding_mask.reshape(x_BTH.shape[:-1])
        logits_BTS = soft_logits(x_BTH, self.router, self.scale)
        dispatch_BTS, combine_BTS = soft_routing(logits_BTS, padding_mask)
        slots_BSH = slots_of_tokens(dispatch_BTS, x_BTH)
        y_ERH = batched_experts(
            by_expert(slots_BSH, self.config.num_experts),
            self.up,
            self.down,
            self.up_bias,
            self.down_bias,
            activation=self.config.activation,
        )
        y_BTH = tokens_of_slots(combine_BTS, by_sequence(y_ERH, self.config.num_slots))
        return y_BTH.view_as(hidden_states)

    def extra_repr(self) -> str:
        """Return the sizes that a printed model shows."""
        config = self.config
        return (
            f"hidden_size={config.hidden_size}, ffn_hidden_size={config.ffn_hidden_size}, "
            f"num_experts={config.num_experts}, slots_per_expert={config.slots_per_expert}, "
            f"activation={config.activation}"
        )
