"""The published zero-shot accuracies (arXiv 2412.14711, table 8), to compare ours with.

The paper says only "zero-shot accuracy". We take its numbers for `acc`, and not for the accuracy
that is normalized by length, because its ARC-Challenge is below chance at every size.
"""

TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "lambada_openai", "piqa", "race")
METRIC = "acc"

# percent, in the order of TASKS; E = 8, k = 1, 30B tokens of the Pile
ROWS: dict[str, tuple[float, ...]] = {
    "dense 182M": (19.45, 43.35, 54.40, 28.61, 31.09, 61.97, 28.52),
    "dense 469M": (21.50, 49.12, 56.88, 31.12, 36.74, 64.47, 30.53),
    "dense 978M": (21.93, 50.88, 60.24, 32.42, 41.06, 67.46, 31.77),
    "TopK 182M": (20.82, 45.03, 57.55, 29.84, 31.81, 63.28, 28.42),
    "TopK 469M*": (23.63, 52.40, 53.94, 32.43, 43.64, 68.34, 31.48),
    "TopK 978M": (23.81, 52.90, 58.90, 35.01, 44.42, 67.90, 31.48),
    "ReMoE 182M": (20.22, 46.68, 54.16, 30.26, 35.94, 63.55, 29.38),
    "ReMoE 469M": (21.67, 53.16, 58.75, 33.80, 40.66, 67.95, 31.20),
    "ReMoE 978M": (24.06, 55.26, 57.28, 35.93, 44.42, 68.99, 30.43),
}
NOTE = "* five of these seven are also those of the paper's run of 120B tokens, probably by mistake"


def table(name: str, results: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table of accuracies in percent: the model's, and the published ones.

    Args:
        name: name of the model.
        results: metrics by task; tasks of the paper come first.
    """
    ours = [task for task in TASKS if task in results]
    columns = [*ours, *(task for task in results if task not in TASKS)]
    known = [task for task in columns if METRIC in results[task]]
    cells = [f"{100 * results[task][METRIC]:.2f}" for task in known]
    mean = sum(results[task][METRIC] for task in known) / len(known) if known else None
    lines = [["model", *known, "mean"], ["---"] * (len(known) + 2)]
    lines.append([name, *cells, "" if mean is None else f"{100 * mean:.2f}"])
    if ours:
        for row, values in ROWS.items():
            by_task = dict(zip(TASKS, values, strict=True))
            shown = [f"{by_task[task]:.2f}" if task in by_task else "" for task in known]
            average = f"{sum(by_task[task] for task in ours) / len(ours):.2f}"
            lines.append([f"published: {row}", *shown, average if ours == known else ""])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{text}\n\n{NOTE}" if ours else text
