"""The answers of an analysis: against loops, constructed cases, and scipy."""

import csv
import json
import math
import statistics
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from megatron.remoe.analysis import by_expert, by_token
from megatron.remoe.analysis.answers import COLUMNS, answers, read_answers, write_answers
from megatron.remoe.analysis.results import read_groups, results
from megatron.remoe.analysis.trace import Facts, LayerTrace, Trace, layer_trace
from remoe import usage
from tests.test_analysis import loop_information
from tests.test_compare import remoe, topk

LENGTH, SEQUENCES, EXPERTS, DOMAINS = 8, 9, 6, ("code", "prose", "quiet")
TEXTS = [" the", "ing", "\n", "42", "!", " x1"]
SEED = 7


def facts(**changes) -> Facts:
    known = Facts(
        model="m",
        iteration=3,
        model_class="ReMoEForCausalLM",
        router="relu",
        topk=2,
        num_experts=EXPERTS,
        flops_per_expert=10.0,
        flops_others=100.0,
        domains=DOMAINS,
        data="tokens",
        sequence_length=LENGTH,
        sequences=SEQUENCES,
        seed=1,
    )
    return replace(known, **changes)


def layer_of(gates: torch.Tensor, scores: torch.Tensor | None = None) -> LayerTrace:
    return layer_trace(gates, gates > 0, scores)


def made(seed: int = 0, shift: float = 0.5, **changes) -> Trace:
    """A record with 12 ids, two domains that occur and one that does not, and two layers."""
    generator = torch.Generator().manual_seed(seed)
    tokens = LENGTH * SEQUENCES
    ids = torch.randint(12, (tokens,), generator=generator) // 2  # ids of unequal frequency
    ids[:3] = 20 + torch.arange(3)
    layers = {
        number: layer_of((torch.randn(tokens, EXPERTS, generator=generator) - shift).relu())
        for number in (1, 3)
    }
    domains = (torch.arange(SEQUENCES) % 2).repeat_interleave(LENGTH)
    losses = torch.rand(tokens, generator=generator)
    found = Trace(facts(), ids, losses, domains, layers, dict(enumerate(TEXTS)))
    return replace(found, **changes)


def sets_of(layer: LayerTrace) -> list[set[int]]:
    """The experts of each token."""
    starts, experts = layer.starts.tolist(), layer.experts.tolist()
    return [set(experts[a:b]) for a, b in pairwise(starts)]


def loop_mean(values: list[float], sequences: list[int]) -> tuple[float, float | None]:
    """Mean and half width, sequence by sequence."""
    mean, found = statistics.fmean(values), sorted(set(sequences))
    if len(found) < 2:
        return mean, None
    residuals = []
    for sequence in found:
        own = [v for v, s in zip(values, sequences, strict=True) if s == sequence]
        residuals.append(sum(own) - mean * len(own))
    m = len(found)
    variance = m / (m - 1) * sum(r * r for r in residuals) / len(values) ** 2
    return mean, stats.t.ppf(0.975, m - 1) * math.sqrt(variance)


@given(
    st.lists(
        st.tuples(st.floats(-5, 5), st.integers(-1, 3), st.integers(0, 4)), min_size=1, max_size=30
    )
)
def test_means_of_groups_equal_the_loop(cells):
    values, groups, sequences = map(torch.tensor, zip(*cells, strict=True))
    found = usage.group_means(values, groups, sequences, 4)
    for group in range(4):
        own = [(v, s) for v, g, s in cells if g == group]
        assert found.tokens[group] == len(own)
        assert found.sequences[group] == len({s for _, s in own})
        if not own:
            assert found.mean[group].isnan() and found.standard_error[group].isnan()
            continue
        mean, half = loop_mean(*map(list, zip(*own, strict=True)))
        assert found.mean[group].item() == pytest.approx(mean, abs=1e-5)
        error = found.standard_error[group].item()
        if half is None:
            assert math.isnan(error)
        else:
            freedom = len({s for _, s in own}) - 1
            assert error * stats.t.ppf(0.975, freedom) == pytest.approx(half, abs=1e-4)


def test_tokens_that_repeat_their_sequence_are_no_more_than_one():
    """With equal values within sequences, the error is that of so many means of sequences."""
    of_sequences = torch.tensor([1.0, 4.0, 2.0, 7.0])
    sequences = torch.arange(4).repeat_interleave(50)
    found = usage.group_means(of_sequences[sequences], torch.zeros(200).long(), sequences, 1)
    assert found.standard_error.item() == pytest.approx(of_sequences.std().item() / 2)


def check_rows(trace: Trace, rows: list[dict], classes: list, named: dict) -> None:
    """Compare the rows of a table with a loop over tokens, of which `classes` names the class."""
    sequences = [t // LENGTH for t in range(len(trace.tokens))]
    counts = {number: [len(s) for s in sets_of(layer)] for number, layer in trace.layers.items()}
    counts["all"] = [statistics.fmean(c) for c in zip(*counts.values(), strict=True)]
    assert [row["layer"] for row in rows] == [n for n in counts for _ in named]
    for row, (number, name) in zip(rows, [(n, c) for n in counts for c in named], strict=True):
        own = [t for t, of in enumerate(classes) if of == name]
        assert own and row.items() >= named[name].items()
        mean, half = loop_mean([counts[number][t] for t in own], [sequences[t] for t in own])
        assert (row["tokens"], row["mean"]) == (len(own), pytest.approx(mean))
        if half is None:
            assert math.isnan(row["low"])
        else:
            assert (row["low"], row["high"]) == pytest.approx((mean - half, mean + half))


def test_active_experts_by_frequency_equal_the_loop():
    trace = made()
    ids = trace.tokens.tolist()
    often, classes, before = Counter(ids), {}, 0
    for one in sorted(often, key=lambda i: (often[i], i)):
        classes[one], before = before * 8 // len(ids), before + often[one]
    named = {}
    for number in sorted(set(classes.values())):
        counts = [often[i] for i in classes if classes[i] == number]
        low_high = {"count_low": min(counts), "count_high": max(counts)}
        named[number] = {"class": number + 1} | low_high
    assert named[0]["count_low"] == 1 and len(named) > 3
    check_rows(trace, by_token.by_frequency(trace), [classes[i] for i in ids], named)


def test_active_experts_by_loss_equal_the_loop():
    trace = made()
    losses = trace.losses.tolist()
    order = sorted(range(len(losses)), key=lambda t: losses[t])
    classes = {t: place * 10 // len(losses) for place, t in enumerate(order)}
    named = {
        c: {
            "class": c + 1,
            "loss": pytest.approx(statistics.fmean(losses[t] for t in classes if classes[t] == c)),
        }
        for c in range(10)
    }
    rows = by_token.by_loss(trace)
    for row in rows:
        assert row["loss"] == named[row["class"] - 1].pop("loss", row["loss"])
    check_rows(trace, rows, [classes[t] for t in range(len(losses))], named)


def test_active_experts_by_position_equal_the_loop():
    trace = made()
    bins = [0, 1, 2, 2, 3, 3, 3, 3] * SEQUENCES
    named = dict(enumerate({"first": a, "last": b} for a, b in ((0, 0), (1, 1), (2, 3), (4, 7))))
    check_rows(trace, by_token.by_position(trace), bins, named)
    far = usage.doubling_bins(torch.tensor([0, 2**14 - 1, 2**14, 2**20]), 16)
    assert far.tolist() == [0, 14, 15, 15]


def test_active_experts_by_domain_equal_the_loop_and_have_its_loss():
    trace = made()
    rows = by_token.by_domain(trace)
    names = [DOMAINS[d] for d in trace.domains.tolist()]
    check_rows(trace, rows, names, {name: {"domain": name} for name in DOMAINS[:2]})
    for row in rows:
        losses = [
            v for v, n in zip(trace.losses.tolist(), names, strict=True) if n == row["domain"]
        ]
        assert row["loss"] == pytest.approx(statistics.fmean(losses))


def test_parts_of_words():
    """Each token with the part that it is; the second sequence begins with letters."""
    text = [
        (" un", "word start"), ("like", "inside a word"), ("ly", "inside a word"),
        ("'s", "other"), ("s", "inside a word"), (" ", "white space"), ("It", "word start"),
        ("?", "punctuation"),
        ("ed", "word start"), (" 12", "number"), ("th", "word start"), (" +=", "punctuation"),
        ("\n\n", "white space"), ("\ufffd", "other"), ("e\u0301", "word start"), ("", "other"),
    ]  # fmt: skip
    found = replace(made(), tokens=torch.arange(16), texts={i: t for i, (t, _) in enumerate(text)})
    parts = by_token.word_parts(found).tolist()
    assert [by_token.WORD_PARTS[part] for part in parts] == [part for _, part in text]
    unknown = by_token.word_parts(replace(found, texts={0: " un"})).tolist()
    assert [by_token.WORD_PARTS[part] for part in unknown] == ["word start"] + ["other"] * 15


def test_active_experts_by_part_equal_the_loop_and_need_texts():
    trace = made()
    rows = by_token.by_word_part(trace)
    parts = [by_token.WORD_PARTS[p] for p in by_token.word_parts(trace).tolist()]
    named = {p: {"part": p} for p in by_token.WORD_PARTS if p in parts}
    assert len(named) > 4
    check_rows(trace, rows, parts, named)
    assert by_token.by_word_part(replace(trace, texts={})) == []


def test_experts_by_domain_equal_the_loop():
    trace = made()
    rows = by_expert.experts_by_domain(trace)
    assert len(rows) == 2 * 2 * EXPERTS  # no row of the domain that does not occur
    for row in rows:
        domain = DOMAINS.index(row["domain"])
        sets = sets_of(trace.layers[row["layer"]])
        own = [s for s, d in zip(sets, trace.domains.tolist(), strict=True) if d == domain]
        share = sum(row["expert"] in s for s in own) / sum(map(len, own))
        every = sum(row["expert"] in s for s in sets) / sum(map(len, sets))
        assert (row["share"], row["lift"]) == pytest.approx((share, share / every))
        per_token = sum(row["expert"] in s for s in own) / len(own)
        assert row["per_token"] == pytest.approx(per_token)


def assigned(experts: list[list[int]], domains: list[int], length: int = LENGTH) -> Trace:
    """A record of one layer, in which all tokens of a sequence have these experts."""
    gates = torch.zeros(len(experts) * length, EXPERTS)
    for sequence, own in enumerate(experts):
        gates[sequence * length : (sequence + 1) * length, own] = 1.0
    tokens = torch.arange(len(gates)) % 5
    return Trace(
        facts(sequences=len(experts), sequence_length=length),
        tokens,
        torch.ones(len(gates)),
        torch.tensor(domains).repeat_interleave(length),
        {2: layer_of(gates)},
        {},
    )


def test_information_between_domains_and_experts_equals_the_loop():
    trace = made()
    rows = by_expert.specialization(trace, SEED)
    for row, layer in zip(rows, trace.layers.values(), strict=False):
        pairs = [
            (domain, expert)
            for domain, own in zip(trace.domains.tolist(), sets_of(layer), strict=True)
            for expert in own
        ]
        information = loop_information(*map(list, zip(*pairs, strict=True)))
        assert row["information"] == pytest.approx(information, abs=1e-12)
        shares = [n / len(pairs) for n in Counter(d for d, _ in pairs).values()]
        entropy = -sum(p * math.log(p) for p in shares)
        assert row["excess"] == pytest.approx(information - row["shuffled"])
        assert row["share"] == pytest.approx(row["excess"] / entropy)
    every = rows[-1]
    assert every["layer"] == "all"
    for key in ("information", "shuffled", "excess"):
        assert every[key] == pytest.approx(statistics.fmean(row[key] for row in rows[:-1]))
    # Layers share their orders, so that the deviation of the mean is that of the 20 means.
    assert 0 < every["shuffled_std"] < max(row["shuffled_std"] for row in rows[:-1])
    assert by_expert.specialization(trace, SEED) == rows != by_expert.specialization(trace, 8)


def test_experts_that_are_the_domains_tell_their_entropy():
    domains = [0, 1, 2] * 8
    row = by_expert.specialization(assigned([[d] for d in domains], domains), SEED)[0]
    assert row["information"] == pytest.approx(math.log(3))
    assert row["excess"] > 0.8 * math.log(3)
    assert row["share"] == pytest.approx(row["excess"] / math.log(3))


def test_sequences_that_differ_do_not_pass_for_domains_that_do():
    """Each sequence has an expert of its own choice: information, but not beyond the control."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(EXPERTS, (24, 1), generator=generator).tolist()
    row = by_expert.specialization(assigned(experts, [0, 1, 2] * 8), SEED)[0]
    assert row["information"] > 0.1  # a shuffle of tokens would leave less than 0.03 of it
    assert abs(row["excess"]) < 3 * row["shuffled_std"] and abs(row["share"]) < 0.2


def test_one_domain_has_no_information_and_an_unused_layer_none():
    (row, every) = by_expert.specialization(assigned([[0], [1], [2]], [0, 0, 0]), SEED)
    assert (row["information"], row["shuffled"]) == pytest.approx((0, 0), abs=1e-12)
    assert row["share"] is None
    assert every == row | {"layer": "all"}
    trace = assigned([[], [], []], [0, 1, 0])
    row = answers([trace], [], SEED)["specialization"][0]
    assert {row[key] for key in ("information", "shuffled", "excess", "share")} == {None}


def test_an_unused_layer_has_no_part_in_the_mean_of_layers():
    used = assigned([[0], [1], [0]], [0, 1, 0])
    unused = layer_of(torch.zeros(len(used.tokens), EXPERTS))
    rows = by_expert.specialization(replace(used, layers={2: used.layers[2], 4: unused}), SEED)
    assert rows[2] == rows[0] | {"layer": "all"} and math.isnan(rows[1]["information"])


def test_a_sequence_of_two_domains_is_refused():
    trace = made()
    trace.domains[LENGTH + 1] = 2
    for table in (by_expert.experts_by_domain, lambda t: by_expert.specialization(t, SEED)):
        with pytest.raises(ValueError, match="sequence 1 of the trace of m has tokens of two dom"):
            table(trace)


@given(st.integers(0, 40), st.integers(1, 40), st.sampled_from([0.9, 0.99, 0.9999]))
def test_the_score_interval_is_that_of_scipy(successes, more, confidence):
    trials = successes + more
    z = stats.norm.ppf((1 + confidence) / 2)
    found = usage.wilson_lower(torch.tensor([successes, 0]), torch.tensor([trials, 0]), z)
    interval = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert found.tolist() == pytest.approx([interval.low, 0], abs=1e-12)


def test_the_vocabulary_equals_the_loop():
    trace = made(shift=1.2)
    trace.layers[1] = layer_of(trace.layers[1].probs() + torch.eye(EXPERTS)[trace.tokens % 5])
    rows = by_expert.vocabulary(trace)
    expected = []
    ids = trace.tokens.tolist()
    for number, layer in trace.layers.items():
        pairs = Counter((i, e) for i, own in zip(ids, sets_of(layer), strict=True) for e in own)
        per_id, per_expert = Counter(), Counter()
        for (i, e), n in pairs.items():
            per_id[i] += n
            per_expert[e] += n
        enough = [i for i in per_id if per_id[i] >= 5]
        confidence = 1 - 2 * 0.05 / len(enough)
        for expert in range(EXPERTS):
            share = per_expert[expert] / sum(per_id.values())
            found = []
            for i in enough:
                interval = stats.binomtest(pairs[i, expert], per_id[i]).proportion_ci(
                    confidence, method="wilson"
                )
                if interval.low > share:
                    found.append((interval.low / share, i))
            found.sort(key=lambda pair: (-pair[0], pair[1]))
            for rank, (lower, i) in enumerate(found, start=1):
                expected.append(
                    {
                        "layer": number,
                        "expert": expert,
                        "rank": rank,
                        "id": i,
                        "text": dict(enumerate(TEXTS)).get(i),
                        "occurrences": ids.count(i),
                        "count": pairs[i, expert],
                        "expected": pytest.approx(per_id[i] * share),
                        "lift": pytest.approx(pairs[i, expert] / (per_id[i] * share)),
                        "lower": pytest.approx(lower),
                    }
                )
    assert len(expected) >= 5
    assert rows == expected


def test_experts_without_a_preference_have_no_vocabulary():
    """Of 40 ids at random, none is over-represented in most records; without the bound many are."""
    listed = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(40, (800,), generator=generator)
        layer = layer_of((torch.randn(800, EXPERTS, generator=generator) - 1).relu())
        trace = replace(made(), tokens=tokens, layers={1: layer})
        listed += len(by_expert.vocabulary(trace)) > 0
    assert listed <= 8  # at most 6 experts times 5%, of 20 records, is 6 of them in the mean


def test_coactivation_equals_the_loop():
    trace = made()
    trace.layers[3] = layer_of(trace.layers[3].probs() * torch.tensor([1, 1, 0, 1, 0, 1]))
    rows = by_expert.coactivations(trace)
    assert len(rows) == 2 * EXPERTS * (EXPERTS - 1) // 2
    pairs = [(n, a, b) for n in trace.layers for a, b in combinations(range(EXPERTS), 2)]
    for row, (number, first, second) in zip(rows, pairs, strict=True):
        assert (row["layer"], row["first"], row["second"]) == (number, first, second)
        sets, gates = sets_of(trace.layers[number]), trace.layers[number].probs().tolist()
        with_first = [t for t, own in enumerate(sets) if first in own]
        with_second = [t for t, own in enumerate(sets) if second in own]
        both, either = set(with_first) & set(with_second), set(with_first) | set(with_second)
        assert row["tokens"] == len(both)
        expected = len(with_first) * len(with_second) / len(sets)
        assert row["expected"] == pytest.approx(expected)
        if either:
            assert row["jaccard"] == pytest.approx(len(both) / len(either))
        else:
            assert math.isnan(row["jaccard"])
        norms = [math.sqrt(sum(token[e] ** 2 for token in gates)) for e in (first, second)]
        if min(norms) > 0:
            product = sum(token[first] * token[second] for token in gates)
            assert row["cosine"] == pytest.approx(product / (norms[0] * norms[1]), rel=1e-5)
        else:
            assert math.isnan(row["cosine"])
    assert any(math.isnan(row["jaccard"]) for row in rows)


def test_flips_equal_the_loop():
    first, second, third = made(1), made(2), made(3)
    third = replace(third, tokens=first.tokens, facts=facts(iteration=9))
    second = replace(second, tokens=first.tokens, facts=facts(iteration=6))
    rows = by_token.flips([first, second, third])
    assert [(row["first"], row["second"], row["layer"]) for row in rows] == [
        (a, b, layer) for a, b in ((3, 6), (6, 9)) for layer in (1, 3, "all")
    ]
    by_layer: dict[int, list[float]] = {}
    for row, layer in zip(rows[:2], (1, 3), strict=True):
        distances, changed, leading = [], [], []
        for a, b in zip(sets_of(first.layers[layer]), sets_of(second.layers[layer]), strict=True):
            distances.append(1 - len(a & b) / len(a | b) if a | b else 0)
            changed.append(len(a ^ b))
        probs = [t.layers[layer].probs().tolist() for t in (first, second)]
        for a, b in zip(*probs, strict=True):
            tops = [g.index(max(g)) if max(g) > 0 else -1 for g in (a, b)]
            leading.append(tops[0] != tops[1])
        mean, half = loop_mean(distances, [t // LENGTH for t in range(len(distances))])
        assert row["flip_rate"] == pytest.approx(mean)
        assert (row["low"], row["high"]) == pytest.approx((mean - half, mean + half))
        assert row["flip_count"] == pytest.approx(statistics.fmean(changed))
        assert row["leading_changed"] == pytest.approx(statistics.fmean(leading))
        by_layer[layer] = distances
    both = [statistics.fmean(pair) for pair in zip(*by_layer.values(), strict=True)]
    mean, half = loop_mean(both, [t // LENGTH for t in range(len(both))])
    assert rows[2]["flip_rate"] == pytest.approx(mean)
    assert rows[2]["high"] == pytest.approx(mean + half)


def test_identical_checkpoints_have_no_flips_and_disjoint_ones_only_flips():
    trace = made()
    for row in by_token.flips([trace, trace]):
        assert [row[k] for k in ("flip_rate", "low", "high", "flip_count", "leading_changed")] == (
            [0] * 5
        )
    one, other = (assigned([[e]] * 3, [0, 1, 0]) for e in (0, 1))
    row = by_token.flips([one, other])[0]
    assert [row[k] for k in ("flip_rate", "flip_count", "leading_changed")] == [1, 2, 1]
    assert by_token.flips([trace]) == []


def test_checkpoints_on_other_tokens_are_refused():
    trace = made()
    other = replace(trace, tokens=trace.tokens + 1, facts=facts(iteration=9))
    with pytest.raises(ValueError, match="m was traced at iterations 3 and 9 on different tokens"):
        by_token.flips([trace, other])


def test_load_equals_the_loop():
    trace = made()
    trace.layers[3] = layer_of(trace.layers[3].probs() * torch.tensor([1, 1, 0, 1, 1, 1]))
    probs = trace.layers[1].probs()
    probs[1:, 4] = 0  # one token, below an eighth of 2/6 of the tokens
    probs[0, 4] = 1
    trace.layers[1] = layer_of(probs)
    rows = by_expert.load(trace)
    for row in rows:
        layer = trace.layers[row["layer"]]
        sets, gates = sets_of(layer), layer.probs()[:, row["expert"]].tolist()
        own = [t for t, experts in enumerate(sets) if row["expert"] in experts]
        assert row["per_token"] == pytest.approx(len(own) / len(sets))
        assert row["share"] == pytest.approx(len(own) / sum(map(len, sets)))
        assert row["dead"] == (not own)
        assert row["starved"] == (len(own) < len(sets) * 2 / 6 / 8)
        if own:
            assert row["gate"] == pytest.approx(statistics.fmean(gates[t] for t in own))
        else:
            assert row["gate"] is None
    assert [(r["layer"], r["expert"]) for r in rows if r["dead"]] == [(3, 2)]
    assert [(r["layer"], r["expert"]) for r in rows if r["starved"]] == [(1, 4), (3, 2)]


def test_the_time_of_unequal_loads_equals_the_loop():
    trace = made()
    counts = {
        n: [sum(e in own for own in sets_of(layer)) for e in range(EXPERTS)]
        for n, layer in trace.layers.items()
    }
    rows = by_expert.load_time(trace)
    assert [(row["parallel_size"], row["layer"]) for row in rows] == [
        (size, layer) for size in (2, 3, 6) for layer in (1, 3, "all")
    ]
    for row in rows:
        size = row["parallel_size"]
        own = EXPERTS // size
        loads = {
            n: [sum(c[r * own : (r + 1) * own]) for r in range(size)] for n, c in counts.items()
        }
        layers = list(loads) if row["layer"] == "all" else [row["layer"]]
        even = sum(sum(loads[n]) / size for n in layers)
        slowdown = sum(max(loads[n]) for n in layers) / even
        assert row["slowdown"] == pytest.approx(slowdown)
        if row["layer"] != "all":
            assert row["step_time"] is None
            continue
        experts = 10.0 * sum(map(sum, counts.values())) / len(trace.tokens)
        assert row["step_time"] == pytest.approx((100 + experts * slowdown) / (100 + experts))


def test_the_histogram_equals_the_loop():
    trace = made()
    counts = {n: [len(s) for s in sets_of(layer)] for n, layer in trace.layers.items()}
    rows = by_token.histogram(trace)
    for number in (1, 3, "all"):
        own = [row for row in rows if row["layer"] == number]
        if number == "all":
            found, layers = [sum(pair) for pair in zip(*counts.values(), strict=True)], 2
        else:
            found, layers = counts[number], 1
        assert own == [
            {
                "layer": number,
                "active": active / layers,
                "tokens": found.count(active),
                "share": pytest.approx(found.count(active) / len(found)),
                "flops": 10.0 * active,
            }
            for active in range(min(found), max(found) + 1)
        ]


INTERVENTIONS = [
    {"table": "pruning", "layer": "all", "removed": 1, "loss": 2.0, "active": 1.0,
     "extra_loss": 0.5, "tokens": 64},
    {"table": "shift", "offset": 0.3, "loss": 2.0, "active": 1.0, "extra_loss": 0.1, "tokens": 64},
    {"table": "shift", "offset": 0.03, "loss": 2.0, "active": 1.0, "extra_loss": 0.2, "tokens": 64},
]  # fmt: skip


@pytest.mark.parametrize("shift", [-9.0, 9.0], ids=["every expert", "no expert"])
def test_extreme_routing_has_all_tables(shift):
    tables = answers([made(shift=shift), made(shift=shift)], INTERVENTIONS, SEED)
    number = EXPERTS if shift < 0 else 0
    assert {row["mean"] for row in tables["by_loss"]} == {number}
    assert {row["high"] for row in tables["by_loss"]} == {number}
    assert [row["active"] for row in tables["histogram"]] == [number] * 3
    assert {row["flip_rate"] for row in tables["flips"]} == {0}
    assert {row["slowdown"] for row in tables["load_time"]} == {1}
    assert {row["dead"] for row in tables["load"]} == {int(number == 0)}
    assert {row["share"] for row in tables["load"]} == {1 / EXPERTS if number else None}
    assert {row["jaccard"] for row in tables["coactivation"]} == {1 if number else None}
    assert tables["vocabulary"] == []
    assert {row["lift"] for row in tables["experts_by_domain"]} == {1 if number else None}


def test_fewer_tokens_than_classes_have_rows_for_those_there_are():
    trace = made()
    few = Trace(
        facts(sequence_length=3, sequences=1),
        trace.tokens[:3],
        trace.losses[:3],
        trace.domains[:3],
        {1: layer_of(trace.layers[1].probs()[:3])},
        {},
    )
    tables = answers([few], [], SEED)
    assert [row["class"] for row in tables["by_loss"] if row["layer"] == 1] == [1, 4, 7]
    assert all(row["low"] is None for row in tables["by_loss"])
    assert tables["by_word_part"] == tables["flips"] == tables["between_layers"] == []


def test_tables_are_read_as_they_were_written(tmp_path):
    texts = {0: 'a "quote",\r\n', 1: "", 2: "ü\u2028"}
    trace = made(shift=1.2, texts=texts)
    trace.layers[1] = layer_of(trace.layers[1].probs() + torch.eye(EXPERTS)[trace.tokens % 5])
    tables = answers([trace, replace(trace, facts=facts(iteration=6))], INTERVENTIONS, SEED)
    assert {row["text"] for row in tables["vocabulary"]} >= {*texts.values(), None}
    assert [row["extra_loss"] for row in tables["shift"]] == [0.1, 0.2]
    assert tables["lower_k"] == []
    balance, between = tables["balance"], tables["between_layers"]
    assert [row["layer"] for row in balance] == [1, 3, "all"]
    assert [(r["first"], r["second"]) for r in between] == [(1, 3)]
    assert 0 < between[0]["expert_information"] == balance[0]["expert_information"]
    write_answers(tmp_path, tables)
    assert read_answers(tmp_path) == tables
    for name, columns in COLUMNS.items():
        with (tmp_path / "answers" / f"{name}.csv").open(newline="") as file:
            titles, *cells = csv.reader(file)
        assert tuple(titles) == columns
        assert cells == [
            ["" if value is None else str(value) for value in row.values()] for row in tables[name]
        ]


def test_damaged_answers_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"answers.json cannot be read .*; run remoe analyze"):
        read_answers(tmp_path)
    tables = answers([made()], [], SEED)
    write_answers(tmp_path, tables)
    file = tmp_path / "answers.json"
    for change, message in (
        (lambda t: t.pop("load"), "has no table load; run remoe analyze"),
        (lambda t: t["load"][0].pop("dead"), "has no rows of load; run remoe analyze"),
    ):
        damaged = json.loads(json.dumps(tables))
        change(damaged)
        file.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=message):
            read_answers(tmp_path)


def column_of(text: str, title: str, column: str) -> list[str]:
    """The cells of a column in the section with a title."""
    lines = text.split(f"## {title}")[1].strip().split("\n\n")[1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row[rows[0].index(column)] for row in rows[2:]]


def test_results_are_means_over_seeds_with_an_interval():
    groups = {
        name: {
            seed: answers([made(seed), replace(made(seed + 9), tokens=made(seed).tokens)],
                          INTERVENTIONS, SEED)
            for seed in seeds
        }
        for name, seeds in {"TopK": (1, 2), "ReMoE": (1, 2, 3), "RMoE": (4,)}.items()
    }  # fmt: skip
    text = results(groups)

    def cell(values: list[float]) -> str:
        mean = f"{statistics.fmean(values):.4g}"
        if len(values) < 2:
            return mean
        deviation = statistics.stdev(values) / math.sqrt(len(values))
        return f"{mean} ± {stats.t.ppf(0.975, len(values) - 1) * deviation:.2g}"

    def all_rows(table: str, key: str) -> list[list[float]]:
        return [
            [[r[key] for r in t[table] if r["layer"] == "all"][0] for t in runs.values()]
            for runs in groups.values()
        ]

    rare = all_rows("by_frequency", "mean")
    assert column_of(text, "1. ", "rarest ids") == [cell(v) for v in rare]
    share = all_rows("specialization", "share")
    assert column_of(text, "2. ", "excess / entropy") == [cell(v) for v in share]
    differences = []
    for runs in groups.values():
        differences.append([])
        for seed in runs:
            found, domains = [], made(seed).domains.tolist()
            for layer in made(seed + 9).layers.values():
                for expert in range(EXPERTS):
                    has = [expert in own for own in sets_of(layer)]
                    for domain in (0, 1):
                        own = [h for h, d in zip(has, domains, strict=True) if d == domain]
                        found.append(statistics.fmean(own) - statistics.fmean(has))
            differences[-1].append(max(found))
    assert column_of(text, "2. ", "largest difference of a domain") == [
        cell(v) for v in differences
    ]
    flips = all_rows("flips", "flip_count")
    assert column_of(text, "5. ", "experts changed") == [cell(v) for v in flips]
    means = [
        [
            statistics.fmean(len(s) for x in made(seed + 9).layers.values() for s in sets_of(x))
            for seed in runs
        ]
        for runs in groups.values()
    ]
    assert column_of(text, "7. ", "mean") == [cell(v) for v in means]
    assert column_of(text, "8. ", "shift of 0.1") == ["0.2 ± 0", "0.2 ± 0", "0.2"]
    assert column_of(text, "8. ", "1 removed") == ["0.5 ± 0", "0.5 ± 0", "0.5"]
    assert column_of(text, "1. ", "seeds") == ["2", "3", "1"]


@pytest.mark.parametrize(
    ("rare", "verdict"),
    [
        ((2.0, 2.1, 2.2), "seen"),
        ((0.2, 0.1, 0.3), "the opposite is seen"),
        ((0.0, 1.0, 2.0), "undecided"),
        ((2.0,), "one seed"),
    ],
)
def test_a_finding_is_seen_if_its_interval_is_above_zero(rare, verdict):
    groups = {"ReMoE": {}}
    for seed, value in enumerate(rare):
        tables = answers([made()], [], SEED)
        rows = [row for row in tables["by_frequency"] if row["layer"] == "all"]
        rows[0]["mean"], rows[-1]["mean"] = value, 1.0
        groups["ReMoE"][seed] = tables
    text = results(groups)
    assert column_of(text, "What the papers", "here")[0] == verdict
    assert column_of(text, "What the papers", "mean")[0].startswith(
        f"{statistics.fmean(rare) - 1:+.4g}"
    )
    assert "minus" not in text and "5. Flips" not in text


def test_findings_of_two_routers_are_paired_by_seed():
    made_of = {seed: answers([made(seed)], [], SEED) for seed in (1, 2, 3)}
    shifted = {}
    for seed in (2, 3, 4):
        shifted[seed] = json.loads(json.dumps(made_of[min(seed, 3)]))
        shifted[seed]["specialization"][-1]["share"] += 0.25
    text = results({"TopK": made_of, "ReMoE": shifted})
    index = column_of(text, "What the papers", "number").index("ReMoE minus TopK")
    assert column_of(text, "What the papers", "mean")[index].startswith("+0.25 ± ")
    assert column_of(text, "What the papers", "here")[index] == "seen"


def test_answers_of_runs_are_grouped_by_router_and_seed(tmp_path):
    runs = [topk(tmp_path, f"topk-{seed}", 2.0, seed=seed) for seed in (2, 1)]
    runs.append(remoe(tmp_path, "remoe-1", 2.0, seed=1))
    models = [*runs, tmp_path / "exported"]
    analyses = {model: tmp_path / "out" / model.name for model in models}
    tables = [answers([made(number)], [], SEED) for number in range(4)]
    for folder, own in list(zip(analyses.values(), tables, strict=True))[1:]:
        folder.mkdir(parents=True)
        write_answers(folder, own)
    with pytest.raises(ValueError, match="out/topk-2/answers.json cannot be read"):
        read_groups(analyses)
    (tmp_path / "out/topk-2").mkdir()
    write_answers(tmp_path / "out/topk-2", tables[0])
    groups = read_groups(analyses)
    assert groups == {
        "TopK": {1: tables[1], 2: tables[0]},
        "ReMoE": {1: tables[2]},
        str(models[3]): {0: tables[3]},
    }
    assert list(groups["TopK"]) == [1, 2]


def test_every_table_is_described():
    page = (Path(__file__).parents[1] / "docs/experiments.md").read_text()
    assert [name for name in COLUMNS if f"`{name}`" not in page] == []
