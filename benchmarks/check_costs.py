"""What the checks of a sampling run of 64 images cost: `python benchmarks/check_costs.py`; half a minute.

Under Python's profiler, which makes small functions look slower than they are, so the shares are upper bounds. Counted
are functions of `jacobiflow.checks` and all others of the package whose name begins with "check" or "verify", with
what they call. Writes docs/results/check-costs.json.
"""

from __future__ import annotations

import cProfile
import pstats
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jacobiflow as jf
from jacobiflow.files import write_json
from jacobiflow.measuring import machine

RESULT = Path(__file__).resolve().parent.parent / "docs" / "results" / "check-costs.json"
NUM = 64
Function = tuple[str, int, str]


def is_check(function: Function) -> bool:
    """Whether a function of the profile is a check of ours."""
    file, _, name = function
    return "jacobiflow" in file and (file.endswith("checks.py") or re.match("_?(check|verify)", name) is not None)


def share(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a run, and of the checks in it."""
    profile = cProfile.Profile()
    profile.runcall(run)
    stats: Any = pstats.Stats(profile)
    # Of each check, the time of calls from what is no check: those from another check are in that one's.
    checks = sum(
        times[3]
        for function, (_, _, _, _, callers) in stats.stats.items()
        if is_check(function)
        for caller, times in callers.items()
        if not is_check(caller)
    )
    return {"seconds": stats.total_tt, "checks": checks, "share": checks / stats.total_tt}


def main() -> None:
    """In memory, and to a folder; without the first run, which loads and plans."""
    flow = jf.load("fashion-p2")
    jf.sample(flow, NUM, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "sample": share(lambda: jf.sample(flow, NUM, progress=False)),
            "sample_to_folder": share(lambda: jf.sample_to_folder(flow, NUM, Path(folder) / "out", progress=False)),
        }
    write_json(RESULT, {"model": "fashion-p2", "num": NUM, "machine": machine(), "runs": found})
    for name, figures in found.items():
        print(f"{name}: {figures['seconds']:.3f} s, checks {1000 * figures['checks']:.2f} ms, {figures['share']:.3%}")


if __name__ == "__main__":
    main()
