#!/usr/bin/env bash
# Sets everything up (once), then runs the main job: trains a small GPT on 2 processes, kills
# a worker in the middle of training and one in the middle of a save, and shows that the
# result is the very same, bit for bit, as that of a run without faults.
# Arguments go to launch/train.py, for example: launch/demo.sh --text my-texts/ --steps 400
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

runs=runs/demo
rm -rf "$runs"
export OMP_NUM_THREADS=1

train() {
    "$venv/bin/torchrun" --nproc-per-node 2 --max-restarts 3 --monitor-interval 0.1 \
        --master-port "$(free_port)" launch/train.py "$@"
}

free_port() {
    "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

started=$SECONDS
say "Training on 2 processes; one worker will be killed in training, one in a save"
train --directory "$runs/faults" --kill-in-training 70 --kill-in-save 115 "$@"

say "What is on disk, and whether every byte of it is right"
"$venv/bin/distckpt" list "$runs/faults"
"$venv/bin/distckpt" verify "$runs/faults"

say "The same training without faults"
train --directory "$runs/clean" "$@"

say "Are the results the same?"
"$python" launch/compare.py "$runs/faults" "$runs/clean"
printf '\nThe demo took %s s.\n' "$((SECONDS - started))"
