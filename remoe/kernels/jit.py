# mypy: ignore-errors
"""The kernels, in Triton's language. `remoe.kernels.fused` launches them and says what they do.

Sums are taken in the type ACC: fp32, or fp64 for fp64 inputs. Offsets that can exceed 2^31 are
int64. No kernel adds atomically, so that every run gives the same bits.

Shapes: T tokens, H hidden, E experts, F expert width, A active (token, expert) pairs. A tile is a
number of tokens or rows by a number of experts or columns, and tiles are numbered by token.
"""

from __future__ import annotations

from remoe.kernels.backend import import_triton, jit

_, tl = import_triton()


@jit
def route(
    logits_TE,
    padding_T,
    probs_TE,
    map_TE,
    sums_PE,
    counts_PE,
    tokens_3P,
    num_tokens,
    tiles_per_program,
    E: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    ACC: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_E: tl.constexpr,
):
    """Write gates and map of a program's tokens, and its sums, counts, and counts of tokens."""
    program = tl.program_id(0)
    row = tl.arange(0, TILE_T)
    expert = tl.arange(0, TILE_E)
    within = row[:, None] * E + expert[None, :]
    is_expert = (expert < E)[None, :]
    sums = tl.zeros([TILE_T, TILE_E], ACC)
    counts = tl.zeros([TILE_T, TILE_E], tl.int32)
    tokens = tl.zeros([TILE_T], tl.int32)
    silent = tl.zeros([TILE_T], tl.int32)
    most = tl.zeros([TILE_T], tl.int32)
    for i in range(tiles_per_program):
        first = (program.to(tl.int64) * tiles_per_program + i) * TILE_T
        is_token = row < num_tokens - first
        mask = is_token[:, None] & is_expert
        logits = tl.load(logits_TE + first * E + within, mask=mask, other=0).to(ACC)
        active = logits > 0
        probs = tl.where(logits <= 0, 0, logits)  # NaN stays
        tl.store(probs_TE + first * E + within, probs, mask=mask)
        tl.store(map_TE + first * E + within, active, mask=mask)
        counted = is_token
        if HAS_PADDING:
            counted = is_token & (tl.load(padding_T + first + row, mask=is_token, other=1) == 0)
        sums += tl.where(counted[:, None], probs, 0)
        ones = (active & counted[:, None]).to(tl.int32)
        counts += ones
        per_token = tl.sum(ones, axis=1)
        tokens += counted.to(tl.int32)
        silent += (counted & (per_token == 0)).to(tl.int32)
        most = tl.maximum(most, per_token)
    place = program * E + expert
    tl.store(sums_PE + place, tl.sum(sums, axis=0), mask=expert < E)
    tl.store(counts_PE + place, tl.sum(counts, axis=0), mask=expert < E)
    programs = tl.num_programs(0)
    tl.store(tokens_3P + program, tl.sum(tokens, axis=0))
    tl.store(tokens_3P + programs + program, tl.sum(silent, axis=0))
    tl.store(tokens_3P + 2 * programs + program, tl.max(most, axis=0))


@jit
def route_sums(
    sums_PE,
    counts_PE,
    tokens_3P,
    sum_E,
    counts,
    silent,
    most_active,
    num_programs,
    E: tl.constexpr,
    ACC: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_E: tl.constexpr,
):
    """Sum over the programs of `route`, in their order; `counts` is `TokenCounts.flat`."""
    expert = tl.program_id(0) * TILE_E + tl.arange(0, TILE_E)
    row = tl.arange(0, TILE_P)
    sums = tl.zeros([TILE_P, TILE_E], ACC)
    count = tl.zeros([TILE_P, TILE_E], tl.int64)
    for first in range(0, num_programs, TILE_P):
        place = (first + row)[:, None] * E + expert[None, :]
        mask = (first + row < num_programs)[:, None] & (expert < E)[None, :]
        sums += tl.load(sums_PE + place, mask=mask, other=0)
        count += tl.load(counts_PE + place, mask=mask, other=0).to(tl.int64)
    tl.store(sum_E + expert, tl.sum(sums, axis=0), mask=expert < E)
    tl.store(counts + 1 + expert, tl.sum(count, axis=0), mask=expert < E)
    if tl.program_id(0) == 0:
        tokens = tl.zeros([TILE_P], tl.int64)
        none = tl.zeros([TILE_P], tl.int64)
        most = tl.zeros([TILE_P], tl.int64)
        for first in range(0, num_programs, TILE_P):
            mask = first + row < num_programs
            at = tokens_3P + first + row
            tokens += tl.load(at, mask=mask, other=0).to(tl.int64)
            none += tl.load(at + num_programs, mask=mask, other=0).to(tl.int64)
            most = tl.maximum(most, tl.load(at + 2 * num_programs, mask=mask, other=0).to(tl.int64))
        tl.store(counts, tl.sum(tokens, axis=0))
        tl.store(silent, tl.sum(none, axis=0))
        tl.store(most_active, tl.max(most, axis=0))


@jit
def route_backward(
    grad_probs_TE,
    grad_sum_E,
    map_TE,
    padding_T,
    grad_logits_TE,
    num_tokens,
    E: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    ACC: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_E: tl.constexpr,
):
    """Add the gradients of gates and sums where experts are active, and write zeros elsewhere."""
    first = tl.program_id(0).to(tl.int64) * TILE_T
    row = tl.arange(0, TILE_T)
    expert = tl.arange(0, TILE_E)
    within = row[:, None] * E + expert[None, :]
    is_token = row < num_tokens - first
    mask = is_token[:, None] & (expert < E)[None, :]
    active = tl.load(map_TE + first * E + within, mask=mask, other=0) != 0
    grad = tl.zeros([TILE_T, TILE_E], ACC)
    if HAS_PROBS:
        grad += tl.load(grad_probs_TE + first * E + within, mask=mask, other=0).to(ACC)
    if HAS_SUM:
        of_sum = tl.load(grad_sum_E + expert, mask=expert < E, other=0)[None, :]
        if HAS_PADDING:
            counted = tl.load(padding_T + first + row, mask=is_token, other=1) == 0
            of_sum = tl.where(counted[:, None], of_sum, 0)
        grad += of_sum
    grad = tl.where(active, grad, 0)
    tl.store(grad_logits_TE + first * E + within, grad, mask=mask)


@jit
def count_pairs(
    map_TE,
    stride_t,
    stride_e,
    counts,
    num_tokens,
    E: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_E: tl.constexpr,
):
    """Count a tile's tokens of every expert, `[E, tiles]`, and after these its experts by token."""
    tile = tl.program_id(0)
    first = tile.to(tl.int64) * TILE_T
    row = tl.arange(0, TILE_T)
    expert = tl.arange(0, TILE_E)
    is_token = row < num_tokens - first
    mask = is_token[:, None] & (expert < E)[None, :]
    place = (first + row)[:, None] * stride_t + expert[None, :].to(tl.int64) * stride_e
    active = (tl.load(map_TE + place, mask=mask, other=0) != 0).to(tl.int32)
    tiles = tl.num_programs(0).to(tl.int64)
    tl.store(counts + expert * tiles + tile, tl.sum(active, axis=0), mask=expert < E)
    tl.store(counts + E * tiles + first + row, tl.sum(active, axis=1), mask=is_token)


@jit
def place_pairs(
    map_TE,
    stride_t,
    stride_e,
    ends,
    token_A,
    entry_A,
    by_token_A,
    starts_T,
    num_tokens,
    num_pairs,
    E: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_E: tl.constexpr,
):
    """Write a tile's pairs where they belong, given the running sums of what `count_pairs` counts.

    A pair's place is the number of pairs of earlier experts and of the expert's earlier tokens.
    """
    tile = tl.program_id(0)
    first = tile.to(tl.int64) * TILE_T
    row = tl.arange(0, TILE_T)
    expert = tl.arange(0, TILE_E)
    is_token = row < num_tokens - first
    mask = is_token[:, None] & (expert < E)[None, :]
    token = first + row
    place = token[:, None] * stride_t + expert[None, :].to(tl.int64) * stride_e
    active = tl.load(map_TE + place, mask=mask, other=0) != 0
    ones = active.to(tl.int32)
    tiles = tl.num_programs(0).to(tl.int64)

    before = expert * tiles + tile
    start_E = tl.load(ends + before - 1, mask=(expert < E) & (before > 0), other=0)
    pair = start_E[None, :] + tl.cumsum(ones, axis=0) - ones
    # The running sums go on over the tokens, after all of the experts' pairs.
    start_T = tl.load(ends + E * tiles + token - 1, mask=is_token, other=0) - num_pairs
    rank = start_T[:, None] + tl.cumsum(ones, axis=1) - ones

    mask = active & (pair < num_pairs) & (rank < num_pairs)
    entry = token[:, None] * E + expert[None, :]
    tl.store(token_A + pair, tl.broadcast_to(token[:, None], [TILE_T, TILE_E]), mask=mask)
    tl.store(entry_A + pair, entry, mask=mask)
    tl.store(by_token_A + rank, pair, mask=mask)
    tl.store(starts_T + token, start_T, mask=is_token)


@jit
def gather(
    x_TH,
    token_A,
    rows_AH,
    probs_TE,
    stride_t,
    stride_e,
    entry_A,
    prob_A,
    num_pairs,
    H: tl.constexpr,
    E: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    TILE_A: tl.constexpr,
    TILE_H: tl.constexpr,
):
    """Copy the rows of the pairs' tokens, and their probabilities."""
    pair = tl.program_id(0).to(tl.int64) * TILE_A + tl.arange(0, TILE_A)
    column = tl.program_id(1) * TILE_H + tl.arange(0, TILE_H)
    is_pair = pair < num_pairs
    token = tl.load(token_A + pair, mask=is_pair, other=0)
    mask = is_pair[:, None] & (column < H)[None, :]
    rows = tl.load(x_TH + token[:, None] * H + column[None, :], mask=mask)
    tl.store(rows_AH + pair[:, None] * H + column[None, :], rows, mask=mask)
    if HAS_PROBS:
        is_first = is_pair & (tl.program_id(1) == 0)
        expert = tl.load(entry_A + pair, mask=is_first, other=0) - token * E
        prob = tl.load(probs_TE + token * stride_t + expert * stride_e, mask=is_first)
        tl.store(prob_A + pair, prob, mask=is_first)


@jit
def sum_by_token(
    rows_AH,
    by_token_A,
    starts_T,
    sums_TH,
    grad_prob_A,
    entry_A,
    grad_probs_TE,
    num_pairs,
    H: tl.constexpr,
    E: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    ACC: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_E: tl.constexpr,
):
    """Sum the rows of a token's pairs, in the order of `by_token_A`.

    With HAS_PROBS the token's row of `grad_probs_TE` gets the pairs' gradients, and zeros. What is
    loaded in the loop is a number or a row: Triton 3.6 and 3.7 fail to compile a loop that loads
    the pairs of several tokens, and the rows of these, where H is the width of the tile.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE_H + tl.arange(0, TILE_H)
    is_last = token + 1 == tl.num_programs(0)
    start = tl.load(starts_T + token)
    end = tl.load(starts_T + token + 1, mask=not is_last, other=num_pairs)
    sums = tl.zeros([TILE_H], ACC)
    if HAS_PROBS:
        entry = token * E + tl.arange(0, TILE_E)
        grads = tl.zeros([TILE_E], grad_prob_A.dtype.element_ty)
    for i in range(start, end):
        pair = tl.load(by_token_A + i)
        row = tl.load(rows_AH + pair * H + column, mask=column < H, other=0)
        sums += row.to(ACC)
        if HAS_PROBS:
            is_pair = entry == tl.load(entry_A + pair)
            grads = tl.where(is_pair, tl.load(grad_prob_A + pair), grads)
    tl.store(sums_TH + token * H + column, sums, mask=column < H)
    if HAS_PROBS:
        is_expert = (tl.arange(0, TILE_E) < E) & (tl.program_id(1) == 0)
        tl.store(grad_probs_TE + entry, grads, mask=is_expert)


@jit
def weighted_swiglu(
    z_AG,
    prob_A,
    h_AF,
    F: tl.constexpr,
    ACC: tl.constexpr,
    TILE_F: tl.constexpr,
):
    """Write `prob * silu(gate) * up` of a part of a row, of which `z` has gate and up (G = 2F)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE_F + tl.arange(0, TILE_F)
    mask = column < F
    gate = tl.load(z_AG + row * 2 * F + column, mask=mask, other=0).to(ACC)
    up = tl.load(z_AG + row * 2 * F + F + column, mask=mask, other=0).to(ACC)
    prob = tl.load(prob_A + row).to(ACC)
    tl.store(h_AF + row * F + column, prob * (gate * tl.sigmoid(gate) * up), mask=mask)


@jit
def weighted_swiglu_backward(
    z_AG,
    prob_A,
    grad_h_AF,
    h_AF,
    grad_z_AG,
    grad_prob_A,
    F: tl.constexpr,
    ACC: tl.constexpr,
    TILE_F: tl.constexpr,
):
    """Write a row's `prob * silu(gate) * up` again, and the gradients of gate, up and prob.

    With s the sigmoid of the gate, the derivative of `silu(gate) = gate * s` is
    `s + silu(gate) * (1 - s)`. The gradient of prob is summed over the columns of a tile, tile by
    tile, and then over the tile, in this order in every run.
    """
    row = tl.program_id(0).to(tl.int64)
    prob = tl.load(prob_A + row).to(ACC)
    grad_prob = tl.zeros([TILE_F], ACC)
    for first in range(0, F, TILE_F):
        column = first + tl.arange(0, TILE_F)
        mask = column < F
        gate = tl.load(z_AG + row * 2 * F + column, mask=mask, other=0).to(ACC)
        up = tl.load(z_AG + row * 2 * F + F + column, mask=mask, other=0).to(ACC)
        grad_h = tl.load(grad_h_AF + row * F + column, mask=mask, other=0).to(ACC)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        grad_prob += silu * up * grad_h
        tl.store(h_AF + row * F + column, prob * (silu * up), mask=mask)
        grad_h *= prob
        grad_gate = grad_h * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(grad_z_AG + row * 2 * F + column, grad_gate, mask=mask)
        tl.store(grad_z_AG + row * 2 * F + F + column, grad_h * silu, mask=mask)
    tl.store(grad_prob_A + row, tl.sum(grad_prob))
