#!/usr/bin/env bash
# Sets everything up (once), and transformers and Lightning with it; then shows that real
# clients work: models of transformers' are sharded by FSDP2, trained, saved, restored at
# another size, exported, and loaded by from_pretrained; and a loop of Lightning Fabric's.
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

"$python" -m pip install --quiet --disable-pip-version-check -r launch/requirements.txt -e '.[clients]'

runs=runs/clients
rm -rf "$runs"
mkdir -p "$runs"
export OMP_NUM_THREADS=1 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

job() {
    "$venv/bin/torchrun" --nproc-per-node "$1" --standalone launch/clients.py "${@:2}"
}

job 2 train "$runs"
job 3 restore "$runs"
"$python" launch/clients.py configure "$runs"
for kind in llama gpt2; do
    "$venv/bin/distckpt" export "$runs/$kind" --to huggingface --config "$runs/$kind-config" \
        --output "$runs/$kind-hf"
done
"$python" launch/clients.py load "$runs"
job 2 fabric "$runs"
