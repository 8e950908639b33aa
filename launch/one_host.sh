#!/usr/bin/env bash
# One job on one host, as on a workstation or a rented machine: copy this file, edit the three
# marked places, start it. Started again, it goes on from the last checkpoint.
# What happens when, and how the numbers belong together: docs/launching.md.
set -euo pipefail

# EDIT 1 of 3: how many processes; gpu means one for each GPU.
processes=gpu

# EDIT 2 of 3: where torchrun and distckpt are installed.
export PATH=/path/to/venv/bin:$PATH

# EDIT 3 of 3: the program. The run's name stays the same when it is started again.
run=gpt
grace=60 # seconds for the last save, once the job is told to stop
program=(launch/train.py --directory "runs/$run" --device cuda --strategy fsdp
    --grace-period-seconds "$grace")

# By default torchrun kills its workers 30 seconds after the signal, in the middle of a save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$((grace + 10))

# exec: SIGTERM to this process is SIGTERM to torchrun, which sends it on to the workers.
# By the run id distckpt knows a job that is started again, and fences what is left of it. With
# another one, as --standalone draws each time, it refuses to start while any of it is alive.
# Port 0: any that is free.
exec torchrun --nnodes 1 --nproc-per-node "$processes" --max-restarts 10 \
    --rdzv-backend c10d --rdzv-endpoint localhost:0 --rdzv-id "$run" \
    "${program[@]}"
