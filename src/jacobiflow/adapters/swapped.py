"""An accelerated module is an object of the library's class whose class is, for now, a subclass; and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacobiflow.adapters.chain import Chain, Library, Values, is_plain, run
from jacobiflow.adapters.masked import UnsupportedError
from jacobiflow.adapters.part import ChangedError, part_of
from jacobiflow.native import describe as native_line
from jacobiflow.native import library as native_library

if TYPE_CHECKING:
    from typing_extensions import Self


class Swapped(nn.Module):
    """Mixed in before a library's class. No attribute of the module changes, so its weights and state dict do not.

    Copies and pickles are of the library's own class: they are not accelerated, so that none outlives `restore`, and a
    pickle loads without this package.
    """

    library_class: ClassVar[type[nn.Module]]
    acceleration: ClassVar[Acceleration]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state: Any = super().__reduce_ex__(protocol)[2:]
        return (object.__new__, (self.library_class,), *state)

    @staticmethod
    def library_class_of(module: nn.Module) -> type[nn.Module] | None:
        """The library's class of an accelerated module; `None` for others, and if its class was changed since."""
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
    """

    def __init__(self, tolerance: float | None) -> None:
        self.tolerance = tolerance
        self.transforms: dict[str, str] = {}
        self.untouched: dict[str, str] = {}
        self._chains: dict[tuple[nn.Module, bool], Chain] = {}
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
        is_start: bool = False,
    ) -> Values | None:
        """The values of a transform or composition, see `chain.run`; `None` if native code is not used for them.

        Args:
            module: The transform or composition, which is described at its first use, and again if it has changed.
            library: Of the module.
            x: Rows.
            context: A row for each row of `x`, or one for all.
            is_inverse: Whether to invert.
            log_det: See `native.masked.run_chain`.
            is_start: Whether passes start from the values, which then serve any tolerance.
        """
        if (self.tolerance == 0 and not is_start) or native_library() is None or not is_plain(x, context):
            return None
        for_graph = torch.is_grad_enabled()
        if len(x) == 0 or (for_graph and (x.requires_grad or (context is not None and context.requires_grad))):
            return None
        key = (module, context is not None)
        for _ in range(2):
            chain = self._chains.get(key)
            if chain is None:
                chain = self._chains[key] = Chain(module, library, context is not None)
            try:
                values = run(chain, x, context, is_inverse, log_det, for_graph)
            except ChangedError:
                self._chains.pop(key, None)  # or another thread has
                continue
            for link in chain.native_links if values is not None else ():
                self.count(link, 0, "native")
            return values
        return None

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
