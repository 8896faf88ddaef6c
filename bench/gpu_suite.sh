#!/bin/bash
# Builds the tree on a GPU machine without a network and runs all checks and benchmarks that need a GPU, in less than 9
# minutes: first correctness, then benchmarks.
#
#   bench/gpu_suite.sh                  all sections
#   bench/gpu_suite.sh --only step      one section (may be repeated)
#   bench/gpu_suite.sh --list           the sections and their time caps in seconds
#   bench/gpu_suite.sh --cpu            the same code without a GPU: small shapes, no figures, generous caps
#
# Environment: OUT     folder for the results (default bench/results): one JSON per section, written as soon as it ends,
#                      and with figures of a card a second time as record-SECTION-CARD-DATE.json
#              WHEELS  folder with wheels of packages this machine lacks; installed from there and nowhere else
#              PYTHON  interpreter that has torch (default python3)
# Exit code 0 only if every section that ran is ok.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
SECTIONS=(build tests ops attention step digits)
# Seconds on one H200: 530 in all, the rest of 9 minutes is for starting sections and ending those that are cut.
declare -A CAP=([build]=100 [tests]=145 [ops]=130 [attention]=35 [step]=75 [digits]=45)

cpu=
only=()
while (($#)); do
    case $1 in
        --only)
            [[ -n ${2:-} && -n ${CAP[${2:-}]:-} ]] || { echo "gpu_suite: --only needs one of: ${SECTIONS[*]}" >&2; exit 2; }
            only+=("$2")
            shift 2
            ;;
        --cpu)
            cpu=1
            shift
            ;;
        --list)
            for name in "${SECTIONS[@]}"; do echo "$name ${CAP[$name]}"; done
            exit 0
            ;;
        *)
            echo "gpu_suite: unknown argument $1 (known: --only NAME, --list, --cpu)" >&2
            exit 2
            ;;
    esac
done
((${#only[@]})) || only=("${SECTIONS[@]}")
if [[ $cpu ]]; then for name in "${SECTIONS[@]}"; do CAP[$name]=900; done; fi

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

if [[ -n ${WHEELS:-} ]]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$scratch/site" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$scratch/site"
fi

section_build() {
    local arch=
    if [[ ! $cpu ]]; then
        arch=$("$PYTHON" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a == 9))') || return
        export PRISM_FAST_CUDA=1 PRISM_FAST_CUDA_ARCHS=$arch
    fi
    "$PYTHON" setup.py build_ext --inplace || return
    "$PYTHON" -c 'import sys; from prism_fast.ops import native; assert native.has_cuda() or (sys.argv[1] and native.available()), native.why_not(); print("native module:", native.module().cuda_archs if native.has_cuda() else "no CUDA kernels")' "$cpu"
}

section_tests() {
    # Only the files that have GPU tests: importing the others would ask for packages this machine may lack. Those of
    # the trainer ask for its packages too.
    local files missing
    mapfile -t files < <(grep -rlE "mark\.gpu|support\.triton_device" tests --include='test_*.py')
    if ! missing=$("$PYTHON" -c 'import prism_fast.train.pipeline' 2>&1); then
        echo "tests of the trainer are left out: ${missing##*$'\n'}"
        mapfile -t files < <(printf '%s\n' "${files[@]}" | grep -vE '^tests/(train|rollout|engine|track|contracts)/')
    fi
    "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu "${files[@]}" || return
    # The Triton tests carry no mark: the same tests run in the interpreter elsewhere and on the card here.
    local mark=()
    if [[ $cpu ]]; then mark=(-m "not long"); fi
    "$PYTHON" -m pytest -q -p no:cacheprovider "${mark[@]}" tests/kernels \
        --ignore tests/kernels/test_kernel_forms.py
}

section_ops() {
    "$PYTHON" -m prism_fast.cli bench ops ${cpu:+--cpu} --seconds 1.5 --json "$scratch/ops.data.json" ${BENCH_OPS_ARGS:-}
}

section_attention() {
    # The last of the ops above, which the cap there may cut.
    "$PYTHON" -m prism_fast.cli bench ops ${cpu:+--cpu} --op attention --seconds 2 --json "$scratch/attention.data.json"
}

section_step() {
    # Five steps of every column, an optimizer update each, at the widths of the 4B policy and the 2B x 4 discriminator.
    local shapes=(
        --device cuda --depth 2 --checkpointing --rounds 5
        --prompt 1024 --response 1024 --teacher 768 --prompt 2048 --response 512 --teacher 512
    )
    if [[ $cpu ]]; then shapes=(--device cpu --rounds 1 --rollouts 2 --prompt 24 --response 8); fi
    "$PYTHON" -m prism_fast.cli bench step "${shapes[@]}" --json "$scratch/step.data.json" ${BENCH_STEP_ARGS:-}
}

section_digits() {
    # Only the metrics of the run directory come back. A run that the cap ends is still a result.
    local settings=(device=cuda)
    if [[ $cpu ]]; then
        settings=(
            device=cpu threads=1 model.tiny.vocab_size=600 sft.max_updates=60 sft.eval_every=30 sft.optimizer.lr=4e-3
            warmup.prompts=2 warmup.pairs_per_prompt=2 warmup.eval_every=2 warmup.target_margin=-100
            align.steps=1 align.prompts=2 align.rollout.n=4 rlvr.steps=1 rlvr.prompts=2 rlvr.rollout.n=4
            data.digits.eval_images=8 data.digits.sft_val_images=8
        )
    fi
    "$PYTHON" -m prism_fast.cli run digits "${settings[@]}" "out=$scratch/digits"
}

after_digits() {
    local file
    for file in metrics.jsonl report.html; do
        if [[ -f $scratch/digits/$file ]]; then cp "$scratch/digits/$file" "$OUT/digits-$file"; fi
    done
}

status=0
summary=()
: > "$OUT/suite.log"
export -f section_build section_tests section_ops section_attention section_step section_digits
export PYTHON scratch cpu
for name in "${SECTIONS[@]}"; do
    [[ " ${only[*]} " == *" $name "* ]] || continue
    echo "== $name (at most ${CAP[$name]} s)" | tee -a "$OUT/suite.log"
    started=$(date +%s.%N)
    set +e
    timeout -k 10 "${CAP[$name]}" bash -c "set -uo pipefail; section_$name" 2>&1 | tee -a "$OUT/suite.log"
    code=${PIPESTATUS[0]}
    set -e
    if [[ $(type -t "after_$name") == function ]]; then "after_$name"; fi
    line=$("$PYTHON" bench/flush.py --section "$name" --exit-code "$code" --cap "${CAP[$name]}" --started "$started" \
        --data "$scratch/$name.data.json" --out "$OUT/$name.json")
    summary+=("$line")
    first=${line%%$'\n'*}
    [[ $first == *" ok "* || ($name == digits && $first == *" cut "*) ]] || status=1
done

echo
cat bench/UNMEASURED.md
echo
printf '%s\n' "${summary[@]}"
exit $status
