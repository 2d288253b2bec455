"""`python -m megatron.remoe` is the `remoe` command."""

from megatron.remoe.cli import main

if __name__ == "__main__":
    main()
