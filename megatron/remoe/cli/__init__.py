"""The `remoe` command: a file for each group of commands."""

from megatron.remoe.cli.app import main

__all__ = ["main"]
