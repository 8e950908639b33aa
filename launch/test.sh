#!/usr/bin/env bash
# Sets everything up (once), then runs the whole test suite: style, types, tests.
# Arguments go to pytest: launch/test.sh tests/unit -k manifest
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [ $# -eq 0 ]; then
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$python" -m mypy
fi
exec "$python" -m pytest "$@"
