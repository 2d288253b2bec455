"""The `remoe` command: one file for each group of commands."""

from megatron.remoe.cli.app import main

__all__ = ["main"]
