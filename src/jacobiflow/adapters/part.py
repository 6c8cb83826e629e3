"""`Part`: an accelerated module of a flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import nn

from jacobiflow.adapters.adapter import Adapter
from jacobiflow.adapters.library_module import library_class, shallow_copy
from jacobiflow.adapters.native_module import NativeModule
from jacobiflow.errors import UnsupportedError
from jacobiflow.native import describe, load_library


@dataclass(eq=False)
class Part:
    """An accelerated module of a flow.

    Attributes:
        accelerate_run: Accelerates a run of layers of this composition.
        parts: The accelerated modules in it, itself included.
        latest_use: The passes of the latest call, and its backend.
        fallback_reason: Why native code did not compute the latest call that it left to the library.
    """

    module: nn.Module
    name: str
    adapter: Adapter
    accelerate_run: Callable[[nn.Module, Adapter], None]
    parts: list[Part] = field(default_factory=list)
    latest_use: tuple[int, str] | None = None
    fallback_reason: str = ""

    def __post_init__(self) -> None:
        self.class_before = type(self.module)
        self._natives: dict[bool, NativeModule] = {}

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of a composition; none of another module."""
        return list(getattr(self.module, self.adapter.layers)) if self.adapter.layers else []

    def find_native(self, is_conditional: bool) -> NativeModule:
        """Returns the module as native code takes it now; raises UnsupportedError if there is no native code."""
        native = self._natives.get(is_conditional)
        if native is None or not native.is_current():
            if self.adapter.list_transforms is None or load_library() is None:
                raise UnsupportedError(f"native code is {describe()}")
            native = NativeModule(self.module, self.adapter.list_transforms, is_conditional)
            self._natives[is_conditional] = native
        if native.obstacle is not None and native.mixed_states != (states := native.find_states()):
            native.mixed = self._compose_runs(is_conditional)
            native.mixed_states = states  # last, since other threads read it
        return native

    def _compose_runs(self, is_conditional: bool) -> nn.Module | None:
        """Returns a composition in which consecutive layers that native code knows are one layer; `None` if none are.

        The run of these layers is a composition of the same class, and shares its layers with the module.
        """
        kind, name, list_transforms = self.adapter.target, self.adapter.layers, self.adapter.list_transforms
        if list_transforms is None or library_class(self.module) is not kind:
            return None

        def compose(layers: list[nn.Module]) -> nn.Module:
            attributes: Any = vars(nn.Module()) | {"_modules": {name: nn.ModuleList(layers)}}
            return shallow_copy(self.module, kind, **attributes)

        layers: list[nn.Module] = []
        for obstacle, group in groupby(
            self.layers, lambda layer: NativeModule(layer, list_transforms, is_conditional).obstacle
        ):
            members = list(group)
            if obstacle is None and len(members) > 1:
                members = [compose(members)]
                self.accelerate_run(members[0], self.adapter)
            layers += members
        return None if len(layers) in (0, 1, len(self.layers)) else compose(layers)
