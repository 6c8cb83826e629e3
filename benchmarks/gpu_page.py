"""What docs/performance.md says of GPUs: the counts of gpu_counts.py."""

from __future__ import annotations

from typing import Any

from filling import table

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


def parts(result: dict[str, Any]) -> dict[str, str]:
    """The page's part, by its mark."""
    return {"gpu counts": counts(result)}
