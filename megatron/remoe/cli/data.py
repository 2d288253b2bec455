"""The commands `remoe data ...`: corpora, token files, and tasks made from them."""

from pathlib import Path
from typing import Annotated

import typer

from megatron.remoe.cli.common import Force, example

app = typer.Typer(help="Build corpora, token files and tasks.", no_args_is_help=True)


@app.command(epilog=example("data corpus data/quickstart/corpus --max-mb-per-domain 2"))
def corpus(
    out: Annotated[Path, typer.Argument(help="The folder of the corpus, which is made.")],
    max_mb_per_domain: Annotated[
        float, typer.Option(help="The most text that a domain gets, in megabytes.")
    ] = 8.0,
    valid_fraction: Annotated[
        float, typer.Option(help="The share of every domain that is held out for validation.")
    ] = 0.02,
    force: Force = False,
) -> None:
    """Build a corpus from what is installed: Python, C++, prose, markup. Nothing is downloaded."""
    from megatron.remoe.data.corpus import CorpusConfig, build_corpus

    config = CorpusConfig(max_mb_per_domain=max_mb_per_domain, valid_fraction=valid_fraction)
    manifest, written = build_corpus(out, config, force=force)
    for name, entry in manifest["files"].items():
        typer.echo(f"{name:20} {entry['documents']:6} documents {entry['bytes'] / 1e6:8.3f} MB")
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    typer.echo(f"{out}: {total / 1e6:.1f} MB" + ("" if written else ", up to date"))


@app.command(
    epilog=example("data tokenize data/quickstart/corpus --out data/quickstart/tokens --workers 4")
)
def tokenize(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="A corpus folder, or .jsonl and .jsonl.zst files or folders of them."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to which the .bin and .idx files go.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="A tokenizer.json, or a folder that holds it or a vocab.json and a merges.txt.",
            show_default="a new one is trained",
        ),
    ] = None,
    vocab_file: Annotated[
        Path | None, typer.Option(help="The vocab.json of a GPT-2 tokenizer, with --merge-file.")
    ] = None,
    merge_file: Annotated[
        Path | None, typer.Option(help="The merges.txt of a GPT-2 tokenizer, with --vocab-file.")
    ] = None,
    eod_token: Annotated[
        str | None,
        typer.Option(
            help="The token of the given tokenizer that ends a document.",
            show_default="a well-known one",
        ),
    ] = None,
    vocab_size: Annotated[
        int, typer.Option(help="The number of tokens of the tokenizer if a new one is trained.")
    ] = 8192,
    workers: Annotated[
        int | None,
        typer.Option(help="The number of processes that tokenize.", show_default="all cores"),
    ] = None,
    text_key: Annotated[
        str, typer.Option(help="The JSON key that holds the text of a document.")
    ] = "text",
    append_eod: Annotated[
        bool,
        typer.Option(
            "--append-eod/--no-append-eod",
            help="Write the end-of-document token after every document.",
        ),
    ] = True,
    skip_invalid: Annotated[
        bool,
        typer.Option("--skip-invalid", help="Count malformed lines and leave them out."),
    ] = False,
    force: Force = False,
) -> None:
    """Write Megatron's token files, one pair per file or per domain and split of a corpus."""
    from megatron.remoe import cpu
    from megatron.remoe.data.tokenize import TokenizeConfig
    from megatron.remoe.data.tokenize import tokenize as run

    cpu.silence_megatron()
    config = TokenizeConfig(
        tokenizer=tokenizer,
        vocab_file=vocab_file,
        merge_file=merge_file,
        eod_token=eod_token,
        vocab_size=vocab_size,
        text_key=text_key,
        append_eod=append_eod,
        skip_invalid=skip_invalid,
        **({} if workers is None else {"workers": workers}),
    )
    manifest, written = run(inputs, out, config, force=force)
    for name, entry in manifest["outputs"].items():
        typer.echo(
            f"{name:20} {entry['documents']:8} documents {entry['tokens']:12} tokens "
            f"(left out: {entry['empty']} empty, {entry['invalid']} malformed)"
        )
    typer.echo(
        f"{out}: {sum(entry['tokens'] for entry in manifest['outputs'].values())} tokens, "
        f"vocabulary {manifest['settings']['vocab_size']}" + ("" if written else ", up to date")
    )


@app.command(epilog=example("data cloze data/quickstart/corpus data/quickstart/cloze --items 100"))
def cloze(
    corpus: Annotated[
        Path, typer.Argument(help="A corpus, or a folder of .jsonl files, one per domain.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder of the tasks, which is made.")],
    items: Annotated[int, typer.Option(help="The number of questions for each domain.")] = 200,
    context_words: Annotated[
        int, typer.Option(help="The number of words before the continuation.")
    ] = 48,
    continuation_words: Annotated[
        int, typer.Option(help="The number of words of each continuation.")
    ] = 8,
    seed: Annotated[int, typer.Option(help="The seed with which passages are chosen.")] = 0,
) -> None:
    """Make a task for `remoe evaluate` from held-out documents: which continuation is the true one.

    The three wrong ones come from other documents of the domain, so chance is 25%.
    """
    from megatron.remoe.data.cloze import GROUP, ClozeConfig, write_cloze

    config = ClozeConfig(items, context_words, continuation_words, seed)
    for domain, count in write_cloze(corpus, out, config).items():
        typer.echo(f"{GROUP}_{domain}: {count} items")
    typer.echo(f"remoe evaluate MODEL --tasks {GROUP} --include-path {out}")
