"""What docs/performance.md says of GPUs: what gpu_counts.py and planning_at_size.py counted, and what gpu.py measured
where there is a file of it.
"""

from __future__ import annotations

from typing import Any

from filling import measured_on, table

from jacobiflow.baselines import GROWING_CACHE

ASKED = {"operations": "kernels launched", "read_backs": "waits for the device", "explicit_masks": "masks in memory"}


def counts(result: dict[str, Any]) -> str:
    """A line for each thing that is counted, before and after."""
    before, after, lines = result["before"], result["after"], []

    def number(value: float) -> str:
        return f"{value:.3g}"

    def pair(name: str, title: str) -> str:
        found = (
            f"{words} {number(before[name][title][key])} -> {number(after[name][title][key])}"
            for key, words in ASKED.items()
            if before[name][title][key] or after[name][title][key]
        )
        return ", ".join(found)

    for name in after:
        if name == "peak of waiting samples":
            cells = [f"{number(before[name][title])} -> {number(after[name][title])}" for title in ("plain", "guided")]
            lines.append(["peak of 40 samples in 8 slots, over that of 8 samples", *cells])
        elif name == "denoising":
            row = after[name]
            title = f"denoising {row['images']} images of 128x128, GiB beside the weights"
            lines.append([title, f"{number(before[name]['gib'])} -> {number(row['gib'])}", ""])
        else:
            lines.append([name, *(pair(name, title) for title in ("plain", "guided"))])
    return table(("of a block of 8 layers", "plain", "guided"), lines)


def in_bfloat16(result: dict[str, Any]) -> str:
    """Network calls in both precisions."""
    lines = [[way, str(calls["float32"]), str(calls["bfloat16"])] for way, calls in result["calls"].items()]
    title = f"`fashion-p2`, {result['samples']} samples to {result['tolerance']:.1e}"
    return table([title, "network calls in float32", "in bfloat16"], lines)


def planning(result: dict[str, Any]) -> str:
    """Passes and seconds of calibrating and planning at 128x128."""
    made = result["calibrate"]
    lines = [[
        f"calibrating, {made['images']} images, {made['traced']} traced", f"{made['passes']:,.0f}",
        f"{made['seconds'] / 60:.1f} min", "",
    ]]  # fmt: skip
    for plan in result["plan"]:
        sampling = f"{plan['sampling']:.1f} s (the loop {plan['sequential']:.1f} s)"
        took = f"{plan['seconds']:.0f} s"
        lines.append([f"planning, batch {plan['batch']}", f"{plan['passes']:,.0f}", took, sampling])
    columns = ("at 128x128", "passes of a sample over a block", "at half an A100's rate", "a batch by that plan")
    return table(columns, lines)


def measured(result: dict[str, Any] | None) -> str:
    """What a GPU showed, or that none was at hand."""
    if result is None:
        return (
            "**No GPU was at hand: nothing in this section is a time, and whether the targets are met is not known.**"
        )
    machine, shown = result["machine"], {"images": _images, "precision": _precision, "memory": _memory}
    tables = [shown[name](part) if name in shown else _shape(name, part) for name, part in result["parts"].items()]
    return "\n\n".join([f"{machine['device']}. {measured_on(machine)}", *tables])


def _images(part: dict[str, Any]) -> str:
    lines = [
        [row["model"], "yes" if row["guided"] else "no", row["strategy"], f"{row['difference']:.1e}"]
        for row in part["rows"]
    ]  # fmt: skip
    return table(["model", "guided", "strategy", "largest difference from the CPU's images"], lines)


def _precision(part: dict[str, Any]) -> str:
    lines = [
        [row["precision"], f"{row['tolerance']:.1e}", f"{row['network_calls']:,}", f"{row['certificate']:.1e}",
         str(row["resolved_sequentially"]), f"{row['seconds']:.3f}"]
        for row in part["rows"]
    ]  # fmt: skip
    return table(["`fashion-p2` in", "tolerance", "calls", "largest certificate", "re-solved", "seconds"], lines)


def _memory(part: dict[str, float | None]) -> str:
    lines = [[name, "" if gib is None else f"{gib:.2f}"] for name, gib in part.items()]
    return table(["at 128x128", "GiB at the peak"], lines)


def _shape(title: str, part: dict[str, Any]) -> str:
    lines = [
        [row["method"], row["reason"] if row["seconds"] is None else f"{row['seconds']:.2f}",
         "" if row["rate"] is None else f"{row['rate']:.1f}x"]
        for row in part["rows"]
    ]  # fmt: skip
    target = f"target {part['target_rate']:.1f}x, the paper's {part['paper_rate']:.2f}x on an A800"
    return f"{title}; {target}:\n\n{table(['way', 'seconds of a batch', f'over the {GROWING_CACHE}'], lines)}"


def parts(counted: dict[str, Any], planned: dict[str, Any], found: dict[str, Any] | None) -> dict[str, str]:
    """The page's parts, by their marks; `found` where gpu.py has run."""
    return {
        "gpu": measured(found), "gpu counts": counts(counted), "calls in bfloat16": in_bfloat16(counted["bfloat16"]),
        "planning at size": planning(planned),
    }  # fmt: skip
