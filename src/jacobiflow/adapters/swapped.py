"""What an accelerated module is: an object of the library's class whose class is, for now, a subclass of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

if TYPE_CHECKING:
    from jacobiflow.adapters.accelerate import Acceleration


class Swapped(nn.Module):
    """Mixed in before a library's class. No attribute of the module changes, so its weights and state dict do not.

    A deep copy is accelerated too. A pickle is of the library's own class, so that it loads where this package is not
    installed, and is not accelerated there.
    """

    library_class: ClassVar[type[nn.Module]]
    acceleration: ClassVar[Acceleration]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state: Any = super().__reduce_ex__(protocol)[2:]
        return (object.__new__, (self.library_class,), *state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = copied = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    @staticmethod
    def library_class_of(module: nn.Module) -> type[nn.Module] | None:
        """The library's class of an accelerated module; `None` for others, and where its class was changed since."""
        return vars(type(module)).get("library_class")

    @classmethod
    def of(cls, library_class: type[nn.Module], acceleration: Acceleration) -> type[nn.Module]:
        """The subclass of `library_class` that works as `acceleration` says; it has the library's name."""
        names = {"library_class": library_class, "acceleration": acceleration, "__module__": library_class.__module__}
        return type(library_class.__name__, (cls, library_class), names)


@dataclass(frozen=True)
class Adapter:
    """How a library's autoregressive transforms are found and accelerated.

    `transform` is the class that owns the slow loop, which its method `entry` starts. `accelerated` is mixed in before
    it, or before a subclass that leaves that method unchanged.
    """

    transform: type[nn.Module]
    entry: str
    accelerated: type[Swapped]

    def obstacle(self, module: nn.Module, own: type[nn.Module]) -> str | None:
        """Why a transform of the library's class `own` cannot be accelerated; `None` where it can."""
        if getattr(own, self.entry) is not getattr(self.transform, self.entry):
            return f"{own.__name__} overrides {self.transform.__module__.split('.')[0]}'s {self.entry}"
        if self.entry in vars(module):
            return f"its {self.entry} was replaced"
        return None
