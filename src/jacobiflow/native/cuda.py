"""Chains of transforms on an NVIDIA GPU: who gets the kernel, and the trial of its first results."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import TransformKind
from jacobiflow.native.chain import InPyTorch, Result, TransformChain
from jacobiflow.native.cuda_plan import LANES, MAX_WARPS, DevicePlan, choose_grid, load_kernel, make_plan
from jacobiflow.native.tensors import PLAIN

SWITCH = "JACOBIFLOW_CUDA"  # environment variable; 1 makes `cuda=True` the default of `jf.accelerate`
NOTE = "one kernel, never run on a GPU by us; its first results are compared with the library's own"
_OMITTED = {TransformKind.LU_LINEAR, TransformKind.BERNSTEIN, TransformKind.SUM_OF_SQUARES}  # from the kernel
_RESIDENT_WARPS = 16  # that a processor of a GPU runs at once, as in chain.cu
_TOLERANCE = 1e-3  # largest difference of a first result from the library's own, absolute plus relative
_TIMEOUT = 300  # seconds in which the first results have to come
_REQUEST, _RESULTS = "request.pt", "results.pt"  # files between the two processes


class RefusedError(UnsupportedError):
    """The kernel is not used for a chain on a device any more; the message says why."""


class CudaChain:
    """A chain, and its inverse, on the GPUs that its rows are on."""

    def __init__(self, chain: TransformChain) -> None:
        self._chain = chain
        # For each device, direction and kind of log-determinant: the plan there, or why it is not used.
        self._plans: dict[tuple[torch.device, bool, str | None], DevicePlan | RefusedError] = {}

    def evaluate(
        self,
        tensors: Sequence[Tensor],
        x: Float[Tensor, "b d"],
        context: Float[Tensor, "#b c"] | None,
        is_inverse: bool,
        log_det: str | None,
        in_pytorch: InPyTorch | None,
    ) -> Result:
        """Computes the chain or its inverse as `TransformChain.evaluate` does, without gradients.

        The first results are compared with those of `in_pytorch`, in a process of their own: an access to memory that
        is not the kernel's own would end all use of the GPU in a process.

        Raises:
            RefusedError: If the first results were not those of `in_pytorch`.
            UnsupportedError: If the kernel does not take the inputs, or the library is not slower.
        """
        self._check(tensors, x, context)
        key = x.device, is_inverse, log_det
        with torch.cuda.device(x.device):
            if torch.cuda.is_current_stream_capturing() or in_pytorch is None:
                raise UnsupportedError("the capture of a graph, or no code of the library's own")
            processors = torch.cuda.get_device_properties(x.device).multi_processor_count
            library, kernel = estimate_seconds(self._chain, is_inverse, len(x), processors)
            if library <= kernel:
                raise UnsupportedError("a chain and a number of rows for which the library is not slower")
            try:
                numbers = torch.cat([x.new_zeros(1), *(tensor.detach().flatten() for tensor in tensors)])
                if key not in self._plans:
                    self._plans[key] = self._try(key, numbers, x, context, in_pytorch, tensors)
                plan = self._plans[key]
                if isinstance(plan, RefusedError):
                    raise plan
                grid = choose_grid(len(x), load_kernel(x.device.index or 0)[1])
                values, log_dets, failed = plan.launch(numbers, x, context, *grid)
            except torch.OutOfMemoryError as error:
                raise UnsupportedError("too little memory on the GPU") from error
        return Result(values, log_dets, failed if failed.any() else None)

    def _check(self, tensors: Sequence[Tensor], x: Tensor, context: Tensor | None) -> None:
        inputs = (x, *tensors, *(() if context is None else (context,)))
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            raise UnsupportedError("gradients on a GPU")
        if any(each.structure.kind in _OMITTED for each in self._chain.transforms):
            raise UnsupportedError("L U, or a polynomial, on a GPU")
        if [tuple(tensor.shape) for tensor in tensors] != self._chain.shapes or not all(
            _is_readable(t, x.device) for t in inputs
        ):
            raise UnsupportedError("tensors that are not of torch.float32, of one GPU, or of other shapes")
        width = 0 if context is None else context.shape[1]
        if x.shape[1:] != (self._chain.features,) or width != self._chain.context or not len(x):
            raise UnsupportedError("no rows, or rows or a context of another width")
        if context is not None and len(context) not in (1, len(x)):
            raise UnsupportedError("a context that does not fit the rows")

    def _try(
        self, key: tuple[torch.device, bool, str | None], numbers: Tensor, x: Tensor, context: Tensor | None,
        in_pytorch: InPyTorch, tensors: Sequence[Tensor],
    ) -> DevicePlan | RefusedError:  # fmt: skip
        """Returns the plan for a device if its first results are those of PyTorch, and else the reason."""
        device, is_inverse, log_det = key
        with torch.no_grad():
            expected = in_pytorch(x, context, tensors)
        if not (good := expected[0].isfinite().all(dim=1)).any():
            raise UnsupportedError("no finite row to compare the first results by")
        plan = make_plan(self._chain, is_inverse, log_det)
        try:
            differences = [
                _find_difference(result, expected, good) for result in run_in_process(plan, device, numbers, x, context)
            ]
        except (OSError, subprocess.SubprocessError) as error:
            # The last line of a traceback has the reason.
            text = str(getattr(error, "stderr", None) or error).strip()
            return RefusedError(f"the process for its first results failed: {text.splitlines()[-1]}")
        if max(differences) > _TOLERANCE:
            return RefusedError(f"its first results differed from the library's own by {max(differences):.1g}")
        return plan.on(device)


def is_on_gpu(tensor: Tensor) -> bool:
    """Returns True for a tensor on an NVIDIA GPU."""
    return tensor.is_cuda and torch.version.cuda is not None


def is_installed() -> bool:
    """Returns True if cuda.core is installed."""
    return importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.core") is not None


def estimate_seconds(chain: TransformChain, is_inverse: bool, rows: int, processors: int) -> tuple[float, float]:
    """Models the seconds of the library and of the kernel. Nothing in it was measured on a GPU.

    Its assumptions favour the library. It launches two operations for each one of a network, and 8 more (60 for a
    spline), in 4 microseconds each, whatever the number of rows. An inverse takes it no more than 8 passes. The kernel
    takes 30 microseconds before it starts, and runs at 1.6 GHz. A warp takes 8 cycles for a multiplication, which the
    warps of a tile share, and one more; 1,000 cycles for each step; and 1,000 for each spline. A processor takes 2
    cycles for a multiplication of each tile.
    """
    tiles = -(-rows // LANES)
    waves = -(-tiles // (_RESIDENT_WARPS * processors))
    _, warps = choose_grid(rows, _RESIDENT_WARPS * processors)
    launches, multiplications, cycles = 0, 0, 0.0
    for each in chain.transforms:
        transform = each.structure
        steps = max(transform.steps, 1)
        is_spline = transform.kind in (TransformKind.RATIONAL_QUADRATIC, TransformKind.RATIONAL_LINEAR)
        inverts = is_inverse != bool(transform.is_inverted) and not each.is_coupling
        launches += (min(steps, 8) if inverts else 1) * (2 * transform.num_operations + (60 if is_spline else 8))
        multiplications += sum(math.prod(shape) for shape in each.shapes if len(shape) == 2)
        cycles += 1000 * waves * (steps + is_spline * transform.features)
    cycles += multiplications * (8 / warps + 1 + 2 * tiles / processors)
    return 4e-6 * launches, 30e-6 + cycles / 1.6e9


def _is_readable(tensor: Tensor, device: torch.device) -> bool:
    """Returns True for a dense float32 tensor of PyTorch's own classes on this device."""
    return type(tensor) in PLAIN and (
        tensor.dtype is torch.float32 and tensor.device == device and tensor.layout is torch.strided
        and not tensor.is_nested and not tensor.is_neg()
    )  # fmt: skip


def run_in_process(
    plan: DevicePlan, device: torch.device, numbers: Tensor, x: Tensor, context: Tensor | None
) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """Returns the results of `DevicePlan.launch` in a new process, for blocks of each number of warps.

    Raises:
        OSError, SubprocessError: If the process fails, or takes too long.
    """
    with tempfile.TemporaryDirectory(prefix="jacobiflow-") as folder:
        inputs = [None if tensor is None else tensor.detach().cpu().contiguous() for tensor in (numbers, x, context)]
        torch.save((*plan, str(device), *inputs), Path(folder, _REQUEST))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = (sys.executable, "-m", "jacobiflow.native.cuda", folder)
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT, env=environment)
        results: list[Any] = torch.load(Path(folder, _RESULTS), map_location=device, weights_only=True)
        return results


def main() -> None:
    """Computes the request of `run_in_process` in the folder that the command names."""
    folder = Path(sys.argv[1])
    *fields, name, numbers, x, context = torch.load(folder / _REQUEST, weights_only=True)
    device = torch.device(name)
    with torch.cuda.device(device):
        plan = DevicePlan(*fields).on(device)
        numbers, x, context = numbers.to(device), x.to(device), None if context is None else context.to(device)
        blocks = max(1, len(x) // LANES // 2)  # so that a block has several tiles if there are enough
        results = [plan.launch(numbers, x, context, blocks, warps) for warps in range(1, MAX_WARPS + 1)]
        torch.cuda.synchronize()
    torch.save(results, folder / _RESULTS)


def _find_difference(
    result: tuple[Tensor, Tensor | None, Tensor], expected: tuple[Tensor, Tensor | None], good: Tensor
) -> float:
    """Returns the largest difference of rows whose expected values are finite; infinity if they all failed."""
    *outputs, failed = result
    good = good & ~failed
    if not good.any():
        return math.inf
    errors = [
        ((ours - theirs).abs() / (1 + theirs.abs()))[good].nan_to_num(math.inf).max().item()
        for ours, theirs in zip(outputs, expected, strict=True)
        if ours is not None and theirs is not None
    ]
    return max(errors)


if __name__ == "__main__":
    main()
