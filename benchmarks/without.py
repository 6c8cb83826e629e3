"""`auto` without what the samplers of other papers lack: sweeps in bfloat16, fitted pieces, the native loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jacobiflow as jf
from jacobiflow.calibration import TuneSettings
from jacobiflow.native import SWITCH
from jacobiflow.strategy import PlanSettings

FOLDER = Path(__file__).resolve().parent.parent / "out" / "performance"


@dataclass(frozen=True)
class Without:
    """What a row of `auto` may use."""

    low_precision: bool = True
    fitted: bool = True
    native: bool = True

    def plan(self, flow: jf.TarFlow, report: jf.Report, batch: int) -> jf.Strategy:
        """The strategy for a batch, planned as `auto` plans."""
        tuning = report if self.fitted else nothing_fitted(flow)
        with switched(self.native):
            return jf.plan(flow, tuning, batch, settings=PlanSettings(low_precision=self.low_precision))

    def run(self, draw: Callable[[], Any]) -> Any:
        """`draw`, with native code or without."""
        with switched(self.native):
            return draw()


ROWS = {
    "auto, without bfloat16": Without(low_precision=False),
    "auto, without fitted pieces": Without(fitted=False),
    "auto, without the native loop": Without(native=False),
    "auto, without the native loop or bfloat16": Without(native=False, low_precision=False),
    "auto, without the native loop or fitted pieces": Without(native=False, fitted=False),
    "auto, without all three": Without(native=False, low_precision=False, fitted=False),
}


@contextmanager
def switched(native: bool) -> Iterator[None]:
    """Exact loops in native code, or in PyTorch."""
    before = os.environ.get(SWITCH)
    if not native:
        os.environ[SWITCH] = "0"
    try:
        yield
    finally:
        os.environ.pop(SWITCH, None)
        if before is not None:
            os.environ[SWITCH] = before


def nothing_fitted(flow: jf.TarFlow) -> jf.Tuning:
    """What the planner needs of a flow whose blocks start from the latents and are swept plainly; made once."""
    path = FOLDER / "tuning.json"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        jf.tune(flow, settings=TuneSettings(fit=False)).save(path)
    return jf.Tuning.load(path)


def pieces(plan: jf.Strategy) -> dict[str, int]:
    """How many blocks the loop solves, and how many sweeps; of these, how many in bfloat16, and with fitted pieces."""
    swept = [solver for solver in plan.solvers if solver.partition != jf.Sequential()]
    return {
        "loop": len(plan.solvers) - len(swept),
        "swept": len(swept),
        "bfloat16": sum(solver.coarse > 0 for solver in swept),
        "fitted": sum(solver.guess != jf.Latent() or solver.correction != jf.Plain() for solver in swept),
    }
