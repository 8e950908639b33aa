#!/usr/bin/env bash
# Sets everything up (once), then trains on 4 processes while workers are killed at random, in
# training, in saves, in restores and in restarts; shows that nothing acknowledged is lost.
# Arguments go to launch/soak.py, for example: launch/soak.sh --minutes 10 --strategy ddp
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec "$python" launch/soak.py "$@"
