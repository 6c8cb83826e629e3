"""The plan of a chain on an NVIDIA GPU, and its kernel, from the C++ sources of the CPU.

We have never run it on a GPU. Tests run the kernel as C++ on a CPU, with a stand-in for cuda.core.
"""

from __future__ import annotations

import ctypes
import functools
import math
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jacobiflow.errors import UnsupportedError
from jacobiflow.native import compiler
from jacobiflow.native.boundary import ChainArgs
from jacobiflow.native.chain import TransformChain, with_row_stride
from jacobiflow.native.library import compiled_library, private_folder
from jacobiflow.utils.files import write_atomically

LANES = 32  # rows of a tile: one for each thread of a warp
MAX_WARPS = 8  # of a block, as in chain.cu


class _Stream(NamedTuple):
    """A stream of PyTorch, as cuda.core takes it."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


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

        Args:
            numbers: 0, and the entries of all tensors.
            blocks: The number of blocks, which share the tiles of rows.
            warps: The number of warps of a block, which share a tile.
        """
        from cuda import core

        rows, features = x.shape
        # A weight that is not finite makes all rows fail, as on a CPU.
        packed = numbers[self.positions] + (numbers * 0).sum()
        x, in_stride = with_row_stride(x)
        context_stride = 0
        if context is not None:
            context, stride = with_row_stride(context)
            context_stride = stride if len(context) > 1 else 0
        # PyTorch gives this memory to nothing else on the stream before the kernel is done.
        memory = x.new_empty(blocks * LANES * (self.units + (warps - 1) * self.own_units))
        out, failed = x.new_empty(rows, features), torch.empty(rows, dtype=torch.bool, device=x.device)
        log_det = None if self.log_det_shape is None else x.new_empty(rows, *self.log_det_shape)
        core.launch(
            _Stream(torch.cuda.current_stream(x.device).cuda_stream),
            core.LaunchConfig(grid=blocks, block=LANES * warps), load_kernel(x.device.index or 0)[0],
            self.image.data_ptr(), packed.data_ptr(), x.data_ptr(), in_stride,
            0 if context is None else context.data_ptr(), context_stride, out.data_ptr(),
            0 if log_det is None else log_det.data_ptr(), failed.data_ptr(), rows, memory.data_ptr(),
        )  # fmt: skip
        return out, log_det, failed


def make_plan(chain: TransformChain, is_inverse: bool, log_det: str | None) -> DevicePlan:
    """Plans a chain or its inverse."""
    native = compiled_library()
    if native is None:
        raise UnsupportedError("no native library")
    # The plan is that of a call with packed weights; any address says so.
    arguments = ChainArgs(
        ctypes.addressof(chain.table), packed=1, count=len(chain.table), features=chain.features,
        context_features=chain.context, is_inverse=is_inverse, is_by_feature=log_det == "features", num_threads=1,
    )  # fmt: skip
    size, units, own_units = native.chain_image(arguments, 0, None)
    images = torch.zeros(2, -(-size // 8), dtype=torch.int64)
    for base, image in enumerate(images):
        native.chain_image(arguments, base, image.data_ptr())
    # The CPU's own packing tells where each packed weight comes from: it packs positions in place of weights.
    counts = [math.prod(shape) for shape in chain.shapes]
    sources = torch.arange(1, sum(counts) + 1, dtype=torch.float64).split(counts)
    table = (ctypes.c_void_p * len(counts))(*(source.data_ptr() for source in sources))
    packed = torch.zeros(chain.sizes(native)[0], dtype=torch.float64)
    arguments.tensors, arguments.packed = ctypes.addressof(table), packed.data_ptr()
    native.pack_chain(arguments)
    log_det_shape = {None: None, "rows": (), "features": (chain.features,)}[log_det]
    return DevicePlan(images[0], (images[1] - images[0] == 1).long(), packed.long(), units, own_units, log_det_shape)


def choose_grid(rows: int, resident: int) -> tuple[int, int]:
    """Returns the number of blocks, and of the warps in each. The fewer tiles there are, the more warps share one.

    Args:
        resident: The number of warps that run at once on the device.
    """
    tiles = -(-rows // LANES)
    warps = max(1, min(MAX_WARPS, resident // tiles))
    return min(tiles, max(1, resident // warps)), warps


@functools.cache
def load_kernel(ordinal: int) -> tuple[Any, int]:
    """Returns the kernel for a device, and the number of its warps that run there at once.

    It is compiled at the first use, and stored in the user's cache folder.
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
    blocks = kernel.occupancy.max_active_blocks_per_multiprocessor(LANES * MAX_WARPS, 0)
    return kernel, blocks * MAX_WARPS * device.properties.multiprocessor_count
