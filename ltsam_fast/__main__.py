"""The command line: ``ltsam info|demo|train|compare|evidence|diagnose``, or ``python -m ltsam_fast ...``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import sys
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch

import ltsam_fast
from ltsam_fast import backend
from ltsam_fast.command_line import Parser, one_line
from ltsam_fast.optim.options import did_you_mean

COMMANDS = {
    "info": "versions, and available backends, with the reason for each that is not",
    "demo": "train a small network on long-tailed digits with SGD, SAM, Focal-SAM and others (demo --help tells more)",
    "train": "train a network on long-tailed data, with any method, loss and dataset",
    "compare": "train a grid of methods, losses and seeds; table and charts",
    "evidence": "compare methods by a protocol, with options chosen on held-out images",
    "diagnose": "sharpness, gradients and curvature by class, from a checkpoint",
}
TRAINING = ("train", "compare", "evidence", "diagnose")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; ``argv`` as in ``sys.argv[1:]``."""
    parser = Parser(
        prog="ltsam",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:8} {text}" for name, text in COMMANDS.items()),
    )
    parser.add_argument("--version", action="version", version=f"ltsam_fast {ltsam_fast.__version__}")
    parser.add_argument("command", metavar="COMMAND", nargs="?", help=f"one of {', '.join(COMMANDS)}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the command; try COMMAND --help")
    asked = parser.parse_args((sys.argv[1:] if argv is None else argv) or ["--help"])
    if asked.command is None:
        parser.error("a command must be given: --help lists them")
    if asked.command not in COMMANDS:
        meant = did_you_mean(asked.command, COMMANDS)
        parser.error(f"there is no command {asked.command!r}{meant} There are {', '.join(COMMANDS)}")
    if asked.command == "info":
        Parser(prog=f"{parser.prog} info", description=COMMANDS["info"]).parse_args(asked.arguments)
        with one_line(f"{parser.prog} info"):
            print(info())
    elif asked.command in TRAINING:
        with one_line(f"ltsam_fast {asked.command}"):
            commands = importlib.import_module("ltsam_fast.train.cli")
        sys.exit(commands.main([asked.command, *asked.arguments]))
    else:
        importlib.import_module("ltsam_fast.demo").main(asked.arguments)


def info() -> str:
    """Returns versions, threads and all backends, with the reason for each that is not available."""
    cpu, cuda = _core("_cpu"), _core("_cuda")
    facts = {
        "ltsam_fast": ltsam_fast.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "triton": _triton_version(),
        "numpy": np.__version__,
        "CPU threads": torch.get_num_threads(),
    }
    if cpu is not None:
        facts["CPU core"] = "with OpenMP" if cpu.OPENMP else "without OpenMP: one thread, whatever the number above"
    if cuda is not None:
        facts["CUDA core"] = "for " + " ".join(f"sm_{arch // 10}" for arch in cuda.ARCHS)
    return "\n".join([*(f"{name:12} {fact}" for name, fact in facts.items()), "", backend.report()])


def _core(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"ltsam_fast.{name}")
    except ImportError:  # the reason is in backend.report()
        return None


def _triton_version() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    try:
        return str(importlib.import_module("triton").__version__)
    except Exception as error:  # info must not fail with a broken Triton
        return f"does not load: {type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
