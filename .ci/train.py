"""Trains with the installed package and nothing but torch; the argument is the backend that has to serve the CPU."""

import sys

import torch
import torch.nn.functional as F

import ltsam_fast as lf
from ltsam_fast import backend

chosen = backend.backend_for(torch.device("cpu"))
print(backend.report(), f"tensors on the CPU are served by {chosen.__name__}", sep="\n")
assert chosen.__name__ == {"cpu": "ltsam_fast._cpu", "torch": "ltsam_fast.torch_backend"}[sys.argv[1]]

torch.manual_seed(0)
counts = [100, 30, 10]
y = torch.arange(3).repeat_interleave(torch.tensor(counts))
x = torch.randn(140, 8) + 4 * F.one_hot(y, 8)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
options = {"rho": 0.05, "lr": 0.1, "momentum": 0.9, "model": model}
optimizer = lf.FocalSAM(model.parameters(), torch.optim.SGD, class_counts=counts, **options)
for _ in range(30):
    optimizer.step(lambda i=slice(None): F.cross_entropy(model(x[i]), y[i], reduction="none"), targets=y)
right = (model(x).argmax(1) == y).float().mean().item()
print(f"trained: {right:.0%} of the samples are classified")
assert right > 0.9
