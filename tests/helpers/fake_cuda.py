"""A stand-in for cuda.core, which runs the kernel as C++ on a CPU and refuses what cuda.core would not take."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ARCHITECTURE = "90"


@dataclass(frozen=True)
class ProgramOptions:
    std: str
    arch: str
    device_as_default_execution_space: bool
    include_path: str


@dataclass(frozen=True)
class LaunchConfig:
    grid: int
    block: int


@dataclass
class FakeCuda:
    """The module.

    Attributes:
        blocks: The number of blocks that a processor runs at once; there are 2 processors.
        compiled: The sources that were compiled.
        launches: The blocks and the threads of each launch.
        order: 1 if the emulator runs threads in descending order.
        device: The current device.
    """

    emulator: Path
    blocks: int = 2
    compiled: list[str] = field(default_factory=list)
    launches: list[LaunchConfig] = field(default_factory=list)
    order: int = 0
    device: Any = None

    ProgramOptions = ProgramOptions
    LaunchConfig = LaunchConfig

    @contextmanager
    def use_device(self, device: Any) -> Iterator[None]:
        before, self.device = self.device, device
        yield
        self.device = before

    def Device(self, ordinal: int) -> Any:  # noqa: N802
        assert ordinal == 0
        properties = SimpleNamespace(multiprocessor_count=2)
        return SimpleNamespace(arch=ARCHITECTURE, set_current=lambda: None, properties=properties)

    def Program(self, code: str, kind: str, options: ProgramOptions) -> Any:  # noqa: N802
        assert kind == "c++" and options.std == "c++17" and options.arch == f"sm_{ARCHITECTURE}"
        assert options.device_as_default_execution_space and Path(options.include_path, "forward.h").is_file()
        self.compiled.append(code)
        return SimpleNamespace(compile={"cubin": self._object(b"cubin")}.__getitem__)

    @property
    def ObjectCode(self) -> Any:  # noqa: N802
        return SimpleNamespace(from_cubin=self._object)

    def _object(self, code: bytes) -> Any:
        assert code == b"cubin"
        blocks = {(256, 0): self.blocks}
        occupancy = SimpleNamespace(
            max_active_blocks_per_multiprocessor=lambda threads, memory: blocks[threads, memory]
        )
        kernel = SimpleNamespace(occupancy=occupancy)
        return SimpleNamespace(code=code, get_kernel={"jacobiflow_chain": kernel}.__getitem__)

    def launch(self, stream: Any, config: LaunchConfig, kernel: Any, *arguments: int) -> None:
        assert self.device is not None, "another device than that of the rows"
        assert stream.__cuda_stream__() == (0, 77) and hasattr(kernel, "occupancy")
        assert len(arguments) == 11 and all(type(argument) is int for argument in arguments)  # of 64 bits to cuda.core
        assert config.grid > 0 and config.block % 32 == 0 and 0 < config.block <= 256
        self.launches.append(config)
        ctypes.CDLL(str(self.emulator)).emulate(
            ctypes.c_int(self.order), ctypes.c_uint(config.grid), ctypes.c_uint(config.block),
            *map(ctypes.c_int64, arguments),
        )  # fmt: skip
