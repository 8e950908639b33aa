#!/usr/bin/env bash
# Runs the tests with another version of torch: launch/compat.sh VERSION [pytest arguments]
#   launch/compat.sh 2.9.1            this release
#   launch/compat.sh 2.13             the newest release of 2.13
#   launch/compat.sh newest           the newest release that pip finds
#   PYTHON=python3.12 launch/compat.sh 2.9.1    with another Python
#   CLASSES=unit launch/compat.sh 2.9.1 -k dtype    one class of tests, and some of its tests
# Makes build/compat/VERSION (once) with that torch in it: a build for CUDA takes 5 to 8 GB.
# Ends with one line for docs/compatibility.md, and fails if a test failed.

set -euo pipefail

classes=${CLASSES:-unit ranks}

# Prints the folder of a class. Those of class full in it are run, too; those of class long are not.
tests_of() {
    case $1 in
    unit) echo tests/unit ;;
    ranks) echo tests/multiprocess ;;
    *)
        echo "compat: CLASSES names '$1'; the classes are: unit ranks" >&2
        return 2
        ;;
    esac
}

version=${1:-}
case $version in
newest) setup_torch=torch ;;
*[!0-9.]* | '' | .* | *.)
    echo "compat: '$version' is no version of torch; example: $0 2.9.1 (or 2.13, or newest)" >&2
    exit 2
    ;;
*.*.*) setup_torch="torch==$version" ;;
*) setup_torch="torch==$version.*" ;;
esac
shift
for class in $classes; do
    tests_of "$class" >/dev/null
done
setup_venv=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/build/compat/$version
if [ -n "${PYTHON:-}" ]; then
    setup_venv+=-$("$PYTHON" -c 'import platform; print("python" + platform.python_version())')
fi
mkdir -p "$(dirname "$setup_venv")"
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

"$python" -m compileall -q -j 0 distckpt tests

results=$venv/results
rm -rf "$results"
mkdir -p "$results"
export PYTHONHASHSEED=0
outcome=0
run() { # name of the result, pytest arguments ...
    local code=0
    "$python" -m pytest -o "junit_family=xunit1" --junitxml="$results/$1.xml" "${@:2}" || code=$?
    # 5 means that no test was selected.
    if [ "$code" != 0 ] && [ "$code" != 5 ]; then
        outcome=1
    fi
}

started=$SECONDS
for class in $classes; do
    tests=$(tests_of "$class")
    # Those that measure no time, two at once; then the others.
    run "$class.together" -n 2 --dist worksteal -m 'not alone and not long' "$tests" "$@"
    run "$class.alone" -m 'alone and not long' "$tests" "$@"
done
SECONDS_TAKEN=$((SECONDS - started)) CLASSES=$classes "$python" - "$results" <<'PYTHON'
"""Print one line of a table: versions, then what became of the tests of each class."""

import datetime
import os
import pathlib
import platform
import sys
from xml.etree import ElementTree

import torch

cells = [torch.__version__, platform.python_version()]
for name in os.environ["CLASSES"].split():
    count = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for path in pathlib.Path(sys.argv[1]).glob(f"{name}.*.xml"):
        for suite in ElementTree.parse(path).iter("testsuite"):
            for kind in count:
                count[kind] += int(suite.get(kind, 0))
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    cells.append(f"{name}: {passed} passed, {failed} failed, {count['skipped']} skipped")
cells.append(f"{round(int(os.environ['SECONDS_TAKEN']) / 60)} min")
cells.append(datetime.date.today().isoformat())
print("|", " | ".join(cells), "|")
PYTHON
exit "$outcome"
