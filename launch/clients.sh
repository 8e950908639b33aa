#!/usr/bin/env bash
# Makes the environment of real libraries (once); then shows that real clients work: models of
# transformers' are sharded by FSDP2, trained, saved, restored at another size, exported, and
# loaded by from_pretrained; and a loop of Lightning Fabric's. tests/clients compares more.
# shellcheck source=launch/clients_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/clients_env.sh"

runs=runs/clients
rm -rf "$runs"
mkdir -p "$runs"
export OMP_NUM_THREADS=1 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

job() {
    "$clients_python" -m torch.distributed.run --nproc-per-node "$1" --standalone \
        launch/clients.py "${@:2}"
}

job 2 train "$runs"
job 3 restore "$runs"
"$clients_python" launch/clients.py configure "$runs"
for kind in llama gpt2; do
    "$venv/bin/distckpt" export "$runs/$kind" --to huggingface --config "$runs/$kind-config" \
        --output "$runs/$kind-hf"
done
"$clients_python" launch/clients.py load "$runs"
job 2 fabric "$runs"
