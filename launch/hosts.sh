#!/usr/bin/env bash
# One job on several hosts: copy this file to where all of them see it, edit the three marked
# places, start it on each host with the same contents. Started again, it goes on from the last
# checkpoint; on fewer hosts, too.
# What happens when, and how the numbers belong together: docs/launching.md.
set -euo pipefail

# EDIT 1 of 3: the hosts. The first one is where all meet, named as `hostname` says there.
hosts=2:4 # at least : at most
first_host=host-0
port=29400
processes=gpu # on each host; gpu means one for each GPU

# EDIT 2 of 3: the environment, the same on all hosts.
cd /shared/distckpt
export PATH=/shared/venv/bin:$PATH
# export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0    # where hosts have several networks

# EDIT 3 of 3: the program, with a run directory that all hosts share. The run's name stays the
# same when it is started again.
run=gpt
grace=60 # seconds for the last save, once the job is told to stop
program=(launch/train.py --directory "/shared/runs/$run" --device cuda --strategy fsdp
    --grace-period-seconds "$grace")

# By default torchrun kills its workers 30 seconds after the signal, in the middle of a save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$((grace + 10))
# Else launchers go on with the store of the first start, and a job that has shrunk cannot grow.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# How long, in seconds, a launcher waits for the first host to be there ...
rendezvous=read_timeout=300
# ... and for enough others, at the start and when hosts are lost ...
rendezvous+=,join_timeout=1800
# ... and, once there are enough, so much longer for the rest. Who comes later joins later.
rendezvous+=,last_call_timeout=15
# A host is lost when nothing has been heard of its launcher for three times 5 seconds.
rendezvous+=,keep_alive_interval=5,keep_alive_max_attempt=3

# exec: SIGTERM to this process is SIGTERM to torchrun, which sends it on to the workers.
# Restarts are also what it takes to go on without a host, as often as one is lost.
# By the run id distckpt knows a job that is started again, and fences what is left of it.
exec torchrun --nnodes "$hosts" --nproc-per-node "$processes" --max-restarts 100 \
    --rdzv-backend c10d --rdzv-endpoint "$first_host:$port" --rdzv-id "$run" \
    --rdzv-conf "$rendezvous" \
    "${program[@]}"
