"""Chains of transforms on an NVIDIA GPU: one launch for all rows, of a kernel from the C++ sources of the CPU.

We have never run it on a GPU. Tests run the kernel as C++ on a CPU, with a stand-in for cuda.core.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.errors import UnsupportedError
from jacobiflow.native import compiler
from jacobiflow.native.boundary import ChainArgs, TransformKind
from jacobiflow.native.chain import Result, TransformChain, with_row_stride
from jacobiflow.native.library import compiled_library, private_folder
from jacobiflow.native.tensors import PLAIN
from jacobiflow.utils.files import write_atomically

NOTE = "one kernel, never run on a GPU by us; its first results are compared with the library's own"
_LANES = 32  # rows of a tile: one for each thread of a warp
_MAX_WARPS = 8  # of a block, as in chain.cu
_TOLERANCE = 1e-3  # largest difference of a first result from the library's own, absolute plus relative


_Key = tuple[torch.device, bool, str | None]  # device, True for the inverse, kind of log-determinant


class _Stream(NamedTuple):
    """A stream of PyTorch, as cuda.core takes it."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class CudaChain:
    """A chain, and its inverse, on the GPUs that its rows are on.

    Attributes:
        refusals: Why the kernel is not used, or `None` if it is: for each device, direction and kind of log-determinant
            whose first result was compared with the library's own.
    """

    def __init__(self, chain: TransformChain) -> None:
        self._chain = chain
        self._plans: dict[_Key, _DevicePlan] = {}
        self.refusals: dict[_Key, str | None] = {}

    def evaluate(
        self,
        tensors: Sequence[Tensor],
        x: Float[Tensor, "b d"],
        context: Float[Tensor, "#b c"] | None,
        is_inverse: bool,
        log_det: str | None,
        library_call: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]],
    ) -> Result:
        """Computes the chain or its inverse as `TransformChain.evaluate` does, without gradients.

        Args:
            library_call: Computes the same by the library's own code. The first result is compared with it.

        Raises:
            UnsupportedError: If the kernel does not take the inputs, or a first result was wrong.
        """
        key = x.device, is_inverse, log_det
        inputs = (x, *tensors, *(() if context is None else (context,)))
        width = 0 if context is None else context.shape[1]
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            raise UnsupportedError("gradients on a GPU")
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if shapes != self._chain.shapes or not all(_is_readable(t, x.device) for t in inputs):
            raise UnsupportedError("tensors that are not of torch.float32, of one GPU, or of other shapes")
        if x.shape[1:] != (self._chain.features,) or width != self._chain.context or not len(x):
            raise UnsupportedError("no rows, or rows or a context of another width")
        if context is not None and len(context) not in (1, len(x)):
            raise UnsupportedError("a context that does not fit the rows")
        if (reason := self.refusals.get(key)) is not None:
            raise UnsupportedError(reason)
        with torch.cuda.device(x.device):
            if torch.cuda.is_current_stream_capturing():
                raise UnsupportedError("the capture of a graph")
            if key not in self._plans:
                self._plans[key] = _DevicePlan(self._chain, *key)
            values, log_dets, failed = self._plans[key].evaluate(tensors, x, context)
        if key not in self.refusals and not failed.all():
            expected = library_call(x, None if context is None else context.expand(len(x), -1))
            self.refusals[key] = reason = _find_difference((values, log_dets), expected, ~failed)
            if reason is not None:
                raise UnsupportedError(reason)
        return Result(values, log_dets, failed if failed.any() else None)


class _DevicePlan:
    """The plan of a chain in the memory of a device."""

    def __init__(self, chain: TransformChain, device: torch.device, is_inverse: bool, log_det: str | None) -> None:
        native = compiled_library()
        if native is None:
            raise UnsupportedError("no native library")
        if any(each.structure.kind == TransformKind.LU_LINEAR for each in chain.transforms):
            raise UnsupportedError("L U on a GPU")
        # The plan is that of a call with packed weights; any address says so.
        arguments = ChainArgs(
            ctypes.addressof(chain.table), packed=1, count=len(chain.table), features=chain.features,
            context_features=chain.context, is_inverse=is_inverse, is_by_feature=log_det == "features", num_threads=1,
        )  # fmt: skip
        self._log_det_shape = {None: None, "rows": (), "features": (chain.features,)}[log_det]
        size, self._units, self._own_units = native.chain_image(arguments, 0, None)
        self._image, on_host = torch.empty(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8)
        native.chain_image(arguments, self._image.data_ptr(), on_host.data_ptr())
        self._image.copy_(on_host)
        # The CPU's own packing tells where each packed weight comes from: it packs positions in place of weights. They
        # are counted from 1, and 0 is a masked weight.
        counts = [math.prod(shape) for shape in chain.shapes]
        sources = torch.arange(1, sum(counts) + 1, dtype=torch.float64).split(counts)
        table = (ctypes.c_void_p * len(counts))(*(source.data_ptr() for source in sources))
        packed = torch.zeros(chain.sizes(native)[0], dtype=torch.float64)
        arguments.tensors, arguments.packed = ctypes.addressof(table), packed.data_ptr()
        native.pack_chain(arguments)
        self._positions = packed.long().to(device)

    def evaluate(
        self, tensors: Sequence[Tensor], x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Launches the kernel on PyTorch's current stream, without waiting. Returns the parts of a `Result`."""
        from cuda import core

        rows, features = x.shape
        kernel, resident = _load_kernel(x.device.index or 0)
        blocks, warps = choose_grid(rows, resident)
        # A weight that is not finite makes all rows fail, as on a CPU.
        numbers = torch.cat([x.new_zeros(1), *(tensor.detach().flatten() for tensor in tensors)])
        packed = numbers[self._positions] + (numbers * 0).sum()
        x, in_stride = with_row_stride(x)
        context_stride = 0
        if context is not None:
            context, stride = with_row_stride(context)
            context_stride = stride if len(context) > 1 else 0
        # PyTorch gives this memory to nothing else on the stream before the kernel is done.
        memory = x.new_empty(blocks * _LANES * (self._units + (warps - 1) * self._own_units))
        out, failed = x.new_empty(rows, features), torch.empty(rows, dtype=torch.bool, device=x.device)
        log_det = None if self._log_det_shape is None else x.new_empty(rows, *self._log_det_shape)
        core.launch(
            _Stream(torch.cuda.current_stream(x.device).cuda_stream),
            core.LaunchConfig(grid=blocks, block=_LANES * warps), kernel,
            self._image.data_ptr(), packed.data_ptr(), x.data_ptr(), in_stride,
            0 if context is None else context.data_ptr(), context_stride, out.data_ptr(),
            0 if log_det is None else log_det.data_ptr(), failed.data_ptr(), rows, memory.data_ptr(),
        )  # fmt: skip
        return out, log_det, failed


def is_on_gpu(tensor: Tensor) -> bool:
    """Returns True for a tensor on an NVIDIA GPU."""
    return tensor.is_cuda and torch.version.cuda is not None


def is_installed() -> bool:
    """Returns True if cuda.core is installed."""
    return importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.core") is not None


def choose_grid(rows: int, resident: int) -> tuple[int, int]:
    """Returns the number of blocks, and of the warps in each. The fewer tiles there are, the more warps share one.

    Args:
        resident: The number of warps that run at once on the device.
    """
    tiles = -(-rows // _LANES)
    warps = max(1, min(_MAX_WARPS, resident // tiles))
    return min(tiles, max(1, resident // warps)), warps


@functools.cache
def _load_kernel(ordinal: int) -> tuple[Any, int]:
    """Returns the kernel for a device, and the number of its warps that run there at once.

    It is compiled at the first use, which takes about ten seconds, and stored in the user's cache folder.
    """
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


def _is_readable(tensor: Tensor, device: torch.device) -> bool:
    """Returns True for a dense float32 tensor of PyTorch's own classes on this device."""
    return type(tensor) in PLAIN and (
        tensor.dtype is torch.float32 and tensor.device == device and tensor.layout is torch.strided
        and not tensor.is_nested and not tensor.is_neg()
    )  # fmt: skip


def _find_difference(
    result: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None], good: Tensor
) -> str | None:
    """Returns how some rows differ from the library's own result, or `None` if they do not."""
    for ours, theirs in zip(result, expected, strict=True):
        if ours is not None and theirs is not None:
            error = ((ours - theirs).abs() / (1 + theirs.abs()))[good]
            if not (error <= _TOLERANCE).all():
                return f"a first result on this GPU differed from the library's own by {error.max():.1g}"
    return None
