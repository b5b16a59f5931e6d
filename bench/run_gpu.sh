#!/usr/bin/env bash
# bench/run_gpu.sh OUTDIR: everything to be done on a GPU machine, in under ten minutes: build, tests, memory and race checks
# of the kernels, benchmarks, table and chart. Needs torch, pytest, pytest-benchmark, pybind11 and ninja; no network.
# Without a GPU it runs the same commands on the CPU, so that a typing error is found before a GPU is paid for.
set -uo pipefail
out=$(mkdir -p "${1:?usage: bench/run_gpu.sh OUTDIR}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
failed=0
run() { echo "== $*"; timeout 240 "$@" || { echo "== failed: $*"; failed=1; }; }

run python3 -m pip install -q --no-index --no-deps --no-build-isolation -e .
run python3 -m ltsam_fast info | tee "$out/info.txt"
run python3 -m pytest -q tests -k "not wheel" 2>&1 | tail -n 40 | tee "$out/tests.txt"
if command -v compute-sanitizer >/dev/null && python3 -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
    for tool in memcheck racecheck; do
        LTSAM_BACKEND=cuda run compute-sanitizer --tool "$tool" --error-exitcode 1 python3 -m bench.sanitize \
            2>&1 | tail -n 5 | tee "$out/$tool.txt"
    done
fi
run python3 -m pytest -q bench --benchmark-json="$out/bench.json" 2>&1 | tail -n 5
run python3 -m bench.report "$out/bench.json" "$out"
exit $failed
