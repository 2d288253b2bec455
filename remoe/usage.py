"""How the experts of a layer are used: by which tokens, with which others, and for how long.

Tokens of one sequence resemble each other, so that a sequence, not a token, is what was drawn at
random. All standard errors here treat it so, and so does the control of `domain_information`.

Shapes: T tokens, S sequences, E experts, D domains, U ids, G groups.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from remoe.analysis import mutual_information


@dataclass(frozen=True)
class GroupMeans:
    """The means of a quantity over groups of tokens.

    Attributes:
        tokens: number of tokens of each group, int64 `[G]`.
        sequences: number of sequences that have such tokens, int64 `[G]`.
        mean: fp64 `[G]`, NaN for a group without tokens.
        standard_error: fp64 `[G]`, NaN for a group with tokens of fewer than two sequences.
    """

    tokens: Tensor
    sequences: Tensor
    mean: Tensor
    standard_error: Tensor


def group_means(
    values_T: Tensor, groups_T: Tensor, sequences_T: Tensor, num_groups: int
) -> GroupMeans:
    """Return the means of values over groups of tokens, and their standard errors.

    A mean is a ratio of two sums over sequences, of values y and of tokens n. With m sequences that
    have tokens of the group, `r = sum y / sum n`, the squared standard error is
    `m / (m - 1) * sum (y - r n)^2 / (sum n)^2` (W. G. Cochran, Sampling Techniques, 1977, chapter
    6). An interval takes the quantiles of Student's t with m - 1 degrees of freedom.

    Args:
        values_T: `[T]`.
        groups_T: the number of each token's group, int64 `[T]`; a negative one leaves it out.
        sequences_T: the number of each token's sequence, int64 `[T]`.
        num_groups: G.
    """
    kept = groups_T >= 0
    values_T, groups_T, sequences_T = values_T[kept], groups_T[kept], sequences_T[kept]
    num_sequences = int(sequences_T.max()) + 1 if len(sequences_T) else 0
    cells_T = sequences_T * num_groups + groups_T
    shape, cells = (num_sequences, num_groups), num_sequences * num_groups
    tokens_SG = torch.bincount(cells_T, minlength=cells).view(shape)
    sums_SG = torch.bincount(cells_T, values_T.double(), minlength=cells).view(shape)
    tokens_G, sequences_G = tokens_SG.sum(dim=0), (tokens_SG > 0).sum(dim=0)
    mean_G = sums_SG.sum(dim=0) / tokens_G
    squares_G = (sums_SG - mean_G.nan_to_num() * tokens_SG).square().sum(dim=0)
    correction_G = torch.where(sequences_G > 1, sequences_G / (sequences_G - 1), math.nan)
    error_G = (correction_G * squares_G).sqrt() / tokens_G
    return GroupMeans(tokens_G, sequences_G, mean_G, error_G)


def equal_classes(values_T: Tensor, num_classes: int) -> Tensor:
    """Return the class of every token by its value, int64 `[T]`, 0 for the lowest.

    Classes have equal numbers of tokens, up to one. Equal values are in the order of the tokens.
    """
    classes_T = torch.empty(len(values_T), dtype=torch.int64)
    order = values_T.argsort(stable=True)
    classes_T[order] = torch.arange(len(values_T)) * num_classes // len(values_T)
    return classes_T


def doubling_bins(positions_T: Tensor, num_bins: int) -> Tensor:
    """Return the bin of every position, int64 `[T]`: 0, 1, 2 to 3, 4 to 7, and so on.

    What a token knows of its text grows with its position, most of all at the start. The last bin
    has all positions from `2 ** (num_bins - 2)`.
    """
    starts = 2 ** torch.arange(num_bins - 1)
    return torch.bucketize(positions_T, starts, right=True)


def entropy(counts: Tensor) -> float:
    """Return `-sum p ln p` in nats, with the frequencies as p; NaN without any."""
    shares = counts.double() / counts.sum()
    return float(-torch.xlogy(shares, shares).sum())


@dataclass(frozen=True)
class DomainInformation:
    """What the domain of a text and the experts of its tokens tell of each other, in nats.

    Attributes:
        information: the mutual information; NaN without an assignment.
        shuffled: the same of shuffled domains, fp64 `[shuffles]`.
        entropy: that of the domains of assignments, which `information` cannot exceed.
    """

    information: float
    shuffled: Tensor
    entropy: float


def domain_information(counts_SE: Tensor, domains_S: Tensor, orders: Tensor) -> DomainInformation:
    """Return the mutual information between the domain and the expert of an assignment.

    It is 0 if all domains use the experts alike, and the entropy of the domains if none shares an
    expert with another. Few sequences overstate it: they differ even within a domain. The control
    gives the domains to the sequences in random orders. It does not shuffle tokens, since these
    would all be mixed, and what is left would be far too small.

    Args:
        counts_SE: assignments of each sequence to each expert, int64 `[S, E]`.
        domains_S: the domain of each sequence, int64 `[S]`.
        orders: permutations of the sequences, int64 `[shuffles, S]`.
    """
    counts_DE = domain_counts(counts_SE, domains_S)
    shuffled = [
        mutual_information(domain_counts(counts_SE, domains_S[order_S])) for order_S in orders
    ]
    return DomainInformation(
        mutual_information(counts_DE),
        torch.tensor(shuffled, dtype=torch.float64),
        entropy(counts_DE.sum(dim=1)),
    )


def domain_counts(counts_SE: Tensor, domains_S: Tensor) -> Tensor:
    """Return the assignments of each domain to each expert, int64 `[D, E]`."""
    counts_DE = counts_SE.new_zeros(int(domains_S.max()) + 1, counts_SE.shape[1])
    return counts_DE.index_add(0, domains_S, counts_SE)


def wilson_lower(successes: Tensor, trials: Tensor, z: float) -> Tensor:
    """Return the lower end of the score interval of a probability, fp64 in the shape of both.

    With `p = successes / trials`, it is `(p + z^2 / 2n - z sqrt(p (1 - p) / n + z^2 / 4n^2)) /
    (1 + z^2 / n)` (E. B. Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953). It is 0
    where nothing was tried.
    """
    n = trials.double().clamp(min=1)
    p, squared = successes.double() / n, z * z
    spread = z * (p * (1 - p) / n + squared / (4 * n * n)).sqrt()
    lower = (p + squared / (2 * n) - spread) / (1 + squared / n)
    return lower.clamp(min=0).where(trials > 0, 0.0)


def over_represented(counts_UE: Tensor, min_count: int) -> Tensor:
    """Return by how much each expert is surely over-represented in an id, fp64 `[U, E]`.

    It is the lower end of the interval of the share of the id's assignments that the expert has
    (`wilson_lower`), divided by the share that the expert has in all. Above 1 it is no chance: with
    the quantile z of `1 - 0.05 / U`, an expert that does not distinguish ids has one above 1 with a
    probability of about 5% (Bonferroni), if assignments are independent. A rare id does not win by
    a lift that it owes to few occurrences.

    Args:
        counts_UE: assignments of the tokens of each id to each expert, int64 `[U, E]`.
        min_count: ids with fewer assignments have 0, and are not counted as U above.
    """
    per_id_U1 = counts_UE.sum(dim=1, keepdim=True)
    enough_U1 = per_id_U1 >= min_count
    chance = 0.05 / max(1, int(enough_U1.sum()))
    z = -float(torch.special.ndtri(torch.tensor(chance, dtype=torch.float64)))
    share_E = counts_UE.sum(dim=0).double() / counts_UE.sum()
    lower_UE = wilson_lower(counts_UE, per_id_U1.expand_as(counts_UE), z)
    return (lower_UE / share_E).where(enough_U1 & (counts_UE > 0), 0.0)


@dataclass(frozen=True)
class Coactivation:
    """How the experts of a layer go together, each `[E, E]`.

    Attributes:
        tokens: number of tokens for which both are active, int64; of one expert on the diagonal.
        expected: that number if they were active independently of each other.
        jaccard: tokens of both divided by tokens of either; NaN for two unused experts.
        cosine: the cosine between the vectors of their gates over all tokens; NaN where one has
            only gates of zero.
    """

    tokens: Tensor
    expected: Tensor
    jaccard: Tensor
    cosine: Tensor


def coactivation(active_TE: Tensor, probs_TE: Tensor) -> Coactivation:
    """Return how experts go together, from the map, bool `[T, E]`, and the gates, `[T, E]`."""
    active_TE = active_TE.double()
    both_EE = active_TE.T @ active_TE
    counts_E = both_EE.diagonal()
    either_EE = counts_E[:, None] + counts_E - both_EE
    probs_TE = probs_TE.double()
    norms_E = probs_TE.norm(dim=0)
    return Coactivation(
        both_EE.long(),
        counts_E[:, None] * counts_E / len(active_TE),
        both_EE / either_EE,
        probs_TE.T @ probs_TE / (norms_E[:, None] * norms_E),
    )


def changed_experts(first_TE: Tensor, second_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far the experts of each token changed from one map to another, bool `[T, E]`.

    Returns:
        The Jaccard distance of the two sets, `1 - |A and B| / |A or B|`, fp64 `[T]`, which is 0 for
        two empty ones; and the number of experts in one of them only, int64 `[T]`. The mean of the
        latter is the flip count of ReMoE (arXiv 2412.14711, appendix A): its flip rate times E.
    """
    either_T = (first_TE | second_TE).sum(dim=1)
    changed_T = (first_TE ^ second_TE).sum(dim=1)
    return changed_T.double() / either_T.clamp(min=1), changed_T
