#!/usr/bin/env bash
# Renew constraints.txt: install all extras but te, unpinned, into an environment of their own, and
# pin what that has. Takes minutes and 6 GB. Run the tests with the new pins before you keep them.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"$(scripts/python.sh)" -m venv "$environment"
"$environment/bin/python" -m pip install --quiet --upgrade pip
"$environment/bin/python" -m pip install --quiet ".[${1:?name the extras}]"
{
    echo "# The versions this project is tested with: pip install -c constraints.txt ..."
    echo "# Made by make constraints. NVIDIA's wheels and triton are pinned by torch itself."
    "$environment/bin/python" -m pip freeze --all | grep -vE '^(remoe|pip|triton|nvidia-|cuda-)|@'
} >constraints.txt
