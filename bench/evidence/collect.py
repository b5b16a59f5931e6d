"""``python -m bench.evidence.collect RUNS FILE.csv``: every tenth epoch of all runs of a protocol, as one table."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

COLUMNS = ("epoch", "lr", "train_loss", "all", "many", "medium", "few", "seconds")


def main(runs: Path, file: Path) -> None:
    """Collects the logs of ``runs``, the folder of ``python -m ltsam_fast evidence``, into ``file``."""
    with file.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("stage", "method", "loss", "seed", *COLUMNS))
        for log in sorted(runs.glob("*/*/seed*/log.csv")):
            stage, cell, seed = log.relative_to(runs).parts[:3]
            method, _, loss = cell.rpartition("-")
            with log.open() as rows:
                for row in csv.DictReader(rows):
                    if row["epoch"] == "1" or int(row["epoch"]) % 10 == 0:
                        row |= {"lr": f"{float(row['lr']):.6g}", "train_loss": f"{float(row['train_loss']):.4f}"}
                        writer.writerow((stage, method, loss, seed[4:], *(row[name] for name in COLUMNS)))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
