#!/usr/bin/env bash
# Sets everything up (once), then tells whether one version of distckpt is slower than another:
# launch/ab.sh OLD NEW --directory DIR; git revisions, or folders such as . for this one.
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec "$python" -m distckpt.bench.ab "$@"
