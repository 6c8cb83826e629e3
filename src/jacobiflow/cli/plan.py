"""`jacobiflow plan`: the fastest solver for each block on this machine."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jacobiflow as jf
from jacobiflow.cli import loading, options, output_files
from jacobiflow.cli.output import show_table
from jacobiflow.errors import InputValueError

if TYPE_CHECKING:
    from jacobiflow.models.flow import Flow

_MAX_AUTO_BATCH_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class PlanConfig(options.Config):
    """Options of `jacobiflow plan`.

    Attributes:
        tune: First fit guesses and corrections, and save them as tuning.json in the model's folder, or beside --out for
            a bundled model; under guidance as tuning-guided.json.
        batch_size: Images solved together, or auto: as many as fit in free memory, at most 1,024.
        tolerance: Largest residual in any block, and largest error of a sample.
        out: File for the strategy (JSON).
    """

    model: options.Model = "fashion-p2"
    tune: Annotated[options.Flag, options.SPEED] = False
    batch_size: Annotated[str, options.SPEED] = "16"
    tolerance: Annotated[float, options.SPEED] = 1e-3
    guidance: options.RecommendedGuidance = None
    plain: options.NoGuidance = False
    device: options.Device = "auto"
    dtype: options.Dtype = "float32"
    out: Annotated[Path, options.OUTPUT]


@dataclass(frozen=True)
class PlanResult:
    """A strategy and its file.

    Attributes:
        tuning: The file of guesses and corrections, if any.
        settings: A line that names the guidance.
        memory: The most memory that a batch takes beside the weights, in bytes; None if it is not known.
    """

    model: str
    out: str
    batch_size: int
    guidance: str
    settings: str
    tuning: str | None
    num_tokens: int
    memory: int | None
    strategy: jf.Strategy

    def to_json(self) -> dict[str, Any]:
        """Returns the model, the file of the tuning and the strategy."""
        return {"model": self.model, "tuning": self.tuning, "strategy": self.strategy.to_json()}


def run(config: PlanConfig) -> PlanResult:
    """Find the fastest strategy for a model on this machine.

    Times solvers on this machine, for one batch size and tolerance. The strategy "auto" makes the same plan by itself.
    `sample --strategy` takes the file.

    Example: jacobiflow plan --model fashion-p2 --batch-size 4 --out out/plan.json
    """
    from jacobiflow.models.memory import batch_bytes, find_batch_size

    is_model_file = any(fnmatch(config.out.name, name) for name in ("config.json", "report*.json", "tuning*.json"))
    output_files.check_output("--out", config.out, *[config.model] if is_model_file else [])
    if config.out.suffix != ".json":
        raise InputValueError(f"--out {config.out}: give a file that ends in .json")
    size = options.parse_batch_size(config.batch_size)
    flow = loading.load_model(config.model, config.device, config.dtype)
    settings, origin = loading.resolve_settings(flow, config.guidance, 0.0, config.plain, has_context=True)
    flow = flow.guided(settings.guidance)
    size = size or find_batch_size(flow, _MAX_AUTO_BATCH_SIZE)
    tuning = _tune(flow, config.model, config.out) if config.tune else jf.find_tuning(flow)
    strategy = jf.plan(flow, None if tuning is None else jf.Tuning.load(tuning), size, config.tolerance)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    strategy.save(config.out)
    return PlanResult(
        model=config.model, out=str(config.out), batch_size=size, guidance=str(flow.guidance or 0), settings=origin,
        tuning=None if tuning is None else str(tuning), num_tokens=flow.config.num_tokens,
        memory=batch_bytes(flow, size), strategy=strategy,
    )  # fmt: skip


def _tune(flow: Flow, model: str, out: Path) -> Path:
    """Tunes the flow; returns the file of the tuning, in the model's folder unless it is a bundled model."""
    folder = Path(model) if Path(model).is_dir() else out.parent
    file = folder / ("tuning.json" if flow.guidance is None else "tuning-guided.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    jf.tune(flow).save(file)
    print(f"wrote {file}")
    return file


def show(result: PlanResult) -> None:
    """Prints the solver of each block, what it promises, and how to use it."""
    prediction = result.strategy.prediction
    assert prediction is not None
    print(f"{result.model}, batch size {result.batch_size}, {prediction.device}\n{result.settings}")
    rows = [(str(i), *_describe(solver, result.num_tokens)) for i, solver in enumerate(result.strategy.solvers)]
    show_table(("block", "tokens at a time", "until"), rows, text=(0, 1, 2))
    print(
        f"predicted: {prediction.seconds:.3f} s a batch, the exact loop {prediction.sequential_seconds:.3f} s; "
        f"largest error of a sample {prediction.error:.1e}"
    )
    if result.memory is not None:
        print(f"memory: at most {result.memory / 1e6:,.1f} MB for a batch, beside the weights")
    size = str(result.batch_size)
    use = ["jacobiflow", "sample", "--model", result.model, "--strategy", result.out, "--batch-size", size]
    print(f"wrote {result.out}\nuse it: {shlex.join([*use, '--num', size, '--guidance', result.guidance])}")


def _describe(solver: jf.Solver, num_tokens: int) -> tuple[str, str]:
    """Returns the tokens at a time and the stopping rule of a solver, in words."""
    tokens = str(solver.partition.stop(0, num_tokens))
    if tokens == "1":
        return tokens, "exact"
    first = f"{solver.bf16_sweeps} sweeps in bfloat16, then " if solver.bf16_sweeps else ""
    if solver.stopping.atol is not None:
        return tokens, f"{first}changes are below {solver.stopping.atol:.1e}"
    return tokens, f"{first}{solver.stopping.max_sweeps} sweeps"
