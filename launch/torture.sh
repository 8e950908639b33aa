#!/usr/bin/env bash
# Sets everything up (once), then runs one of the campaigns of tests/crash for as long as you
# like: launch/torture.sh rot --minutes 30. It says how far it has come, and goes on from there
# when it is started again. 'launch/torture.sh --help' lists them; docs/reliability.md has the
# last figures.
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec "$python" tests/crash/torture.py "$@"
