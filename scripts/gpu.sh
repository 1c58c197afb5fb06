#!/usr/bin/env bash
# Everything that wants a GPU, in steps of less than 9 minutes:
#
#   bash scripts/gpu.sh OUT                 a step whose OUT/<step>.json is there is not done again
#   bash scripts/gpu.sh OUT --dry-run       lists the steps
#   bash scripts/gpu.sh OUT --step NAME     this one only
#   bash scripts/gpu.sh OUT --device cpu --tiny    small sizes, to try the script itself
#
# A step that fails leaves OUT/<step>.log and no JSON; the others go on, and the exit code is 1. Give the same command again
# after an interruption. MNIST=PATH says where MNIST lies. Then: python scripts/gpu_report.py OUT
set -uo pipefail
cd "$(dirname "$0")/.."

out="" device=cuda tiny="" dry="" only=""
while [ $# -gt 0 ]; do
    case "$1" in
        --dry-run) dry=yes ;;
        --tiny) tiny=yes ;;
        --device) device="$2" && shift ;;
        --step) only="$2" && shift ;;
        -*) echo "error: $1: takes --device, --tiny, --dry-run, --step" >&2 && exit 2 ;;
        *) out="$1" ;;
    esac
    shift
done
[ -n "$out" ] || { echo "error: say where results go: bash scripts/gpu.sh OUT" >&2 && exit 2; }
root="$PWD" python="${PYTHON:-$PWD/.venv/bin/python}" limit=530 failed=0
[ -n "$dry" ] || mkdir -p "$out" || exit 2
out="$(realpath -m "$out")"

# step NAME COMMAND…: the command writes the file $result.
step() {
    local name="$1"
    shift
    [ -z "$only" ] || [ "$only" = "$name" ] || return 0
    if [ -n "$dry" ]; then
        echo "$name"
        return
    fi
    if [ -f "$out/$name.json" ]; then
        echo "$name: done before"
        return
    fi
    result="$out/.$name.part"
    rm -f "$result"
    if timeout --kill-after=10 "$limit" bash -c "$1" step "$result" "${@:2}" >"$out/$name.log" 2>&1 && [ -s "$result" ]; then
        mv "$result" "$out/$name.json"
        echo "$name: done"
    else
        echo "$name: failed, see $out/$name.log"
        failed=1
    fi
}
export root python device out PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# shellcheck disable=SC2016 # the commands are read by the shell of their step; $1 is the file to write
{
    looked='"$python" scripts/doctor.py --device "$device" --json "$1" "${@:2}" || [ $? -eq 1 ]'
    tested='rm -f "$out/.tests.xml"
        "$python" -m pytest -q -m gpu --junitxml="$out/.tests.xml" "$2"
        "$python" scripts/gpu_report.py --tests "$out/.tests.xml" >"$1"'
    timed='"$python" scripts/benchmark.py train --plain --device "$device" --json "$1" "${@:2}"'
    depthwise='"$python" scripts/benchmark.py depthwise --device "$device" --json "$1" "${@:2}"'
    trained='cd "$out" # where runs/ is made
        timeout --signal=TERM --kill-after=120 "$2" "$python" "$root/train.py" "$3" name=gpu train.device="$device" "${@:4}"
        code=$?
        [ $code -eq 0 ] || [ $code -eq 75 ] || [ $code -eq 124 ] || exit $code
        "$python" "$root/scripts/gpu_report.py" --run runs/gpu >"$1"'
}

if [ -n "$tiny" ]; then
    step doctor "$looked" --recipe debug
    step tests-sampling "$tested" tests/sampling
    step update-debug-fp32 "$timed" --model configs/debug.yaml --batch 2 --rounds 1 --precision fp32
    step training-1 "$trained" 300 debug train.steps=4 train.log_every=2
else
    step doctor "$looked"
    for room in $(grep -rl "mark\.gpu" tests --include="test_*.py" | cut -d/ -f2 | sort -u); do
        step "tests-$room" "$tested" "tests/$room"
    done
    for precision in fp16 bf16 tf32; do
        step "update-cifar10-$precision" "$timed" --model configs/cifar10.yaml --batch 32 --compile --precision $precision
        step "update-celeba_64-$precision" "$timed" --model configs/celeba_64.yaml --batch 16 --compile --precision $precision
        step "update-ffhq_256-$precision" "$timed" --model configs/ffhq_256.yaml --batch 4 --compile --precision $precision
    done
    step depthwise "$depthwise" --precision fp32 tf32 fp16 bf16 --rounds 20
    for part in 1 2; do # ten minutes in all
        step "training-$part" "$trained" 300 mnist train.precision=mixed ${MNIST:+"data.path=$(realpath "$MNIST")"}
    done
fi
exit "$failed"
