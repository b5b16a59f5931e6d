#!/usr/bin/env bash
# bench/evidence_gpu.sh OUTDIR [SECONDS [PROTOCOL [FLAG...]]]: runs a protocol on one GPU, many trainings at once, and begins no
# further run after SECONDS (200). Default: bench/evidence/cifar10-lt.toml. Flags are those of python -m ltsam_fast evidence.
#
# Needs torch, matplotlib, and for the build pybind11 and ninja; no network. Images: .data/cifar10-16.tar of
# bench/evidence/prepare_cifar10.py, made elsewhere.
#
# Runs are in evidence-out/NAME, NAME being the protocol's. OUTDIR/NAME.tgz has them, tables and charts, without weights; it is
# written anew every 20 seconds, so that a call that was stopped counts. A further call trains only what is not finished there.
# On another machine: with that file as .data/NAME.tgz. With SECONDS 0 a call only writes the tables of what is finished.
#
# JOBS processes (4) train TOGETHER runs (8) each in turns, every run in CUDA graphs of its own and on a stream of its own.
set -uo pipefail
out=$(mkdir -p "${1:?usage: bench/evidence_gpu.sh OUTDIR [SECONDS [PROTOCOL [FLAG...]]]}" && cd "$1" && pwd) || exit 2
seconds=${2:-200}
cd "$(dirname "$0")/.." || exit
protocol=${3:-bench/evidence/cifar10-lt.toml}
name=$(basename "${protocol%.*}")
runs=evidence-out/$name
mkdir -p "$runs"
[[ -f .data/$name.tgz ]] && tar -xzkf ".data/$name.tgz" -C "$runs" 2>/dev/null # what is there already stays
[[ -d .data/cifar10-16 ]] || tar -xf .data/cifar10-16.tar -C .data || exit 2

if python3 -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
    LTSAM_CUDA_ARCHS=${LTSAM_CUDA_ARCHS:-$(python3 -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")}
    export LTSAM_CUDA_ARCHS
    timeout 200 python3 -m pip install -q --no-index --no-deps --no-build-isolation -e . || exit
    pace=(--jobs "${JOBS:-4}" --together "${TOGETHER:-8}")
else
    echo "no GPU: the same on the CPU"
    pace=(--jobs 2)
    ((seconds > 0)) && pace+=(--no-graph) # else runs that were captured are read
fi
keep() { tar -czf "$out/$name.part" -C "$runs" . 2>/dev/null && mv "$out/$name.part" "$out/$name.tgz"; }
while sleep 20; do keep; done &
saver=$!
trap 'kill $saver' EXIT
begin=$SECONDS
OMP_NUM_THREADS=1 python3 -m ltsam_fast evidence "$protocol" --out "$runs" --quiet --limit "$seconds" "${pace[@]}" "${@:4}"
status=$?
echo "exit $status after $((SECONDS - begin)) s, $(find "$runs" -name log.csv | wc -l) runs begun or finished"
keep
exit $status
