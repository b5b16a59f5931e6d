"""A loop with Accelerate: ``python -m ltsam_fast.examples.accelerate_loop``, or ``torchrun --nproc-per-node=2 -m ...``.

Has a schedule, gradient accumulation, clipping and mixed precision, by the accelerator's settings; with ``--out`` checkpoints.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ltsam_fast.command_line import one_line
from ltsam_fast.examples.common import arguments, loader, method_of, report
from ltsam_fast.models import small_cnn


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains and returns the test accuracies."""
    from accelerate import Accelerator, DataLoaderConfiguration

    from ltsam_fast.trainers.accelerate import AcceleratedStep

    options = arguments(__doc__, argv, epochs=25, lr=0.05)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if options.bf16 else "no",
        gradient_accumulation_steps=options.accumulate,
        dataloader_config=DataLoaderConfiguration(split_batches=True),  # each batch is split between the processes
    )
    model = small_cnn()
    method, own = method_of(options, head=model[-1])
    base = {"lr": options.lr, "momentum": 0.9, "weight_decay": 5e-4}
    optimizer: Any = method(model.parameters(), torch.optim.SGD, **own, max_grad_norm=options.clip, **base)
    schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    wrapped, optimizer, batches, schedule = accelerator.prepare(
        model, optimizer, loader(options.data, options.accumulate), schedule
    )

    def losses(batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(wrapped(x), y, reduction="none")

    step = AcceleratedStep(accelerator, wrapped, optimizer, losses)
    for epoch in range(resume(accelerator, options.out), options.epochs):
        seen: list[Tensor] = []
        for batch in batches:
            with accelerator.accumulate(wrapped):
                loss = step(batch)
                schedule.step()
            seen += [] if loss is None else [loss]
        if (epoch + 1) % 5 == 0:
            accelerator.print(f"epoch {epoch + 1}: mean loss {torch.stack(seen).mean():.3f}")
        save(accelerator, options.out, epoch + 1)
    return report(options, model.cpu(), accelerator.print)


def save(accelerator: Any, folder: Path | None, epoch: int) -> None:
    """Writes a checkpoint under another name and renames it: ``save_state`` makes several files, and may be killed at any."""
    if folder is None:
        return
    accelerator.save_state(str(folder / "unfinished"))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (folder / "unfinished").rename(folder / f"epoch_{epoch}")
        shutil.rmtree(folder / f"epoch_{epoch - 1}", ignore_errors=True)


def resume(accelerator: Any, folder: Path | None) -> int:
    """Loads the latest checkpoint, if there is one; returns its epoch."""
    epochs = [] if folder is None else [int(path.name.removeprefix("epoch_")) for path in folder.glob("epoch_*")]
    if not epochs:
        return 0
    accelerator.load_state(f"{folder}/epoch_{max(epochs)}")
    return max(epochs)


if __name__ == "__main__":
    with one_line("accelerate_loop"):
        main()
