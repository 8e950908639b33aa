# shellcheck shell=bash
# Sourced by the other scripts here: makes the project's .venv and installs everything into it.
# Works again on a second run without reinstalling: a stamp remembers what was installed.
# A script that needs another environment sets setup_venv (its folder) and setup_torch (what pip
# is asked for) before it sources this file.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=${setup_venv:-$root/.venv}
python=$venv/bin/python
if [ -n "${setup_torch:-}" ]; then
    torch_requirement=("$setup_torch")
else
    torch_requirement=(-r launch/requirements.txt)
fi

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: Python 3.10 or newer was not found; install it, or set PYTHON=/path/to/python3." >&2
    return 1
}

stamp_of_requirements() {
    # The location is part of it: an editable install points at this very folder.
    { echo "$root"; cat pyproject.toml launch/requirements.txt; echo "${setup_torch:-}"; } | cksum
}

install() {
    local base
    base=$(find_python)
    echo "setup: making $venv with $base and installing (once) ..."
    if [ ! -x "$python" ] && ! "$base" -m venv "$venv"; then
        echo "setup: '$base -m venv' failed; on Debian and Ubuntu install python3-venv." >&2
        return 1
    fi
    # Compiled below by all cores; pip has one do it.
    if ! "$python" -m pip install --quiet --no-compile --disable-pip-version-check \
        "${torch_requirement[@]}" -e '.[test,docs]'; then
        echo "setup: installation failed. What is needed, from a package index or a local mirror:" >&2
        echo "  - ${setup_torch:-$(grep -v '^#' launch/requirements.txt) (launch/requirements.txt)}" >&2
        echo "  - the packages listed under dependencies, 'test' and 'docs' in pyproject.toml" >&2
        echo "Without a network, point pip at a folder of wheels: PIP_FIND_LINKS=/path PIP_NO_INDEX=1 $0" >&2
        return 1
    fi
    # All but what nobody imports. Some packages have files that are not meant to be compiled.
    # By relative paths: a folder above that is called "tests" would rule out everything.
    (cd "$venv/lib" && "$python" -m compileall -q -j 0 \
        -x '/(mypy|mypyc|networkx|physics|pip|setuptools|tests)/' . >/dev/null) || true
    stamp_of_requirements >"$venv/.distckpt-installed"
}

if [ "$(cat "$venv/.distckpt-installed" 2>/dev/null)" != "$(stamp_of_requirements)" ]; then
    install
fi
