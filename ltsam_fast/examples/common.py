"""Arguments, data, methods by name and test accuracies, for all examples."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ltsam_fast.command_line import Parser
from ltsam_fast.data import LongTailed, digits
from ltsam_fast.demo import METHODS, Setting, accuracies, options_of
from ltsam_fast.optim import SharpnessAware, list_methods
from ltsam_fast.optim.registry import method_named

BATCH = 64


def arguments(description: str | None, argv: list[str] | None, epochs: int, lr: float) -> argparse.Namespace:
    """Parses the command line, loads the data into ``data`` and seeds torch's random numbers."""
    parser = Parser(description=(description or "").splitlines()[0])
    names = ", ".join(list_methods())
    parser.add_argument("--method", default="focal_sam", metavar="NAME", help=f"{names} (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=epochs, help="default %(default)s")
    parser.add_argument("--lr", type=float, default=lr, help="learning rate (default %(default)s)")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step (default %(default)s)")
    parser.add_argument(
        "--clip", type=float, default=1.0, help="maximum norm of the gradient, 0: no clipping (default %(default)s)"
    )
    parser.add_argument("--bf16", action="store_true", help="forward passes in bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for a checkpoint after each epoch; a run there goes on"
    )
    options = parser.parse_args(argv)
    for name in ("epochs", "accumulate"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: must be at least 1, got {getattr(options, name)}")
    if not 0 <= options.seed < 2**32:
        parser.error(f"--seed: must be a whole number in [0, 2^32), got {options.seed}")
    if options.accumulate > BATCH:
        parser.error(f"--accumulate: must be at most {BATCH}, got {options.accumulate}")
    method_named(options.method)
    torch.set_num_threads(1)  # a second thread slows such small networks down
    torch.manual_seed(options.seed)
    options.data = digits(seed=options.seed)
    options.steps = options.epochs * math.ceil(len(options.data.train_y) / BATCH)
    return options


def loader(data: LongTailed, accumulate: int = 1) -> DataLoader[Any]:
    """Returns a loader of shuffled micro-batches; ``accumulate`` of them have :data:`BATCH` samples."""
    return DataLoader(TensorDataset(data.train_x, data.train_y), batch_size=BATCH // accumulate, shuffle=True)


def method_of(options: argparse.Namespace, head: nn.Module) -> tuple[type[SharpnessAware], dict[str, Any]]:
    """Returns the method and its options; ``head`` is the classifier, which CC-SAM needs."""
    method = method_named(options.method)
    setting = Setting(nn.Sequential(head), options.data.class_counts, options.steps)
    return method.cls, method.options_with(options_of(options.method, setting))


def report(
    options: argparse.Namespace, predict: Callable[[Tensor], Tensor], show: Callable[[str], None] = print
) -> dict[str, float]:
    """Prints and returns the test accuracies; ``predict`` returns logits, shape (M, C)."""
    result = accuracies(predict, options.data)  # type: ignore[arg-type]  # accuracies() only calls it
    shown = "  ".join(f"{group} {value:.1f}" for group, value in result.items())
    show(f"{METHODS[options.method]}: test accuracy (%): {shown}")
    return result
