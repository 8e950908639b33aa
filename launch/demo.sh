#!/usr/bin/env bash
# Sets everything up (once), then runs the main job: trains a small GPT on 2 processes, kills
# a worker in the middle of training and one in the middle of a save, and shows that the
# result is the very same, bit for bit, as that of a run without faults. Once with replicated
# parameters (DDP), once with sharded ones (FSDP2).
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

# What one strategy does to a run that loses two workers, and to one that does not.
demonstrate() {
    local strategy=$1 faults=$runs/$1-faults clean=$runs/$1-clean
    shift
    say "Training on 2 processes ($strategy); one worker will be killed in training, one in a save"
    train --strategy "$strategy" --directory "$faults" \
        --kill-in-training 70 --kill-in-save 115 "$@"

    say "What is on disk, and whether every byte of it is right"
    "$venv/bin/distckpt" list "$faults"
    "$venv/bin/distckpt" verify "$faults"

    say "The same training without faults"
    train --strategy "$strategy" --directory "$clean" "$@"

    say "Are the results the same?"
    "$python" launch/compare.py "$faults" "$clean"
}

started=$SECONDS
demonstrate ddp "$@"
demonstrate fsdp "$@"
printf '\nThe demo took %s s.\n' "$((SECONDS - started))"
