"""`jacobiflow plan`: the fastest solver for each block on this machine."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jacobiflow as jf
from jacobiflow.cli import loading, options
from jacobiflow.cli.output import progress_bar, show_table
from jacobiflow.errors import InputValueError

_MAX_AUTO_BATCH_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class PlanConfig(options.Config):
    """Find the fastest strategy for a model on this machine.

    Times solvers on this machine for one batch size and tolerance, and writes a file for sample --strategy. The
    strategy "auto" makes the same plan by itself.

    Example: jacobiflow plan --model fashion-p2 --batch-size 4 --out out/plan.json

    Attributes:
        batch_size: Samples solved together, or auto: as many as fit in free memory, at most 1,024.
        tolerance: Largest residual in any block, and largest error of a sample.
        out: File for the strategy (JSON).
    """

    model: options.Model
    batch_size: options.BatchSize = 16
    tolerance: Annotated[float, options.SPEED] = 1e-3
    guidance: options.RecommendedGuidance = None
    plain: options.NoGuidance = False
    device: options.Device = "auto"
    dtype: options.Dtype = "float32"
    out: Annotated[Path, options.OUTPUT]

    def check_options(self) -> None:
        """Also checks the file for the strategy."""
        super().check_options()
        if self.out.suffix != ".json":
            raise InputValueError(f"--out {self.out}: give a file that ends in .json")
        self.check_file("out")


@dataclass(frozen=True)
class PlanResult:
    """A strategy.

    Attributes:
        settings: A line that names the guidance.
        num_tokens: Number of tokens of a sample.
    """

    strategy: jf.Strategy
    settings: str
    num_tokens: int


def run(config: PlanConfig) -> PlanResult:
    """Plans a strategy, and writes it."""
    from jacobiflow.models.memory import find_batch_size

    flow = loading.load_model(config.model, config.device, config.dtype)
    settings, origin = loading.resolve_settings(flow, config.guidance, 0.0, config.plain, has_context=True)
    flow = flow.guided(settings.guidance)
    size = find_batch_size(flow, _MAX_AUTO_BATCH_SIZE) if config.batch_size == "auto" else config.batch_size
    with progress_bar() as progress:
        strategy = jf.plan(flow, size, config.tolerance, progress=progress)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    strategy.save(config.out)
    return PlanResult(strategy, origin, flow.config.num_tokens)


def show(config: PlanConfig, result: PlanResult) -> None:
    """Prints the solver of each block, what it promises, and how to use it."""
    plan = result.strategy.prediction
    assert plan is not None
    print(f"{config.model}, batch size {plan.batch_size}, {plan.device}\n{result.settings}")
    rows = [
        (str(i), str(solver.partition.stop(0, result.num_tokens)), _describe_end(solver, result))
        for i, solver in enumerate(result.strategy.solvers)
    ]
    show_table(("block", "tokens at a time", "until"), rows, text=(0, 1, 2))
    print(
        f"predicted: {plan.seconds:.3f} s a batch, the exact loop {plan.sequential_seconds:.3f} s; largest error of a "
        f"sample {plan.error:.1e}\nwrote {config.out}"
    )
    size, guidance = str(plan.batch_size), str(plan.guidance or 0)
    use = ["jacobiflow", "sample", "--model", config.model, "--strategy", str(config.out), "--batch-size", size]
    print(f"use it: {shlex.join([*use, '--num', size, '--guidance', guidance])}")


def _describe_end(solver: jf.Solver, result: PlanResult) -> str:
    """Describes what ends the sweeps of a planned solver, and which come first."""
    assert result.strategy.tolerance is not None
    if solver.partition.token_by_token(result.num_tokens):
        return "exact"
    first = f"{solver.guess.count} sweeps in bfloat16, then " if isinstance(solver.guess, jf.Bf16Sweeps) else ""
    return f"{first}changes are below {solver.tolerance_factor * result.strategy.tolerance:.1e}"
