"""Fast classes for the modules of a user's flow, and the handle that reports on them and takes them back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from jacobiflow.adapters.chain import Chain, Describe, Fallback, Values, flatten, is_plain_call
from jacobiflow.native import describe as native_line
from jacobiflow.native import load_library

if TYPE_CHECKING:
    from typing_extensions import Self


class AcceleratedModule(nn.Module):
    """Mixed in before a library's class, whose methods it replaces.

    Unlike a method bound to the object, a class leaves the object's attributes alone. Copies and pickles are of the
    library's class.
    """

    library_class: ClassVar[type[nn.Module]]
    acceleration: ClassVar[Acceleration]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (object.__new__, (self.library_class,), *super().__reduce_ex__(protocol)[2:])


def accelerate_module(module: nn.Module, mixin: type[AcceleratedModule], acceleration: Acceleration) -> None:
    """Gives the module the subclass of its library's class that works as `acceleration` says."""
    kind = library_class(module)
    names = {"library_class": kind, "acceleration": acceleration, "__module__": kind.__module__}
    module.__class__ = type(kind.__name__, (mixin, kind), names)


def is_accelerated(module: nn.Module) -> bool:
    """Returns True if the module has a class that `accelerate_module` made."""
    return "library_class" in vars(type(module))


def library_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that the module has without acceleration."""
    return vars(type(module)).get("library_class", type(module))


@dataclass(frozen=True)
class Adapter:
    """A class of a library that can be accelerated.

    Attributes:
        transform: The class of a transform with a slow loop, or of a composition of transforms.
        methods: Its methods that are replaced. A subclass is accelerated if it leaves them unchanged.
        accelerated: The class that is mixed in before it.
        describe: Gives the transforms of a module for native code; `None` if `accelerated` calls it by itself.
    """

    transform: type[nn.Module]
    methods: tuple[str, ...]
    accelerated: type[AcceleratedModule]
    describe: Describe | None
    is_composition: bool = False

    @property
    def library(self) -> str:
        return self.transform.__module__.split(".")[0]

    def obstacle(self, module: nn.Module) -> str | None:
        """Returns why the module cannot be accelerated, or `None` if it can."""
        of_library = library_class(module)
        for method in self.methods:
            if getattr(of_library, method) is not getattr(self.transform, method):
                return f"{of_library.__name__} overrides {self.library}'s {method}"
            if method in vars(module):
                return f"its {method} was replaced"
        return None


def find_adapter(module: nn.Module, adapters: Iterable[Adapter]) -> Adapter | None:
    """Returns the first adapter of the module's class, or `None`."""
    return next((adapter for adapter in adapters if issubclass(library_class(module), adapter.transform)), None)


def describe_tolerance(tolerance: float | None) -> str:
    """Returns what a tolerance means, in words."""
    if tolerance is None:
        return "exact to rounding"
    return f"to a tolerance of {tolerance:g}" if tolerance else "to the library's own bits"


class Acceleration:
    """The report of what `accelerate` did to a flow, and the way back.

    Leaving a `with` block puts the flow back as it was before: inside another block it stays accelerated.

    Attributes:
        tolerance: `None` for exact to rounding, 0 for the library's own bits, or the tolerance at which passes end.
        transforms: The accelerated transforms: name of the module in the flow to "library class".
        untouched: The masked autoregressive transforms and TarFlow blocks that were left alone: name to the reason.

    Example:
        >>> flow = zuko.flows.MAF(3, transforms=1)
        >>> print(jf.accelerate(flow))
        accelerated, exact to rounding: 1 autoregressive transforms
          transform.transforms.0: zuko MaskedAutoregressiveTransform, by native code
    """

    def __init__(
        self, tolerance: float | None, adapters: dict[nn.Module, tuple[str, Adapter]], untouched: dict[str, str]
    ) -> None:
        self.tolerance, self.untouched = tolerance, untouched
        self._adapters = {module: adapter for module, (_, adapter) in adapters.items()}
        self._names = {module: name for module, (name, adapter) in adapters.items() if not adapter.is_composition}
        self._classes_before = {module: type(module) for module in adapters}
        self._chains: dict[tuple[nn.Module, bool], Chain] = {}
        self._latest: dict[nn.Module, tuple[int, str]] = {}
        self.transforms = {
            name: f"{self._adapters[module].library} {library_class(module).__name__}"
            for module, name in self._names.items()
        }
        for module, adapter in self._adapters.items():
            accelerate_module(module, adapter.accelerated, self)

    @property
    def passes(self) -> dict[str, int]:
        """For each transform that was used, the passes of its network in the latest inverse; 0 by native code."""
        return {name: self._latest[module][0] for module, name in self._names.items() if module in self._latest}

    @property
    def ways(self) -> dict[str, str]:
        """For each transform that was used, how: "native", "passes", or "library" for the library's own loop."""
        return {name: self._latest[module][1] for module, name in self._names.items() if module in self._latest}

    def restore(self) -> None:
        """Gives every module the library's own class back, however often it was accelerated."""
        for module in self._adapters:
            module.__class__ = library_class(module)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for module, kind in self._classes_before.items():
            if is_accelerated(module):
                module.__class__ = kind

    def __repr__(self) -> str:
        lines = [f"accelerated, {describe_tolerance(self.tolerance)}: {len(self.transforms)} autoregressive transforms"]
        lines += [f"  {name}: {self.transforms[name]}, by {self._way(module)}" for module, name in self._names.items()]
        lines += [f"  {name}: left alone, {why}" for name, why in self.untouched.items()]
        return "\n".join(lines)

    def _way(self, module: nn.Module) -> str:
        describe = self._adapters[module].describe
        if describe is None:
            return "native code" if load_library() is not None else f"its own loop: native code is {native_line()}"
        if self.tolerance == 0:
            return "passes"
        if load_library() is None:
            return f"passes: native code is {native_line()}"
        obstacle = Chain(module, describe, is_conditional=False).obstacle
        return "native code" if obstacle is None else f"passes: native code does not know {obstacle}"

    def count(self, module: nn.Module, passes: int, way: str) -> None:
        """Sets the passes and the way of the latest use of a transform, for `passes` and `ways`."""
        self._latest[module] = passes, way

    def evaluate(
        self,
        module: nn.Module,
        x: Float[Tensor, "*batch d"],
        context: Float[Tensor, "*batch c"] | None,
        is_inverse: bool,
        fallback: Fallback | None,
        log_det: str | None = None,
    ) -> Values | None:
        """Returns the values of a transform or composition by native code; `None` if they are left to the library.

        The batches of `x` and `context` are broadcast. Without a `fallback`, see `Chain.evaluate`, the values are the
        start of passes, at any tolerance. For `log_det` see `native.masked.TransformChain`.
        """
        if (self.tolerance == 0 and fallback is not None) or load_library() is None:
            return None
        adapter = self._adapters.get(module)
        if adapter is None or x.ndim == 0 or not is_plain_call():  # a replica of DataParallel has no adapter
            return None
        try:
            rows, contexts, batch = flatten(x, context)
        except RuntimeError:  # the library's message is its own
            return None
        assert adapter.describe is not None
        key = module, context is not None
        chain = self._chains.get(key)
        if chain is None or not chain.snapshot.is_current():
            chain = self._chains[key] = Chain(module, adapter.describe, context is not None)
        result = chain.evaluate(rows, contexts, is_inverse, fallback, log_det)
        if result is None:
            return None
        for part in chain.modules:
            self._latest[part] = 0, "native"
        if len(batch) == 1:
            return result
        values, log_dets = result
        values = values.view((*batch, values.shape[-1]))
        return values, None if log_dets is None else log_dets.view((*batch, *log_dets.shape[1:]))
