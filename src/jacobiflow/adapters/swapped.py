"""An accelerated module is an object of the library's class whose class is, for now, a subclass; and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

if TYPE_CHECKING:
    from typing_extensions import Self


class Swapped(nn.Module):
    """Mixed in before a library's class. No attribute of the module changes, so its weights and state dict do not.

    Copies and pickles are of the library's own class: they are not accelerated, so that none outlives `restore`, and a
    pickle loads where this package is not installed.
    """

    library_class: ClassVar[type[nn.Module]]
    acceleration: ClassVar[Acceleration]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state: Any = super().__reduce_ex__(protocol)[2:]
        return (object.__new__, (self.library_class,), *state)

    @staticmethod
    def library_class_of(module: nn.Module) -> type[nn.Module] | None:
        """The library's class of an accelerated module; `None` for others, and where its class was changed since."""
        return vars(type(module)).get("library_class")

    @classmethod
    def of(cls, library_class: type[nn.Module], acceleration: Acceleration) -> type[nn.Module]:
        """The subclass of `library_class` that works as `acceleration` says; it has the library's name."""
        names = {"library_class": library_class, "acceleration": acceleration, "__module__": library_class.__module__}
        return type(library_class.__name__, (cls, library_class), names)


class Acceleration:
    """A record of what `accelerate` did to a flow, and the way back.

    Leaving a `with` block puts the flow back as it was before: inside another `with` it stays accelerated as that one
    says. `restore()` makes it the library's own, however often it was accelerated.

    **Attributes:**

    - `tolerance`: at which passes end; 0 for identical bits.
    - `retry_float64`: whether rows that failed in float32 are solved again in float64; `retried`: how many were.
    - `transforms`: the accelerated transforms: name of the module in the flow to "library class".
    - `untouched`: the masked autoregressive transforms that were left alone: name to the reason.
    - `passes`: name to the number of network passes in the latest inverse, for each accelerated transform that had one.
      The library makes one pass for each feature, and so does an inverse that is left to its own loop. It stays empty
      where a program never inverts: MCMC posteriors of sbi call the fast direction only, and gain nothing.
    - `ways`: name to how that inverse was found: "library", its own loop; "passes", from 0; "units", passes from an
      answer for which each hidden unit was computed once; "columns", from one for which each pass of the network served
      the features that it makes final. The making of that answer does not count as passes.
    """

    def __init__(self, tolerance: float, retry_float64: bool = False) -> None:
        self.tolerance, self.retry_float64 = tolerance, retry_float64
        self.retried = 0
        self.transforms: dict[str, str] = {}
        self.untouched: dict[str, str] = {}
        self._names: dict[nn.Module, str] = {}
        self._before: dict[nn.Module, type[nn.Module]] = {}
        self._latest: dict[str, tuple[int, str]] = {}

    @property
    def passes(self) -> dict[str, int]:
        """See the class."""
        return {name: self._latest[name][0] for name in self.transforms if name in self._latest}

    @property
    def ways(self) -> dict[str, str]:
        """See the class."""
        return {name: self._latest[name][1] for name in self.transforms if name in self._latest}

    def note(self, name: str, module: nn.Module, what: str) -> None:
        """Add a transform to those that are accelerated, before it is."""
        self.transforms[name] = what
        self._names[module], self._before[module] = name, type(module)

    def restore(self) -> None:
        """Give every module the library's own class back, however often it was accelerated."""
        for module in self._names:
            if (own := Swapped.library_class_of(module)) is not None:
                module.__class__ = own

    def count(self, module: nn.Module, passes: int, way: str) -> None:
        """Note the passes of an inverse and its way; those of copies that `retry_float64` makes are not reported."""
        if module in self._names:
            self._latest[self._names[module]] = passes, way

    def count_retried(self, rows: int) -> None:
        """Add rows that were solved again."""
        self.retried += rows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for module, before in self._before.items():
            if self in _accelerations(module):
                module.__class__ = before

    def __repr__(self) -> str:
        to = "identical bits" if self.tolerance == 0 else f"a tolerance of {self.tolerance:g}"
        lines = [f"accelerated to {to}: {len(self.transforms)} masked autoregressive transforms"]
        lines += [f"  {name}: {what}" for name, what in self.transforms.items()]
        lines += [f"  {name}: left alone, {why}" for name, why in self.untouched.items()]
        if not self._latest:
            lines.append("  no inverse so far, and only inverses are faster")
        return "\n".join(lines)


def _accelerations(module: nn.Module) -> Iterator[Acceleration]:
    """Those that a module has, the latest first."""
    kind: Any = type(module)
    while "library_class" in vars(kind):
        yield kind.acceleration
        kind = kind.acceleration._before[module]


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
