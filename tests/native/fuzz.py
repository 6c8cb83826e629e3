"""Calls the native library with malformed and extreme input. Each call is refused, or gives what PyTorch gives.

    python -m tests.native.fuzz LIBRARY [--seed 0] [--count 100] [--callers 1]

Call i depends on seed + i alone, so a failure is repeated by its seed and a count of 1. Run it with a library that has
the sanitizers: they end the process at the first read or write out of bounds, undefined operation, or data race.
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import zuko
from torch import Tensor, nn

import jacobiflow as jf
from jacobiflow.errors import UnsupportedError
from jacobiflow.native import library
from jacobiflow.native import weights as native_weights
from tests.helpers import library_flows
from tests.helpers.native_problems import CASES

Change = Callable[[Tensor], Tensor]


def unaligned(x: Tensor) -> Tensor:
    """Returns the same values in memory that is not aligned."""
    memory = torch.zeros(x.numel() * x.itemsize + 1, dtype=torch.uint8)
    memory[1:] = x.contiguous().reshape(-1).view(torch.uint8)
    return torch.frombuffer(memory.numpy(), dtype=x.dtype, count=x.numel(), offset=1).view(x.shape)


def filled(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    if x.numel() and x.is_floating_point():
        x.view(-1)[x.numel() // 2] = value
    return x


LAYOUTS: dict[str, Change] = {  # the values stay the same
    "as it is": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}
EXTREMES: dict[str, Change] = {  # PyTorch's own rounding errors may have any size
    "NaN": lambda x: filled(x, math.nan),
    "infinite": lambda x: filled(x, -math.inf),
    "enormous": lambda x: filled(x, 3e38),
}
OTHERS: dict[str, Change] = {  # native code may refuse them
    "expanded": lambda x: x[:1].expand(x.shape) if x.ndim else x,
    "zero": torch.zeros_like,
    "no rows": lambda x: x[:0],
    "a row less": lambda x: x[:-1],
    "a row more": lambda x: torch.cat([x, x[:1]]),
    "one row": lambda x: x[:1],
    "twice": lambda x: torch.cat([x, x]),
    "a column less": lambda x: x[..., :-1],
    "a column more": lambda x: torch.cat([x, x[..., :1]], dim=-1),
    "another rank": lambda x: x.unsqueeze(0),
    "flat": lambda x: x.flatten(),
    "turned": lambda x: x.transpose(0, -1),
    "a middle less": lambda x: x[:, :-1] if x.ndim > 2 else x[:-1],
    "other bits": lambda x: x.double() if x.dtype == torch.float32 else x.float(),
    "half": torch.Tensor.half,
    "sparse": torch.Tensor.to_sparse,
    "unaligned": unaligned,
    "on meta": lambda x: x.to("meta"),
}
CHANGES = LAYOUTS | EXTREMES | OTHERS


def answer(compute: Callable[[], Any]) -> Any:
    """Returns the result, or `None` after an exception."""
    try:
        return compute()
    except (UnsupportedError, ValueError, TypeError, RuntimeError, IndexError, NotImplementedError, AssertionError):
        return None


def answers(flow: nn.Module, compute: Callable[[], Any]) -> tuple[Any, Any]:
    """Returns the results of the library's own code and of native code."""
    theirs = answer(compute)
    with jf.accelerate(flow):
        return theirs, answer(compute)


def check_same(ours: Any, theirs: Any, what: str, tolerance: float = 1e-3) -> None:
    assert theirs is not None, f"computed what PyTorch refuses: {what}"
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape, f"{what}: {tuple(a.shape)}, not {tuple(b.shape)}"
        error = ((a - b).abs() / b.abs().clamp(min=1)).nan_to_num(0.0, torch.inf)
        assert not error.numel() or error.max() <= tolerance, f"{what}: off by {error.max():g}"


def change_weight(module: nn.Module, change: str, rng: random.Random) -> str:
    """Changes a parameter of the module; returns its name."""
    path, parameter = rng.choice(list(module.named_parameters()))
    owner, _, name = path.rpartition(".")
    changed = CHANGES[change](parameter.detach())
    module.get_submodule(owner)._parameters[name] = nn.Parameter(changed, requires_grad=False)
    return path


def transformer(rng: random.Random) -> tuple[Any, str]:
    """Inverts a block with tokens, contexts or weights that may not fit."""
    name, weights = rng.choice(list(CASES)), rng.choice(["float32", "float64", "bfloat16", "float16"])
    case = CASES[name]
    if case.kind is jf.MAF and weights != "float64":
        weights = "float32"
    flow, context = case.flow(), case.context()
    z = case.z(flow)
    flow = flow.to(getattr(torch, weights))
    if weights == "float64":
        z, context = z.double(), context.double() if context is not None and context.is_floating_point() else context
    native_weights.MIN_IN_PLACE = rng.choice([0, 2**25])
    block = case.block(flow)
    target, change = rng.choice(["z", "context", "weight"]), rng.choice(list(CHANGES))
    if target == "z":
        z = CHANGES[change](z)
    elif target == "context" and context is not None:
        context = CHANGES[change](context)
    elif target == "weight":
        target = change_weight(flow.blocks[1], change, rng)
    what = f"{name}, {weights}: {target} {change}"
    ours = answer(lambda: block.sequential_inverse(z, jf.Context(context)))
    if ours is None:
        assert change not in LAYOUTS, f"refused: {what}"
    elif ours[0].numel() and change not in EXTREMES:
        one = context is not None and len(context) == 1  # for all rows
        rows = context.expand(len(z), *context.shape[1:]) if one else context
        theirs, is_half = answer(lambda: in_pytorch(block, z, rows)), weights in ("bfloat16", "float16")
        if is_half and theirs is not None:  # whose network rounds each step
            theirs = in_pytorch(case.block(flow.float()), z, rows)
        check_same(ours, theirs, what, 0.1 if is_half else 1e-3)
    return ours, what


def in_pytorch(block: Any, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Inverts a block token by token with a cache."""
    x, cache = torch.zeros_like(z), block.init_cache(z, jf.Context(context))
    log_det = z.new_zeros(len(z))
    for t in range(z.shape[1]):
        log_scale, shift = block.affine(x, t, t + 1, cache)
        x[:, t : t + 1] = log_scale.exp() * z[:, t : t + 1] + shift
        log_det += log_scale.sum(dim=(1, 2))
    return x, log_det


def library_flow(rng: random.Random) -> tuple[Any, str]:
    """Evaluates an accelerated flow of another library with rows or contexts that may not fit."""
    name, dtype = rng.choice(library_flows.NATIVE), rng.choice([torch.float32, torch.float64])
    rows, features, hidden, width = rng.choice([1, 2, 5, 17, 70]), rng.choice([2, 3, 6]), 8, rng.choice([0, 3])
    if rng.random() < 0.1:
        name, (features, hidden) = rng.choice(list(library_flows.LARGE.items()))
    if name.startswith("pyro"):  # whose own passes are in the default dtype
        dtype = torch.float32
    flow = library_flows.CASES[name].make(width, features, dtype, hidden)
    x, context = (library_flows.normal(rows, size, dtype=dtype) if size else None for size in (features, width))
    assert x is not None
    target, change = rng.choice(["x", "context", "weight"]), rng.choice(list(CHANGES))
    if target == "x":
        x = CHANGES[change](x)
    elif target == "context" and context is not None:
        context = CHANGES[change](context)
    elif target == "weight":
        target = change_weight(flow, change, rng)
    what, is_inverse = f"{name}, {rows} x {features}, context {width}: {target} {change}", rng.random() < 0.5
    theirs, ours = answers(flow, lambda: library_flows.values(flow, x, context, is_inverse))
    # PyTorch's own linear layers, and zuko's couplings, then return memory that nothing was written to.
    if change == "on meta" or (name == "zuko coupling" and x.shape[-1:] != (features,)):
        return ours, what
    if theirs is None and context is not None and name.startswith("zuko"):  # not all of its transforms broadcast x
        shape = answer(lambda: torch.broadcast_shapes(x.shape[:-1], context.shape[:-1]))
        theirs = answer(lambda: library_flows.values(flow, x.expand(*shape, -1), context, is_inverse))
    assert ours is not None or theirs is None, f"refused: {what}"
    if ours is not None and change not in EXTREMES and ours[0].numel():
        check_same(ours, theirs, what, 1e-2)
    if ours is not None and rng.random() < 0.5:
        check_gradients(rng, flow, x, context, is_inverse, ours, what, change not in EXTREMES)
    return ours, what


def check_gradients(
    rng: random.Random, flow: nn.Module, x: Tensor, context: Tensor | None, is_inverse: bool, results: Any, what: str,
    is_compared: bool,
) -> None:  # fmt: skip
    """Takes the gradients of some tensors, for cotangents of any layout.

    At a kink of ReLU or a knot of a spline, rounding decides between two gradients: if they differ, the check is
    repeated with other weights.
    """
    for tensor in (x, context, *flow.parameters()):
        if tensor is not None:
            tensor.requires_grad_(rng.random() < 0.7)
    changes = [rng.choice([*LAYOUTS, rng.choice([*EXTREMES]), "expanded", "zero", "none"]) for _ in results]
    cotangents = [
        None if change == "none" else CHANGES[change](library_flows.normal(*part.shape, seed=1, dtype=part.dtype))
        for part, change in zip(results, changes, strict=True)
    ]
    what = f"gradients of {what}, cotangents {' and '.join(changes)}"
    for is_last in (False, True):
        with torch.enable_grad():
            theirs, ours = answers(flow, lambda: library_flows.gradients(flow, x, context, is_inverse, cotangents))
        assert ours is not None or theirs is None, f"refused: {what}"
        if theirs is None or not is_compared or not EXTREMES.keys().isdisjoint(changes):
            return
        error = gradient_error(ours, theirs, what)
        if error <= 1:
            return
        assert not is_last, f"{what}: off by {error:g} times the tolerance"
        for parameter in flow.parameters():
            if parameter.is_contiguous():
                parameter *= 1.001


def gradient_error(ours: Any, theirs: Any, what: str) -> float:
    """The largest error, as a multiple of a tolerance relative to a tensor's largest entry."""
    errors = [0.0]
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            assert not any(part.any() for part in (a, b) if part is not None), f"{what}: none in place of one"
        else:
            assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{what}: {a.dtype} {tuple(a.shape)}, not {tuple(b.shape)}"
            if b.numel() and b.isfinite().all():
                tolerance = 1e-6 if b.dtype == torch.float64 else 1e-2
                error = (a - b).abs().max().double() / (tolerance * b.abs().max().double().clamp(min=1e-6))
                errors.append(float(error.nan_to_num(torch.inf)))
    return max(errors)


KINDS = (transformer, library_flow)


def run(seed: int) -> str:
    """Makes the call of a seed; returns its kind, and whether it was computed."""
    rng = random.Random(seed)
    with torch.no_grad():
        kind = rng.choice(KINDS)
        try:
            ours, _ = kind(rng)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    return f"{kind.__name__} {'refused' if ours is None else 'computed'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--callers", type=int, default=1, help="threads that call at once")
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.count} calls, {options.callers} at once", flush=True)
    if options.callers > 1:  # in threads of its own: the thread sanitizer does not see how those of OpenMP wait
        library.Library._use_threads_of_pytorch = lambda self: None  # type: ignore[method-assign]
    loaded = library.Library(options.library)
    library._load_or_explain = lambda: (loaded, "")
    zuko.transforms.bisection = library_flows.exact_bisection
    torch.set_num_threads(3)
    outcomes: Counter[str] = Counter()
    with ThreadPoolExecutor(options.callers) as pool:
        for done, outcome in enumerate(pool.map(run, range(options.seed, options.seed + options.count)), 1):
            outcomes[outcome] += 1
            if done % 500 == 0:
                print(f"{done:8,} calls", flush=True)
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:8,} {outcome}")


if __name__ == "__main__":
    main()
