"""Records the weights of every method after 20 steps, to compare before and after a change of the optimizer layer.

    python -m tests.record before.pt
    python -m tests.record after.pt --compare before.pt

Each method runs with three bases, through the closure and the phases, in three dtypes, on the backends cpu and torch; two small
cases run in Triton's interpreter too. Equal means equal in every bit.
"""

import argparse
import itertools
import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch.optim import SGD, AdamW, RMSprop

import ltsam_fast as lf

from .method_rows import PHASED, ROWS, closure_of, step_in_phases
from .oracles import batches, flat, network

BASES = {
    "sgd": (SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}),
    "adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "rmsprop": (RMSprop, {"lr": 0.01}),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def weights(name, base, interface, dtype, backend, steps=20):
    """The weights after ``steps`` steps, flat, float64."""
    kind, options = BASES[base]
    model = network(dtype)
    with lf.use_backend(backend):
        opt = ROWS[name].make(model, kind, **options)
        for x, y in batches(dtype, steps=steps):
            losses = closure_of(model, x, y)
            step_in_phases(opt, losses) if interface == "phases" else opt.step(losses, targets=y)
    return flat(model)


def record():
    """The weights of every case, by its name."""
    cases = list(itertools.product(ROWS, BASES, ("closure", "phases"), DTYPES, ("cpu", "torch")))
    cases += [(name, "sgd", "closure", torch.float32, "triton") for name in ("SAM", "FocalSAM")]
    found = {}
    for name, base, interface, dtype, backend in cases:
        if interface == "closure" or ROWS[name].method in PHASED:
            steps = 5 if backend == "triton" else 20
            found[f"{name} {base} {interface} {dtype} {backend}"] = weights(
                name, base, interface, dtype, backend, steps
            )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="where the weights go")
    parser.add_argument("--compare", metavar="BEFORE", help="weights recorded before")
    args = parser.parse_args()
    found = record()
    torch.save(found, args.output)
    if args.compare:
        before = torch.load(args.compare)
        differing = {name for name in found.keys() | before.keys() if not same(found.get(name), before.get(name))}
        for name in sorted(differing):
            both = name in found and name in before
            print(name, float((found[name] - before[name]).norm() / before[name].norm()) if both else "not in both")
        print(f"{len(found)} cases, {len(differing)} differ")
        return int(bool(differing))
    print(f"{len(found)} cases recorded")
    return 0


def same(one, other):
    return one is not None and other is not None and torch.equal(one, other)


if __name__ == "__main__":
    sys.exit(main())
