"""A training loop without a trainer: ``python -m ltsam_fast.examples.plain_loop``.

Has a learning rate schedule, gradient accumulation, clipping and mixed precision. With ``--out`` it has a checkpoint, too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ltsam_fast.atomic import write
from ltsam_fast.command_line import one_line
from ltsam_fast.examples.common import arguments, loader, method_of, report
from ltsam_fast.models import small_cnn


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains and returns the test accuracies."""
    options = arguments(__doc__, argv, epochs=25, lr=0.05)
    model = small_cnn()
    method, own = method_of(options, head=model[-1])  # lf.FocalSAM and {"class_counts": ..., "rho": ...}, for instance
    base = {"lr": options.lr, "momentum": 0.9, "weight_decay": 5e-4}
    optimizer = method(model.parameters(), torch.optim.SGD, **own, model=model, max_grad_norm=options.clip, **base)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)

    def closure_of(x: Tensor, y: Tensor) -> Callable[..., Tensor]:
        def losses(i: Tensor | slice = slice(None)) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
                return F.cross_entropy(model(x[i]), y[i], reduction="none")

        return losses

    batches = loader(options.data)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    for epoch in range(resume(options.out, parts), options.epochs):
        total = torch.zeros(())
        for x, y in batches:
            chunks = list(zip(x.chunk(options.accumulate), y.chunk(options.accumulate), strict=True))
            total += optimizer.step([closure_of(*chunk) for chunk in chunks], targets=[chunk[1] for chunk in chunks])
            schedule.step()
        if (epoch + 1) % 5 == 0:
            print(f"epoch {epoch + 1}: mean loss {total / len(batches):.3f}")
        save(options.out, parts, epoch + 1)
    return report(options, model)


def save(folder: Path | None, parts: dict[str, Any], epoch: int) -> None:
    """Writes a checkpoint under another name and renames it: a kill at any time leaves the one before."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        states = {name: part.state_dict() for name, part in parts.items()}
        write(folder / "last.pt", {"epoch": epoch, "random": torch.get_rng_state(), **states})


def resume(folder: Path | None, parts: dict[str, Any]) -> int:
    """Loads the checkpoint, if there is one, random numbers for the order of the images included; returns its epoch."""
    if folder is None or not (folder / "last.pt").exists():
        return 0
    saved = torch.load(folder / "last.pt", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["random"])
    return saved["epoch"]


if __name__ == "__main__":
    with one_line("plain_loop"):
        main()
