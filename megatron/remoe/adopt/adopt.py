"""`remoe adopt`: make an adaptive model from a trained TopK mixture (docs/adopt.md)."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.remoe.adopt import distill as training
from megatron.remoe.adopt.allocate import allocate
from megatron.remoe.adopt.distill import Plan, Progress
from megatron.remoe.adopt.fit import fit
from megatron.remoe.adopt.state import Saved, discard_finished, saved_beside
from megatron.remoe.adopt.teacher import Teacher, open_teacher
from megatron.remoe.convert.architecture import moe_layers
from megatron.remoe.convert.export import export
from megatron.remoe.convert.exported import check_vocabulary
from megatron.remoe.convert.foreign import build
from megatron.remoe.convert.hf_source import check_finite, validated
from megatron.remoe.convert.output import check_folder
from megatron.remoe.convert.table import CONFIG, Config, Item, plan
from megatron.remoe.evaluate.perplexity import default_length, find_domains
from megatron.remoe.evaluate.text import Text, hash_of, read_text
from remoe.hf.budget_remoe import LEAST_TOKENS, TOLERANCE, active_by_layer

RECORD = "adoption.json"
KEPT = "topk"  # the teacher's own router, under a threshold
ROUTERS = ("relu", KEPT)
_LENGTH = 1024  # the longest sequences by default
_HELD_OUT, _CALIBRATION = 32, 16  # the most sequences
_PARTS = 8  # one of them is held out
_SAVE_EVERY = 10  # steps
Shown = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Settings:
    """The settings of an adoption.

    Attributes:
        active_experts: the mean number of active experts of a token; None with `keep_topk`.
        steps, batch_size, lr, all_weights, walk: see `Plan`.
        router: the router of the adopted model, one of `ROUTERS`.
        keep_topk: k of a TopK model that is distilled in its place, a baseline; None is none.
        sequence_length: None is that of the run, or else the positions of the model, 1024 at most.
        seed: the seed of the order of documents.
    """

    active_experts: float | None
    steps: int = 200
    batch_size: int = 8
    lr: float = 0.005
    all_weights: bool = False
    walk: str = "threshold"
    router: str = KEPT
    keep_topk: int | None = None
    sequence_length: int | None = None
    seed: int = 1234

    def check(self, teacher: Teacher) -> None:
        """Refuse settings that do not fit the teacher.

        Raises:
            ValueError: naming the setting.
        """
        k, experts = teacher.topk, teacher.config["num_experts"]
        if (self.active_experts is None) == (self.keep_topk is None):
            raise ValueError("give one of --active-experts and --keep-topk")
        if self.keep_topk is not None and not 1 <= self.keep_topk <= k:
            raise ValueError(f"keep_topk is {self.keep_topk}; it must be from 1 to k, which is {k}")
        x = self.active_experts
        if x is not None and not (math.isfinite(x) and 0 < x <= k):
            raise ValueError(
                f"active_experts is {x:g}; it must be above 0 and at most {k}, the number of "
                f"experts that {teacher.path} was trained with ({experts} in all)"
            )
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr is {self.lr:g}; it must be a number above 0, such as 0.005")
        if self.sequence_length is not None and self.sequence_length > teacher.positions:
            raise ValueError(
                f"sequence_length is {self.sequence_length}, and {teacher.path} has "
                f"{teacher.positions} positions; use at most as many tokens"
            )
        for name, allowed in (("router", ROUTERS), ("walk", training.WALKS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}"
                )
        if teacher.config.get("recurrence", "none") != "none" and self.router != KEPT:
            raise ValueError(
                f"{teacher.path} has recurrent routers, for which no gates of a ReLU are fitted; "
                f"keep the model's own, under a threshold (--router {KEPT})"
            )
        if self.router != KEPT and self.keep_topk is not None:
            raise ValueError(
                f"router is {self.router!r} beside keep_topk {self.keep_topk}, which keeps the "
                f"teacher's; leave one of them out"
            )
        if self.walk == "l1" and self.router == KEPT:
            raise ValueError("the walk is l1, which acts on gates of a ReLU; choose --router relu")


@dataclass(frozen=True)
class Adopted:
    """What was made, and its losses on held-out text in nats per token.

    Attributes:
        teacher, initial, final: the loss of the teacher, of the fitted routers with the teacher's
            number of active experts, and after distillation.
        pruned: the loss of the fitted routers at the target, without distillation.
        active: the mean number of active experts of a token on that text.
        tokens: the number of tokens that were predicted.
    """

    teacher: float
    initial: float
    pruned: float
    final: float
    active: float
    tokens: int


@dataclass(frozen=True)
class Texts:
    """Text for distillation, and held-out text; the sequences of both are different."""

    train: Text
    held_out: Text


def adopt(
    path: Path,
    out: Path,
    data: Path,
    settings: Settings,
    *,
    held_out: Path | None = None,
    tokenizer: Path | None = None,
    force: bool = False,
    shown: Shown = lambda done, total, text: None,
) -> Adopted:
    """Write the adopted model as transformers loads it, or go on after an interruption.

    Args:
        path: a TopK mixture: a run or checkpoint of ours, or a Hugging Face folder.
        out: the folder to make.
        data: a folder of token files, or one of them without its suffix.
        settings: how to adopt.
        held_out: token files for the losses that are reported; None holds out a part of `data`.
        tokenizer: a tokenizer to use in place of the model's own.
        force: whether to replace `out`, and to forget an interrupted adoption with other settings.
        shown: called with the number of steps that are done, that of all steps, and a text.

    Raises:
        ValueError: the model is of another kind, a setting does not fit it, or there is too little
            text, or text of another vocabulary.
    """
    teacher = open_teacher(path, tokenizer)
    settings.check(teacher)
    reads = [one for one in (path, data, held_out, tokenizer) if one is not None]
    discard_finished(out, out / RECORD)
    check_folder(out, reads=reads, force=force)
    texts = read_texts(teacher, data, held_out, settings)
    model = teacher.load()
    known = asdict(settings) | {
        "model": str(path),
        "config": teacher.config,
        "weights": hash_of(*model.state_dict().values()),
        "data": texts.train.fingerprint(),
        "held_out": texts.held_out.fingerprint(),
    }
    with saved_beside(out, known, force=force) as saved:
        job = _Job(teacher, model, settings, texts, saved, shown)
        result = job.run()
        source = _Source(teacher, job.config(result), job.student)
        record = json.dumps(job.record(result), indent=2) + "\n"
        export(source, out, reads=reads, force=force, files={RECORD: record})
        saved.remove()
    return result


def read_texts(teacher: Teacher, data: Path, held_out: Path | None, settings: Settings) -> Texts:
    """Read the text, of which one part is held out unless there are other files for it.

    Raises:
        ValueError: it is too little, or of another vocabulary.
    """
    length = settings.sequence_length or min(default_length(teacher.config), _LENGTH)
    needed = max(settings.steps * settings.batch_size, _CALIBRATION)
    if held_out is not None:
        texts = Texts(
            _read(teacher, data, needed, length, settings.seed),
            _read(teacher, held_out, _HELD_OUT, length, settings.seed),
        )
    else:
        most = max(needed, (_PARTS - 1) * _HELD_OUT) + _HELD_OUT
        text = _read(teacher, data, most, length, settings.seed)
        count = max(2, min(_HELD_OUT, len(text.inputs) // _PARTS))
        texts = Texts(text.rows(count, None), text.rows(0, count))
    found = len(texts.train.inputs)
    if found < settings.batch_size:
        beside = "" if held_out is not None else f" beside {len(texts.held_out.inputs)} held out"
        raise ValueError(
            f"{data} has {found} sequences of {length} tokens{beside}, fewer than the "
            f"{settings.batch_size} of a step; name more data (--data), or use shorter sequences "
            f"(--sequence-length)"
        )
    tokens = texts.train.inputs[:_CALIBRATION].numel()
    if settings.active_experts is not None and tokens < LEAST_TOKENS:
        raise ValueError(
            f"{data} has {tokens} tokens to set a threshold by, fewer than {LEAST_TOKENS}; name "
            f"more data (--data)"
        )
    return texts


def _read(teacher: Teacher, data: Path, count: int, length: int, seed: int) -> Text:
    """Read up to a number of sequences."""
    domains = find_domains(data, teacher.tokenizer)
    count = max(count, len(domains))
    text = read_text(str(data), domains, length=length, tokens=count * length, seed=seed)
    ids = torch.cat((text.inputs, text.labels))
    check_vocabulary(ids, teacher.config["vocab_size"], str(data))
    return text


class _Job:
    """One adoption: teacher and student, and where they stand."""

    def __init__(
        self,
        teacher: Teacher,
        model: Any,
        settings: Settings,
        texts: Texts,
        saved: Saved,
        shown: Shown,
    ) -> None:
        self.opened, self.teacher = teacher, model
        self.settings, self.texts = settings, texts
        self.saved, self.shown = saved, shown
        self.plan = Plan(
            settings.steps, settings.batch_size, settings.active_experts, settings.walk,
            settings.lr, settings.all_weights,
        )  # fmt: skip
        self.calibration = texts.train.inputs[:_CALIBRATION]
        self.progress, self.losses = Progress.start(), dict[str, float]()
        self.lines: list[dict[str, Any]] = []

    def run(self) -> Adopted:
        """Fit, distill and measure, or go on from what was saved."""
        state = self.saved.read()
        self.student = self._fitted() if state is None else self._rebuilt(state)
        self.parameters = training.trained(self.student, self.plan)
        self.optimizer = training.optimizer_of(self.parameters, self.plan)
        if state is None:
            self._save()
        else:
            self._restore(state)
        training.distill(
            self.teacher, self.student, self.optimizer, self.texts.train.inputs, self.plan,
            self.progress, self._after_step,
        )  # fmt: skip
        with torch.no_grad():  # as they are written
            for name, parameter in self.parameters.items():
                parameter.copy_(parameter.to(self.opened.dtype))
                check_finite(f"{name} after the last step", parameter)
        if self.plan.target is not None:
            training.calibrate(self.student, self.calibration, self._last_targets())
        final, active = self._measure(self.student)
        tokens = self.texts.held_out.labels.numel()
        return Adopted(**self.losses, final=final, active=active, tokens=tokens)

    def _last_targets(self) -> list[float]:
        """Return the numbers of layers: where the walk went, or what the penalty left, or less."""
        if self.plan.walk != "l1":
            return self.progress.targets
        assert self.plan.target is not None
        left = active_by_layer(
            self.student, self.calibration, torch.ones_like(self.calibration)
        ).tolist()
        share = min(1.0, self.plan.target * len(left) / math.fsum(left))
        return [share * number for number in left]

    def _measure(self, model: Any) -> tuple[float, float]:
        return training.mean_loss(model, self.texts.held_out.inputs, self.texts.held_out.labels)

    def _fitted(self) -> Any:
        """Return the student before its first step, and measure what comes before that."""
        self.losses["teacher"], _ = self._measure(self.teacher)
        state = self.teacher.state_dict()
        if self.settings.router != KEPT and self.settings.keep_topk is None:
            weights, lines = fit(self.teacher, self.calibration)
            self.lines = [asdict(line) for line in lines]
            state = state | weights
        student = self._student(state)
        if self.plan.target is not None:
            layers = len(student.config.moe_layers)
            student.config.gate_threshold = [0.0] * layers
            training.calibrate(student, self.calibration, [float(self.opened.topk)] * layers)
        self.losses["initial"], _ = self._measure(student if self.plan.target else self.teacher)
        start = student.config.gate_threshold
        if self.plan.target is not None:
            self.progress.targets = allocate(
                self.teacher, student, self.calibration, self.plan.target, self._layer_measured
            )
            reached = training.calibrate(student, self.calibration, self.progress.targets)
            if abs(reached - self.plan.target) > TOLERANCE * self.plan.target:
                raise ValueError(
                    f"active_experts is {self.plan.target:g}, which cannot be met within "
                    f"{TOLERANCE:.0%}: the nearest threshold leaves {reached:.4g} on the text that "
                    f"it is set by; choose another number, another router or more data"
                )
        self.losses["pruned"], _ = self._measure(student)
        student.config.gate_threshold = start
        return student

    def _student(self, state: dict[str, Tensor]) -> Any:
        """Return a student with its own routers, or its own weights if all are trained."""
        own = {
            name: tensor.clone()
            for name, tensor in state.items()
            if self.plan.all_weights or ".mlp.router." in name
        }
        return build(self._student_config(), state | own)

    def _student_config(self) -> Config:
        config = dict(self.opened.config)
        if self.settings.keep_topk is not None:
            config["num_experts_per_tok"] = self.settings.keep_topk
            config["target_sparsity"] = None
        elif self.settings.router != KEPT:
            config["router_type"] = self.settings.router
            config["l1_coeff"] = [1e-8] * len(moe_layers(config))
        return validated(config)

    def _layer_measured(self, done: int, total: int) -> None:
        self.shown(0, self.plan.steps, f"layer {done + 1} of {total} is measured")

    def _after_step(self) -> None:
        done = self.progress.step
        if done % _SAVE_EVERY == 0:
            self._save()
        text = f"divergence {self.progress.losses[-1]:.4f}, active {self.progress.active[-1]:.2f}"
        self.shown(done, self.plan.steps, text)

    def _save(self) -> None:
        config = self.student.config
        self.saved.write(
            {
                "progress": asdict(self.progress),
                "losses": self.losses,
                "lines": self.lines,
                "weights": {name: p.detach() for name, p in self.parameters.items()},
                "optimizer": self.optimizer.state_dict(),
                "peaks": [group["peak"] for group in self.optimizer.param_groups],
                "gate_threshold": config.gate_threshold,
            }
        )

    def _rebuilt(self, state: dict[str, Any]) -> Any:
        weights = {name: w.to(self.teacher.device) for name, w in state["weights"].items()}
        return self._student(self.teacher.state_dict() | weights)

    def _restore(self, state: dict[str, Any]) -> None:
        self.student.config.gate_threshold = state["gate_threshold"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress, self.losses = Progress(**state["progress"]), state["losses"]
        self.lines = state["lines"]

    def config(self, result: Adopted) -> Config:
        """Return the config of the adopted model, with the facts of its adoption."""
        config = self.student.config.to_dict()
        before = config.get("training_facts") or {}
        kept = ("sequence_length", "padded_vocab_size")
        facts = {name: before[name] for name in kept if name in before} | {"teacher": before}
        facts["adoption"] = asdict(result) | {
            "k": self.opened.topk,
            "gate_threshold": config["gate_threshold"],
            "router": self.opened.config["router_type"],
            "steps": self.plan.steps,
            "all_weights": self.plan.all_weights,
        }
        return validated(config | {"training_facts": facts})

    def record(self, result: Adopted) -> dict[str, Any]:
        """Return what `adoption.json` says."""
        return {
            "model": str(self.opened.path),
            "data": self.texts.train.data,
            "held_out_data": self.texts.held_out.data,
            "settings": asdict(self.settings),
            "sequence_length": self.texts.train.length,
            "train_sequences": len(self.texts.train.inputs),
            "held_out_sequences": len(self.texts.held_out.inputs),
            "losses": asdict(result),
            "gate_threshold": self.student.config.gate_threshold,
            "active_experts_of_layers": self.progress.targets,
            "lines": self.lines,
            "divergence_per_step": self.progress.losses,
            "active_experts_per_step": self.progress.active,
        }


class _Source:
    """The adopted model as a source of tensors for an export."""

    def __init__(self, teacher: Teacher, config: Config, student: Any) -> None:
        self.config, self.tokenizer, self.dtype = config, teacher.tokenizer, teacher.dtype
        self.items = plan(config, config["vocab_size"])
        self._state = student.state_dict()

    def hf_tensors(self, item: Item) -> dict[str, Tensor]:
        """Return the tensors of an item, by their names in Hugging Face."""
        return {name: self._tensor(name, shape) for name, shape in item.hf.items()}

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.startswith(CONFIG):
            return torch.tensor(self.config["l1_coeff"][0])
        if name not in self._state:  # rows that pad the vocabulary, of which there are none
            return torch.zeros(shape)
        tensor: Tensor = self._state[name].cpu()
        return tensor
