#!/usr/bin/env bash
# Sets everything up (once), then runs the whole test suite: style, types, tests.
# Arguments go to pytest: launch/test.sh tests/unit -k manifest
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# Where PYTHONDONTWRITEBYTECODE is set, each of thousands of ranks would compile the modules of
# its test anew: a fifth of the time of a test of ranks.
"$python" -m compileall -q -j 0 distckpt tests

if [ $# -gt 0 ]; then
    exec "$python" -m pytest "$@"
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
# On one core, beside the first tests.
"$python" -m mypy &
types=$!
# Those that measure no time, two at once; with one seed both processes list them in one order.
export PYTHONHASHSEED=0
one_process=(tests/unit tests/scale tests/gpu)
"$python" -m pytest -n 2 -m 'not alone' "${one_process[@]}"
wait "$types"
"$python" -m pytest -m alone "${one_process[@]}"
# Each process begins with a half: those of one wait more than they work, those of the other
# work more than they wait. First those without torch: they fork thousands of processes, and
# with torch in it each fork takes twenty times as long.
"$python" -m pytest -n 2 --dist worksteal tests/crash --ignore tests/crash/ranks
exec "$python" -m pytest -n 2 --dist worksteal tests/multiprocess tests/crash/ranks
