#!/usr/bin/env bash
# bench/run_gpu.sh OUTDIR: everything to be done on a GPU machine, in under ten minutes: build, GPU tests, memory and race
# checks of the kernels, counters, benchmarks, table and charts. Needs torch, pytest, pytest-benchmark, pybind11 and ninja; no
# network. Eight files in OUTDIR: info, tests, memcheck, racecheck and ncu (.txt), bench.json, report.md, report.png.
#
# Without a GPU it runs the same commands, Triton in its interpreter and CUDA compiled only, with a few quick benchmarks: so
# that a typing error is found before a GPU is paid for.
set -uo pipefail
out=$(mkdir -p "${1:?usage: bench/run_gpu.sh OUTDIR}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
failed=()

# step NAME SECONDS COMMAND...: output goes to OUTDIR/NAME.txt, its end to the terminal; a failure is reported at the end.
step() {
    local name=$1 seconds=$2 log="$out/$1.txt" begin=$SECONDS
    shift 2
    echo "== $name: $*"
    timeout "$seconds" "$@" >"$log" 2>&1
    local status=$?
    tail -n 12 "$log"
    ((status == 0)) || failed+=("$name (exit $status)")
    echo "== $name: exit $status after $((SECONDS - begin)) s"
}
python_has() { python3 -c "import sys, importlib.util as u; sys.exit(u.find_spec('$1') is None)"; }

gpu=1
python3 -c "import torch, sys; sys.exit(not torch.cuda.is_available())" || gpu=0
workers=()
python_has xdist && workers=(-n 4)

if ((gpu)); then
    export LTSAM_REQUIRE=cpu,cuda
    tests=(tests/test_ops.py tests/test_every_backend.py tests/test_random.py tests/test_losses.py tests/test_graph.py -k "cuda or triton or gpu")
    benches=(bench)
else
    echo "== no GPU: a dry run on the CPU"
    tests=(tests/test_graph.py tests/test_triton_compile.py tests/test_cuda_source.py -k "not bits")
    benches=(bench -k "test_step and resnet32 or growth or family and resnet32 and GNM or losses and 10")
fi

step build 180 python3 -m pip install -q --no-index --no-deps --no-build-isolation -e .
step info 60 python3 -m ltsam_fast info
step tests 200 python3 -m pytest -q "${workers[@]}" "${tests[@]}"
if ((gpu)) && command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        LTSAM_BACKEND=cuda step $tool 90 compute-sanitizer --tool $tool --error-exitcode 1 python3 -m bench.sanitize
    done
else
    step memcheck 60 python3 -m bench.sanitize
fi
if ((gpu)) && command -v ncu >/dev/null; then
    LTSAM_BACKEND=cuda step ncu 60 ncu --clock-control none --kernel-name regex:map_kernel --launch-count 12 \
        --metrics gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active \
        python3 -m bench.sanitize large
fi
step bench 280 python3 -m pytest -q "${benches[@]}" --benchmark-json="$out/bench.json"
step report 60 python3 -m bench.report "$out/bench.json" "$out"
rm -f "$out"/{build,bench,report}.txt
((${#failed[@]} == 0)) || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
