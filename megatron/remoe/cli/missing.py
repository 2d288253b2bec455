"""What to install for a module that is missing. Imports nothing that is not Python's own."""

import re
from importlib import metadata

# Modules whose distribution has another name.
_DISTRIBUTIONS = {"megatron": "megatron-core", "yaml": "pyyaml", "sklearn": "scikit-learn"}


def remedy(module: str) -> str | None:
    """Return the line that names the missing package and the extras that have it.

    Args:
        module: The dotted name of a module that cannot be imported.

    Returns:
        None, if the package is in no extra, so that its absence is a mistake of ours.
    """
    top = module.partition(".")[0]
    package = _DISTRIBUTIONS.get(top, top.replace("_", "-"))
    extras = []
    try:
        requirements = metadata.requires("remoe") or []
    except metadata.PackageNotFoundError:  # This is a checkout that is on the path alone.
        requirements = []
    for line in requirements:
        name, extra = re.match(r"([\w.-]+)", line), re.search(r"extra == [\"'](\w+)", line)
        if name and extra and name[1].replace("_", "-").lower() == package:
            extras.append(f"pip install 'remoe[{extra[1]}]'")
    return f"{package} is not installed; run: {' or '.join(extras)}" if extras else None
