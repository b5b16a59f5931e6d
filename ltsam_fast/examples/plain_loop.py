"""A training loop without a trainer: ``python -m ltsam_fast.examples.plain_loop``.

Has a learning rate schedule, gradient accumulation, clipping and mixed precision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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
    for epoch in range(options.epochs):
        total = torch.zeros(())
        for x, y in batches:
            chunks = list(zip(x.chunk(options.accumulate), y.chunk(options.accumulate), strict=True))
            total += optimizer.step([closure_of(*chunk) for chunk in chunks], targets=[chunk[1] for chunk in chunks])
            schedule.step()
        if (epoch + 1) % 5 == 0:
            print(f"epoch {epoch + 1}: mean loss {total / len(batches):.3f}")
    return report(options, model)


if __name__ == "__main__":
    with one_line("plain_loop"):
        main()
