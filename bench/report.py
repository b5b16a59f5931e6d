"""``python -m bench.report FILE.json [OUTDIR]``: the benchmarks' JSON as a Markdown table and a chart.

Reads and draws only; it does not import the package, which the repository root on the path would hide.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEAD = "| method | network | backend | plain (ms) | fused (ms) | ratio | GB/s | share of roof | ratio if at the roof |"


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The measured benchmarks' extra figures."""
    return [entry["extra_info"] for entry in results["benchmarks"] if "ratio" in entry["extra_info"]]


def table(results: dict[str, Any]) -> str:
    """A Markdown table with what was measured, on which machine and commit."""
    found = rows(results)
    machine = results["machine_info"]["cpu"].get("brand_raw", "unknown CPU")
    commit = results.get("commit_info", {}).get("id", "unknown")[:10]
    lines = [
        f"{results['datetime'][:10]}, {machine}, {found[0]['threads']} threads, device {found[0]['device']}, "
        f"torch {found[0]['torch']}, commit {commit}; roof {found[0]['roof_gb_per_s']:.0f} GB/s.",
        "",
        HEAD,
        "|---" * (HEAD.count("|") - 1) + "|",
    ]
    for row in found:
        lines.append(
            f"| {row['method']} | {row['network']} | {row['backend']} | {row['plain_ms']:.2f} | {row['fused_ms']:.2f} | "
            f"{row['ratio']:.1f} | {row['gb_per_s']:.0f} | {row['share_of_roof']:.0%} | {row['ratio_at_roof']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """Bars of the ratio to the plain loop, and of the share of the bandwidth roof."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = rows(results)
    labels = [f"{row['method']}\n{row['network']}\n{row['backend']}" for row in found]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
    for axes, key, title in (
        (left, "ratio", "times faster than the plain loop"),
        (right, "share_of_roof", "share of roof"),
    ):
        bars = axes.bar(range(len(found)), [row[key] for row in found])
        axes.bar_label(bars, fmt="%.2g")
        axes.set_xticks(range(len(found)), labels, fontsize=7)
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(arguments: list[str]) -> int:
    """Prints the table; with a folder, writes report.md and report.png there."""
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    results = json.loads(Path(arguments[0]).read_text())
    print(text := table(results))
    if len(arguments) == 2:
        folder = Path(arguments[1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.md").write_text(text)
        draw(results, folder / "report.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
