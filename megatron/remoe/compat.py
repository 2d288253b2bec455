"""Everything that depends on the version of Megatron: the check, and the fixes that it needs.

Each fix says what is wrong, names the version in which it was seen, and does nothing once Megatron
has mended it. `apply()` is called by the entry point and by `add_arguments`.
"""

import importlib.metadata
import importlib.util

TESTED_VERSION = "0.19.2"


def apply() -> None:
    """Check the installed megatron-core and apply the fixes. Idempotent.

    Raises:
        ValueError: megatron-core is missing, or another minor version than the tested one.
    """
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"megatron-core is not installed; run: pip install 'remoe[megatron]' "
            f"(tested with {TESTED_VERSION})"
        ) from None
    if version.split(".")[:2] != TESTED_VERSION.split(".")[:2]:
        raise ValueError(
            f"megatron-core {version} is installed, but this release of remoe works with "
            f"{TESTED_VERSION}; run: pip install megatron-core=={TESTED_VERSION}"
        )
    _skip_compiling_dataset_helpers()


def _skip_compiling_dataset_helpers() -> None:
    """0.19.2 runs `make` in its datasets folder; the wheel has the built helper, no Makefile."""
    from megatron.core.datasets import utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = lambda: None


def tensorboard_writer():
    """The TensorBoard writer that Megatron made for this rank, or None."""
    from megatron.training import global_vars

    return global_vars._GLOBAL_TENSORBOARD_WRITER


def set_tensorboard_writer(writer: object) -> None:
    """Make Megatron report to `writer`; 0.19.2 has a getter for it, and no setter."""
    from megatron.training import global_vars

    global_vars._GLOBAL_TENSORBOARD_WRITER = writer
