"""The commands `remoe convert ...`: to Hugging Face and back, and from models made elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from megatron.remoe.cli.common import AtLeastOne, command, prepare
from megatron.remoe.progress import progress

app = typer.Typer(
    help="Convert models to transformers and back, from the 2024 fork, and from dense models.",
    no_args_is_help=True,
)

_TEXT = """The router gives every token to the experts whose logit is positive.

def relu_routing(logits):
    probs = torch.relu(logits)
    return probs, probs > 0

#include <vector>
int main() { std::vector<int> experts(8); return experts.size(); }
"""


@command(app, "to-hf")
def to_hf(
    source: Path,
    out: Path,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    tokenizer: Path | None = None,
    license: str | None = None,
    force: bool = False,
) -> None:
    """Export a checkpoint for transformers, with its tokenizer, the model's code and a model card.

    Example: remoe convert to-hf runs/quickstart model --dtype bf16

    Args:
        source: The run directory, or a checkpoint of any parallel layout.
        out: The Hugging Face folder to create.
        dtype: The type of the weights (fp32, bf16 or fp16), by default the checkpoint's.
        max_shard_size: The largest size of a file of weights, such as 500MB or 5GB.
    """
    prepare()
    from megatron.remoe.convert import export
    from megatron.remoe.formats.safetensors import parse_size

    chosen, size = export.parse_dtype(dtype), parse_size(max_shard_size)
    with progress("bytes") as report:
        config = export.to_hf(
            source,
            out,
            dtype=chosen,
            max_shard_bytes=size,
            tokenizer=tokenizer,
            license=license,
            force=force,
            progress=report,
        )
    typer.echo(f"{out}: {config['architectures'][0]}, {config['dtype']}")


@command(app, "card")
def card_(folder: Path, license: str | None = None) -> None:
    """Write the model card of an exported model anew, with its budget curve if there is one by now.

    The card is README.md in the folder. What was written into it by hand is lost, but for its
    license.

    Example: remoe convert card model --license apache-2.0

    Args:
        folder: The Hugging Face folder that remoe convert has made.
    """
    prepare()
    from megatron.remoe.convert import card

    typer.echo(card.rewrite(folder, license))


@command(app, "to-megatron")
def to_megatron(
    source: Path,
    out: Path,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    expert_parallel: int = 1,
    padded_vocab_size: int | None = None,
    force: bool = False,
) -> None:
    """Convert a Hugging Face folder to a checkpoint to train on, with its flags in model.yaml.

    Example: remoe convert to-megatron model checkpoints --expert-parallel 2

    Args:
        source: The Hugging Face folder, of the model type remoe or llama.
        out: The folder of checkpoints to create.
    """
    prepare()
    from megatron.remoe.convert import to_megatron as run

    layout = run.Layout(tensor_parallel, pipeline_parallel, expert_parallel, padded_vocab_size)
    with progress("tensors") as report:
        folder = run.to_megatron(source, out, layout=layout, force=force, progress=report)
    typer.echo(f"{folder}; continue with a config whose base is {out / 'model.yaml'}")


@command(app, "from-fork")
def from_fork(
    checkpoint: Path,
    out: Path,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    expert_parallel: int = 1,
    padded_vocab_size: int | None = None,
    tokenizer: Path | None = None,
    force: bool = False,
) -> None:
    """Convert a checkpoint of thu-ml/ReMoE, with its coefficient, for transformers and Megatron.

    Example: remoe convert from-fork CHECKPOINTS model --tokenizer gpt2-tokenizer

    Args:
        checkpoint: A checkpoint of the published implementation, or a folder of them.
        out: The folder to create, with the subfolders hf and megatron.
    """
    prepare()
    from megatron.remoe.convert import from_fork as run
    from megatron.remoe.convert import to_megatron

    layout = to_megatron.Layout(
        tensor_parallel, pipeline_parallel, expert_parallel, padded_vocab_size
    )
    with progress("bytes") as report:
        config = run.from_fork(
            checkpoint, out, layout=layout, tokenizer=tokenizer, force=force, progress=report
        )
    coefficient = (config.get("l1_coeff") or [None])[0]
    typer.echo(f"{out / run.HF}: {config['architectures'][0]}, coefficient {coefficient}")
    typer.echo(
        f"{out / run.MEGATRON}; continue with a config whose base is "
        f"{out / run.MEGATRON / 'model.yaml'}"
    )


@command(app)
def script(
    launcher: Path,
    out: Annotated[Path | None, typer.Argument()] = None,
    values: Annotated[list[str] | None, typer.Option("--set")] = None,
    force: bool = False,
) -> None:
    """Turn a launch script of the fork, or of Megatron-LM, into a config, without running it.

    Every flag that is renamed, left out or added is named with the reason.

    Example: remoe convert script train_llama_182m_remoe.sh remoe.yaml --set 4=16

    Args:
        launcher: The script, in bash, that starts pretrain_gpt.py.
        out: The YAML file to write. By default the config is printed.
        values: A variable of the script, or an argument by its number, as NAME=VALUE; by default
            those have the values that the script gives them.
        force: Replace the YAML file.
    """
    prepare()
    from megatron.remoe.convert import script as run
    from megatron.remoe.files import write_whole

    if out is not None and out.exists() and not force:
        raise ValueError(f"{out} exists; choose another file, or replace it (--force)")
    made = run.convert(launcher, values or [], name=None if out is None else out.stem)
    text = made.to_yaml(launcher.name)
    if out is None:
        typer.echo(text, nl=False)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text)
    for note in made.notes:
        typer.echo(f"- {note}")
    typer.echo(f"{out}; train with remoe train {out}")


@command(app)
def upcycle(
    dense: Path,
    out: Path,
    num_experts: Annotated[int, typer.Option()],
    granularity: int = 1,
    topk: int = 1,
    data: list[Path] | None = None,
    tokens: Annotated[int, typer.Option(min=512)] = 8192,
    spread: float = 0.5,
    seed: int = 0,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    expert_parallel: int = 1,
    padded_vocab_size: int | None = None,
    tokenizer: Path | None = None,
    force: bool = False,
) -> None:
    """Make a mixture with ReLU routing from a dense model, and print the losses of both.

    Example: remoe convert upcycle runs/dense start --num-experts 8 --granularity 2

    Args:
        dense: A dense run or checkpoint, or a Hugging Face Llama.
        out: The folder of checkpoints to create.
        num_experts: E, the number of copies of the dense MLP before granularity.
        granularity: G, the number of slices of each copy: there are E * G experts of width / G.
        topk: The k of the target sparsity 1 - k/E.
        data: Token files, without their suffix, to which the router is fitted. By default it is
            fitted to text that the model samples.
        tokens: The number of tokens. The router is fitted to one half and tested on the other.
        spread: The standard deviation of a gate's noise, relative to the gate's mean.
        seed: The seed of the noise and of the samples.
    """
    prepare()
    from megatron.remoe.convert import to_megatron
    from megatron.remoe.convert import upcycle as run

    settings = run.Settings(num_experts, topk, granularity, spread, seed)
    layout = to_megatron.Layout(
        tensor_parallel, pipeline_parallel, expert_parallel, padded_vocab_size
    )
    with progress("bytes") as report:
        made = run.upcycle(
            dense,
            out,
            settings,
            data=data,
            num_tokens=tokens,
            layout=layout,
            tokenizer=tokenizer,
            force=force,
            progress=report,
        )
    typer.echo(
        f"first forward on held-out {'data' if data else 'samples'}: loss {made.loss:.4f}, dense "
        f"{made.dense_loss:.4f}, gap {made.loss - made.dense_loss:+.4f}"
    )
    typer.echo(
        f"gates of a slice's copies sum to 1 ± {made.gate_sum_std:.3f}; active: {made.active:.1%}"
    )
    typer.echo(f"{made.folder}; train with a config whose base is {out / 'model.yaml'}")


@command(app)
def verify(
    a: Path,
    b: Path,
    text: str | None = None,
    text_file: Path | None = None,
    tokens: str | None = None,
    dtype: str = "fp32",
    new_tokens: AtLeastOne = 20,
    tokenizer: Path | None = None,
) -> None:
    """Compare the tensors, logits, active experts and greedy text of two models.

    Exits with 1 if they differ more than the dtype allows.

    Example: remoe convert verify runs/quickstart model --tokens 5,17,3

    Args:
        a: A run directory, a checkpoint or a Hugging Face folder.
        b: Another run directory, checkpoint or Hugging Face folder.
        text: The text to run both models on, by default some prose and code.
        text_file: A file that holds the text, instead of the default or of --text.
        tokens: Token ids such as 5,17,3, instead of the default text or of --text.
        dtype: The type of the forward passes: fp32 or bf16.
        new_tokens: The number of tokens to generate greedily.
    """
    prepare()
    from megatron.remoe.convert import compare
    from megatron.remoe.convert.export import parse_dtype

    chosen = parse_dtype(dtype)
    assert chosen is not None
    result = compare.compare(
        a,
        b,
        _text_or_ids(text, text_file, tokens),
        dtype=chosen,
        new_tokens=new_tokens,
        tokenizer=tokenizer,
    )
    equal = result.tensors - len(result.differing)
    typer.echo(f"tensors: {equal} of {result.tensors} bit-equal")
    for name, largest in sorted(result.differing.items(), key=lambda pair: -pair[1])[:10]:
        typer.echo(f"  {name}: {largest:.3g}")
    differences = result.logit_differences
    typer.echo(
        f"logits ({dtype}, {len(differences)} tokens): largest difference "
        f"{float(differences.max()):.3g}, allowed {compare.LOGIT_TOLERANCE[chosen]:g}"
    )
    for position in differences.argsort(descending=True)[:3].tolist():
        typer.echo(f"  at token {position}: {float(differences[position]):.3g}")
    typer.echo(f"active experts: {result.flipped:.4%} of (token, expert) pairs differ")
    typer.echo(
        f"{new_tokens} tokens generated greedily: {'same' if result.greedy else 'DIFFERENT'}"
    )
    if not result.ok:
        typer.echo("the models DIFFER")
        raise typer.Exit(1)
    typer.echo("ok")


def _text_or_ids(text: str | None, file: Path | None, tokens: str | None) -> str | list[int]:
    """Return what both models run on: the given text or token ids, or a text with code."""
    if sum(value is not None for value in (text, file, tokens)) > 1:
        raise ValueError("give one of --text, --text-file and --tokens")
    if file is not None:
        if not file.is_file():
            raise ValueError(f"{file} does not exist; name a text file")
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 ({error.reason}); name a text file") from error
    if tokens is not None:
        parts = tokens.split(",")
        if len(parts) < 2 or not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f"tokens is {tokens!r}; it must be two or more ids such as 5,17,3")
        return [int(part) for part in parts]
    return _TEXT if text is None else text
