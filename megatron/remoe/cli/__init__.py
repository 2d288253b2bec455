"""The `remoe` command: one file for each group of commands."""

import sys


def main(argv: list[str] | None = None) -> None:
    """Run the command; a package of an extra that is not installed is one line and exit code 2."""
    try:
        from megatron.remoe.cli import app

        app.main(argv)
    except ModuleNotFoundError as error:
        from megatron.remoe.cli import missing

        message = missing.remedy(error.name or "")
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


__all__ = ["main"]
