#!/usr/bin/env bash
# Builds a wheel and an sdist, installs each into an empty environment, and runs ten lines there.
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build --outdir "$work/dist" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
base=$(find_python)

cat >"$work/ten_lines.py" <<'PYTHON'
import os, torch, distckpt
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(4)).sum().backward()
optimizer.step()
checkpoint = distckpt.Checkpoint(model=model, optimizer=optimizer)
with distckpt.CheckpointManager(checkpoint, "run", max_to_keep=2) as manager:
    path = manager.save()
with distckpt.open(path) as opened:
    assert torch.equal(opened["model/weight"].torch(), model.weight)
assert not os.path.realpath(distckpt.__file__).startswith(os.environ["PROJECT"] + os.sep)
print(f"distckpt {distckpt.__version__} with torch {torch.__version__}: saved and read {path}")
PYTHON

install_and_run() { # FILE...: into the environment, then the ten lines away from this folder
    "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint launch/requirements.txt "$@"
    rm -rf "$work/run"
    (cd "$work" && PROJECT=$root venv/bin/python ten_lines.py && venv/bin/distckpt list run)
}

"$base" -m venv "$work/venv"
install_and_run "$work"/dist/*.whl
# What else both need is installed already; a second torch would only take time.
install_and_run --force-reinstall --no-deps "$work"/dist/*.tar.gz
ls -l "$work/dist"
