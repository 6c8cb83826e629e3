"""`jacobiflow plan`: the fastest solver for each block on this machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jacobiflow as jf
from jacobiflow.cli import loading, options, output_files
from jacobiflow.cli.output import show_table
from jacobiflow.errors import InputValueError

if TYPE_CHECKING:
    from jacobiflow.models.flow import Flow

_MAX_AUTO_BATCH_SIZE = 1024
_TUNE = (
    "First fit guesses and corrections, and save them as tuning.json in the model's folder, or beside --out for a "
    "bundled model; under guidance as tuning-guided.json."
)


def plan(
    out: Annotated[Path, options.output_option(help="File for the strategy (JSON).")],
    model: options.Model = "fashion-p2",
    tune: Annotated[bool, options.speed_option("--tune", help=_TUNE)] = False,
    batch_size: Annotated[
        str, options.speed_option(help="Images solved together, or auto: as many as fit in free memory, at most 1,024.")
    ] = "16",
    tolerance: Annotated[
        float | None,
        options.speed_option(help="Largest residual in any block, and largest error of a sample. Default: 1e-3."),
    ] = None,
    guidance: options.RecommendedGuidance = None,
    plain: options.NoGuidance = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
) -> dict[str, Any]:
    """Find the fastest strategy for a model on this machine.

    Times solvers on this machine, for one batch size and tolerance. The strategy "auto" makes the same plan by itself.
    `sample --strategy` takes the file.

    Example: jacobiflow plan --model fashion-p2 --batch-size 4 --out out/plan.json
    """
    from jacobiflow.fixed_point.options import DEFAULT_TOLERANCE
    from jacobiflow.models.memory import batch_bytes, find_batch_size

    output_files.check_output("--out", out, model, outputs=output_files.tuning_files_beside(out) if tune else ())
    if out.suffix != ".json":
        raise InputValueError(f"--out {out}: give a file that ends in .json")
    size = options.parse_batch_size(batch_size)
    flow, origin = loading.guide(loading.load_model(model, device, dtype), guidance, plain, has_context=True)
    size = size or find_batch_size(flow, _MAX_AUTO_BATCH_SIZE)
    tuning = _tune(flow, model, out) if tune else jf.find_tuning(flow)
    tolerance = DEFAULT_TOLERANCE if tolerance is None else tolerance
    strategy = jf.plan(flow, None if tuning is None else jf.Tuning.load(tuning), size, tolerance)
    prediction = strategy.prediction
    assert prediction is not None
    out.parent.mkdir(parents=True, exist_ok=True)
    strategy.save(out)

    print(f"{model}, batch size {size}, {prediction.device}\n{origin}")
    rows = [(str(i), *_describe(solver, flow.config.num_tokens)) for i, solver in enumerate(strategy.solvers)]
    show_table(("block", "tokens at a time", "until"), rows, text=(0, 1, 2))
    print(
        f"predicted: {prediction.seconds:.3f} s a batch, the exact loop {prediction.sequential_seconds:.3f} s; "
        f"largest error of a sample {prediction.error:.1e}"
    )
    needed = batch_bytes(flow, size)
    if needed is not None:
        print(f"memory: at most {needed / 1e6:,.1f} MB for a batch, beside the weights")
    use = ["jacobiflow", "sample", "--model", model, "--strategy", str(out), "--batch-size", str(size)]
    use += ["--num", str(size), "--guidance", str(flow.guidance or 0)]
    print(f"wrote {out}\nuse it: {shlex.join(use)}")
    return {"model": model, "tuning": None if tuning is None else str(tuning), "strategy": strategy.to_json()}


def _tune(flow: Flow, model: str, out: Path) -> Path:
    """Tunes the flow; returns the file of the tuning, in the model's folder unless it is a bundled model."""
    folder = Path(model) if Path(model).is_dir() else out.parent
    file = folder / ("tuning.json" if flow.guidance is None else "tuning-guided.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    jf.tune(flow).save(file)
    print(f"wrote {file}")
    return file


def _describe(solver: jf.Solver, num_tokens: int) -> tuple[str, str]:
    """Returns the tokens at a time and the stopping rule of a solver, in words."""
    tokens = str(solver.partition.stop(0, num_tokens))
    if tokens == "1":
        return tokens, "exact"
    first = f"{solver.bf16_sweeps} sweeps in bfloat16, then " if solver.bf16_sweeps else ""
    if solver.stopping.atol is not None:
        return tokens, f"{first}changes are below {solver.stopping.atol:.1e}"
    return tokens, f"{first}{solver.stopping.max_sweeps} sweeps"
