#!/usr/bin/env bash
# Tries distckpt on a CUDA device, in under six minutes and without a network: tests/gpu, a
# benchmark of 1.5 GB in one process over NCCL, and a small one of two ranks that share the
# device over gloo. The machine needs torch 2.11 or newer with its numpy, and nothing else:
#
#   launch/gpu.sh pack                  on a machine with a network: packs what else is needed,
#                                       from an index of packages, into build/gpu-wheels
#   launch/gpu.sh                       on the machine with the device, with that folder copied
#   launch/gpu.sh --dry-run             the same steps on the CPU, with a small benchmark
#
# PYTHON is the Python to use; PIP_FIND_LINKS more folders of wheels to install from; BENCH_DIRECTORY
# where the benchmark writes (15 GB are needed there); RESULTS_DIRECTORY where outputs are kept;
# BENCH_PHASES what is measured, in place of all that there is time for; PYTHON_VERSIONS and PLATFORMS for whom "pack"
# packs.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# Written by "pack" alone, and always here: PIP_FIND_LINKS may be a folder that others use.
wheels=$root/build/gpu-wheels
site=$root/build/gpu-site
results=${RESULTS_DIRECTORY:-$root/build/gpu-results}
# As pyproject.toml has them; torch and numpy are the machine's own, and torch needs jinja2.
packages=('click>=8.1' 'jinja2>=3.1' 'filelock>=3.32.7' 'rich>=13.7' 'xxhash>=3.4' 'pytest>=8.2'
    'pytest-timeout>=2.3')
tests_seconds=140
bench_seconds=150
shared_seconds=45

fail() {
    echo "gpu: $*" >&2
    exit 2
}

pack() {
    local python=${PYTHON:-python3} version platform
    local platforms=()
    for platform in ${PLATFORMS:-manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64}; do
        platforms+=(--platform "$platform")
    done
    mkdir -p "$wheels"
    for version in ${PYTHON_VERSIONS:-3.10 3.11 3.12 3.13}; do
        "$python" -m pip download --quiet --disable-pip-version-check --only-binary=:all: \
            --implementation cp --python-version "$version" "${platforms[@]}" \
            --dest "$wheels" "${packages[@]}"
    done
    echo "gpu: packed $(find "$wheels" -name '*.whl' | wc -l) wheels into $wheels; copy this folder as it is."
}

# Prints "ok" and what the machine is if this Python can be used, and why not otherwise.
look_at() {
    "$1" - "$device" <<'PYTHON' 2>&1 | tail -1
import re, sys
try:
    import torch
except ImportError as error:
    sys.exit(f"it has no torch ({error})")
if sys.version_info < (3, 10):
    sys.exit("it is older than 3.10")
if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 11):
    sys.exit(f"its torch is {torch.__version__}, older than 2.11")
machine = f"the CPU (dry run); torch {torch.__version__}"
if sys.argv[1] == "cuda":
    if not torch.cuda.is_available():
        sys.exit(f"its torch {torch.__version__} sees no CUDA device")
    name, count = torch.cuda.get_device_name(), torch.cuda.device_count()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    machine = f"{name} ({count}); torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}"
print("ok", machine)
PYTHON
}

find_python() {
    local candidate found
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        command -v "$candidate" >/dev/null || continue
        found=$(look_at "$candidate") || true
        if [[ $found == "ok "* ]]; then
            python=$candidate
            machine=${found#ok }
            return
        fi
        echo "gpu: $candidate cannot be used: $found" >&2
    done
    fail "no Python with torch 2.11 or newer${for_device}; set PYTHON=/path/to/python3."
}

# Names what cannot be imported, or is too old, in one line.
missing() {
    "$python" - "${packages[@]}" <<'PYTHON'
import importlib.metadata, re, sys
def numbers(text):
    return tuple(map(int, re.findall(r"\d+", text)[:3]))
found = []
for name, least in (package.split(">=") for package in sys.argv[1:]):
    try:
        if numbers(importlib.metadata.version(name)) < numbers(least):
            found.append(f"{name}>={least}")
    except importlib.metadata.PackageNotFoundError:
        found.append(f"{name}>={least}")
print(" ".join(found))
PYTHON
}

install_missing() {
    local lacking
    export PYTHONPATH=$root:$site
    lacking=$(missing)
    [ -z "$lacking" ] && return
    if [ ! -d "$wheels" ] && [ -z "${PIP_FIND_LINKS:-}" ]; then
        fail "missing: $lacking. Run 'launch/gpu.sh pack' on a machine with a network and copy build/gpu-wheels here, or set PIP_FIND_LINKS to a folder of wheels."
    fi
    # With PIP_FIND_LINKS set, pip looks there by itself, unless it is told of others.
    local links=(--find-links "$wheels") folder
    for folder in ${PIP_FIND_LINKS:-}; do links+=(--find-links "$folder"); done
    # Into a folder that only these runs see: the machine's own packages stay as they are.
    # shellcheck disable=SC2086  # several words
    "$python" -m pip install --quiet --disable-pip-version-check --no-index \
        "${links[@]}" --upgrade --target "$site" $lacking ||
        fail "missing: $lacking. Not all of it is in $wheels${PIP_FIND_LINKS:+ or $PIP_FIND_LINKS} for this Python; run 'launch/gpu.sh pack' with its version in PYTHON_VERSIONS."
    lacking=$(missing)
    [ -z "$lacking" ] || fail "missing: $lacking, also after installing it into $site."
}

# Runs one step with a limit of seconds; keeps its output, and goes on if it fails.
step() {
    local name=$1 seconds=$2 code=0
    shift 2
    echo "gpu: $name (at most $seconds s)"
    # SIGINT lets the benchmark show what it has and remove its files.
    timeout --signal=INT --kill-after=10 "$seconds" "$@" >"$results/$name.txt" 2>"$results/$name.err" || code=$?
    codes+=("$name: $(outcome "$code")")
    [ "$code" -eq 0 ] || { failed=1; tail -n 30 "$results/$name.txt" "$results/$name.err"; }
}

outcome() {
    case $1 in
        0) echo ok ;;
        124 | 137) echo "FAILED: not done in time" ;;
        *) echo "FAILED: exit code $1" ;;
    esac
}

device=cuda
for_device=" that sees a CUDA device"
on_device=(--cuda)
scale=()
case ${1:-} in
    pack)
        pack
        exit
        ;;
    --dry-run)
        device=cpu
        for_device=""
        on_device=()
        scale=(--scale 0.001)
        ;;
    "") ;;
    *) fail "unknown: $1; without arguments, or one of: pack, --dry-run." ;;
esac

python=""
machine=""
find_python
install_missing
directory=${BENCH_DIRECTORY:-$root/build/gpu-bench}
rm -rf "$results"
mkdir -p "$results" "$directory"
codes=()
failed=0
export DISTCKPT_GPU_TESTS_DEVICE=$device
began=$SECONDS
step tests "$tests_seconds" "$python" -m pytest -p no:cacheprovider tests/gpu
# One process is a job of one rank, whose group is NCCL with --cuda.
step bench "$bench_seconds" "$python" -m distckpt.bench --directory "$directory" \
    "${on_device[@]}" "${scale[@]}" --workload gpt2-sharded --compare dcp,torch-save --repeat 2 \
    --phases "${BENCH_PHASES:-save,async,lost,warm,memory,gate}" --json "$results/bench.json"
# NCCL refuses two ranks on one device, so their group is gloo.
if [ -z "${BENCH_PHASES:-}" ]; then
    step bench-shared "$shared_seconds" "$python" -m torch.distributed.run --standalone \
        --nproc-per-node 2 -m distckpt.bench --directory "$directory" "${on_device[@]}" \
        --scale 0.001 --workload gpt2-sharded --compare none --repeat 1 \
        --phases save,async,warm,gate
fi
rmdir "$directory" 2>/dev/null || true

echo
grep -v '^$' "$results/bench.txt" || true
echo
echo "device: $machine"
printf '%s\n' "${codes[@]}"
grep -E '^[0-9]+ (passed|failed|skipped|error)|^=+ .* in [0-9.]+s' "$results/tests.txt" | tail -1 || true
echo "gpu: $((SECONDS - began)) s; everything is in $results"
exit "$failed"
