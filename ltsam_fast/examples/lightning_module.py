"""A LightningModule: ``python -m ltsam_fast.examples.lightning_module``.

Has a schedule, gradient accumulation, clipping and mixed precision, by the Trainer's settings; with ``--out`` checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ltsam_fast.command_line import one_line
from ltsam_fast.examples.common import arguments, loader, method_of, report
from ltsam_fast.models import small_cnn

with one_line("lightning_module") if __name__ == "__main__" else contextlib.nullcontext():
    from ltsam_fast.trainers.lightning import SharpnessAwareModule


class Classifier(SharpnessAwareModule):
    """The demo's network. Differs from a LightningModule in the base class and in ``training_losses``."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options
        self.net = small_cnn()

    def training_losses(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the per-sample losses."""
        x, y = batch
        return F.cross_entropy(self.net(x), y, reduction="none")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs the loss at the unperturbed weights."""
        if self.training_loss is not None:
            self.log("train_loss", self.training_loss, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Returns the method and a cosine schedule that is stepped after every step."""
        method, own = method_of(self.options, head=self.net[-1])
        base = {"lr": self.options.lr, "momentum": 0.9, "weight_decay": 5e-4}
        optimizer = method(self.parameters(), torch.optim.SGD, **own, **base)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.options.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the state of the random numbers, which Lightning leaves out: it decides the order of the images."""
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores it."""
        torch.set_rng_state(checkpoint["random"])


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains and returns the test accuracies."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    options = arguments(__doc__, argv, epochs=25, lr=0.05)
    module = Classifier(options)
    trainer = Trainer(
        max_epochs=options.epochs,
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=1,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=options.clip or None,
        precision="bf16-mixed" if options.bf16 else "32-true",
        logger=False,
        callbacks=ModelCheckpoint(options.out, filename="last", enable_version_counter=False) if options.out else None,
        enable_checkpointing=options.out is not None,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    last = options.out and options.out / "last.ckpt"
    found = last if last and last.exists() else None
    safely = (
        {"weights_only": True} if "weights_only" in inspect.signature(trainer.fit).parameters else {}
    )  # Lightning 2.6
    trainer.fit(module, loader(options.data, options.accumulate), ckpt_path=found, **safely)
    return report(options, module.net.cpu())


if __name__ == "__main__":
    with one_line("lightning_module"):
        main()
