"""`Part`: an accelerated module of a flow."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from jacobiflow.adapters.adapter import Adapter
from jacobiflow.adapters.native_module import NativeModule
from jacobiflow.adapters.runs import AccelerateRun, compose_runs
from jacobiflow.errors import UnsupportedError
from jacobiflow.native import describe, load_library


@dataclass(eq=False)
class Part:
    """An accelerated module of a flow.

    Attributes:
        accelerate_run: Accelerates a run of layers of this composition.
        parts: The accelerated modules in it, itself included.
        latest_use: The passes of the latest call, and its backend.
    """

    module: nn.Module
    name: str
    adapter: Adapter
    accelerate_run: AccelerateRun
    parts: list[Part] = field(default_factory=list)
    latest_use: tuple[int, str] | None = None

    def __post_init__(self) -> None:
        self.class_before = type(self.module)
        self._natives: dict[bool, NativeModule] = {}

    def find_native(self, is_conditional: bool) -> NativeModule:
        """Returns the module as native code takes it now; raises UnsupportedError if there is no native code."""
        if self.adapter.list_transforms is None or load_library() is None:
            raise UnsupportedError(f"native code is {describe()}")
        native = self._natives.get(is_conditional)
        if native is None or not native.snapshot.is_current():
            native = self._natives[is_conditional] = NativeModule(
                self.module, self.adapter.list_transforms, is_conditional
            )
        if native.obstacle is not None and native.mixed_states != (states := native.find_states()):
            native.mixed = compose_runs(self.module, self.adapter, is_conditional, self.accelerate_run)
            native.mixed_states = states  # last, since other threads read it
        return native

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The layers of a composition by their names in the flow; none of another module."""
        prefix, layers = f"{self.name}.{self.adapter.layers}".lstrip("."), self.adapter.layers
        return {f"{prefix}.{i}": layer for i, layer in enumerate(getattr(self.module, layers) if layers else ())}
