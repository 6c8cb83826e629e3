"""An accelerated module is an object of the library's class whose class is, for now, a subclass; and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from jacobiflow.adapters.chain import Chains, Library, Values
from jacobiflow.adapters.masked import UnsupportedError
from jacobiflow.adapters.part import part_of
from jacobiflow.native import describe as native_line
from jacobiflow.native import library as native_library

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

    Attributes:
        tolerance: `None` for exact to rounding, 0 for the library's own bits, or at which passes end.
        transforms: The accelerated transforms: name of the module in the flow to "library class".
        untouched: The masked autoregressive transforms that were left alone: name to the reason.
        chains: What native code knows of them.
    """

    def __init__(self, tolerance: float | None) -> None:
        self.tolerance = tolerance
        self.transforms: dict[str, str] = {}
        self.untouched: dict[str, str] = {}
        self.chains = Chains()
        self._names: dict[nn.Module, str] = {}
        self._before: dict[nn.Module, type[nn.Module]] = {}
        self._libraries: dict[nn.Module, Library] = {}
        self._latest: dict[str, tuple[int, str]] = {}

    @property
    def passes(self) -> dict[str, int]:
        """For each transform that was used, the passes of its network in the latest inverse; 0 by native code."""
        return {name: self._latest[name][0] for name in self.transforms if name in self._latest}

    @property
    def ways(self) -> dict[str, str]:
        """For each transform that was used, how: "native", "passes", or "library" for the library's own loop."""
        return {name: self._latest[name][1] for name in self.transforms if name in self._latest}

    def note(self, name: str, module: nn.Module, library: Library, kind: str | None) -> None:
        """Adds a module to those that are accelerated, before it is; a `kind` if it is a transform."""
        self._before[module] = type(module)
        if kind is not None:
            self.transforms[name] = kind
            self._names[module], self._libraries[module] = name, library

    def restore(self) -> None:
        """Gives every module the library's own class back, however often it was accelerated."""
        for module in self._before:
            if (own := Swapped.library_class_of(module)) is not None:
                module.__class__ = own

    def count(self, module: nn.Module, passes: int, way: str) -> None:
        """Notes the passes of the latest use of a transform, and its way."""
        if module in self._names:
            self._latest[self._names[module]] = passes, way

    def by_native_code(
        self,
        module: nn.Module,
        library: Library,
        x: Float[Tensor, "b d"],
        context: Float[Tensor, "#b c"] | None,
        is_inverse: bool,
        log_det: str | None = None,
    ) -> Values | None:
        """The values of a transform or chain, see `chain.run`; `None` if they are left to other ways."""
        if self.tolerance == 0:
            return None
        result = self.chains.run(module, library, x, context, is_inverse, log_det)
        if result is None:
            return None
        values, chain = result
        for segment in chain.segments:
            if segment.transforms is not None:
                for link, _ in segment.links:
                    self.count(link, 0, "native")
        return values

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for module, before in self._before.items():
            if self in _accelerations(module):
                module.__class__ = before

    def __repr__(self) -> str:
        to = "exact to rounding" if self.tolerance is None else f"to a tolerance of {self.tolerance:g}"
        to = "to the library's own bits" if self.tolerance == 0 else to
        lines = [f"accelerated, {to}: {len(self.transforms)} masked autoregressive transforms"]
        lines += [f"  {self._names[module]}: {self._line(module)}" for module in self._names]
        lines += [f"  {name}: left alone, {why}" for name, why in self.untouched.items()]
        return "\n".join(lines)

    def _line(self, module: nn.Module) -> str:
        kind = self.transforms[self._names[module]]
        if self.tolerance == 0:
            return f"{kind}, by passes"
        if native_library() is None:
            return f"{kind}, by passes: native code is {native_line()}"
        try:
            part_of(self._libraries[module].describe(module, is_conditional=False))
        except UnsupportedError as why:
            return f"{kind}, by passes: native code does not know {why}"
        return f"{kind}, by native code"


def _accelerations(module: nn.Module) -> Iterator[Acceleration]:
    """Those that a module has, the latest first."""
    kind: Any = type(module)
    while "library_class" in vars(kind):
        yield kind.acceleration
        kind = kind.acceleration._before[module]


@dataclass(frozen=True)
class Adapter:
    """A class of a library that is accelerated.

    Attributes:
        transform: The class of a transform that owns a slow loop, or of a composition of transforms.
        entries: Its methods that are replaced. A subclass is accelerated if it leaves them unchanged.
        accelerated: Is mixed in before it.
        library: Says how native code takes it.
        is_composition: Whether it only composes transforms.
    """

    transform: type[nn.Module]
    entries: tuple[str, ...]
    accelerated: type[Swapped]
    library: Library
    is_composition: bool = False

    def obstacle(self, module: nn.Module, own: type[nn.Module]) -> str | None:
        """Why a transform of the library's class `own` cannot be accelerated; `None` if it can."""
        for entry in self.entries:
            if getattr(own, entry) is not getattr(self.transform, entry):
                return f"{own.__name__} overrides {self.transform.__module__.split('.')[0]}'s {entry}"
            if entry in vars(module):
                return f"its {entry} was replaced"
        return None
