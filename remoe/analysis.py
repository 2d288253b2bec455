"""What the gates of a trained model say: how balanced they are, and what layers know of each other.

The measures of gates are those of RMoE (arXiv 2408.06793, section 6). Its mutual information is
computed within each token, over its experts (`expert_information`); that over tokens is
`mutual_information`, which says whether one layer's choice tells the next one's. How experts differ
in their tokens is in `remoe.usage`.

Scores are what a router ranks experts by, and none is negative: the softmax over all experts of a
TopK router, before it selects, or the gates of ReLU routing, which are zero for inactive experts.

Shapes: T tokens, E experts.
"""

import math

import torch
from torch import Tensor

# The published code cuts [0, 1] at so many equidistant edges (appendix A.4.2).
BIN_EDGES = 100


def inner_balance(scores_TE: Tensor) -> Tensor:
    """Return the largest score of a token divided by its second largest (RMoE, section 6).

    Args:
        scores_TE: `[T, E]`.

    Returns:
        One ratio for each token that has two positive scores, `[t]` with t <= T. Without a second
        one there is no ratio, which is common in ReLU routing.
    """
    if scores_TE.shape[1] < 2:
        return scores_TE.new_empty(0)
    first_T, second_T = scores_TE.topk(2, dim=1).values.unbind(1)
    has_two_T = second_T > 0
    return first_T[has_two_T] / second_T[has_two_T]


def outer_balance(scores_TE: Tensor, topk: int) -> Tensor:
    """Return the share that the `topk` largest scores of a token have in all (RMoE, section 6).

    Args:
        scores_TE: `[T, E]`.
        topk: k of the model.

    Returns:
        One share for each token that has a positive score, `[t]` with t <= T. It is 1 for a token
        of ReLU routing that activates at most k experts.
    """
    scores_tE = scores_TE[(scores_TE > 0).any(dim=1)]
    return scores_tE.topk(topk, dim=1).values.sum(dim=1) / scores_tE.sum(dim=1)


def frequency_classes(tokens_T: Tensor, num_classes: int) -> Tensor:
    """Return the class of every token by how often its id occurs, int64 `[T]`, 0 for the rarest.

    Ids are ordered from the rarest to the most frequent, and cut into classes of about
    `T / num_classes` occurrences. All tokens of an id are in one class. An id that occurs more
    often than that may leave a class empty.

    Args:
        tokens_T: ids, integers `[T]`; equally frequent ids are in the order of their numbers.
        num_classes: number of classes.
    """
    counts = torch.bincount(tokens_T)
    rarest_first = counts.argsort(stable=True)
    before = counts[rarest_first].cumsum(0) - counts[rarest_first]
    classes = torch.empty_like(before)
    classes[rarest_first] = before * num_classes // len(tokens_T)
    return classes[tokens_T]


def leading_expert(scores_TE: Tensor) -> Tensor:
    """Return the expert of the largest score, int64 `[T]`; E for a token without a positive one.

    That no expert is active is thereby a choice of its own, so that there are E + 1 of them.
    """
    largest_T, expert_T = scores_TE.max(dim=1)
    return expert_T.masked_fill(largest_T <= 0, scores_TE.shape[1])


def joint_counts(first_T: Tensor, second_T: Tensor, num_choices: int) -> Tensor:
    """Return how many tokens made each pair of choices, int64 `[num_choices, num_choices]`."""
    pairs_T = first_T * num_choices + second_T
    counts = torch.bincount(pairs_T, minlength=num_choices * num_choices)
    return counts.view(num_choices, num_choices)


def mutual_information(counts_AB: Tensor) -> float:
    """Return `sum p(a, b) ln(p(a, b) / (p(a) p(b)))` in nats, with the frequencies as p.

    Frequencies of few tokens overstate it, by about `(A - 1) (B - 1) / (2 T)` where the choices are
    independent. The same number after `shuffle` shows by how much.

    Args:
        counts_AB: number of tokens with choices a and b, `[A, B]`; NaN is returned without tokens.
    """
    joint_AB = counts_AB.double() / counts_AB.sum()
    independent_AB = joint_AB.sum(dim=1, keepdim=True) * joint_AB.sum(dim=0, keepdim=True)
    ratio_AB = torch.where(counts_AB > 0, joint_AB / independent_AB, 1.0)
    return float((joint_AB * ratio_AB.log()).sum())


def expert_information(first_TE: Tensor, second_TE: Tensor) -> Tensor:
    """Return the mutual information within each token, over experts, in nats `[T]`.

    This is the number of the RMoE paper's figure 3: the scores of a token in two layers are rounded
    to bins, and the E pairs of bins are the sample. It is at most `ln E`, small where scores are
    almost one-hot, since nearly all of them are then in the lowest bin, and large where they are
    spread, whether or not the layers have to do with each other: compare it with the same number
    after `shuffle`.

    Args:
        first_TE: scores of a layer, `[T, E]`, which are divided by their sum over experts.
        second_TE: scores of another layer for the same tokens.
    """
    first_TE, second_TE = _bins(first_TE), _bins(second_TE)
    pairs_TE = first_TE * (BIN_EDGES + 1) + second_TE
    num_experts = first_TE.shape[1]
    both_T, first_T, second_T = map(_repetition, (pairs_TE, first_TE, second_TE))
    # the mean over experts of ln(p(a, b) / (p(a) p(b))), where p is a count divided by E
    information_T = (both_T - first_T - second_T) / num_experts + math.log(num_experts)
    return information_T.clamp(min=0)


def _bins(scores_TE: Tensor) -> Tensor:
    """Return the bin of each score's share in its token; all scores of a silent token share one."""
    total_T1 = scores_TE.sum(dim=1, keepdim=True)
    shares_TE = torch.where(total_T1 > 0, scores_TE / total_T1, 0.0)
    edges = torch.linspace(0, 1, BIN_EDGES, dtype=scores_TE.dtype, device=scores_TE.device)
    return torch.bucketize(shares_TE, edges, right=True)


def _repetition(values_TE: Tensor) -> Tensor:
    """Return the sum of `ln n` over the experts of a token, where n of them have its value."""
    tokens, num_values = len(values_TE), BIN_EDGES * (BIN_EDGES + 2) + 1
    rows_T1 = torch.arange(tokens, device=values_TE.device).unsqueeze(1)
    sorted_TE = values_TE.sort(dim=1).values + rows_T1 * num_values
    found, times = torch.unique_consecutive(sorted_TE, return_counts=True)
    times = times.double()
    return torch.bincount(found // num_values, torch.xlogy(times, times), minlength=tokens)


def shuffle(values_T: Tensor, seed: int) -> Tensor:
    """Return the tokens' values, `[T, ...]`, in a random order that the seed gives.

    What is left of a relation between two layers after one is shuffled is no relation: it comes
    from the number of tokens, and from how often each choice is made.
    """
    generator = torch.Generator().manual_seed(seed)
    return values_T[torch.randperm(len(values_T), generator=generator).to(values_T.device)]
