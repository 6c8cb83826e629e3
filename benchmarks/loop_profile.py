"""What keeps the native loop from one encoding pass: `python benchmarks/loop_profile.py`, a minute.

Compiles the sources of the loop once more, into a temporary folder, with `loop_profile.h` before them: clocks at the
waits between a layer's steps, and around its normalisations. GELU is inside a step: it is what that step saves where
GELU is left out. Packing weights is timed from outside. Beside them the same pieces of an encoding pass, each timed
alone, and the loop compiled for processors with fewer instructions. Writes docs/results/loop-profile.json; seconds are
the least of `--repeats` rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from regimes import fused, trained_flow
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

import jacobiflow as jf
from jacobiflow import native
from jacobiflow.files import write_json
from jacobiflow.flows.tarflow import TarFlowBlock
from jacobiflow.latents import draw_latents
from jacobiflow.measuring import interleave, machine
from jacobiflow.memory import keep_freed_memory

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "docs" / "results" / "loop-profile.json"
MODEL, BLOCK, BATCH_SIZES = "fashion-p2", 7, (1, 4, 16, 64)
TARGETS = {"AVX2": ("-mavx2", "-mfma"), "128-bit vectors": ()}  # on x86-64
STEPS = ("qkv", "attention", "projection", "up", "down", "ends", "norms", "waiting")  # `Piece` of loop_profile.h


class Profiled:
    """The library compiled with clocks, in place of the library; `seconds` by piece, of a thread on average."""

    def __init__(self, path: Path, *flags: str) -> None:
        include = ("-I", str(Path(native.__file__).parent), "-include", str(HERE / "loop_profile.h"))
        native.compile_library(path, ("-march=native", *include, *flags))
        self.library = native.load_library(path)
        self.jacobiflow_lanes, self.seconds = self.library.jacobiflow_lanes, dict[str, float]()
        self.depth = 0

    def add(self, name: str, seconds: float) -> None:
        """Count them."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def jacobiflow_pack(self, *arguments: Any) -> int:
        """As the library has it."""
        started = perf_counter()
        failed: int = self.library.jacobiflow_pack(*arguments)
        self.add("packing", perf_counter() - started)
        return failed

    def jacobiflow_tarflow(self, arguments: Any) -> int:
        """As the library has it."""
        spent = (ctypes.c_int64 * len(STEPS))()
        self.library.profile_start(self.depth)
        failed: int = self.library.jacobiflow_tarflow(arguments)
        self.library.profile_take(spent)
        for name, nanoseconds in zip(STEPS, spent, strict=True):
            self.add(name, nanoseconds / 1e9 / torch.get_num_threads())
        return failed

    def solve(self, block: TarFlowBlock, z: Tensor, labels: Tensor, repeats: int) -> dict[str, float]:
        """The seconds of the fastest of `repeats` solves, "all" of it and by piece."""
        best: dict[str, float] = {}
        self.depth = len(block.attn_blocks)
        with patch("jacobiflow.native.tensors.library", return_value=self):
            for _ in range(repeats + 1):
                self.seconds = {}
                started = perf_counter()
                fused(block, z, labels)
                found = {"all": perf_counter() - started} | self.seconds
                best = min(best or found, found, key=lambda each: each["all"])
        return best


def pieces(whole: dict[str, float], without_gelu: dict[str, float]) -> dict[str, float]:
    """Seconds of the loop by what the page tells apart."""
    gelu = max(whole["up"] - without_gelu["up"], 0.0)
    found = {
        "dense layers": sum(whole[name] for name in ("qkv", "projection", "up", "down")) - gelu,
        "attention": whole["attention"],
        "GELU": gelu,
        "normalisation": whole["norms"],
        "first and last layer": whole["ends"],
        "waiting": whole["waiting"],
        "packing weights": whole["packing"],
    }
    return found | {"other": whole["all"] - sum(found.values())}


def pass_pieces(block: TarFlowBlock, z: Tensor, labels: Tensor) -> dict[str, Callable[[], Any]]:
    """One encoding pass, and its pieces alone, on tensors of their shapes."""
    layers = [layer.weights() for layer in block.attn_blocks]
    heads, channels = layers[0].num_heads, layers[0].qkv[0].shape[1]
    x, up = torch.randn(*z.shape[:2], channels), torch.randn(*z.shape[:2], layers[0].up[0].shape[0])
    q = x.view(*z.shape[:2], heads, -1).transpose(1, 2)

    def dense() -> None:
        for layer in layers:
            for inputs, parameters in ((x, layer.qkv), (x, layer.proj), (x, layer.up), (up, layer.down)):
                F.linear(inputs, *parameters)

    def attention() -> None:
        for _ in layers:
            F.scaled_dot_product_attention(q, q, q, is_causal=True)

    def gelu() -> None:
        for _ in layers:
            torch.ops.aten.gelu_(up)

    def norms() -> None:
        for layer in layers:
            for parameters in (layer.norm, layer.mlp_norm):
                F.layer_norm(x, (channels,), *parameters)

    return {
        "all": lambda: block(z, labels), "dense layers": dense, "attention": attention, "GELU": gelu,
        "normalisation": norms,
    }  # fmt: skip


def multiplications(block: TarFlowBlock, tokens: int) -> int:
    """In the dense layers of all transformer layers, for so many tokens."""
    pairs = (pair for layer in block.attn_blocks for pair in layer.weights()[:-1])
    return tokens * sum(weight.numel() for weight, _ in pairs if weight.ndim == 2)


def by_library(library: ctypes.CDLL, block: TarFlowBlock, z: Tensor, labels: Tensor) -> None:
    """The loop by another build."""
    with patch("jacobiflow.native.tensors.library", return_value=library):
        fused(block, z, labels)


def measure(
    flow: jf.TarFlow, libraries: tuple[Profiled, Profiled], builds: Mapping[str, ctypes.CDLL], batch: int, repeats: int
) -> dict[str, Any]:
    """The pieces of the loop and of a pass at a batch size, and the loop by other builds."""
    config, block = flow.config, flow.blocks[BLOCK]
    z = draw_latents(batch, config.num_tokens, config.token_channels, seed=1)
    labels = torch.arange(batch) % config.num_classes
    whole, without_gelu = (library.solve(block, z, labels, repeats) for library in libraries)
    with torch.inference_mode():
        others = {name: partial(by_library, library, block, z, labels) for name, library in builds.items()}
        runs: dict[str, Callable[[], Any]] = {"loop": lambda: fused(block, z, labels)}
        runs |= {**others, **pass_pieces(block, z, labels)}
        timings, _ = interleave(runs, repeats)
    one_pass = {name: timing.min for name, timing in timings.items()}
    return {
        "batch_size": batch,
        "loop": one_pass.pop("loop"),
        "builds": {name: one_pass.pop(name) for name in builds},
        "with_clocks": whole["all"],
        "pieces": pieces(whole, without_gelu),
        "pass": one_pass,
        "multiplications": multiplications(block, batch * config.num_tokens),
    }


def main() -> None:
    """Measure all batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    flow = trained_flow(MODEL)
    flow.blocks[BLOCK].proj_out.weight.zero_()  # x is z then: without GELU nothing may grow
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        libraries = (Profiled(Path(folder) / "all.so"), Profiled(Path(folder) / "rest.so", "-DWITHOUT_GELU"))
        builds = {}
        for name, flags in TARGETS.items() if platform.machine() == "x86_64" else ():
            native.compile_library(path := Path(folder) / f"{name}.so", flags)
            builds[name] = native.load_library(path)
        for batch in track(BATCH_SIZES, description="profiling"):
            rows.append(measure(flow, libraries, builds, batch, given.repeats))
            write_json(given.out, {"model": MODEL, "block": BLOCK, "machine": machine(), "rows": rows})
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    keep_freed_memory()  # for all that is compared
    main()
