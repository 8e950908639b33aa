#!/usr/bin/env bash
# Sets everything up (once), then runs tests:
#   launch/test.sh                           style, and the tests of the classes unit, ranks
#                                            and durability
#   launch/test.sh all                       the rest: types, and the tests of class full
#   launch/test.sh tests/unit -k manifest    other arguments go to pytest
# tests/README.md has the classes. Those of class long: launch/torture.sh.
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# Else each of thousands of ranks would compile the modules of its test anew, a fifth of its
# time, and each process of pytest all tests.
export PYTHONDONTWRITEBYTECODE=
"$python" -m compileall -q -j 0 distckpt tests

if [ $# -gt 0 ] && [ "$*" != all ]; then
    exec "$python" -m pytest "$@"
fi

left_out=$(mktemp)
number_of() {
    sort --unique "$left_out" | grep --count "^$1 " || true
}
say_what_was_not_run() {
    local status=$?
    if [ $status -ne 0 ]; then
        echo "failed; the tests after the failed step were not run"
    elif [ "${1:-}" = all ]; then
        echo "not run: the default classes (launch/test.sh)," \
            "class long (launch/torture.sh long, and its campaigns)"
    else
        echo "not run: $(number_of full) tests of class full (launch/test.sh all)," \
            "$(number_of long) tests and the campaigns of class long (launch/torture.sh)"
    fi
    rm -f "$left_out"
}
# shellcheck disable=SC2064 # the argument of now
trap "say_what_was_not_run ${1:-}" EXIT

# With one seed both processes of pytest list the tests in one order.
export PYTHONHASHSEED=0
one_process=(tests/unit tests/scale tests/gpu)
with_ranks=(tests/multiprocess tests/crash/ranks tests/clients)
# First those without torch: they fork thousands of processes, and with torch in it each fork
# takes twenty times as long.
without_torch=(tests/crash --ignore tests/crash/ranks)
# Each process begins with a half: those of one wait more than they work, those of the other
# work more than they wait.
two_at_once=(-n 2 --dist worksteal)

files_with() {
    grep --recursive --files-with-matches --include='test_*.py' "$1" "${one_process[@]}"
}

if [ "${1:-}" = all ]; then
    # The libraries of tests/clients; without them its tests skip.
    launch/clients_env.sh || echo "the environment of tests/clients could not be made" >&2
    # With all examples of hypothesis, of which the default classes draw a fifth.
    export DISTCKPT_ALL_EXAMPLES=1
    "$python" -m mypy
    "$python" -m pytest -n 2 -m "full and not alone" "${one_process[@]}"
    mapfile -t files < <(files_with mark.alone)
    "$python" -m pytest -m "full and alone" "${files[@]}"
    "$python" -m pytest -m full "${two_at_once[@]}" "${without_torch[@]}"
    "$python" -m pytest -m full "${two_at_once[@]}" "${with_ranks[@]}"
    exit
fi

export DISTCKPT_TESTS_LEFT_OUT=$left_out
by_default='not full and not long'
"$python" -m ruff check .
"$python" -m ruff format --check .
# In one process: a second one would import and collect for half as long as it would run
# tests, and the tests that measure time, which are the last, would have to wait for it.
"$python" -m pytest -m "$by_default" "${one_process[@]}"
"$python" -m pytest -m "$by_default" "${two_at_once[@]}" "${without_torch[@]}"
"$python" -m pytest -m "$by_default" "${two_at_once[@]}" "${with_ranks[@]}"
