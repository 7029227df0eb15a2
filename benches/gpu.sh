#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, correctness first, in less than 9 minutes:
#
#     benches/gpu.sh                  all steps
#     benches/gpu.sh check layer      these steps
#
# Needs this repository and a Python with PyTorch, Triton and transformers; installs and downloads nothing. Results go to
# benches/results/<device>/. Exit code: 0, 1 if a check or a step failed, 2 without a GPU.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
seconds=525

# By step: the time that is kept for it. What the steps before leave over comes on top.
declare -A reserved=([check]=130 [layer]=130 [shapes]=70 [generate]=150 [adapt]=45)
order=(check layer shapes generate adapt)
for step in "$@"; do
    [ -n "${reserved[$step]:-}" ] || { echo "gpu.sh: '$step' is not a step; the steps are ${order[*]}"; exit 1; }
done
steps=("$@")
[ "$#" -gt 0 ] || steps=("${order[@]}")

# Imports do not follow the folders: a tree of links stands in for an installation. The package's own `__init__` loads
# its plug-in for transformers, which needs all its dependencies; only the step `adapt` needs it, too.
tree="$(mktemp -d)"
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/moe_compiler"
ln -s "$root"/moe_compiler/* "$tree/moe_compiler/"
for folder in kernels passes runtime; do
    ln -s "$root/$folder" "$tree/moe_compiler/$folder"
done
summary=()
if ! (cd "$tree" && "$python" -c 'import datasets, jenkspy' 2>/dev/null); then
    rm "$tree/moe_compiler/__init__.py"
    touch "$tree/moe_compiler/__init__.py"
    wanted=("${steps[@]}")
    steps=()
    for step in "${wanted[@]}"; do
        if [ "$step" = adapt ]; then
            summary+=("adapt: left out, it needs the packages datasets and jenkspy")
        else
            steps+=("$step")
        fi
    done
fi
export PYTHONPATH="$tree${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

device="$(cd "$tree" && "$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')"
if [ -z "$device" ]; then
    echo "gpu.sh: PyTorch sees no GPU here; nothing was run"
    exit 2
fi
results="$root/benches/results/$(tr ' /' '--' <<<"$device")"
mkdir -p "$results"
log="$results/log.txt"
: >"$log"
say() { echo "$@" | tee -a "$log"; }
say "$device"
if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader | tee -a "$log"
fi

set_arguments() {
    case "$1" in
    check) arguments=(gpu_check.py) ;;
    layer) arguments=(bench_moe_layer.py --seconds 0.5 --tokens 1 16 128 2048 --csv "$results/layer.csv") ;;
    shapes)
        arguments=(bench_moe_layer.py --seconds 0.3 --modes layer --no-compile --tokens 1 16 128
            --shapes Qwen1.5-MoE-A2.7B DeepSeek-MoE-16B Mixtral-8x7B --csv "$results/shapes.csv")
        ;;
    generate) arguments=(bench_generate.py --seconds 5 --csv "$results/generate.csv") ;;
    adapt) arguments=(bench_adapt.py --csv "$results/adapt.csv") ;;
    esac
}

status=0
for i in "${!steps[@]}"; do
    step="${steps[$i]}"
    limit=$((seconds - SECONDS))
    for later in "${steps[@]:$((i + 1))}"; do
        limit=$((limit - reserved[$later]))
    done
    if [ "$limit" -lt 5 ]; then
        summary+=("$step: left out, no time")
        status=1
        continue
    fi
    say ""
    say "== $step, at most $limit s"
    start=$SECONDS
    code=0
    set_arguments "$step"
    (cd "$root/benches" && timeout --kill-after=10 "$limit" "$python" "${arguments[@]}") 2>&1 | tee -a "$log" || code=$?
    case "$code" in
    0) summary+=("$step: done in $((SECONDS - start)) s") ;;
    124 | 137) summary+=("$step: CUT SHORT after $limit s") ;;
    *) summary+=("$step: FAILED with exit code $code") ;;
    esac
    [ "$code" -eq 0 ] || status=1
done

say ""
say "== summary on $device"
for line in "${summary[@]}"; do
    say "$line"
done
[ "$status" -eq 0 ] || say "NOT ALL WELL: after a failed check the times say nothing"
exit "$status"
