"""What the experts of a model do, and with whom: answers 2, 3, 4 and 6 of an analysis.

Rows are in long format. `layer` is a layer's number, which begins with 1, or "all"; experts are
numbered from 0. An assignment is a pair of a token and an expert that is active for it.

Shapes: T tokens, S sequences, E experts, D domains, U ids, A assignments.
"""

from typing import Any

import torch
from torch import Tensor

from megatron.remoe.analysis.trace import LayerTrace, Trace
from remoe.statistics import DEAD_SHARE, busiest_rank_load
from remoe.usage import (
    DomainInformation,
    coactivation,
    domain_counts,
    domain_information,
    over_represented,
)

Row = dict[str, Any]
SHUFFLES = 20
VOCABULARY = 20  # ids of an expert
MIN_OCCURRENCES = 5  # assignments of an id
PARALLEL_SIZES = range(2, 65)


def experts_by_domain(trace: Trace) -> list[Row]:
    """Return how the assignments of each domain are spread over the experts of a layer.

    `share` is that of the domain's assignments in the layer, and `lift` is `share` divided by the
    expert's share in all domains. `per_token` is the share of the domain's tokens that activate the
    expert, as in ReMoE's figures 9 and 11 (arXiv 2412.14711).
    """
    domains_S = sequence_domains(trace)
    rows = []
    for number, layer in trace.layers.items():
        counts_DE = domain_counts(_by_sequence(trace, layer), domains_S).double()
        shares_DE = counts_DE / counts_DE.sum(dim=1, keepdim=True)
        lifts_DE = shares_DE / (counts_DE.sum(dim=0) / counts_DE.sum())
        per_token_DE = counts_DE / torch.bincount(trace.domains).unsqueeze(1)
        columns = {"share": shares_DE, "lift": lifts_DE, "per_token": per_token_DE}
        rows += [
            {
                "layer": number,
                "expert": expert,
                "domain": trace.facts.domains[domain],
            }
            | {name: float(column[domain, expert]) for name, column in columns.items()}
            for domain in torch.unique(domains_S).tolist()
            for expert in range(layer.num_experts)
        ]
    return rows


def specialization(trace: Trace, seed: int) -> list[Row]:
    """Return the information in nats between the domain of a token and its experts.

    It is the size of what ReMoE's figures 9 and 11 show. `shuffled` and `shuffled_std` are mean and
    standard deviation of the same information in 20 random orders of the sequences' domains, which
    is what no specialization would give; `excess` is the information minus `shuffled`, and `share`
    is the excess divided by the entropy of the domains: 1 if the experts tell the domain. In layer
    "all", all of them are those of the mean over layers that have assignments.
    """
    domains_S = sequence_domains(trace)
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack(
        [torch.randperm(len(domains_S), generator=generator) for _ in range(SHUFFLES)]
    )
    found = {
        number: domain_information(_by_sequence(trace, layer), domains_S, orders)
        for number, layer in trace.layers.items()
    }
    used = [layer for layer, of in zip(found.values(), trace.layers.values(), strict=True)
            if len(of.experts)]  # fmt: skip
    rows = [{"layer": number} | _information(layer) for number, layer in found.items()]
    if not used:
        return [*rows, rows[0] | {"layer": "all"}]
    count = len(used)
    mean = DomainInformation(
        sum(layer.information for layer in used) / count,
        torch.stack([layer.shuffled for layer in used]).mean(dim=0),
        sum(layer.entropy for layer in used) / count,
    )
    return [*rows, {"layer": "all"} | _information(mean)]


def _information(found: DomainInformation) -> Row:
    shuffled = found.shuffled.mean().item()
    excess = found.information - shuffled
    return {
        "information": found.information,
        "shuffled": shuffled,
        "shuffled_std": found.shuffled.std().item(),
        "excess": excess,
        "share": excess / found.entropy if found.entropy > 0 else None,
    }


def sequence_domains(trace: Trace) -> Tensor:
    """Return the domain of each sequence, int64 `[S]`.

    Raises:
        ValueError: a sequence has tokens of two domains.
    """
    domains_SN = trace.domains.view(-1, trace.facts.sequence_length)
    mixed_S = (domains_SN != domains_SN[:, :1]).any(dim=1)
    if mixed_S.any():
        raise ValueError(
            f"sequence {int(mixed_S.int().argmax())} of the trace of {trace.facts.model} has tokens"
            f" of two domains, but domains are compared by sequences; trace the model again"
        )
    return domains_SN[:, 0]


def _tokens_of(layer: LayerTrace) -> Tensor:
    """Return the token of each assignment, int64 `[A]`."""
    counts_T = layer.counts()
    return torch.arange(len(counts_T)).repeat_interleave(counts_T)


def _by_sequence(trace: Trace, layer: LayerTrace) -> Tensor:
    """Return the assignments of each sequence to each expert, int64 `[S, E]`."""
    sequences, experts = int(trace.sequence[-1]) + 1, layer.num_experts
    cells_A = trace.sequence[_tokens_of(layer)] * experts + layer.experts
    return torch.bincount(cells_A, minlength=sequences * experts).view(sequences, experts)


def vocabulary(trace: Trace) -> list[Row]:
    """Return the ids in which each expert is over-represented, at most 20, the surest first.

    `count` is the number of assignments of the id's tokens to the expert, `occurrences` that of the
    id's tokens, and `expected` what `count` would be if the id's assignments were spread over the
    experts as all assignments of the layer are; `lift` is `count` divided by `expected`. The order
    is that of `lower`, the lower end of the interval of `lift` (`remoe.usage.over_represented`).
    Only ids of which it is above 1 are there. ReMoE's table 12 has such words of experts; `count`
    divided by `occurrences` is its probability of routing.
    """
    ids_U, id_T = torch.unique(trace.tokens, return_inverse=True)
    occurrences = torch.bincount(id_T).tolist()
    ids = ids_U.tolist()
    rows = []
    for number, layer in trace.layers.items():
        cells_A = id_T[_tokens_of(layer)] * layer.num_experts + layer.experts
        counts_UE = torch.bincount(cells_A, minlength=len(ids) * layer.num_experts)
        counts_UE = counts_UE.view(len(ids), layer.num_experts)
        lower_UE = over_represented(counts_UE, MIN_OCCURRENCES)
        best = lower_UE.sort(dim=0, descending=True, stable=True)
        per_id_U = counts_UE.sum(dim=1)
        share_E = counts_UE.sum(dim=0).double() / max(1, len(layer.experts))
        for expert in range(layer.num_experts):
            for rank in range(min(VOCABULARY, len(ids))):
                lower = best.values[rank, expert].item()
                if lower <= 1:
                    break
                index = int(best.indices[rank, expert])
                count = int(counts_UE[index, expert])
                expected = float(per_id_U[index] * share_E[expert])
                rows.append(
                    {
                        "layer": number,
                        "expert": expert,
                        "rank": rank + 1,
                        "id": ids[index],
                        "text": trace.texts.get(ids[index]),
                        "occurrences": occurrences[index],
                        "count": count,
                        "expected": expected,
                        "lift": count / expected,
                        "lower": lower,
                    }
                )
    return rows


def coactivations(trace: Trace) -> list[Row]:
    """Return how often two experts are active for the same token, and how alike their gates are.

    `tokens` is the number of tokens that activate both, and `expected` what it would be if they
    were independent; `jaccard` is `tokens` divided by the tokens of either, and `cosine` that of
    their gates over all tokens. RMoE (arXiv 2408.06793, section 6) compares experts by their
    weights; these are compared by their use.
    """
    rows = []
    for number, layer in trace.layers.items():
        found = coactivation(layer.active(), layer.probs())
        first, second = torch.triu_indices(layer.num_experts, layer.num_experts, 1)
        columns = {
            "first": first,
            "second": second,
            "tokens": found.tokens[first, second],
            "expected": found.expected[first, second],
            "jaccard": found.jaccard[first, second],
            "cosine": found.cosine[first, second],
        }
        cells = zip(*(column.tolist() for column in columns.values()), strict=True)
        rows += [{"layer": number} | dict(zip(columns, row, strict=True)) for row in cells]
    return rows


def load(trace: Trace) -> list[Row]:
    """Return the load of each expert.

    `share` is that of the layer's assignments, `per_token` that of the tokens, and `gate` the mean
    of its gates where it is active. `dead` is 1 for an expert without an assignment. `starved` is 1
    for one with less than an eighth of a balanced share of the tokens, k/E, which is what
    `dead_experts` in `metrics.jsonl` and ReMoE's figure 8 (1/64 for k/E = 1/8) count.
    """
    rows = []
    for number, layer in trace.layers.items():
        counts_E = torch.bincount(layer.experts, minlength=layer.num_experts)
        gates_E = torch.bincount(layer.experts, layer.gates.double(), minlength=layer.num_experts)
        tokens, assignments = len(trace.tokens), len(layer.experts)
        balanced = tokens * trace.facts.topk / layer.num_experts
        rows += [
            {
                "layer": number,
                "expert": expert,
                "share": count / assignments if assignments else None,
                "per_token": count / tokens,
                "gate": gates / count if count else None,
                "dead": int(count == 0),
                "starved": int(count < balanced / DEAD_SHARE),
            }
            for expert, (count, gates) in enumerate(
                zip(counts_E.tolist(), gates_E.tolist(), strict=True)
            )
        ]
    return rows


def load_time(trace: Trace) -> list[Row]:
    """Return how much time expert parallelism loses to unequal loads of ranks.

    `slowdown` is the largest load of a rank divided by the mean, with neighboring experts on a rank
    (`remoe.statistics.busiest_rank_load`); in layer "all" it is that of the sums over layers, since
    ranks wait for each other in each. `step_time` is the time of a forward pass relative to even
    loads, if time goes with FLOPs, and everything but the experts is spread evenly. All of the text
    counts as one batch, and the batches of a run are smaller and thus less even: this is a lower
    bound. A layer without an assignment loses no time.
    """
    numbers: list[int | str] = list(trace.layers)
    counts_LE = torch.stack(
        [torch.bincount(x.experts, minlength=x.num_experts) for x in trace.layers.values()]
    )
    num_experts = counts_LE.shape[1]
    flops = int(counts_LE.sum()) / len(trace.tokens) * trace.facts.flops_per_expert
    others = trace.facts.flops_others
    rows = []
    for size in PARALLEL_SIZES:
        if num_experts % size:
            continue
        parts = [*torch.split(counts_LE, 1), counts_LE]
        for number, part in zip([*numbers, "all"], parts, strict=True):
            slowdown = busiest_rank_load(part, size)
            whole = (others + flops * slowdown) / (others + flops) if others + flops else None
            rows.append(
                {
                    "parallel_size": size,
                    "layer": number,
                    "slowdown": slowdown,
                    "step_time": whole if number == "all" else None,
                }
            )
    return rows
