"""Attack the check of a config with random values, and train what it accepts.

    python -m tests.fuzz --cases 2000 --seed 1

Every case is a YAML file of a tiny run with one to three changes: any known key of Megatron's or
our parser with a value of any type, a malformed document, an override, or something in the way of
the run directory. The check must accept it, or raise a `ValueError` of one line and leave no file.
What it accepts is trained for two steps in a process of its own, as a rank trains, and must end
well; a loss that is NaN or infinite, which the run itself reports, is counted apart.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import yaml

from tests.mcore import tiny

_RUN_SECONDS = 300
_DIVERGED = ("the loss is nan", "the loss is inf")
RUN = {
    "run_dir": "run", "num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 32, "seq_length": 16,
    "max_position_embeddings": 16, "num_experts": 2, "micro_batch_size": 1, "global_batch_size": 2,
    "train_iters": 2, "eval_iters": 1, "vocab_size": 31, "make_vocab_size_divisible_by": 32,
    "save": None, "load": None, "save_interval": None, "verify_integrity": False,
}  # fmt: skip
# Accepted values of these keys are not trained: they make a run long or large, or start processes.
_LONG = {
    "train_iters", "train_samples", "eval_iters", "nproc", "num_workers", "save",
    "hidden_size", "ffn_hidden_size", "seq_length", "max_position_embeddings", "global_batch_size",
    "num_experts", "num_layers", "moe_ffn_hidden_size", "make_vocab_size_divisible_by",
    "exit_interval", "exit_duration_in_mins", "distributed_timeout_seconds_after_init",
}  # fmt: skip
_WHOLE = (-(2**63) - 1, -(10**9), -1, 0, 1, 2, 3, 4, 7, 8, 64, 10**30)
_REAL = (
    float("nan"), float("inf"), float("-inf"), -1.0, -1e-9, 0.0, 1e-30, 1e-9, 0.3, 0.5, 1.0, 2.0,
    1e30,
)  # fmt: skip
_TEXTS = (
    '', ' ', 'x', 'a/b', '../x', 'nul\x00', '-x', '--lr', '${nothing}', '${lr}', '???', 'é\n',
    'None', '1,2', '[1]', '(0', '1/0', '1e5', 'nan', 'inf', '0x10', "a" * 300, '{}', '\\', "'",
    'lr=1',
)  # fmt: skip
_OTHER: tuple[Any, ...] = ([], {}, [1, 2], ["a", 1], [[1]], {"a": 1}, [None], True, False, None)
_DOCUMENTS = (
    '', '-', 'a', '[]', '- lr\n', 'lr: [1\n', 'lr: {a\n', '\tlr: 1\n', 'lr: 1\nlr: 2\n',
    '1: 2\n', 'null: 1\n', 'true: 1\n', '? [a]\n: 1\n', 'lr: *nowhere\n', 'lr: &a [*a]\n',
    'lr: !!python/object:os.system x\n', 'base: 3\n', 'base: {a: 1}\n', 'base: [[x]]\n',
    "base: ''\n", 'base: .\n', 'base: nowhere.yaml\n', 'base: config.yaml\n',
    'base: [tiny.yaml, null]\n', 'run_dir: 3\n', 'run_dir: [a]\n', "run_dir: ''\n",
    'nproc: true\n', 'nproc: 1.5\n', 'nproc: 10000000\n', 'lr: 2020-01-01\n', 'lr: ${lr}\n',
    'lr: ${a\n', 'lr: ${oc.env:NOWHERE}\n', '%YAML 9.9\n---\nlr: 1\n', 'lr: 1\n---\nlr: 2\n',
    'lr: !!binary aGk=\n', "x" * 5000, "[" * 2000, "a: " * 500, 'lr: !!set {a}\n',
    "lr: '\x07'\n", '\ufefflr: 1\n', 'sweep: {}\n', 'data_root: {a: 1}\nlr: ${data_root}\n',
    'lr: |\n  a\n  b\n', '<<: {lr: 1}\n', 'lr: ~\n', '\x00',
)  # fmt: skip
_BYTES = (b"\xff\xfe\x00", b"lr: \xe9\n", b"\x80", b"lr: 1\x00\n")
_OVERRIDES = (
    'lr', '=', '=1', 'lr=', 'lr=[1', 'lr={a: 1}', 'a.b=1', 'lr.x=1', 'lr[0]=1', 'base=x',
    'base=[a]', 'LR=1', 'lr =1', 'run_dir=[a]', 'run_dir=null', "run_dir=" + "x" * 300,
    'run_dir=config.yaml', 'run_dir=config.yaml/x', 'nproc=[1]', 'lr=${seed}', "lr='",
    'lr=\x00', 'run_dir=a\x00b', 'lr=1=2', 'data_path=[1, {a: b}]', 'data_path=[null]',
    'metrics_file=x', 'metrics_file=null', 'save=config.yaml', 'data_cache_path=config.yaml/x',
    'num_experts=null', 'é=1', '--lr=1',
)  # fmt: skip
_OBSTACLES = (
    "file", "loop", "dangling", "config is a folder", "config is a list", "config is malformed",
    "config is binary", "lock is a folder", "log is a folder", "metrics is a folder",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A config to check.

    Attributes:
        text: of the file.
        overrides: of the command line.
        obstacle: what is at the run's directory.
        changed: keys that differ from the run that is known to work, when only these do.
        what: the change, for a report.
    """

    text: str | bytes
    overrides: list[str]
    obstacle: str | None
    changed: frozenset[str]
    what: str


def make_case(seed: int, index: int, options: dict[str, argparse.Action]) -> Case:
    """The same case for the same seed and index."""
    random_ = random.Random(f"{seed}-{index}")
    flags = tiny.CONFIG | RUN
    kind = random_.random()
    if kind < 0.06:
        text = random_.choice((*_DOCUMENTS, *_BYTES))
        return Case(text, [], None, frozenset(), f"document {text[:60]!r}")
    if kind < 0.12:
        overrides = random_.sample(_OVERRIDES, random_.choice((1, 1, 2)))
        return Case(yaml.safe_dump(flags), overrides, None, frozenset(), f"overrides {overrides}")
    if kind < 0.14:
        obstacle = random_.choice(_OBSTACLES)
        return Case(yaml.safe_dump(flags), [], obstacle, frozenset(), f"obstacle: {obstacle}")
    keys = random_.sample([*options, "nproc", "run_dir"], random_.choice((1, 1, 1, 2, 3)))
    changes = {key: _value(options.get(key), random_) for key in keys}
    kept = {key: value for key, value in flags.items() if key not in changes}
    text = yaml.safe_dump(kept | changes, sort_keys=False)
    return Case(text, [], None, frozenset(keys), f"{changes}")


def _value(action: argparse.Action | None, random_: random.Random) -> Any:
    if action is None or random_.random() < 0.2:
        return random_.choice(random_.choice((_WHOLE, _REAL, _TEXTS, _OTHER)))
    if action.nargs == 0:
        return random_.choice((True, True, True, False, None))
    one = _typed(action, random_)
    return [one, _typed(action, random_)] if action.nargs in ("*", "+") else one


def _typed(action: argparse.Action, random_: random.Random) -> Any:
    if action.choices:
        choice = random_.choice([*action.choices, "x"])
        return getattr(choice, "name", choice)
    if action.type is int:
        return random_.choice(_WHOLE)
    if action.type is float:
        return random_.choice(_REAL)
    return random_.choice((*_TEXTS, 1, 0.5))


def judge(case: Case, folder: Path) -> tuple[str, Any]:
    """ "refused" and the message, "accepted" and the command line, or "broken" and why."""
    from megatron.remoe.run import launch
    from megatron.remoe.run.config import load_config

    path = folder / "config.yaml"
    content = case.text if isinstance(case.text, bytes) else case.text.encode()
    path.write_bytes(content)
    tiny.write_config(folder / "tiny.yaml")
    _put(case.obstacle, folder / "run")
    before = _listing(folder)
    try:
        with contextlib.chdir(folder):
            planned = launch.prepare(load_config(Path("config.yaml"), case.overrides))
    except ValueError as error:
        message = str(error)
        if not message.strip() or "\n" in message.strip() or "Traceback" in message:
            return "broken", f"the message is not one line: {message!r}"
        if _listing(folder) != before:
            return "broken", f"files were left: {_listing(folder) - before}; {message}"
        return "refused", message
    except Exception:
        return "broken", traceback.format_exc()[-1500:]
    return "accepted", planned.argv


def _put(obstacle: str | None, run: Path) -> None:
    if obstacle is None:
        return
    if obstacle in ("file", "loop", "dangling"):
        if obstacle == "file":
            run.write_text("")
        else:
            run.symlink_to(run.name if obstacle == "loop" else "nowhere")
        return
    run.mkdir()
    what, _, rest = obstacle.partition(" is ")
    name = {"config": "config.yaml", "lock": ".lock", "log": "log.txt"}.get(what, "metrics.jsonl")
    if rest == "a folder":
        (run / name).mkdir()
    else:
        texts = {"a list": b"- 1\n", "malformed": b"a: [\n", "binary": b"\xff\x00"}
        (run / name).write_bytes(texts[rest])


def _listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def train(argv: list[str], folder: Path) -> tuple[str, str]:
    """Train in a fork as the only rank: "ok", "diverged", or "failed", and the end of its log."""
    log = folder / "log.txt"
    pid = os.fork()
    if pid == 0:
        _rank(argv, folder, log)
    end, status = time.monotonic() + _RUN_SECONDS, None
    while status is None and time.monotonic() < end:
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if status is None:
        os.waitpid(pid, 0)
    text = log.read_text(errors="replace")
    if status == 0:
        return "ok", ""
    tail = " | ".join(text.strip().splitlines()[-4:])[-700:]
    kind = "diverged" if any(sign in text for sign in _DIVERGED) else "failed"
    return kind, f"exit code {status}: {tail}"


def _rank(argv: list[str], folder: Path, log: Path) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        out = os.open(log, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(out, stream)
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.chdir(folder)
        sys.argv = ["pretrain.py", *argv]
        from megatron.remoe.pretrain import _pretrain

        _pretrain()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fuzz(indices: range, seed: int, share: float, report: Any) -> collections.Counter[str]:
    """Judge these cases; `report` gets a line for each that fell."""
    from megatron.remoe.arguments import megatron_parser

    options = {
        option[2:].replace("-", "_"): action
        for action in megatron_parser()._actions
        for option in action.option_strings
        if option.startswith("--") and option != "--help"
    }
    count: collections.Counter[str] = collections.Counter()
    for index in indices:
        case = make_case(seed, index, options)
        with tempfile.TemporaryDirectory() as name:
            verdict, detail = judge(case, Path(name))
            count[verdict] += 1
            if verdict == "broken":
                report(f"case {index}: {case.what}: {detail}")
            if verdict != "accepted" or not case.changed or case.changed & _LONG:
                continue
            if random.Random(f"run-{seed}-{index}").random() < share:
                outcome, detail = train(detail, Path(name))
                count[f"trained: {outcome}"] += 1
                if outcome == "failed":
                    report(f"case {index}: accepted, but fails: {case.what}: {detail}")
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="Index of the first case.")
    parser.add_argument("--share", type=float, default=1.0, help="Of accepted cases to train.")
    options = parser.parse_args()
    _prepare()
    started, fallen = time.monotonic(), []

    def report(line: str) -> None:
        fallen.append(line)
        print(line, flush=True)

    indices = range(options.first, options.first + options.cases)
    count = fuzz(indices, options.seed, options.share, report)
    said = ", ".join(f"{number} {what}" for what, number in sorted(count.items()))
    print(f"{options.cases} cases in {time.monotonic() - started:.0f} s: {said}")
    return 1 if fallen else 0


def _prepare() -> None:
    """Import once what every fork needs, without GPUs and without asking a hub for tokenizers."""
    import logging
    import warnings

    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    warnings.filterwarnings("ignore")
    from megatron.remoe import cpu

    cpu.prepare_megatron()
    import megatron.core.tokenizers.text  # noqa: F401
    import megatron.training.training  # noqa: F401
    import torch
    import torch.utils.tensorboard  # noqa: F401
    from megatron.training.argument_utils import ArgumentGroupFactory

    # Half of the time of a parser, which is made several times for each case.
    docs = ArgumentGroupFactory._get_field_docstrings
    cached = functools.cache(
        lambda config: docs(ArgumentGroupFactory.__new__(ArgumentGroupFactory), config)
    )
    ArgumentGroupFactory._get_field_docstrings = lambda self, config: cached(config)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
