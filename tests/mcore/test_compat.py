"""What depends on the version of Megatron."""

import ast
import importlib
import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron.remoe import compat
from tests.mcore import moe_cases

ROOT = Path(__file__).parents[2]
OURS = ROOT / "megatron/remoe"


@pytest.mark.processes
def test_the_version_that_counts_is_the_one_that_is_imported(tmp_path):
    """Pip knows of another one than the one that is first on the path."""
    package = tmp_path / "megatron/core"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "package_info.py").write_text('__version__ = "0.18.3"\n')
    code = "from megatron.remoe import compat; compat.apply()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1].startswith(
        f"ValueError: megatron-core 0.18.3 is imported from {package}, but this release of remoe "
        f"works with {compat.TESTED_VERSION};"
    )


def test_what_pip_installs_is_what_every_test_runs_with():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = f"megatron-core=={compat.TESTED_VERSION}"
    assert pinned in project["optional-dependencies"]["megatron"]
    assert pinned in (ROOT / "constraints.txt").read_text().splitlines()
    assert compat.TESTED_VERSION.rpartition(".")[0] in compat.VERSIONS


def test_whether_a_stream_is_captured_is_known_where_the_gpu_is_hidden(call):
    """Optimizers of torch 2.11 ask; CUDA with a driver and a hidden GPU has no device to ask."""
    assert call(is_captured) is False


def is_captured() -> bool:
    import torch

    def no_device() -> bool:
        raise torch.AcceleratorError("CUDA error: no CUDA-capable device is detected")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.graphs._cuda_isCurrentStreamCapturing", no_device)
        return torch.cuda.is_current_stream_capturing()


@pytest.mark.parametrize("name", compat.RELIES_ON)
def test_megatron_still_has_what_we_rely_on(name, call):
    version, _ = compat.imported_version()
    assert call(has, name), (
        f"megatron-core {version} has no {name}; broken: {compat.RELIES_ON[name]}"
    )


def test_a_name_that_is_gone_would_be_seen(call):
    assert not call(has, "megatron.training.global_vars._GLOBAL_TENSORBOARD_WRITERS")
    assert not call(has, "megatron.core.nowhere.Router")


def has(name: str) -> bool:
    """Return whether a dotted name is there: a module, or what it or its classes have."""
    module, _, rest = name.rpartition(".")
    attributes = [rest]
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, rest = module.rpartition(".")
            attributes.insert(0, rest)
    for attribute in attributes:
        if not hasattr(found, attribute):
            return False
        found = getattr(found, attribute)
    return True


def test_every_private_name_of_megatron_is_listed(call):
    """Private names that we read from its modules or objects, and those that we override."""
    listed = {name.rpartition(".")[2] for name in compat.RELIES_ON}
    sources = [file.read_text() for file in OURS.rglob("*.py")]
    private = private_names(sources, megatron_definitions()) | set(call(private_overrides))
    assert private - listed == set()
    assert {"_build_tokenizer", "_get_state_key_dtype", "_maybe_dtoh_and_synchronize"} <= private


def test_a_private_name_that_is_not_listed_would_be_seen():
    code = "from megatron.training import global_vars as g\ng._own = g._GLOBAL_ARGS\nx._secret(1)\n"
    assert private_names([code], {"_secret"}) == {"_own", "_GLOBAL_ARGS", "_secret"}
    assert private_names(["self._secret = 1\nself._secret\n"], {"_secret"}) == set()
    code = "from megatron.training.training import _hidden\ndef _secret(): ...\nx._secret(1)\n"
    assert private_names([code], {"_secret"}) == {"_hidden"}


def megatron_definitions() -> set[str]:
    """Private functions and methods that Megatron defines."""
    found = set()
    for package in ("core", "training"):
        folder = Path(importlib.util.find_spec(f"megatron.{package}").origin).parent
        for file in folder.rglob("*.py"):
            found |= set(re.findall(r"^\s*def (_[a-z]\w*)", file.read_text(), re.MULTILINE))
    return found


def private_names(sources: list[str], definitions: set[str]) -> set[str]:
    """Private names that code takes from Megatron's modules, or that only Megatron defines."""
    taken, used, own = set(), set(), set()
    for source in sources:
        tree = ast.parse(source)
        modules = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                ("megatron.core", "megatron.training")
            ):
                modules |= {alias.asname or alias.name for alias in node.names}
                taken |= {alias.name for alias in node.names if alias.name.startswith("_")}
            elif isinstance(node, ast.Import):
                modules |= {a.asname for a in node.names if a.asname and "megatron." in a.name}
            elif isinstance(node, ast.FunctionDef):
                own.add(node.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.match("_[A-Za-z]", node.attr):
                where = node.value.id if isinstance(node.value, ast.Name) else ""
                if where == "self" and isinstance(node.ctx, ast.Store):
                    own.add(node.attr)
                (taken if where in modules else used).add(node.attr)
    return taken | (used & definitions - own)


def private_overrides() -> set[str]:
    """Private methods of Megatron's classes that ours have too."""
    import megatron.remoe.moe as moe

    classes = [
        compat._mended_distributed_optimizer(),
        compat._resumable_distributed_optimizer(),
    ]
    for module in pkgutil.iter_modules(moe.__path__):
        members = vars(importlib.import_module(f"{moe.__name__}.{module.name}")).values()
        classes += [member for member in members if isinstance(member, type)]
    return {
        name
        for cls in classes
        if not cls.__module__.startswith(("megatron.core", "torch"))
        for base in cls.__mro__
        if base.__module__.startswith("megatron.core")
        for name in vars(cls)
        if re.match("_[a-z]", name)
        and name not in ("_abc_impl", "_is_protocol")
        and name in vars(base)
    }


ROUTERS = {
    "relu": {},
    "topk": {},
    "null_experts": {"moe_router_load_balancing_type": "aux_loss"},
    "hash": {},
    "relu recurrent": {},
    "topk recurrent": {},
}


@pytest.mark.parametrize("router", ROUTERS)
def test_routers_take_what_a_newer_megatron_passes(router, call):
    """Its branch `dev` builds a router with the layer, and calls it with ids and packing too."""
    assert call(is_built_and_called_as_in_dev, router)


def is_built_and_called_as_in_dev(name: str) -> bool:
    """Whether a layer's output is that of today, and Megatron's router gets what is passed."""
    import torch
    from megatron.core.transformer.moe.router import Router, TopKRouter

    from remoe.config import ROUTINGS

    kind, _, recurrent = name.partition(" ")
    settings = {"recurrence": "gru", "recurrent_size": 4} if recurrent else {}
    routing = ROUTINGS[kind](**settings)
    layer = moe_cases.build_layer(
        moe_cases.Layout(), 0.0, routing=routing, fill=False, **ROUTERS[name]
    )
    router = layer.submodules.router
    x = moe_cases.inputs(0)
    ids = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[1], x.shape[0])
    given: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        for cls in (Router, TopKRouter):
            make = cls.__init__

            def init(self, *args, make=make, layer_number=None, **kwargs):
                make(self, *args, **kwargs)
                if layer_number is not None:
                    given["layer_number"] = self.layer_number = layer_number

            patch.setattr(cls, "__init__", init)
        route = TopKRouter.routing

        def routing_of_dev(self, logits, padding_mask=None, input_ids=None, packed=None):
            given["input_ids"] = input_ids
            return route(self, logits, padding_mask)

        def forward_of_dev(self, input, padding_mask=None, input_ids=None, packed=None):
            logits = self.gating(self.apply_input_jitter(input))
            return self.routing(logits, padding_mask, input_ids=input_ids, packed=packed)

        patch.setattr(TopKRouter, "routing", routing_of_dev)
        patch.setattr(TopKRouter, "forward", forward_of_dev)
        new = router(
            config=layer.config,
            pg_collection=default_groups(),
            is_mtp_layer=False,
            layer_number=3,
        ).train()
        new.load_state_dict(layer.router.state_dict())
        if kind == "hash":
            new.token_ids = layer.router.token_ids = ids
        got = new(x, None, ids, None)
    layer.router.set_layer_number(3)
    expected = layer.router(x, None)
    same = all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    passed_on = "input_ids" not in given or given["input_ids"] is ids
    return same and passed_on and given["layer_number"] == 3 and new.layer_number == 3


def test_the_router_of_slots_takes_it_too(call):
    assert call(slots_are_routed_as_in_dev)


def slots_are_routed_as_in_dev() -> bool:
    import torch

    from megatron.remoe.moe.soft import SoftRouter
    from remoe.config import SoftRouting

    layout = moe_cases.Layout()
    moe_cases.initialize(layout)
    config, groups = moe_cases.transformer_config(layout), default_groups()
    router = SoftRouter(config, groups, False, routing=SoftRouting(), layer_number=3)
    x = moe_cases.inputs(0)
    pairs = zip(router(x, None, None, None), router(x), strict=True)
    return router.layer_number == 3 and all(torch.equal(a, b) for a, b in pairs)


def default_groups():
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    return get_default_pg_collection()
