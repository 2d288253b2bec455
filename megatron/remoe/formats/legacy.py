"""Megatron's old `torch` checkpoints: a file `mp_rank_*/model_optim_rng.pt` for every rank.

A folder is named after the ranks in tensor, pipeline and expert parallelism, `mp_rank_01_002_003`;
the last two are left out where there is one rank. The files are pickles. They are read with the
allow-list of `pickles` and mapped into memory, so that only the tensors that are asked for are
read, and joined one at a time.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.remoe.formats import shards
from megatron.remoe.formats.names import COEFFICIENT
from megatron.remoe.formats.pickles import load_allowed

_FILE = "model_optim_rng.pt"
_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size",
          "expert_model_parallel_size")  # fmt: skip
_OUTPUT, _EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


def is_legacy(folder: Path) -> bool:
    """Return whether a folder is a checkpoint of the old format."""
    return any(folder.glob(f"mp_rank_*/{_FILE}")) and not (folder / "metadata.json").is_file()


class _Layout(NamedTuple):
    tensor: int
    pipeline: int
    expert: int

    @classmethod
    def of(cls, args: Any, file: Path) -> "_Layout":
        """Return the layout that a checkpoint's arguments have."""
        sizes = [getattr(args, name, None) or 1 for name in _SIZES]
        for name, size in zip(_SIZES, sizes, strict=True):
            if type(size) is not int or size < 1:
                raise ValueError(f"{file} has {name} = {size!r}; it must be a positive integer")
        layout = cls(*sizes)
        experts = getattr(args, "expert_tensor_parallel_size", None)
        splits_otherwise = experts not in (None, layout.tensor)
        if getattr(args, "num_experts", None) and (
            splits_otherwise or getattr(args, "moe_extended_tp", False)
        ):
            raise ValueError(
                f"{file} was written with expert_tensor_parallel_size {experts} and "
                f"tensor_model_parallel_size {layout.tensor}; old checkpoints can be read where "
                f"both are equal: save it as torch_dist (--ckpt-convert-format torch_dist)"
            )
        return layout

    def folders(self) -> Iterator[tuple[tuple[int, int, int], str]]:
        """Yield the ranks (tensor, pipeline, expert) and the name of each one's folder."""
        for tensor in range(self.tensor):
            for stage in range(self.pipeline):
                for expert in range(self.expert):
                    name = f"mp_rank_{tensor:02d}"
                    name += f"_{stage:03d}" if self.pipeline > 1 else ""
                    name += f"_{expert:03d}" if self.expert > 1 else ""
                    yield (tensor, stage, expert), name


class LegacyReader:
    """The model of a checkpoint of any layout, under the names that the modules of one rank have.

    Raises:
        ValueError: a rank's file is missing or does not fit the others, or one of them holds
            something else than tensors and arguments.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        first = min(folder.glob(f"mp_rank_*/{_FILE}"))
        state = _load(first)
        self.common: dict[str, Any] = {k: state.get(k) for k in ("args", "iteration")}
        self._is_gated = bool(getattr(state["args"], "swiglu", False))
        self._layout = _Layout.of(state["args"], first)
        files = self._files()
        # one dict of tensors by (tensor, pipeline, expert) rank and virtual stage
        self._stages: dict[tuple[int, int, int], list[dict[str, Tensor]]] = {}
        for rank, file in files.items():
            loaded = state if file == first else _load(file)
            _check_same(state, first, loaded, file)
            self._stages[rank] = _models(loaded, file)
        self._grids: dict[str, tuple[str, list[list[Tensor]], int]] = {}
        self._collect(files)
        self._choose_coefficient()
        self._drop_tied_output()
        self.meta = {name: self._join(name, is_meta=True) for name in self._grids}

    def _files(self) -> dict[tuple[int, int, int], Path]:
        files: dict[tuple[int, int, int], Path] = {}
        for rank, name in self._layout.folders():
            files[rank] = self._folder / name / _FILE
            if not files[rank].is_file():
                sizes = " x ".join(map(str, self._layout))
                raise ValueError(
                    f"{files[rank]} is missing: the checkpoint was written by {sizes} ranks "
                    f"(tensor x pipeline x expert parallel); copy the whole checkpoint"
                )
        expected = {file.parent.name for file in files.values()}
        for other in sorted(self._folder.glob("mp_rank_*")):
            if other.name not in expected:
                raise ValueError(
                    f"{other} is not a rank of this checkpoint, which was written by "
                    f"{len(expected)} ranks; remove what another run has left there"
                )
        return files

    def _collect(self, files: dict[tuple[int, int, int], Path]) -> None:
        """Gather the parts of every tensor, by its name in the whole model."""
        before = 0  # Megatron numbers the layers of all first virtual stages, then of the second.
        for chunk in range(max(len(stages) for stages in self._stages.values())):
            for stage in range(self._layout.pipeline):
                before += self._collect_stage(stage, chunk, before, files)

    def _collect_stage(
        self, stage: int, chunk: int, before: int, files: dict[tuple[int, int, int], Path]
    ) -> int:
        """Gather the parts of a stage, and return how many layers it has."""
        tensors, experts = range(self._layout.tensor), range(self._layout.expert)
        models: dict[tuple[int, int], dict[str, Tensor]] = {}
        for t, e in product(tensors, experts):
            chunks, file = self._stages[t, stage, e], files[t, stage, e]
            if chunk >= len(chunks):
                raise ValueError(f"{file} has no model{chunk}, which other ranks have; copy it")
            models[t, e] = chunks[chunk]
            _check_alike(models[0, 0], models[t, e], files[0, stage, 0], file)
        names = models[0, 0]
        local = _local_experts(names, self._layout.expert)
        for name in names:
            layer = shards.layer_of(name)
            ours = shards.with_layer(name, before)
            grid = [[models[t, e][name] for t in tensors] for e in experts]
            count = local.get(layer, 0) if layer is not None else 0
            if shards.expert_of(name) is None:
                if ours in self._grids:  # on several stages, as the coefficient is
                    grid = [*self._grids[ours][1], *grid]
                self._grids[ours] = (name, grid, count)
            else:
                for e in experts:
                    self._grids[shards.with_expert(ours, e * count)] = (name, [grid[e]], count)
        return len({layer for name in names if (layer := shards.layer_of(name)) is not None})

    def _choose_coefficient(self) -> None:
        """Take the first tensor-parallel rank's coefficient, as the fork's `torch_dist` does.

        The fork reduces the sparsity over data-parallel ranks and pipeline stages, but not over
        tensor-parallel ranks. With sequence parallelism each of these then steers its own tokens.
        """
        if COEFFICIENT not in self._grids:
            return
        stored, grid, count = self._grids[COEFFICIENT]
        columns = [[[row[t]] for row in grid] for t in range(self._layout.tensor)]
        values = [shards.join(stored, column, is_gated=False, num_local_experts=0)
                  for column in columns]  # fmt: skip
        if not all(torch.equal(values[0], other) for other in values[1:]):
            print(
                f"remoe: warning: the tensor-parallel ranks of {self._folder} have the "
                f"coefficients {', '.join(str(v.tolist()) for v in values)}, since the fork does "
                f"not reduce the sparsity over them; taking the first"
            )
        self._grids[COEFFICIENT] = (stored, [[values[0]]], count)

    def _drop_tied_output(self) -> None:
        """Leave out the last stage's copy of the embedding, after a comparison."""
        args = self.common["args"]
        tied = not getattr(args, "untie_embeddings_and_output_weights", True)
        if tied and self._layout.pipeline > 1 and _OUTPUT in self._grids:
            if not torch.equal(self.read(_OUTPUT), self.read(_EMBEDDING)):
                raise ValueError(
                    f"{_OUTPUT} and {_EMBEDDING} of {self._folder} must be the same, and differ; "
                    f"take a checkpoint whose files are of one run"
                )
            del self._grids[_OUTPUT]

    def _join(self, name: str, *, is_meta: bool) -> Tensor:
        stored, grid, count = self._grids[name]
        if is_meta:
            grid = [[part.to("meta") for part in parts] for parts in grid]
        return shards.join(stored, grid, is_gated=self._is_gated, num_local_experts=count)

    def read(self, name: str) -> Tensor:
        """Return a tensor, joined from the parts of all ranks."""
        return self._join(name, is_meta=False).detach()


def _load(file: Path) -> dict[str, Any]:
    state = load_allowed(file, str(file))
    if not isinstance(state, dict) or not ("args" in state and {"model", "model0"} & state.keys()):
        raise ValueError(f"{file} has no model with args; save it with its arguments")
    return state


def _models(state: dict[str, Any], file: Path) -> list[dict[str, Tensor]]:
    """Return the tensors of a rank's model, or of its virtual stages `model0`, `model1`, ..."""
    names = ["model"]
    if "model" not in state:
        names = [f"model{i}" for i in range(sum(f"model{i}" in state for i in range(len(state))))]
    return [_tensors(state.get(name), file) for name in names]


def _tensors(model: Any, file: Path) -> dict[str, Tensor]:
    if not isinstance(model, dict) or not all(isinstance(name, str) for name in model):
        raise ValueError(f"{file} has no tensors by name as its model; copy it again")
    tensors = {
        name: value
        for name, value in model.items()
        if isinstance(value, Tensor) and not name.endswith("_extra_state")
    }
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise ValueError(f"{file} has no values of {name}; save the model again")
    return tensors


def _check_same(first: dict[str, Any], file: Path, state: dict[str, Any], other: Path) -> None:
    """Refuse files of different checkpoints: another iteration, or other arguments.

    Arguments whose names have `rank` in them are a rank's own.
    """
    pairs = {"iteration": (first.get("iteration"), state.get("iteration"))}
    ours, theirs = (
        vars(s["args"]) if hasattr(s["args"], "__dict__") else {} for s in (first, state)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        if "rank" not in str(name):
            pairs[name] = (ours.get(name), theirs.get(name))
    for name, (a, b) in pairs.items():
        plain = (bool, int, float, str, type(None))
        if isinstance(a, plain) and isinstance(b, plain) and repr(a) != repr(b):
            raise ValueError(
                f"{other} has {name} {b!r}, and {file} has {a!r}; they are of different "
                f"checkpoints, so copy the whole one again"
            )


def _check_alike(
    first: dict[str, Tensor], model: dict[str, Tensor], file: Path, other: Path
) -> None:
    """Refuse ranks of a stage that have other tensors, or the same in other shapes."""
    for name in sorted(first.keys() ^ model.keys()):
        has, lacks = (file, other) if name in first else (other, file)
        raise ValueError(f"{lacks} lacks {name}, which {has} has; copy the whole checkpoint again")
    for name, tensor in first.items():
        a, b = ((t.dtype, list(t.shape)) for t in (tensor, model[name]))
        if a != b:
            raise ValueError(
                f"{other} has {name} as {b[0]} of shape {b[1]}, and {file} as {a[0]} of shape "
                f"{a[1]}; they are of different checkpoints, so copy the whole one again"
            )


def _local_experts(names: dict[str, Tensor], expert_parallel: int) -> dict[int, int]:
    """Return how many experts a rank has in each layer.

    Where experts are stored one by one they are counted. Otherwise they are those of the layer's
    router, divided by the ranks.
    """
    counted: dict[int, int] = {}
    routed: dict[int, int] = {}
    for name, tensor in names.items():
        layer, expert = shards.layer_of(name), shards.expert_of(name)
        if layer is None:
            continue
        if expert is not None:
            counted[layer] = max(counted.get(layer, 0), expert + 1)
        elif name.endswith(".mlp.router.weight") and tensor.dim():
            routed[layer] = tensor.shape[0] // expert_parallel
    return routed | counted
