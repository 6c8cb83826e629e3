"""The parts of docs/performance.md on what a newcomer runs: the demo, and the page that solves in the browser."""

from __future__ import annotations

from typing import Any


def demo(figures: dict[str, Any]) -> str:
    """The table and the line that `jacobiflow sample --compare --json` gave."""
    num, runs = figures["num"], figures["runs"]
    lines = [
        f"{num} image{'s' * (num > 1)} at batch {figures['batch_size']}:\n",
        "| strategy | seconds | images/s | network calls | token evaluations | certificate | re-solved |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for strategy, run in runs.items():
        cells = [strategy, f"{run['seconds']:.3f}", f"{run['images_per_second']:.1f}"]
        if "certificate" in run:
            certificate = "exact" if run["exact"] else f"{run['certificate']:.1e}"
            cells += [f"{run['network_calls']:,}", f"{run['token_evaluations']:,}", certificate]
            cells.append(str(run["resolved_sequentially"]))
        lines.append(f"| {' | '.join(cells + [''] * (7 - len(cells)))} |")
    (name, own), (_, ours) = ((name, run["seconds"]) for name, run in runs.items())
    error = "error max {max:.1e}, mean {mean:.1e}".format(**figures["error"])
    lines.append(f"\n{own / ours:.1f} times as fast as the original code's loop, {name}; {error}.")
    return "\n".join(lines)


def browser(result: dict[str, Any]) -> str:
    """Both loops of the page that solves in the browser, and what a call takes by its tokens."""
    sizes, machine, calls = result["bytes"], result["machine"], result["call_milliseconds"]
    lines = [
        f"Medians over {result['seeds']} seeds in headless Chromium {result['chromium']} with {result['runtime']}, on "
        f"{machine['cores']} cores of {machine['processor']}. The page is {sizes['.'] / 1e3:.0f} kB, the model "
        f"{sizes['model'] / 1e6:.1f} MB, the runtime {sizes['ort'] / 1e6:.1f} MB. Seconds of the parallel loop include "
        "its certificates; those of the sequential loop do not. *First picture* is counted from the model's arrival.\n",
        "| threads | parallel: calls | seconds | sequential: calls | seconds | times as fast | largest certificate | "
        "first picture (s) |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        loops = [row[loop] for loop in ("parallel", "sequential")]
        cells = [text for loop in loops for text in (f"{loop['calls']:,.0f}", f"{loop['seconds']:.2f}")]
        lines.append(
            f"| {row['threads']} | {' | '.join(cells)} | {row['ratio']:.2f}x | {row['worst_certificate']:.1e} | "
            f"{row['first_picture_seconds']:.1f} |"
        )
    tokens = " | ".join(calls)
    return "\n".join(
        [
            *lines,
            "\nMilliseconds of a call of one block on one thread, both rows of guidance, by its tokens:\n",
            f"| tokens | {tokens} |",
            f"| --- |{' ---: |' * len(calls)}",
            f"| a call | {' | '.join(f'{found:.2f}' for found in calls.values())} |",
            f"| a token | {' | '.join(f'{found / int(size):.3f}' for size, found in calls.items())} |",
        ]
    )
