#!/bin/sh
# Print a Python 3.12 or newer: $PYTHON, pyenv's, one on the PATH, or uv's. Says what is missing.
set -u

fits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

candidates() {
    [ -n "${PYTHON:-}" ] && echo "$PYTHON"
    if command -v pyenv >/dev/null 2>&1; then
        for version in $(pyenv versions --bare 2>/dev/null | grep -E '^3\.1[2-9]' | sort -V); do
            echo "$(pyenv prefix "$version")/bin/python"
        done
    fi
    for name in python3.12 python3.13 python3.14 python3 python; do command -v "$name"; done
    command -v uv >/dev/null 2>&1 && uv python find '>=3.12' 2>/dev/null
}

for python in $(candidates); do
    if fits "$python"; then
        echo "$python"
        exit 0
    fi
done
cat >&2 <<'END'
error: no Python 3.12 or newer with venv was found: looked at $PYTHON, pyenv, the PATH and uv.
Install one (pyenv install 3.12, uv python install 3.12, or your system's python3.12 and
python3.12-venv packages), or name it: make setup PYTHON=/path/to/python3.12
END
exit 2
