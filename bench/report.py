"""``python -m bench.report FILE.json [OUTDIR]``: prints the benchmarks' JSON as Markdown tables, and draws charts.

It does not import the package, which the repository root on the path would hide.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

SECTIONS = {
    "whole steps": (
        "network trained method published_ms ours_ms captured_ms published_sgd ours_sgd captured_sgd ours_sam published_ours "
        "published_peak_mb ours_peak_mb",
        "A whole training step, forwards and backwards included: the passes of the published code with a Python loop over the "
        "parameters, and ours. Batches of 64 random images with labels of long-tailed data, another in every round; the tail "
        "of ImbSAM and SSE-SAM is 3 % of the samples (MLP: 6 %, CNN: 2 %). Ratios are medians of those within a round: to "
        "torch's SGD, to our SAM, and published / ours.",
    ),
    "phases": (
        "method network backend plain_ms fused_ms ratio ratio_foreach ratio_compiled ratio_pytorch_optimizer gb_per_s "
        "bandwidth_gb_per_s share_of_bandwidth ratio_at_bandwidth launches host_us",
        "Optimizer work of a step through the phases (SGD with momentum), rounds in turns; ratios to the plain loop, to "
        "torch's foreach and fused parts, to those under torch.compile, and to pytorch_optimizer 4.1.0. The bandwidth "
        "is the fastest of copy, streaming copy and read; with large networks it is timed in the same rounds. Calls alone: "
        "the same step on tensors of four elements. tiny: 2000 tensors of 16 to 32 elements. Launches are kernels on a GPU, "
        "calls of native code on the CPU.",
    ),
    "methods": (
        "method network backend torch_ms fused_ms ratio gb_per_s",
        "The optimizer's work in a whole step of every method, against the same step on the backend torch, in "
        "plain PyTorch; autograd's time is left out of both.",
    ),
    "host": (
        "method tensors plain_us torch_sgd_us host_us ratio ratio_torch_sgd",
        "The phases on tensors of four elements (SGD with momentum), rounds in turns: the host's time, and the plain loop's.",
    ),
    "losses": (
        "loss shape implementation call_us ratio_plain ratio_torch gb_per_s",
        "Forward and backward of the losses on fp32 logits (samples x classes), rounds in turns; ratios to the published "
        "formula by torch's functions (of plain cross entropy: F.cross_entropy) and to the backend torch. GB/s "
        "counts the logits twice, for two passes read them, and their gradient once.",
    ),
    "growth": (
        "against size us",
        "The norm pass against the number of elements in one tensor (N) and of tiny tensors (T).",
    ),
    "one tensor": (
        "pass elements fused_ms gb_per_s share_of_bandwidth",
        "The passes over one tensor of a billion elements.",
    ),
    "16 bits": (
        "weights rounding cosine length",
        "What is left of SAM's perturbation (rho 0.05, 25 million weights) after rounding, against the one that was wanted: "
        "the cosine, and the length along it. SAM with weights of 16 bits rounds at random.",
    ),
    "whole": (
        "network method implementation ms ratio_reference ratio_sgd",
        "A whole training step, forwards and backwards included; ratios to the same method by the plain loop, and to SGD's "
        "ordinary step.",
    ),
    "shared": (
        "network trained method ms ratio_sam peak_mb",
        "A training step with both gradients from one backward pass (shared_backward=True), against SAM's: medians of the "
        "ratios within a round.",
    ),
}
"""Table -> its columns, and its caption."""
HEADS = {
    "plain_ms": "plain (ms)",
    "torch_ms": "torch (ms)",
    "plain_us": "plain (us)",
    "fused_ms": "fused (ms)",
    "ratio": "ratio",
    "ratio_foreach": "to foreach + fused",
    "ratio_compiled": "to torch.compile",
    "ratio_pytorch_optimizer": "to pytorch_optimizer",
    "ratio_plain": "to the plain formula",
    "ratio_reference": "to the eager reference",
    "ratio_sgd": "to eager SGD",
    "ratio_torch": "to the backend torch",
    "call_us": "both passes (us)",
    "ratio_sam": "times SAM's",
    "peak_mb": "peak (MB)",
    "published_ms": "published (ms)",
    "ours_ms": "ours (ms)",
    "captured_ms": "captured (ms)",
    "published_sgd": "published × SGD",
    "ours_sgd": "ours × SGD",
    "captured_sgd": "captured × SGD",
    "ours_sam": "ours × SAM",
    "published_ours": "published / ours",
    "published_peak_mb": "published, peak (MB)",
    "ours_peak_mb": "ours, peak (MB)",
    "gb_per_s": "GB/s",
    "bandwidth_gb_per_s": "bandwidth (GB/s)",
    "share_of_bandwidth": "share of bandwidth",
    "ratio_at_bandwidth": "ratio at full bandwidth",
    "host_us": "calls alone (us)",
    "torch_sgd_us": "a step of torch.optim.SGD, fused (us)",
    "ratio_torch_sgd": "calls alone / that step",
    "us": "time (us)",
    "ms": "step (ms)",
}
FORMATS = {
    "cosine": ".3f",
    "length": ".3f",
    "ratio_sam": ".3f",
    "peak_mb": ".0f",
    "published_sgd": ".2f",
    "ours_sgd": ".2f",
    "captured_sgd": ".2f",
    "ours_sam": ".2f",
    "published_ours": ".2f",
    "published_peak_mb": ".0f",
    "ours_peak_mb": ".0f",
    "share_of_bandwidth": ".0%",
    "gb_per_s": ".0f",
    "bandwidth_gb_per_s": ".0f",
    "host_us": ".0f",
    "plain_us": ".0f",
    "torch_sgd_us": ".0f",
    "ratio_torch_sgd": ".2f",
    "us": ".1f",
    "call_us": ".0f",
}


def rows(results: dict[str, Any], table: str) -> list[dict[str, Any]]:
    """Returns the rows of one table; a benchmark may have several."""
    found = [entry["extra_info"] for entry in results["benchmarks"] if entry["extra_info"].get("table") == table]
    return [row for info in found for row in info.get("rows", [info])]


def _cell(row: dict[str, Any], name: str) -> str:
    value = row.get(name, "-")
    if not isinstance(value, float):
        return str(value)
    return format(value, FORMATS.get(name, ".2f" if name.endswith("ms") else ".1f"))


def _table(found: list[dict[str, Any]], names: str) -> str:
    columns = [name for name in names.split() if any(name in row for row in found)]
    lines = ["| " + " | ".join(HEADS.get(name, name) for name in columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(row, name) for name in columns) + " |" for row in found]
    return "\n".join(lines)


def _where(results: dict[str, Any]) -> dict[str, Any]:
    """Returns the facts of the machine, which every timed benchmark has."""
    return next(entry["extra_info"] for entry in results["benchmarks"] if "threads" in entry["extra_info"])


def table(results: dict[str, Any]) -> str:
    """Returns Markdown tables of the results, with machine and commit; ``note`` in the results is what else is to be known."""
    machine = results["machine_info"]["cpu"].get("brand_raw", "unknown CPU")
    commit = results.get("commit_info", {}).get("id", "unknown")[:10]
    facts = _where(results)
    malloc = "".join(f", {name}={value}" for name, value in facts.get("malloc", {}).items())
    parts = [
        f"{results['datetime'][:10]}, {machine}, {facts['threads']} threads, device {facts['device']}, "
        f"torch {facts['torch']}, commit {commit}{malloc}; bandwidth {facts['bandwidth_gb_per_s']:.0f} GB/s.",
        *([results["note"]] if "note" in results else []),
    ]
    for name, (columns, about) in SECTIONS.items():
        if found := rows(results, name):
            parts += [about, _table(found, columns)]
    return "\n\n".join(parts) + "\n"


def draw_steps(results: dict[str, Any], path: Path) -> None:
    """Draws the whole steps in units of SGD's, for each network and what is trained."""
    from matplotlib.figure import Figure

    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows(results, "whole steps"):
        # So much longer than all others that their bars would vanish; it is in the table.
        if row["method"] not in ("SGD", "CC-SAM, all"):
            groups.setdefault(f"{row['network']}, trained: {row['trained']}", []).append(row)
    if not groups:
        return
    heights = [len(found) for found in groups.values()]
    figure = Figure(figsize=(9, 0.5 * sum(heights) + 0.9 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    ways = {"published": "tab:gray", "ours": "tab:blue", "captured": "tab:green"}
    for one, (title, found) in zip(axes, groups.items(), strict=True):
        shown = [way for way in ways if any(f"{way}_sgd" in row for row in found)]
        one.axvline(1, color="black", linestyle="--", linewidth=0.8)
        for offset, way in enumerate(shown):
            places = [index + (offset - (len(shown) - 1) / 2) * 0.8 / len(shown) for index in range(len(found))]
            lengths = [row.get(f"{way}_sgd", 0.0) for row in found]
            bars = one.barh(places, lengths, 0.8 / len(shown), color=ways[way], label=way, zorder=2)
            for text in one.bar_label(
                bars, [f"{length:.2f}" if length else "" for length in lengths], fontsize=8, padding=2
            ):
                text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # keeps off the line
        one.set_yticks(range(len(found)), [row["method"] for row in found])
        one.invert_yaxis()
        one.set_title(title, fontsize=10, loc="left")
        one.spines[["top", "right"]].set_visible(False)
    handles = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), frameon=False)
    axes[-1].set_xlabel("whole training step, in units of SGD's")
    figure.savefig(path, dpi=120)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws ratios, GB/s against the bandwidth, and time against N and T, as far as they were measured."""
    from matplotlib.figure import Figure

    phases, methods, growth = (rows(results, name) for name in ("phases", "methods", "growth"))
    if not phases and not methods and not growth:
        return
    figure = Figure(figsize=(17, 10), layout="constrained")
    (times, bandwidth), (work, norms) = figure.subplots(2, 2)
    labels = [f"{row['method']}\n{row['network']}\n{row['backend']}" for row in phases]
    kinds = {
        "plain": "the plain loop",
        "foreach": "foreach + fused",
        "compiled": "torch.compile",
        "pytorch_optimizer": "pytorch_optimizer",
    }
    for offset, (kind, label) in enumerate(kinds.items()):
        heights = [row.get(f"ratio_{kind}", 0.0) for row in phases]
        bars = times.bar([i + 0.2 * (offset - 1.5) for i in range(len(phases))], heights, 0.2, label=label)
        times.bar_label(bars, [f"{height:.1f}" if height else "" for height in heights], fontsize=7)
    times.set_ylabel("times faster than")
    speeds = [row["gb_per_s"] for row in phases]
    bars = bandwidth.bar(range(len(phases)), speeds, label="optimizer work")
    inside = [f"{speed:.0f}" if speed >= 1 else "" for speed in speeds]
    bandwidth.bar_label(bars, inside, label_type="center", color="white")
    limits = [row["bandwidth_gb_per_s"] for row in phases]
    bandwidth.plot(limits, "_", color="black", markersize=24, label="the memory's bandwidth")
    bandwidth.set_ylabel("GB/s")
    for axes in (times, bandwidth):
        axes.set_xticks(range(len(phases)), labels, fontsize=8)
    networks = sorted({row["network"] for row in methods})
    for index, network in enumerate(networks):
        found = [row for row in methods if row["network"] == network]
        places = [i + (index - (len(networks) - 1) / 2) * 0.4 for i in range(len(found))]
        work.bar(places, [row["ratio"] for row in found], 0.4, label=network)
        work.set_xticks(range(len(found)), [row["method"] for row in found], rotation=40, ha="right")
    work.set_yscale("log")
    work.axhline(3, color="black", linestyle="--", linewidth=0.8, zorder=0, label="3 times")
    work.set_ylabel("times faster than the backend torch")
    for what, label in (("N", "one tensor, by its elements"), ("T", "tiny tensors, by their number")):
        found = [row for row in growth if row["against"] == what]
        norms.loglog([row["size"] for row in found], [row["us"] for row in found], "o-", label=label)
    norms.set_xlabel("elements or tensors")
    norms.set_ylabel("norm pass (us)")
    for one, shown in zip((times, bandwidth, work, norms), (phases, phases, methods, growth), strict=True):
        one.set_visible(bool(shown))
        one.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> int:
    """Prints the tables; with a folder, writes report.md, and report.png and steps.png as far as measured, to it."""
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    results = json.loads(Path(arguments[0]).read_text())
    print(text := table(results))
    if len(arguments) == 2:
        folder = Path(arguments[1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.md").write_text(text)
        if importlib.util.find_spec("matplotlib") is None:
            print("no charts: matplotlib is not installed")
            return 0
        draw(results, folder / "report.png")
        draw_steps(results, folder / "steps.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
