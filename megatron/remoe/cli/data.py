"""The commands `remoe data ...`: corpora, token files, and tasks made from them."""

from pathlib import Path
from typing import Annotated

import typer

from megatron.remoe.cli.common import command

app = typer.Typer(help="Build corpora, token files and tasks.", no_args_is_help=True)


@command(app)
def corpus(
    out: Path,
    max_mb_per_domain: float = 8.0,
    valid_fraction: float = 0.02,
    force: bool = False,
) -> None:
    """Build a corpus of Python, C++, prose and markup from installed files, without a download.

    Example: remoe data corpus data/quickstart/corpus --max-mb-per-domain 2

    Args:
        out: The folder of the corpus to create.
        max_mb_per_domain: The largest size of the text of a domain, in megabytes.
        valid_fraction: The share of every domain that is held out for validation.
    """
    from megatron.remoe.data.corpus import CorpusConfig, build_corpus

    config = CorpusConfig(max_mb_per_domain=max_mb_per_domain, valid_fraction=valid_fraction)
    manifest, written = build_corpus(out, config, force=force)
    for name, entry in manifest["files"].items():
        typer.echo(f"{name:20} {entry['documents']:6} documents {entry['bytes'] / 1e6:8.3f} MB")
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    typer.echo(f"{out}: {total / 1e6:.1f} MB" + ("" if written else ", up to date"))


@command(app)
def tokenize(
    inputs: list[Path],
    out: Annotated[Path, typer.Option()],
    tokenizer: Path | None = None,
    vocab_file: Path | None = None,
    merge_file: Path | None = None,
    eod_token: str | None = None,
    vocab_size: int = 8192,
    workers: int | None = None,
    text_key: str = "text",
    append_eod: bool = True,
    skip_invalid: bool = False,
    valid_fraction: float | None = None,
    force: bool = False,
) -> None:
    """Tokenize files, or each domain and split of a corpus, into pairs of .bin and .idx files.

    Example: remoe data tokenize data/quickstart/corpus --out data/quickstart/tokens --workers 4

    Args:
        inputs: A corpus folder, or .jsonl and .jsonl.zst files or folders of them.
        out: The folder to which the .bin and .idx files are written.
        tokenizer: A tokenizer.json, or a folder that holds it or a vocab.json and a merges.txt. By
            default a new tokenizer is trained.
        vocab_file: The vocab.json of a GPT-2 tokenizer, with --merge-file; by default none.
        merge_file: The merges.txt of a GPT-2 tokenizer, with --vocab-file; by default none.
        eod_token: The token of the given tokenizer that ends a document, by default its own one.
        vocab_size: The size of the vocabulary, if a new tokenizer is trained.
        workers: The number of processes that tokenize, by default one per core.
        text_key: The JSON key that holds the text of a document.
        append_eod: Write the end-of-document token after every document.
        skip_invalid: Count malformed lines and leave them out, instead of stopping at the first.
        valid_fraction: The share of the documents of every file to hold out for validation, chosen
            by a hash of their text. By default none is held out.
    """
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
        valid_fraction=valid_fraction,
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


@command(app)
def cloze(
    corpus: Path,
    out: Path,
    items: int = 200,
    context_words: int = 48,
    continuation_words: int = 8,
    seed: int = 0,
) -> None:
    """Make multiple-choice tasks for `remoe evaluate` from the held-out documents of a corpus.

    A model chooses the true continuation of a text among four. The three wrong ones come from other
    documents of the domain, so chance is 25%.

    Example: remoe data cloze data/quickstart/corpus data/quickstart/cloze --items 100

    Args:
        corpus: A corpus, or a folder of .jsonl files, one per domain.
        out: The folder of the tasks to create.
        items: The number of questions for each domain.
        context_words: The number of words before the continuation.
        continuation_words: The number of words of each continuation.
        seed: The seed with which passages are chosen.
    """
    from megatron.remoe.data.cloze import GROUP, ClozeConfig, write_cloze

    config = ClozeConfig(items, context_words, continuation_words, seed)
    for domain, count in write_cloze(corpus, out, config).items():
        typer.echo(f"{GROUP}_{domain}: {count} items")
    typer.echo(f"remoe evaluate MODEL --tasks {GROUP} --include-path {out}")
