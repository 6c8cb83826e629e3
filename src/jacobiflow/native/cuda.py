"""Chains of transforms on an NVIDIA GPU: one launch for all rows, of a kernel from the C++ sources of the CPU.

We have never run it on a GPU. Tests run the kernel as C++ on a CPU, with a stand-in for cuda.core.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.errors import UnsupportedError
from jacobiflow.native import compiler
from jacobiflow.native.boundary import ChainArgs, TransformKind
from jacobiflow.native.chain import InPyTorch, Result, TransformChain, with_row_stride
from jacobiflow.native.library import compiled_library, private_folder
from jacobiflow.native.tensors import address_of, allocate, is_dense
from jacobiflow.utils.files import write_atomically

SWITCH = "JACOBIFLOW_CUDA"  # If this environment variable is 1, `cuda=True` is the default of `jf.accelerate`.
NOTE = "one kernel, never run on a GPU by us; its first results are compared with the library's own"
_LANES = 32  # A tile has a row for each thread of a warp.
_MAX_WARPS = 8  # A block has at most so many warps, as chain.cu says.
_OMITTED = {TransformKind.LU_LINEAR, TransformKind.BERNSTEIN, TransformKind.SUM_OF_SQUARES}
"""Transforms that the kernel is compiled without, which halves its size."""
_RESIDENT_WARPS = 16  # A processor of a GPU runs so many warps at once, as chain.cu says.
_FIRST_ROWS = 1000  # So many rows of the first call are compared with the library's own.
_TOLERANCE = 1e-3  # A first result a may differ from the library's b by at most 1e-3 (1 + |b|).
_TIMEOUT = 300  # The first results have to come within so many seconds.
_REQUEST, _RESULTS = "request.pt", "results.pt"  # files between the two processes


class _Stream(NamedTuple):
    """A stream of PyTorch, as cuda.core takes it."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class RefusedError(UnsupportedError):
    """The kernel failed its trial on a device, so it is not used for this chain there; the message says why."""


class CudaChain:
    """A chain, and its inverse, on the GPUs that its rows are on."""

    def __init__(self, chain: TransformChain) -> None:
        self._chain = chain
        # For each device, direction and kind of log-determinant: the plan there, or why it is not used.
        self._plans: dict[tuple[torch.device, bool, str | None], DevicePlan | str] = {}

    def evaluate(
        self, tensors: Sequence[Tensor], x: Float[Tensor, "b d"], context: Float[Tensor, "#b c"] | None,
        is_inverse: bool, log_det: str | None, in_pytorch: InPyTorch | None,
    ) -> Result:  # fmt: skip
        """Computes the chain or its inverse as `TransformChain.evaluate` does, without gradients.

        The first results are compared with those of `in_pytorch`, in a process of their own: an access to memory that
        is not the kernel's own would end all use of the GPU in a process.

        Raises:
            RefusedError: If the first results were not those of `in_pytorch`.
            UnsupportedError: If the kernel does not take the inputs, or the library is not slower.
        """
        if in_pytorch is None or not self._takes(tensors, x, context):
            raise UnsupportedError("inputs that the kernel does not take")
        key = x.device, is_inverse, log_det
        with torch.cuda.device(x.device):
            processors = torch.cuda.get_device_properties(x.device).multi_processor_count
            library, kernel = estimate_seconds(self._chain, is_inverse, len(x), processors)
            if library <= kernel or torch.cuda.is_current_stream_capturing():
                raise UnsupportedError("a call for which the library is not slower, or the capture of a graph")
            try:
                numbers = torch.cat([x.new_zeros(1), *(tensor.detach().flatten() for tensor in tensors)])
                if key not in self._plans:
                    self._plans[key] = self._try(is_inverse, log_det, numbers, x, context, in_pytorch, tensors)
                plan = self._plans[key]
                if isinstance(plan, str):
                    raise RefusedError(plan)
                grid = choose_grid(len(x), load_kernel(x.device.index or 0)[1])
                values, log_dets, failed = plan.launch(numbers, x, context, *grid)
            except torch.OutOfMemoryError as error:
                raise UnsupportedError("too little memory on the GPU") from error
        return Result(values, log_dets, failed if failed.any() else None)

    def _takes(self, tensors: Sequence[Tensor], x: Tensor, context: Tensor | None) -> bool:
        chain, inputs = self._chain, (x, *tensors, *(() if context is None else (context,)))
        rows, width = (1, 0) if context is None else context.shape
        return (
            [tuple(tensor.shape) for tensor in tensors] == chain.shapes
            and (x.shape[1], width) == (chain.features, chain.context) and rows in (1, len(x)) and len(x) > 0
            and all(is_dense(tensor, torch.float32) and tensor.device == x.device for tensor in inputs)
            and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs))
            and not any(each.structure.kind in _OMITTED for each in chain.transforms)
        )  # fmt: skip

    def _try(
        self, is_inverse: bool, log_det: str | None, numbers: Tensor, x: Tensor, context: Tensor | None,
        in_pytorch: InPyTorch, tensors: Sequence[Tensor],
    ) -> DevicePlan | str:  # fmt: skip
        """Returns the plan for a device, or how its first results differ from those of PyTorch."""
        x, context = x[:_FIRST_ROWS], None if context is None else context[:_FIRST_ROWS]
        with torch.no_grad():
            expected = in_pytorch(x, context, tensors)
        is_good = expected[0].isfinite().all(dim=1)
        if not is_good.any():
            raise UnsupportedError("no finite row to compare the first results by")
        plan = make_plan(self._chain, is_inverse, log_det)
        try:
            results = run_in_process(plan, numbers, x, context)
        except (OSError, subprocess.SubprocessError) as error:
            # The last line of a traceback has the reason.
            text = str(getattr(error, "stderr", None) or error).strip()
            return f"the process for its first results failed: {text.splitlines()[-1]}"
        difference = max(_find_difference(result, expected, is_good) for result in results)
        if difference > _TOLERANCE:
            return f"its first results differed from the library's own by {difference:.1g}"
        return plan.on(x.device)


class DevicePlan(NamedTuple):
    """The plan of a chain, for any device, or with the addresses of one.

    Attributes:
        image: What the kernel reads, as numbers of 64 bits. Before `on`, addresses count from its start.
        is_address: 1 for an address in `image`, else 0.
        positions: For each packed weight, its position in all tensors, from 1; 0 for a masked weight.
        units: The units of a tile's memory.
        own_units: The same of each further warp that shares the tile.
        log_det_shape: The shape of the log-determinant of a row, or `None` without one.
    """

    image: Tensor
    is_address: Tensor
    positions: Tensor
    units: int
    own_units: int
    log_det_shape: tuple[int, ...] | None

    def on(self, device: torch.device) -> DevicePlan:
        """Returns the plan with its addresses on a device."""
        image = torch.empty_like(self.image, device=device)
        image.copy_(self.image + self.is_address * image.data_ptr())
        return self._replace(image=image, positions=self.positions.to(device))

    def launch(
        self, numbers: Tensor, x: Tensor, context: Tensor | None, blocks: int, warps: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Launches the kernel on PyTorch's current stream, without waiting. Returns the parts of a `Result`.

        `numbers` are 0 and the entries of all tensors. The warps of a block share a tile.
        """
        from cuda import core

        rows, features = x.shape
        # A weight that is not finite makes all rows fail, as on a CPU.
        packed = numbers[self.positions] + (numbers * 0).sum()
        (x, in_stride), (context, context_stride) = with_row_stride(x), with_row_stride(context)
        # PyTorch gives this memory to nothing else on the stream before the kernel is done.
        memory = x.new_empty(blocks * _LANES * (self.units + (warps - 1) * self.own_units))
        out, failed = x.new_empty(rows, features), torch.empty(rows, dtype=torch.bool, device=x.device)
        log_det = None if self.log_det_shape is None else x.new_empty(rows, *self.log_det_shape)
        core.launch(
            _Stream(torch.cuda.current_stream(x.device).cuda_stream),
            core.LaunchConfig(grid=blocks, block=_LANES * warps), load_kernel(x.device.index or 0)[0],
            self.image.data_ptr(), packed.data_ptr(), x.data_ptr(), in_stride, address_of(context) or 0, context_stride,
            out.data_ptr(), address_of(log_det) or 0, failed.data_ptr(), rows, memory.data_ptr(),
        )  # fmt: skip
        return out, log_det, failed


def is_on_gpu(tensor: Tensor) -> bool:
    """Returns True for a tensor on an NVIDIA GPU."""
    return tensor.is_cuda and torch.version.cuda is not None


def is_installed() -> bool:
    """Returns True if cuda.core is installed."""
    return importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.core") is not None


def make_plan(chain: TransformChain, is_inverse: bool, log_det: str | None) -> DevicePlan:
    """Plans a chain or its inverse."""
    native: Any = compiled_library()
    # The plan is that of a call with packed weights; any address says so.
    arguments = ChainArgs(
        ctypes.addressof(chain.table), packed=1, count=len(chain.table), features=chain.features,
        context_features=chain.context, is_inverse=is_inverse, is_by_feature=log_det == "features", num_threads=1,
    )  # fmt: skip
    size, units, own_units = native.chain_image(arguments, 0, None)
    images = allocate(torch.int64, 2, -(-size // 8)).zero_()
    for base, image in enumerate(images):
        native.chain_image(arguments, base, image.data_ptr())
    # The CPU's own packing tells where each packed weight comes from: it packs positions in place of weights.
    counts = [math.prod(shape) for shape in chain.shapes]
    sources = torch.arange(1, sum(counts) + 1, dtype=torch.float64, device="cpu").split(counts)
    table = (ctypes.c_void_p * len(counts))(*(source.data_ptr() for source in sources))
    packed = allocate(torch.float64, chain.sizes(native)[0]).zero_()
    arguments.tensors, arguments.packed = ctypes.addressof(table), packed.data_ptr()
    native.evaluate_chain(arguments, torch.float64)  # A call of no rows only packs.
    log_det_shape = {None: None, "rows": (), "features": (chain.features,)}[log_det]
    return DevicePlan(images[0], (images[1] - images[0] == 1).long(), packed.long(), units, own_units, log_det_shape)


def choose_grid(rows: int, resident: int) -> tuple[int, int]:
    """Returns how many blocks to launch, and how many warps each has. `resident` warps run at once on the device."""
    tiles = -(-rows // _LANES)
    warps = max(1, min(_MAX_WARPS, resident // tiles))
    return min(tiles, max(1, resident // warps)), warps


def estimate_seconds(chain: TransformChain, is_inverse: bool, rows: int, processors: int) -> tuple[float, float]:
    """Models the seconds of the library and of the kernel. Nothing in it was measured on a GPU.

    Its assumptions favour the library. It launches two operations for each one of a network, and 8 more (60 for a
    spline), in 4 microseconds each, whatever the number of rows. An inverse takes it no more than 8 passes. The kernel
    takes 30 microseconds before it starts, and runs at 1.6 GHz. A warp takes 8 cycles for a multiplication, which the
    warps of a tile share, and one more; 1,000 cycles for each step; and 1,000 for each spline. A processor takes 2
    cycles for a multiplication of each tile.
    """
    tiles = -(-rows // _LANES)
    waves = -(-tiles // (_RESIDENT_WARPS * processors))
    _, warps = choose_grid(rows, _RESIDENT_WARPS * processors)
    launches, multiplications, cycles = 0, 0, 0.0
    for each in chain.transforms:
        transform, steps = each.structure, max(each.structure.steps, 1)
        is_spline = transform.kind in (TransformKind.RATIONAL_QUADRATIC, TransformKind.RATIONAL_LINEAR)
        inverts = is_inverse != bool(transform.is_inverted) and not each.is_coupling
        launches += (min(steps, 8) if inverts else 1) * (2 * transform.num_operations + (60 if is_spline else 8))
        multiplications += sum(math.prod(shape) for shape in each.shapes if len(shape) == 2)
        cycles += 1000 * waves * (steps + is_spline * transform.features)
    cycles += multiplications * (8 / warps + 1 + 2 * tiles / processors)
    return 4e-6 * launches, 30e-6 + cycles / 1.6e9


@functools.cache
def load_kernel(ordinal: int) -> tuple[Any, int]:
    """Returns the kernel, stored in the user's cache folder, and the number of its warps that a device runs at once."""
    from cuda import core
    from cuda.bindings import nvrtc

    device = core.Device(ordinal)
    device.set_current()
    _, *version = nvrtc.nvrtcVersion()
    folder = private_folder()
    name = f"chain-sm_{device.arch}-{'.'.join(map(str, version))}-{compiler.fingerprint()}.cubin"
    if folder is not None and (folder / name).is_file():
        code = core.ObjectCode.from_cubin((folder / name).read_bytes())
    else:
        options = core.ProgramOptions(
            std="c++17", arch=f"sm_{device.arch}", device_as_default_execution_space=True,
            include_path=str(compiler.SOURCES),
        )  # fmt: skip
        code = core.Program((compiler.SOURCES / "chain.cu").read_text(), "c++", options=options).compile("cubin")
        with suppress(OSError):
            if folder is not None:
                write_atomically(folder / name, code.code)
    kernel = code.get_kernel("jacobiflow_chain")
    blocks = kernel.occupancy.max_active_blocks_per_multiprocessor(_LANES * _MAX_WARPS, 0)
    return kernel, blocks * _MAX_WARPS * device.properties.multiprocessor_count


def run_in_process(
    plan: DevicePlan, numbers: Tensor, x: Tensor, context: Tensor | None
) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """Returns the results of `DevicePlan.launch` in a new process, for blocks of each number of warps."""
    with tempfile.TemporaryDirectory(prefix="jacobiflow-") as folder:
        inputs = [None if tensor is None else tensor.detach().cpu().contiguous() for tensor in (numbers, x, context)]
        torch.save((*plan, str(x.device), *inputs), Path(folder, _REQUEST))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = (sys.executable, "-m", "jacobiflow.native.cuda", folder)
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT, env=environment)
        results: list[Any] = torch.load(Path(folder, _RESULTS), map_location=x.device, weights_only=True)
        return results


def main() -> None:
    """Computes the request of `run_in_process` in the folder that the command names."""
    folder = Path(sys.argv[1])
    *fields, name, numbers, x, context = torch.load(folder / _REQUEST, weights_only=True)
    device = torch.device(name)
    with torch.cuda.device(device):
        plan = DevicePlan(*fields).on(device)
        numbers, x, context = numbers.to(device), x.to(device), None if context is None else context.to(device)
        blocks = max(1, len(x) // _LANES // 2)  # so that a block has several tiles if there are enough
        results = [plan.launch(numbers, x, context, blocks, warps) for warps in range(1, _MAX_WARPS + 1)]
        torch.cuda.synchronize()
    torch.save(results, folder / _RESULTS)


def _find_difference(
    result: tuple[Tensor, Tensor | None, Tensor], expected: tuple[Tensor, Tensor | None], is_good: Tensor
) -> float:
    """Returns the largest difference of rows whose expected values are finite; infinity if they all failed."""
    *outputs, failed = result
    is_good = is_good & ~failed
    errors = [
        ((ours - theirs).abs() / (1 + theirs.abs()))[is_good].nan_to_num(math.inf).max().item()
        for ours, theirs in zip(outputs, expected, strict=True)
        if ours is not None and theirs is not None and is_good.any()
    ]
    return max(errors, default=math.inf)


if __name__ == "__main__":
    main()
