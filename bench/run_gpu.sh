#!/usr/bin/env bash
# bench/run_gpu.sh OUTDIR [steps|tests|bench|checks]...: runs tests and benchmarks on a GPU, each part within 8 minutes; without a
# part all four, in this order. Each starts with the build. Needs torch, pytest, pytest-benchmark, pybind11, ninja and setuptools
# from 77 on (with pytest-xdist the tests take less time, with matplotlib there are charts); no network.
#
#   steps   whole training steps, eager and as CUDA graphs         OUTDIR/steps/bench.json, report.md, steps.png
#   tests   the GPU's tests                                        OUTDIR/tests.txt
#   bench   optimizer work and losses                              OUTDIR/bench/bench.json, report.md, report.png
#   checks  memory and races of our kernels, graphs, counters      OUTDIR/memcheck.txt, racecheck.txt, graphs.txt, ncu.txt
#
# A step that takes too long is interrupted as by Ctrl-C, so that its results so far are written. The logs of steps that
# failed stay. LTSAM_LIMIT=SECONDS is a lower limit for each step.
#
# Without a GPU it runs the same commands, Triton in its interpreter and CUDA compiled only, the GPU's tests up to where they need
# one, and a few quick benchmarks, to find errors without a GPU.
set -uo pipefail
usage="usage: bench/run_gpu.sh OUTDIR [steps|tests|bench|checks]..."
out=$(mkdir -p "${1:?$usage}" && cd "$1" && pwd) || exit 2
shift
parts=("${@:-all}")
[[ ${parts[0]} == all ]] && parts=(steps tests bench checks)
for part in "${parts[@]}"; do
    [[ $part =~ ^(steps|tests|bench|checks)$ ]] || { echo "$usage, got $part" >&2; exit 2; }
done
cd "$(dirname "$0")/.." || exit
failed=()

# step NAME SECONDS COMMAND...: output goes to OUTDIR/NAME.txt, its end to the terminal; a failure is reported at the end.
step() {
    local name=$1 seconds=$2 log="$out/$1.txt" begin=$SECONDS status
    shift 2
    ((seconds > ${LTSAM_LIMIT:-seconds})) && seconds=$LTSAM_LIMIT
    echo "== $name: $*"
    timeout --signal=INT --kill-after=10 "$seconds" "$@" >"$log" 2>&1
    status=$?
    tail -n 12 "$log"
    ((status == 0)) || failed+=("$name (exit $status after $((SECONDS - begin)) s of $seconds)")
    echo "== $name: exit $status after $((SECONDS - begin)) s"
    return $status
}
finish() {
    ((${#failed[@]} == 0)) || printf 'failed: %s\n' "${failed[@]}"
    exit $((${#failed[@]} > 0))
}
python_has() { python3 -c "import sys, importlib.util as u; sys.exit(u.find_spec('$1') is None)"; }

gpu=1
python3 -c "import torch, sys; sys.exit(not torch.cuda.is_available())" || gpu=0
workers=()
python_has xdist && workers=(-n "$(($(nproc) < 14 ? $(nproc) : 14))") # Triton compiles hundreds of kernels

tests=(tests/test_capture.py tests/test_ops.py tests/test_every_backend.py tests/test_random.py tests/test_losses.py)
chosen="cuda or triton or gpu"
if ((gpu)); then
    export LTSAM_REQUIRE=cpu,cuda
    LTSAM_CUDA_ARCHS=${LTSAM_CUDA_ARCHS:-$(python3 -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")}
    export LTSAM_CUDA_ARCHS
    steps=(bench/test_whole_steps.py)
    benches=(bench/test_steps.py bench/test_loss_time.py bench/test_precision.py)
else
    echo "== no GPU: a dry run on the CPU"
    steps=(bench/test_whole_steps.py -k MLP)
    benches=(bench/test_steps.py bench/test_loss_time.py -k "test_step and resnet32 or growth or methods and resnet32 and GNM or test_loss and 10")
fi

run_steps() { benchmark steps 280 "${steps[@]}"; }
run_bench() { benchmark bench 280 "${benches[@]}"; }
benchmark() {
    local name=$1 seconds=$2
    shift 2
    mkdir -p "$out/$name"
    step "$name" "$seconds" python3 -m pytest -q "$@" --benchmark-json="$out/$name/bench.json" && rm "$out/$name.txt"
    step "report-$name" 20 python3 -m bench.report "$out/$name/bench.json" "$out/$name" && rm "$out/report-$name.txt"
}
run_tests() {
    if ((gpu)); then
        step tests 300 python3 -m pytest -q "${workers[@]}" "${tests[@]}" -k "$chosen"
    else
        step tests 60 python3 -m pytest -q "${workers[@]}" -p tests.fake_gpu "${tests[@]}" -k "$chosen"
        step kernels 230 python3 -m pytest -q "${workers[@]}" tests/test_triton_compile.py tests/test_cuda_source.py -k "not bits"
    fi
}
run_checks() {
    if ((gpu)) && command -v compute-sanitizer >/dev/null; then
        # Only our kernels, and memory from cudaMalloc itself: in a block that torch divides a write behind a tensor is not seen.
        local check=(compute-sanitizer --error-exitcode 1 --report-api-errors no --kernel-name kns=_ZN2lt)
        for tool in memcheck racecheck; do
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 LTSAM_BACKEND=cuda step $tool 80 "${check[@]}" --tool $tool python3 -m bench.sanitize
        done
        LTSAM_BACKEND=cuda step graphs 60 "${check[@]}" --tool memcheck python3 -m bench.sanitize graphs
    else
        step memcheck 80 python3 -m bench.sanitize
        step graphs 60 python3 -m bench.sanitize graphs
    fi
    if ((gpu)) && command -v ncu >/dev/null; then
        LTSAM_BACKEND=cuda step ncu 60 ncu --clock-control none --launch-count 16 \
            --kernel-name 'regex:^(map|reduce|cross_entropy)_kernel' \
            --metrics gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active \
            python3 -m bench.sanitize large
    fi
}

# pip says of what is missing here that metadata could not be made, and pytest that it knows no --benchmark-json.
python3 - <<'END' || exit 2
import sys
from importlib.metadata import PackageNotFoundError, version

missing = []
for name, least in {"torch": 2, "numpy": 1, "setuptools": 77, "pybind11": 2, "ninja": 1, "pytest": 8, "pytest-benchmark": 4}.items():
    try:
        if int(version(name).split(".")[0]) < least:
            missing.append(f"{name}>={least} (there is {version(name)})")
    except PackageNotFoundError:
        missing.append(f"{name}>={least}")
if missing:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}: pip install {' '.join(one.split(' ')[0] for one in missing)}")
END

step build 150 python3 -m pip install -q --no-index --no-deps --no-build-isolation -e . || finish
rm "$out/build.txt"
step info 20 python3 -m ltsam_fast info || finish
for part in "${parts[@]}"; do run_"$part"; done
finish
