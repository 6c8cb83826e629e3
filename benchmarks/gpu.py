"""What a GPU shows, in under ten minutes: `python benchmarks/gpu.py`.

In this order, so that a wrong number is seen before a fast one:

1. *images*: bundled models by each kind of solver, against the same on the CPU.
2. *precision*: fashion-p2 in float32, TF32 and bfloat16, by the plan of `auto`: its tolerance, network calls,
   certificates and seconds.
3. *memory*: the peak of a guided window over waiting samples, of certificates and of denoising, at 128x128.
4. the paper's four shapes at batch 1 and 16, by `paper_shapes.py`, in float32 and in bfloat16.

Writes docs/results/gpu.json after each, and leaves out what it holds from the same machine, so that a run can be
interrupted; none is begun after `--minutes`. Then puts the figures into docs/performance.md. Exits with 1 where an
image is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import performance_page
import torch
from paper_shapes import SHAPES, Problem, Shape, machine_of
from paper_shapes import measure as measure_shape
from torch import Tensor

import jacobiflow as jf
from jacobiflow.data import balanced_labels
from jacobiflow.denoising import denoised
from jacobiflow.files import write_json
from jacobiflow.flows import ImageFlow
from jacobiflow.latents import draw_latents
from jacobiflow.memory import keep_freed_memory
from jacobiflow.strategy import auto

OUT = Path(__file__).resolve().parent.parent / "docs" / "results" / "gpu.json"
MODELS = ("fashion-p2", "digits-p1", "digits-maf")
WAYS = ("sequential", "jacobi", "window:32", "gs-jacobi:8-12", "auto")
NUM, TOLERANCE = 8, 1e-4
BOUND = 1e-2  # of a pixel; a residual of 1e-4 is amplified up to 30 times
BATCHES = (1, 16)

Figures = dict[str, Any]


def problem_of(flow: ImageFlow, num: int) -> dict[str, Any]:
    """Latents and labels, the same on every device."""
    config = flow.config
    z = draw_latents(num, config.num_tokens, config.token_channels, seed=0)
    return {"latents": z, "labels": balanced_labels(num, config.num_classes), "progress": False}


def images(device: torch.device, models: Sequence[str] = MODELS, ways: Sequence[str] = WAYS) -> Figures:
    """How far each solver's images are from those of the CPU's exact loop."""
    rows: list[Figures] = []
    for name in models:
        for guided in (False, True):
            there, here = jf.load(name, device=device), jf.load(name)
            guidance = jf.Guidance(1.0) if guided else None
            drawn = partial(jf.sample, guidance=guidance, denoise=float(here.config.noise_std > 0))
            exact = drawn(here, strategy="sequential", **problem_of(here, NUM)).images
            for way in ways:
                tolerance = None if way in ("sequential", "gs-jacobi:8-12") else TOLERANCE
                found = drawn(there, strategy=way, tolerance=tolerance, **problem_of(there, NUM))
                difference = float((found.images.cpu() - exact).abs().max())
                rows.append({"model": name, "guided": guided, "strategy": way, "difference": difference})
    counted = {row["strategy"] for row in rows if row["strategy"].startswith("gs-jacobi")}  # end before they converge
    wrong = [row for row in rows if row["strategy"] not in counted and not row["difference"] <= BOUND]
    return {"rows": rows, "bound": BOUND, "wrong": wrong}


def precision(device: torch.device, model: str = "fashion-p2") -> Figures:
    """A batch by the plan of `auto` to 1e-3, or to what rounding allows."""
    rows = []
    for name in ("float32", "tf32", "bfloat16"):
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        flow = jf.load(model, device=device, dtype="bfloat16" if name == "bfloat16" else None)
        plan = auto(flow, NUM, 1e-3)
        for _ in range(2):
            out = jf.sample(flow, strategy=plan, **problem_of(flow, NUM))
        assert out.certificate is not None
        rows.append({
            "precision": name, "tolerance": plan.tolerance, "network_calls": out.network_calls, "seconds": out.seconds,
            "certificate": float(out.certificate.max()), "resolved_sequentially": out.resolved_sequentially,
        })  # fmt: skip
    torch.set_float32_matmul_precision("highest")
    return {"rows": rows}


def memory(device: torch.device, shape: Shape = SHAPES["img128cond"], batch: int = 16) -> Figures:
    """GiB at the peak, beside what was there before."""
    problem = Problem.draw(shape, 3 * batch, torch.float32, device)
    window = jf.Solver(jf.Window(min(64, problem.z.shape[1] // 2)), stopping=jf.Tolerance(1e-2))
    pixels = problem.flow.to_images(problem.z)

    def peak(run: Callable[[], Tensor | jf.Solution]) -> float | None:
        if device.type != "cuda":
            run()
            return None
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30

    solve = partial(jf.solve, problem.block, solver=window)
    first = slice(0, batch)
    labels = None if problem.labels is None else problem.labels[first]
    return {
        "a batch": peak(lambda: solve(z=problem.z[first], context=labels)),
        "three batches, in the slots of one": peak(lambda: solve(z=problem.z, context=problem.labels, slots=batch)),
        "certificates of a batch": peak(lambda: jf.certify(problem.block, problem.z[first], problem.z[first], labels)),
        "denoising, one block": peak(lambda: denoised(problem.flow, pixels, problem.labels, 1.0, len(pixels))),
    }


def parts_of(shapes: Mapping[str, Shape]) -> dict[str, Callable[[torch.device], Figures]]:
    """What is measured, by name."""
    found: dict[str, Callable[[torch.device], Figures]] = {"images": images, "precision": precision, "memory": memory}
    for batch in BATCHES:
        for dtype in (torch.float32, torch.bfloat16):
            for name, shape in shapes.items():
                title = f"{name}, batch {batch}, {str(dtype).removeprefix('torch.')}"
                found[title] = partial(shape_part, shape, batch, dtype)
    return found


def shape_part(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> Figures:
    """One of the paper's shapes, each way timed once."""
    return measure_shape(shape, batch, dtype, 1, device)


def main(
    arguments: Sequence[str] | None = None, parts: Mapping[str, Callable[[torch.device], Figures]] | None = None
) -> None:
    """Measure what the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    device, started = torch.device(given.device), time.monotonic()
    head = {"command": "python benchmarks/gpu.py", "machine": machine_of(device)}
    found: Figures = {**head, "parts": {}}
    if given.out.exists() and (kept := json.loads(given.out.read_text()))["machine"] == head["machine"]:
        found = kept
    for name, run in (parts_of(SHAPES) if parts is None else parts).items():
        if name in found["parts"]:
            continue
        if time.monotonic() - started > 60 * given.minutes:
            print(f"{name}: left out, {given.minutes:g} minutes are over; start again to go on")
            continue
        began = time.monotonic()
        found["parts"][name] = run(device)
        write_json(given.out, found)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    if given.out == OUT:
        performance_page.main()
    wrong = found["parts"].get("images", {}).get("wrong")
    if wrong:
        sys.exit(f"images that differ from the CPU's by more than {BOUND:g}: {json.dumps(wrong)}")


if __name__ == "__main__":
    keep_freed_memory()  # for all that is compared
    main()
