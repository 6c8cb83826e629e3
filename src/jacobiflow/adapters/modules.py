"""What an accelerated module is: an object of the library's class whose class is, for now, a subclass of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

if TYPE_CHECKING:
    from jacobiflow.adapters.accelerate import Acceleration


class Swapped(nn.Module):
    """Mixed in before a library's class. No attribute of the module changes: its weights and state dict do not either.

    A deep copy is accelerated too. A pickle is of the library's own class, so that it loads where this package is not
    installed, and is as slow there as ever.
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
        """The library's class of a module that is accelerated, unless something else made its class anew since."""
        return vars(type(module)).get("library_class")

    @classmethod
    def of(cls, library_class: type[nn.Module], acceleration: Acceleration) -> type[nn.Module]:
        """The subclass of `library_class` that works as `acceleration` says; it goes by the library's name."""
        names = {"library_class": library_class, "acceleration": acceleration, "__module__": library_class.__module__}
        return type(library_class.__name__, (cls, library_class), names)


@dataclass(frozen=True)
class Adapter:
    """How a library's autoregressive transforms are found and accelerated.

    `transform` is the class that owns the slow loop, started by its method `entry`; `accelerated` is mixed in before
    it, or before a subclass that leaves that method as it is. `linear` is the library's masked linear layer.
    """

    transform: type[nn.Module]
    entry: str
    accelerated: type[Swapped]
    linear: type[nn.Module]


_FEWEST_PASSES = 6

_masked_weights: ContextVar[dict[nn.Module, Tensor] | None] = ContextVar("masked_weights", default=None)


class MaskedOnce(Swapped):
    """A masked linear layer, F.linear(x, mask * weight, bias), that multiplies once per inverse and not in each pass.

    At 784 features and one sample the product is most of a pass.
    """

    mask: Tensor
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        masked = _masked_weights.get()
        if masked is None or torch.is_grad_enabled():  # the pass with a graph needs the product in it
            return super().forward(x)
        if self not in masked:
            masked[self] = self.mask * self.weight
        return F.linear(x, masked[self], self.bias)


@contextmanager
def masked_once() -> Iterator[None]:
    """Within it, in this thread, `MaskedOnce` layers keep their products."""
    token = _masked_weights.set({})
    try:
        yield
    finally:
        _masked_weights.reset(token)


def by_library(module: nn.Module, passes: int) -> bool:
    """Whether the library's own loop is to run: where passes are no function of their argument, or not to be cut short.

    That is a network in training mode with batch normalisation, whose statistics each pass moves, or with dropout;
    `torch.func` transforms and forward-mode derivatives, whose tangents need more passes than the values; and so few
    features that no pass is left out and looking costs more than it saves.
    """
    if passes < _FEWEST_PASSES:
        return True
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return any(part.training and _random_or_moving(part) for part in module.modules())


def _random_or_moving(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.modules.batchnorm._NormBase)


def needs_graph(module: nn.Module, *tensors: Tensor | None) -> bool:
    """Whether the inverse is to have a gradient in any of these tensors, or in a parameter of `module`."""
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in (*tensors, *module.parameters()))
