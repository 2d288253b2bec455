"""Checkpoints and models from elsewhere: what is wrong is named, nothing of it runs, and no output
is half written."""

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.data.test_files import status_of
from tests.mcore import tiny
from tests.mcore.convert_cases import RELU, UNTIED, save_legacy, through_hf
from tests.mcore.fork_cases import write_fork
from tests.mcore.test_convert import assert_same_folder, fails

STEP = "iter_0000003"
OLD = "mp_rank_00/model_optim_rng.pt"


@pytest.fixture(scope="module")
def home(call, tmp_path_factory) -> Path:
    """One model: `iter_0000003`, `hf`, `back`; of the old format `old`, and of the fork `local`."""
    home = tmp_path_factory.mktemp("hostile")
    call(through_hf, RELU | UNTIED, home)
    call(save_legacy, RELU | UNTIED, home)
    call(write_fork, home)
    return home


# A payload, wherever a pickle is read.


class Payload:
    """Runs a command when it is unpickled by a reader that lets it."""

    def __init__(self, marker: Path, kind: str) -> None:
        self.marker, self.kind = marker, kind

    def __reduce__(self):
        code = f"open({str(self.marker)!r}, 'w').close()"
        return {
            "system": (os.system, (f"touch {self.marker}",)),
            "exec": (exec, (code,)),
            "popen": (subprocess.check_call, (["touch", str(self.marker)],)),
            "touch": (Path.touch, (self.marker,)),
        }[self.kind]


KINDS = ("system", "exec", "popen", "touch")


@pytest.mark.parametrize("kind", KINDS)
def test_the_payload_runs_where_it_may(tmp_path, kind):
    """Otherwise the tests below would prove nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran", kind)))
    assert (tmp_path / "ran").exists()


def _state(file: Path) -> dict:
    return torch.load(file, weights_only=False)


def _legacy(home: Path, folder: Path, payload: Payload, kind: str, where: str) -> None:
    shutil.copytree(home / kind / STEP, folder)
    state = _state(folder / OLD)
    if where == "args":
        state["args"].evil = payload
    else:
        (state if where == "root" else state[where])["evil"] = payload
    torch.save(state, folder / OLD)


def _common(home: Path, folder: Path, payload: Payload) -> None:
    """As `common.pt`, which versions before 0.19 wrote."""
    shutil.copytree(home / STEP, folder)
    args = Namespace(hidden_size=32, evil=payload)
    torch.save({"args": args, "iteration": 3}, folder / "common.pt")


def _shard(home: Path, folder: Path, payload: Payload, key: str) -> None:
    """In the place of a tensor, or of the common state."""
    shutil.copytree(home / STEP, folder)
    torch.save(payload, folder / "evil.distcp")
    whole = pickle.loads((folder / ".metadata").read_bytes())
    for index, info in whole.storage_data.items():
        if key in index.fqn:
            info.relative_path, info.offset = "evil.distcp", 0
            info.length = (folder / "evil.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(whole))


def _metadata(home: Path, folder: Path, payload: Payload) -> None:
    shutil.copytree(home / STEP, folder)
    whole = pickle.loads((folder / ".metadata").read_bytes())
    whole.planner_data = payload
    (folder / ".metadata").write_bytes(pickle.dumps(whole))


PLACES = {
    "old format": lambda h, f, p: _legacy(h, f, p, "old", "root"),
    "old format, arguments": lambda h, f, p: _legacy(h, f, p, "old", "args"),
    "old format, model": lambda h, f, p: _legacy(h, f, p, "old", "model"),
    "the fork's": lambda h, f, p: _legacy(h, f, p, "local", "model"),
    "the fork's, arguments": lambda h, f, p: _legacy(h, f, p, "local", "args"),
    "common.pt": _common,
    "a tensor": lambda h, f, p: _shard(h, f, p, "mlp.router.weight"),
    "common state": lambda h, f, p: _shard(h, f, p, "common_state"),
    ".metadata": _metadata,
}
COMMANDS = {
    "to-hf": ("convert", "to-hf", "evil", "out"),
    "from-fork": ("convert", "from-fork", "evil", "out"),
    "verify": ("convert", "verify", "evil", "evil", "--tokens", "1,2,3"),
    "upcycle": ("convert", "upcycle", "evil", "out", "--num-experts", "4"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_payload_does_not_run(call, home, tmp_path, place):
    for kind in KINDS:
        PLACES[place](home, tmp_path / "evil", Payload(tmp_path / "ran", kind))
        for command in list(COMMANDS.values())[: 4 if kind == KINDS[0] else 2]:
            error = fails(call, tmp_path, *command)
            assert "Traceback" not in error and len(error) < 500
        assert sorted(p.name for p in tmp_path.iterdir()) == ["evil"]
        shutil.rmtree(tmp_path / "evil")


def test_code_in_an_exported_folder_does_not_run(call, home, tmp_path):
    """A model's own modules are for transformers and those who trust them; ours are used here."""
    shutil.copytree(home / "hf", tmp_path / "hf")
    for file in (tmp_path / "hf").glob("*.py"):
        file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n" + file.read_text())
    argv = ["verify", "hf", "hf", "--tokens", "1,2,3", "--new-tokens", "2"]
    for command in (argv, ["to-megatron", "hf", "back"]):
        assert call(tiny.remoe, tmp_path, "convert", *command)[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf"]


# Megatron's checkpoints


def _edit_metadata(folder: Path, edit) -> None:
    whole = pickle.loads((folder / ".metadata").read_bytes())
    edit(whole)
    (folder / ".metadata").write_bytes(pickle.dumps(whole))


def _info(whole, key: str = "mlp.router.weight"):
    return next(info for index, info in whole.storage_data.items() if key in index.fqn)


def _elsewhere(folder: Path, relative: str) -> None:
    shutil.copy(folder / "__0_0.distcp", folder.parent / "evil.distcp")
    _edit_metadata(folder, lambda m: setattr(_info(m), "relative_path", relative))


def _flip(folder: Path) -> None:
    """One bit of one weight."""
    file = folder / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    info = _info(pickle.loads((folder / ".metadata").read_bytes()))
    data[info.offset + info.length // 2] ^= 1
    file.write_bytes(data)


ROUTER = "decoder.layers.mlp.router.weight"


def _entry(name: str, value) -> None:
    return lambda f: _edit_metadata(
        f, lambda m: setattr(m.state_dict_metadata[ROUTER], name, value)
    )


def _part(name: str, value) -> None:
    return lambda f: _edit_metadata(f, lambda m: setattr(_info(m), name, value))


DAMAGE = {
    "a flipped bit": (_flip, "is cut off or damaged (the checksum of"),
    "a path that leads elsewhere": (
        lambda f: _elsewhere(f, "../evil.distcp"),
        "is in '../evil.distcp', which must be a file beside it",
    ),
    "an absolute path": (
        lambda f: _elsewhere(f, str(f.parent / "evil.distcp")),
        "which must be a file beside it",
    ),
    "no path": (_part("relative_path", 5), "which must be a file beside it"),
    "no offset": (_part("offset", "x"), "has no place in"),
    "no length": (_part("length", 0), "is cut off or damaged"),
    "layers without end": (_entry("size", torch.Size([10**12, 4, 32])), "at most 10000"),
    "no shape": (_entry("size", "abc"), "cannot be read"),
    "an impossible shape": (
        _entry("size", torch.Size([2, 2**40, 2**40])),
        "has the impossible shape [2, 1099511627776, 1099511627776]",
    ),
    "an impossible shape without values": (
        _entry("size", torch.Size([0, 2**61, 2**61])),
        "has the impossible shape [0, 2305843009213693952, 2305843009213693952]",
    ),
    "another dtype": (
        lambda f: _edit_metadata(
            f, lambda m: setattr(m.state_dict_metadata[ROUTER].properties, "dtype", torch.bfloat16)
        ),
        "is torch.float32 [1, 4, 32] in its file, but torch.bfloat16",
    ),
    "no chunks": (_entry("chunks", None), "cannot be read"),
    "renamed": (
        lambda f: _edit_metadata(
            f, lambda m: m.state_dict_metadata.update(x=m.state_dict_metadata.pop(ROUTER))
        ),
        "lacks decoder.layers.0.mlp.router.weight",
    ),
    "no metadata": (lambda f: (f / ".metadata").write_bytes(pickle.dumps([1])), "but a list"),
    "junk": (lambda f: (f / ".metadata").write_bytes(os.urandom(300)), "cannot be read"),
    "changed since": (
        lambda f: (f / "integrity.json").write_text(json.dumps({"files": {".metadata": "0" * 64}})),
        ".metadata has changed since it was written",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named(call, home, tmp_path, spoil, message):
    shutil.copytree(home / STEP, tmp_path / STEP)
    spoil(tmp_path / STEP)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert message in fails(call, tmp_path, "convert", "to-hf", STEP, "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_parts_that_overlap_do_not_make_a_tensor(home, tmp_path):
    """Their sizes add up to it, while some of its values are nowhere."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    from megatron.remoe.formats.torch_dist import TorchDistReader

    shutil.copytree(home / STEP, tmp_path / STEP)
    name, rows = "decoder.final_layernorm.weight", (0, 8)

    def edit(whole) -> None:
        entry = whole.state_dict_metadata[name]
        index = next(i for i in whole.storage_data if i.fqn == name)
        info = whole.storage_data.pop(index)
        torch.save(torch.ones(16), tmp_path / STEP / "part.distcp")
        info.relative_path, info.offset = "part.distcp", 0
        info.length = (tmp_path / STEP / "part.distcp").stat().st_size
        entry.chunks[:] = [ChunkStorageMetadata(torch.Size([r]), torch.Size([16])) for r in rows]
        for row in rows:
            whole.storage_data[MetadataIndex(name, torch.Size([row]))] = info

    _edit_metadata(tmp_path / STEP, edit)
    with pytest.raises(ValueError, match="holds 16 of the 32 values of"):
        TorchDistReader(tmp_path / STEP).read(name)


def _arguments(**changes):
    def edit(state) -> None:
        args = vars(state["args"])
        state["args"] = Namespace(**{k: v for k, v in (args | changes).items() if v is not ...})

    return edit


def _weight(name: str, value) -> None:
    return lambda state: state["model"].update({name: value})


NORM = "decoder.final_layernorm.weight"
NAN = torch.full((32,), float("nan"))
OLD_MISTAKES = {
    "NaN": (_weight(NORM, NAN), "has 32 values that are NaN or infinite"),
    "infinite": (_weight(NORM, torch.full((32,), -float("inf"))), "are NaN or infinite"),
    "whole numbers": (_weight(NORM, torch.ones(32).int()), "is stored as torch.int32; only"),
    "no values": (_weight(NORM, torch.ones(32, device="meta")), "has no values of"),
    "sparse": (_weight(NORM, torch.ones(32).to_sparse()), "has no values of"),
    "quantized": (
        _weight(NORM, torch.quantize_per_tensor(torch.ones(32), 0.1, 0, torch.qint8)),
        "has no values of",
    ),
    "twice": (
        lambda s: s["model"].update(
            {f"decoder.layers.0.{n}": torch.ones(32)
             for n in ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")}
        ),
        "twice, the second time as",
    ),
    "no tensors": (lambda s: s.update(model=[1]), "has no tensors by name as its model"),
    "no names": (lambda s: s["model"].update({5: torch.ones(2)}), "has no tensors by name"),
    "iteration": (lambda s: s.update(iteration="x"), "has iteration = 'x'; it must be"),
    "hidden_size": (_arguments(hidden_size=-1), "has hidden_size = -1; it must be a whole number"),
    "num_layers": (_arguments(num_layers=10**30), "it must be a whole number from 1 to 10000"),
    "heads": (_arguments(num_query_groups=3), "has num_key_value_heads = 3; it must be a divisor"),
    "text": (_arguments(num_experts="4"), "has num_experts = '4'; it must be a whole number"),
    "no argument": (_arguments(num_layers=...), "has num_layers = None"),
    "no arguments": (_arguments(mock_data=..., vocab_size=...), "lack vocab_size, mock_data"),
    "layers": (_arguments(moe_layer_freq=[1]), "has moe_layer_freq = [1]"),
    "facts": (_arguments(remoe_training_facts=5), "has training_facts = 5; it must be a mapping"),
    "tokenizer": (_arguments(tokenizer_type=5), "have tokenizer_type = 5; it must be of type str"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), OLD_MISTAKES.values(), ids=OLD_MISTAKES)
def test_what_a_checkpoint_says_is_checked(call, home, tmp_path, spoil, message):
    shutil.copytree(home / "old" / STEP, tmp_path / "old")
    state = _state(tmp_path / "old" / OLD)
    spoil(state)
    torch.save(state, tmp_path / "old" / OLD)
    assert message in fails(call, tmp_path, "convert", "to-hf", "old", "out")
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_the_forks_coefficient_and_granularity_are_checked(call, home, tmp_path):
    mistakes = (
        (_weight("moe_relu_l1_reg_coeff", torch.tensor(float("nan"))), "are NaN or infinite"),
        (_arguments(moe_granularity="x"), "has moe_granularity = 'x'; it must be a whole number"),
        (_arguments(hidden_size=...), "has hidden_size = None; it must be a whole number"),
    )
    for spoil, message in mistakes:
        shutil.copytree(home / "local" / STEP, tmp_path / "fork")
        state = _state(tmp_path / "fork" / OLD)
        spoil(state)
        torch.save(state, tmp_path / "fork" / OLD)
        assert message in fails(call, tmp_path, "convert", "from-fork", "fork", "out")
        shutil.rmtree(tmp_path / "fork")
        assert list(tmp_path.iterdir()) == []


METRICS = {
    "cut off": (b'{"iteration": 3, "lm_loss": 2.0}\n{"iteration": 4, "lm_lo', None),
    "NaN": (b'{"iteration": 3, "split": "valid", "lm_loss": null, "sparsity": null}\n', None),
    "damaged": (b'{"iteration": 3, "lm_loss": 2.0}\n{\n', "metrics.jsonl, line 2: it is not JSON"),
    "no row": (b"[]\n", "metrics.jsonl, line 1: it is neither a step nor an evaluation; delete"),
    "text": (b'{"iteration": "x"}\n', "metrics.jsonl, line 1: it is neither a step nor"),
    "sparsity": (
        b'{"iteration": 3, "lm_loss": 2.0, "sparsity": "x"}\n',
        "metrics.jsonl, line 1: its sparsity is no number",
    ),
    "not finite": (b'{"iteration": 3, "lm_loss": NaN}\n', "line 1: it is not JSON (NaN is no"),
}


@pytest.mark.parametrize(("text", "message"), METRICS.values(), ids=METRICS)
def test_the_metrics_beside_a_checkpoint_may_be_of_a_killed_run(
    call, home, tmp_path, text, message
):
    shutil.copytree(home / STEP, tmp_path / "run/checkpoints" / STEP)
    (tmp_path / "run/config.yaml").write_text("save: run/checkpoints\n")
    (tmp_path / "run/metrics.jsonl").write_bytes(text)
    argv = ("convert", "to-hf", "run", "out")
    if message is None:
        assert call(tiny.remoe, tmp_path, *argv)[0] == 0
    else:
        assert message in fails(call, tmp_path, *argv)


# Folders of Hugging Face


def _config(**changes):
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    return edit


def _raw(data: bytes):
    return lambda folder: (folder / "config.json").write_bytes(data)


def _tensors(edit, file: str = "model.safetensors"):
    def change(folder: Path) -> None:
        tensors = load_file(folder / file)
        edit(tensors)
        save_file(tensors, folder / file)

    return change


def _header(name: str, entry: dict | None = None):
    """A tensor more at the start of the header, or one with the values of another."""

    def spoil(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        other = json.loads(data[8 : 8 + length])["model.layers.0.input_layernorm.weight"]
        text = f'{{"{name}":{json.dumps(entry or other)},'.encode() + data[9 : 8 + length]
        (folder / "model.safetensors").write_bytes(
            struct.pack("<Q", len(text)) + text + data[8 + length :]
        )

    return spoil


def _index(edit):
    """Two files and their index."""

    def split(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
        for file, part in parts.items():
            save_file({name: tensors[name] for name in part}, folder / file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        index = edit(folder, weight_map, names[0])
        index = {"weight_map": weight_map} if index is None else index
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return split


def _outside(folder: Path, weight_map: dict, first: str) -> None:
    (folder / "a.safetensors").rename(folder.parent / "a.safetensors")
    weight_map.update({n: "../a.safetensors" for n, f in weight_map.items() if f[0] == "a"})


def _in_both(folder: Path, weight_map: dict, first: str) -> None:
    tensors = load_file(folder / "b.safetensors")
    save_file(
        tensors | {first: load_file(folder / "a.safetensors")[first]}, folder / "b.safetensors"
    )


DOWN = "model.layers.1.mlp.experts.down_proj"
EMBEDDING = "model.embed_tokens.weight"
ROWS, PADDING_FILE = "padding.embed_tokens.weight", "megatron_padding.safetensors"
MODELS = {
    "a list": (_raw(b"[]"), "holds no JSON object, but a list"),
    "null": (_raw(b"null"), "holds no JSON object"),
    "nested": (_raw(b'{"a":' * 100_000), "nested too deeply"),
    "not UTF-8": (_raw(b'{"a": "\xff"}'), "is not valid JSON"),
    "a key twice": (_raw(b'{"hidden_size": 1, "hidden_size": 32}'), "'hidden_size' is there more"),
    "hidden_size -1": (_config(hidden_size=-1), "hidden_size = -1; it must be a whole number"),
    "hidden_size 0": (_config(hidden_size=0), "hidden_size = 0; it must be"),
    "hidden_size 1e30": (_config(hidden_size=10**30), "hidden_size = 100000"),
    "hidden_size '32'": (_config(hidden_size="32"), "hidden_size = '32'; it must be"),
    "hidden_size true": (_config(hidden_size=True), "hidden_size = True; it must be"),
    "hidden_size NaN": (_config(hidden_size=float("nan")), "NaN is no number"),
    "no hidden_size": (_config(hidden_size=...), "hidden_size = None; it must be"),
    "layers": (_config(num_hidden_layers=10**9), "it must be a whole number from 1 to 10000"),
    "heads": (_config(num_attention_heads=0), "num_attention_heads = 0; it must be"),
    "groups": (_config(num_key_value_heads=10**6), "it must be a divisor of the 4 heads"),
    "head_dim": (_config(head_dim=-8), "head_dim = -8; it must be"),
    "experts": (_config(num_experts=1.5), "num_experts = 1.5; it must be"),
    "k": (_config(num_experts_per_tok=5), "it must be at most num_experts, 4"),
    "width": (_config(moe_intermediate_size=None), "moe_intermediate_size = None; it must be"),
    "all too large": (
        _config(num_experts=2**30, moe_intermediate_size=2**30),
        "has sizes that make a tensor of",
    ),
    "epsilon": (_config(rms_norm_eps=-1e-5), "rms_norm_eps = -1e-05; it must be a number above 0"),
    "RoPE": (
        _config(rope_parameters={"rope_type": "default", "rope_theta": -1.0}),
        "rope_theta = -1.0; it must be a number above 0",
    ),
    "no RoPE": (_config(rope_parameters=5), "rope_parameters = 5; it must be a mapping"),
    "unknown RoPE": (
        _config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
        "rope_type = 'spiral'; it must be one of default, linear",
    ),
    "list of RoPEs": (
        _config(rope_parameters={"rope_type": ["default"], "rope_theta": 1e4}),
        "rope_type = ['default']; it must be one of default",
    ),
    "unknown RoPE, old": (
        _config(rope_parameters=..., rope_scaling={"type": "spiral"}),
        "rope_type = 'spiral'; it must be one of default, linear",
    ),
    "scaled RoPE": (
        _config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        "scales RoPE (rope_type = 'linear'); only 'default' can be converted to Megatron",
    ),
    "a RoPE per kind": (
        _config(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 5e5}}),
        "has rope_parameters of their own for full_attention; only models with the same RoPE",
    ),
    "layer types": (
        _config(layer_types=["sliding_attention", "full_attention"]),
        "layer_types = ['sliding_attention', 'full_attention']; only models with full_attention in",
    ),
    "too few layer types": (
        _config(layer_types=["full_attention"]),
        "layer_types = ['full_attention']; only models with full_attention in all 2 layers",
    ),
    "no layer types": (_config(layer_types=5), "layer_types = 5; only models with full_attention"),
    "dense layers": (_config(mlp_only_layers=[9]), "mlp_only_layers = [9]; it must be a list"),
    "coefficient": (_config(l1_coeff=["a", "b"]), "l1_coeff = 'a'; it must be a number"),
    "coefficients": (_config(l1_coeff=[-1, 1]), "l1_coeff = -1; it must be a number above 0"),
    "multiplier": (_config(l1_coeff_multiplier=0.5), "multiplier is 0.5; it must be"),
    "target": (_config(target_sparsity=0.5), "target_sparsity = 0.5; it must be 1 - k/E, 0.75"),
    "facts": (_config(training_facts=[]), "training_facts = []; it must be a mapping"),
    "iteration": (
        _config(training_facts={"iteration": -5}),
        "training_facts.iteration = -5; it must be a whole number",
    ),
    "sequence": (
        _config(training_facts={"sequence_length": 0}),
        "training_facts.sequence_length = 0; it must be a whole number",
    ),
    "quantized": (_config(quantization_config={"quant_method": "gptq"}), "is of quantized weights"),
    "labels": (_config(id2label=5), "config.json: "),
    "model_type": (_config(model_type=[]), "model_type []; remoe and llama can be converted"),
    "NaN": (_tensors(lambda t: t[DOWN][0, 0, :2].fill_(float("nan"))), "has 2 values that are NaN"),
    "infinite": (_tensors(lambda t: t[EMBEDDING][0, :1].fill_(float("inf"))), "has 1 values"),
    "whole numbers": (
        _tensors(lambda t: t.update({n: v.int() for n, v in t.items()})),
        "as I32; only weights in BF16, F16, F32",
    ),
    "doubles": (_tensors(lambda t: t.update({DOWN: t[DOWN].double()})), "as F64; only weights in"),
    "two dtypes": (
        _tensors(lambda t: t.update({DOWN: t[DOWN].bfloat16()})),
        f"{DOWN} is torch.bfloat16, but model.norm.weight is torch.float32",
    ),
    "no matrix": (_tensors(lambda t: t.update({EMBEDDING: torch.tensor(1.0)})), "has shape []"),
    "renamed": (_tensors(lambda t: t.update({f"{DOWN}2": t.pop(DOWN)})), "has the unknown"),
    "twice": (_header("model.norm.weight"), "the key 'model.norm.weight' is there more than once"),
    "impossible": (
        _header("more", {"dtype": "F32", "shape": [0, 2**61, 2**61], "data_offsets": [0, 0]}),
        "has more of the impossible shape [0, 2305843009213693952, 2305843009213693952]",
    ),
    "cut off": (lambda f: os.truncate(f / "model.safetensors", 30_000), "is damaged"),
    "padding, a weight": (
        _tensors(lambda t: t.update({"model.norm.weight": torch.ones(32)}), PADDING_FILE),
        "model.norm.weight is in hf/megatron_padding.safetensors and in hf/model.safetensors",
    ),
    "padding, NaN": (
        _tensors(lambda t: t[ROWS].fill_(float("nan")), PADDING_FILE),
        "values that are NaN or infinite",
    ),
    "padding, rows": (
        _tensors(lambda t: t.update({ROWS: torch.ones(3, 32)}), PADDING_FILE),
        "has tensors of shape [3, 32] and [28, 32]",
    ),
    "padding, unknown": (
        _tensors(lambda t: t.update({"padding.stranger": torch.ones(28, 32)}), PADDING_FILE),
        "has the unknown padding.stranger",
    ),
    "index, no map": (_index(lambda *_: {"metadata": {}}), "has no weight_map of tensors"),
    "index, list": (_index(lambda *_: []), "holds no JSON object"),
    "index, number": (_index(lambda f, m, n: m.update({n: 5})), "has lm_head.weight in 5; it must"),
    "index, outside": (_index(_outside), "in '../a.safetensors'; it must be a file beside it"),
    "index, another file": (
        _index(lambda f, m, n: m.update({n: "b.safetensors"})),
        "and its files differ in lm_head.weight",
    ),
    "in two files": (_index(_in_both), "lm_head.weight is in hf/b.safetensors and in hf/a"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), MODELS.values(), ids=MODELS)
def test_a_hostile_model_is_named(call, home, tmp_path, spoil, message):
    shutil.copytree(home / "hf", tmp_path / "hf")
    spoil(tmp_path / "hf")
    before = sorted(p.name for p in tmp_path.iterdir())
    assert message in fails(call, tmp_path, "convert", "to-megatron", "hf", "deep/out")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_model_of_nan_is_neither_compared_nor_exported_to_infinities(call, home, tmp_path):
    shutil.copytree(home / "hf", tmp_path / "hf")
    _tensors(lambda t: t[DOWN].fill_(float("nan")))(tmp_path / "hf")
    argv = ("convert", "verify", "hf", "hf", "--tokens", "1,2,3")
    assert "values that are NaN or infinite" in fails(call, tmp_path, *argv)
    shutil.copytree(home / "old" / STEP, tmp_path / "old")
    state = _state(tmp_path / "old" / OLD)
    state["model"][NORM].fill_(1e5)  # above the largest number of fp16
    torch.save(state, tmp_path / "old" / OLD)
    error = fails(call, tmp_path, "convert", "to-hf", "old", "out", "--dtype", "fp16")
    assert "model.norm.weight as float16 has 32 values that are NaN or infinite" in error
    assert call(tiny.remoe, tmp_path, "convert", "to-hf", "old", "out")[0] == 0


OPTIONS = {
    "a token outside": (["--tokens", "1,100"], "has token 100, the models' vocabulary has 100"),
    "a huge token": (["--tokens", f"1,{10**30}"], "the models' vocabulary has 100 entries"),
    "too many": (["--tokens", "1,2", "--new-tokens", "32"], "but the model has 32 positions"),
    "no text": (["--text-file", "bytes"], "bytes is not UTF-8"),
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS)
def test_mistakes_of_a_comparison(call, home, tmp_path, options, message):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    model = str(home / "hf")
    assert message in fails(call, tmp_path, "convert", "verify", model, model, *options)


# Kills and Ctrl-C


def ended(cwd: Path, moment: str, number: int, *argv: str) -> tuple[int, str]:
    """How the command ends, and what it says, when a signal comes at a moment of its work."""
    from megatron.remoe.convert import output
    from megatron.remoe.formats import safetensors, torch_dist

    places = {
        "weights": (safetensors.ShardWriter, "write", 5),
        "checkpoint": (torch_dist.TorchDistWriter, "write", 5),
        "end": (output, "_publish", 1),
    }
    owner, name, count = places[moment]
    original, calls, said = getattr(owner, name), [0], cwd / "said"

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    def work() -> None:
        torch.set_num_threads(1)
        setattr(owner, name, counted)
        code, _, error = tiny.remoe(cwd, *argv)
        said.write_text(f"{code} {error}")

    status, text = status_of(work), said.read_text() if said.exists() else ""
    said.unlink(missing_ok=True)
    return status, text


MOMENTS = {
    "to-hf, weights": ("weights", ("to-hf", STEP, "out"), "hf"),
    "to-hf, end": ("end", ("to-hf", STEP, "out"), "hf"),
    "to-megatron": ("checkpoint", ("to-megatron", "hf", "out"), None),
    "from-fork": ("checkpoint", ("from-fork", "local", "out"), None),
}


@pytest.mark.parametrize(("moment", "argv", "expected"), MOMENTS.values(), ids=MOMENTS)
def test_a_killed_conversion_leaves_no_output_and_goes_on(
    call, home, tmp_path, moment, argv, expected
):
    for name in ("hf", STEP, "local"):
        (tmp_path / name).symlink_to(home / name)
    command = ("convert", *argv)
    assert call(ended, tmp_path, moment, signal.SIGKILL, *command)[0] == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    status, said = call(ended, tmp_path, moment, signal.SIGINT, *command)
    assert status == 0 and said.startswith("130 ") and "Traceback" not in said
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["hf", STEP, "local"])
    assert call(tiny.remoe, tmp_path, *command)[0] == 0
    if expected is not None:
        assert_same_folder(tmp_path / expected, tmp_path / "out")
        return
    (tmp_path / "out").rename(tmp_path / "after kills")
    assert call(tiny.remoe, tmp_path, *command)[0] == 0
    assert files_of(tmp_path / "after kills") == files_of(tmp_path / "out")


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_force_does_not_replace_the_source(call, home, tmp_path):
    shutil.copytree(home / "hf", tmp_path / "hf")
    shutil.copytree(home / STEP, tmp_path / "run/checkpoints" / STEP)
    before = files_of(tmp_path)
    for argv in (
        ("to-megatron", "hf", "hf"),
        ("to-megatron", "hf", "."),
        ("to-megatron", "hf", "hf/.."),
        ("to-hf", "run/checkpoints", "run"),
        ("to-hf", f"run/checkpoints/{STEP}", f"run/checkpoints/{STEP}"),
    ):
        assert "which must stay" in fails(call, tmp_path, "convert", *argv, "--force")
    assert "was not made by a conv" in fails(
        call, tmp_path, "convert", "to-megatron", "hf", "run", "--force"
    )
    assert files_of(tmp_path) == before
