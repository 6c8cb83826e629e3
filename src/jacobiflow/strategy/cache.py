"""Plans that "auto" makes once, and keeps in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from jacobiflow.calibration.report import Report
from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.guidance import Guidance
from jacobiflow.solvers import Solver, Tolerance, Window
from jacobiflow.strategy.notation import DEFAULT_TOLERANCE
from jacobiflow.strategy.planner import plan
from jacobiflow.strategy.strategy import Strategy, device_name

_BUSY = 0.3  # a plan by timings that differ by more is not kept
_WINDOW = 32  # of a flow without a tuning


def auto(
    flow: ImageFlow, batch_size: int, tolerance: float | None = None, guidance: Guidance | None = None,
    report: Report | None = None, say: Callable[[str], None] = lambda text: None,
) -> Strategy:  # fmt: skip
    """What `strategy="auto"` stands for: the plan for this flow, device, batch size and tolerance (1e-3 by default).

    Plans are made once, from the report.json in the flow's model folder, and kept in the user's cache folder. Without
    a report that has a tuning, all blocks are swept by windows of 32 tokens. `say` is told what takes long, or is
    missing.
    """
    tolerance = DEFAULT_TOLERANCE if tolerance is None else tolerance
    print_ = fingerprint(flow)
    device = device_name(flow.var.device)
    if report is not None and report.tuning is not None:
        return plan(flow, report, batch_size, tolerance, guidance=guidance)
    words = (
        print_,
        device,
        flow.var.dtype,
        batch_size,
        tolerance,
        guidance,
        _stamp(flow.report_file),
        torch.__version__,
    )
    key = hashlib.sha256(repr(words).encode()).hexdigest()[:32]
    if key not in _plans:
        _plans[key] = _kept(key, print_, flow.config.num_blocks) or _made(
            flow, batch_size, tolerance, guidance, key, say
        )
    return _plans[key]


_plans: dict[str, Strategy] = {}


def _stamp(path: Path | None) -> tuple[Path, int] | None:
    """A file and when it was written: a report that was made anew asks for a new plan."""
    return None if path is None or not path.is_file() else (path, path.stat().st_mtime_ns)


def _kept(key: str, expected: str, num_blocks: int) -> Strategy | None:
    """The plan in the cache folder, unless there is none that can be read."""
    try:
        found = Strategy.load(_folder() / f"{key}.json")
    except ValueError:
        return None
    fits = found.fingerprint == expected and len(found.solvers) == num_blocks and found.prediction is not None
    return found if fits else None


def _made(
    flow: ImageFlow, batch_size: int, tolerance: float, guidance: Guidance | None, key: str, say: Callable[[str], None]
) -> Strategy:
    report = None if flow.report_file is None or tolerance == 0 else Report.load(flow.report_file)
    if report is None or report.tuning is None:
        say("auto: windows of 32 tokens; a plan needs a tolerance above 0, and a report.json in the model's folder by "
            "jacobiflow calibrate --chord")  # fmt: skip
        return Strategy.uniform(Solver(Window(_WINDOW), stopping=Tolerance(tolerance)), flow.config.num_blocks)
    say(f"auto: planning for batches of {batch_size} on {device_name(flow.var.device)}, once")
    made = plan(flow, report, batch_size, tolerance, guidance=guidance)
    if made.prediction is not None and made.prediction.spread > _BUSY:
        say(f"auto: timings differ by {made.prediction.spread:.0%}, the machine is busy; planning anew next time")
        return made
    with suppress(OSError):  # a plan that cannot be kept is made again next time
        _folder().mkdir(parents=True, exist_ok=True)
        made.save(_folder() / f"{key}.json")
    return made


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jacobiflow" / "plans"
