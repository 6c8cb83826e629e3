"""Accelerates a module of a library by a subclass of its class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from jacobiflow.adapters.library_module import device_types, library_class, shallow_copy
from jacobiflow.adapters.native_module import ListTransforms
from jacobiflow.errors import UnsupportedError


class AcceleratedModule(nn.Module):
    """Mixin that replaces methods of a library's class.

    A module is accelerated by a change of its class, so that its attributes stay as they are. Copies and pickles are of
    the library's class.

    Attributes:
        library_class: The class without acceleration.
        acceleration: The `Acceleration` that changed the class.
    """

    library_class: ClassVar[type[nn.Module]]
    acceleration: ClassVar[Any]

    def __init_subclass__(cls, **_: Any) -> None:
        """Leaves out that of the user's class, which may register its subclasses or have parameters."""

    @property
    def __class__(self) -> type:
        """The library's class, since pickle compares it with the class that it writes."""
        return library_class(self)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        vars(object)["__class__"].__set__(self, kind)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return shallow_copy(self, self.library_class).__reduce_ex__(protocol)


@dataclass(frozen=True)
class Adapter:
    """A class of a library that can be accelerated.

    Attributes:
        target: The library's class: a transform with a slow loop, or a composition of transforms.
        methods: Its methods that are replaced. A subclass is accelerated if it leaves them unchanged.
        mixin: The class that replaces them.
        list_transforms: Lists the transforms of a module for native code; `None` if `mixin` calls native code itself.
        needs_native: Whether the class gains by native code only, so a module that this does not know is left alone.
        layers: The name of a composition's list of layers, if it has one.
        has_search: Returns True for a module whose features can be solved one after the other without native code.
    """

    target: type[nn.Module]
    methods: tuple[str, ...]
    mixin: type[AcceleratedModule]
    list_transforms: ListTransforms | None
    is_composition: bool = False
    layers: str = ""
    needs_native: bool = False
    has_search: Callable[[Any], bool] = lambda _: False

    @property
    def library(self) -> str:
        return self.target.__module__.split(".")[0]

    def check(self, module: nn.Module) -> None:
        """Raises UnsupportedError if the module, as it is now, cannot be accelerated."""
        kind = library_class(module)
        if _layout(kind) is not _layout(self.mixin):  # Python refuses to change the class of a module.
            raise UnsupportedError(f"the first base of {kind.__name__} is not {self.library}'s")
        for method in self.methods:
            if getattr(kind, method) is not getattr(self.target, method):
                raise UnsupportedError(f"{kind.__name__} overrides {self.library}'s {method}")
            if method in vars(module):
                raise UnsupportedError(f"its {method} was replaced")
        if "meta" in device_types(module):  # On another device it is the library's until it is on the CPU again.
            raise UnsupportedError("its tensors are on meta")
        if self.needs_native and self.list_transforms is not None:
            try:
                list(self.list_transforms(module, False))
            except UnsupportedError as error:
                raise UnsupportedError(f"native code does not take {error}") from error


def _layout(kind: type) -> type:
    """Returns the nearest base whose objects have no attributes."""
    while kind.__dictoffset__ and kind.__base__ is not None:
        kind = kind.__base__
    return kind


def find_adapter(module: nn.Module, adapters: Iterable[Adapter]) -> Adapter | None:
    """Returns the first adapter of the module's class, or `None`."""
    return next((adapter for adapter in adapters if issubclass(library_class(module), adapter.target)), None)
