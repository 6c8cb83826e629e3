"""`accelerate`: gives the masked autoregressive transforms in a user's flow fast classes, and takes them back."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from jacobiflow.adapters.chain import Chain, Describe, Fallback, Values, flatten, is_readable
from jacobiflow.checks import check_number
from jacobiflow.errors import InputValueError
from jacobiflow.native import describe as native_line
from jacobiflow.native import library as native_library

if TYPE_CHECKING:
    from typing_extensions import Self

_LIBRARIES = {  # name of its module here: package, first supported version, version from which it is not supported
    "zuko": ("zuko", "1.2", "2"), "nflows": ("nflows", "0.14", "0.15"),
    "normflows": ("normflows", "1.7", "2"), "pyro": ("pyro-ppl", "1.9", "2"),
}  # fmt: skip
_DEPTH = 3  # an ensemble of posteriors holds a list of posteriors, which hold modules


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


class Acceleration:
    """The report of what `accelerate` did to a flow, and the way back.

    Leaving a `with` block puts the flow back as it was before: inside another block it stays accelerated.

    Attributes:
        tolerance: `None` for exact to rounding, 0 for the library's own bits, or the tolerance at which passes end.
        transforms: The accelerated transforms: name of the module in the flow to "library class".
        untouched: The masked autoregressive transforms that were left alone: name to the reason.

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
        to = "exact to rounding" if self.tolerance is None else f"to a tolerance of {self.tolerance:g}"
        to = "to the library's own bits" if self.tolerance == 0 else to
        lines = [f"accelerated, {to}: {len(self.transforms)} autoregressive transforms"]
        lines += [f"  {name}: {self.transforms[name]}, by {self._way(module)}" for module, name in self._names.items()]
        lines += [f"  {name}: left alone, {why}" for name, why in self.untouched.items()]
        return "\n".join(lines)

    def _way(self, module: nn.Module) -> str:
        describe = self._adapters[module].describe
        if describe is None:
            return "native code" if native_library() is not None else f"its own loop: native code is {native_line()}"
        if self.tolerance == 0:
            return "passes"
        if native_library() is None:
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
        if (self.tolerance == 0 and fallback is not None) or native_library() is None:
            return None
        if x.ndim == 0 or not is_readable(x, context):
            return None
        try:
            rows, contexts, batch = flatten(x, context)
        except RuntimeError:  # the library's message is its own
            return None
        describe = self._adapters[module].describe
        assert describe is not None
        key = module, context is not None
        chain = self._chains.get(key)
        if chain is None or not chain.snapshot.is_current():
            chain = self._chains[key] = Chain(module, describe, context is not None)
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


def accelerate(flow: Any, tolerance: float | None = None) -> Acceleration:
    """Makes the masked autoregressive transforms of a zuko, nflows, normflows or pyro flow, or a live TarFlow, fast.

    It does so in place, and the flow's own methods are called as before. On a CPU, without gradients, native code then
    computes all transforms at once in both directions: the inverse, which takes these libraries D passes of the network
    for D features, and the forward direction with its log-determinant. The result is exact to rounding. Rows that are
    not finite, or overflow on the way, go through the library's own code.

    If native code does not take a transform (a gradient, a GPU, an activation that it does not know), it is inverted by
    passes x <- g(x) of the library's own network, which end when one changes nothing, with the library's own bits.
    Gradients are those of the inverse, by the implicit function theorem (first derivatives only).

    Of a TarFlow (the original code, that of SBG, and forks with its structure) the blocks' `reverse` becomes native
    code, with its arguments and results; the tolerance plays no part. Where it cannot (a gradient, a GPU, dropout in
    training mode) it is the block's own.

    Weights are read at every call. Copies and pickles of an accelerated module are the library's own and not
    accelerated: so accelerate the posterior of sbi, which copies its network. A distribution `flow(c)` of zuko is
    accelerated as long as its flow is. The guide lists all that is left to the library's own code.

    Args:
        flow: A module with masked autoregressive transforms of these libraries in it, or an sbi posterior or another
            object whose attributes (or lists or dicts of them) hold such modules. If it is accelerated a second time,
            the latest tolerance counts.
        tolerance: `None` for exact to rounding. 0 for the library's own bits, always by passes. Above 0, passes
            end when one changes no entry by more than this, in the units of each transform's input; native code stays
            exact to rounding.

    Returns:
        An `Acceleration`, which says how each transform is computed and restores the flow.

    Raises:
        ValueError: If nothing in `flow` can be accelerated, a library's version is not supported, or the tolerance is
            negative or not finite.
        TypeError: If the tolerance is not a number.

    Example:
        >>> flow = zuko.flows.NSF(5, context=3)
        >>> with jf.accelerate(flow):
        ...     x = flow(torch.zeros(3)).sample((1000,))
        >>> x.shape
        torch.Size([1000, 5])
    """
    if tolerance is not None:
        tolerance = float(check_number("tolerance", tolerance, give="None, 0 for identical bits, or a positive number"))
    modules = list(_named_modules(flow))
    if not modules and isinstance(flow, Distribution | Transform):
        raise InputValueError(
            f"{type(flow).__name__}: made by a flow for one context; accelerate the flow itself; nothing was changed"
        )
    packages = {kind.__module__.split(".")[0] for _, module in modules for kind in type(module).__mro__}
    tarflow = importlib.import_module("jacobiflow.adapters.tarflow")
    adapters = [adapter for library in _LIBRARIES if library in packages for adapter in _adapters(library)]
    accelerated: dict[nn.Module, tuple[str, Adapter]] = {}
    untouched: dict[str, str] = {}
    for name, module in modules:
        kind = library_class(module)
        adapter = next((adapter for adapter in adapters if issubclass(kind, adapter.transform)), None)
        if adapter is None and tarflow.resembles(module):
            adapter, reason = tarflow.recognise(module)
            if adapter is None:
                untouched[name] = reason
        if adapter is None:
            continue
        if (obstacle := adapter.obstacle(module)) is None:
            accelerated[module] = name, adapter
        elif not adapter.is_composition:
            untouched[name] = obstacle
    if all(adapter.is_composition for _, adapter in accelerated.values()):
        reasons = "".join(f"; {name}: {why}" for name, why in untouched.items())
        raise InputValueError(
            f"{type(flow).__name__}: no masked autoregressive transform of {', '.join(_LIBRARIES)}, and no TarFlow "
            f"block, to accelerate{reasons}; nothing was changed"
        )
    return Acceleration(tolerance, accelerated, untouched)


def _adapters(library: str) -> tuple[Adapter, ...]:
    package, least, below = _LIBRARIES[library]
    installed = version(package)
    if not _numbers(least) <= _numbers(installed) < _numbers(below):
        raise InputValueError(f"{library} {installed}: supported are {least} to below {below}; nothing was changed")
    return importlib.import_module(f"jacobiflow.adapters.{library}").ADAPTERS


def _numbers(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in text.split(".")[:2] if number.isdigit())


def _named_modules(flow: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules in a module, or in the attributes of another object, each once, with dotted names."""
    seen: set[nn.Module] = set()
    for prefix, root in _roots(flow, "", _DEPTH):
        yield from root.named_modules(seen, prefix)


def _roots(flow: Any, name: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules, at most `depth` levels down."""
    if isinstance(flow, nn.Module):
        yield name, flow
    elif depth:
        entries = flow if isinstance(flow, dict) else getattr(flow, "__dict__", {})
        parts = enumerate(flow) if isinstance(flow, list | tuple) else entries.items()
        # An attribute's own modules come first: they have the shorter names.
        for key, part in sorted(parts, key=lambda item: not isinstance(item[1], nn.Module)):
            yield from _roots(part, f"{name}.{key}".lstrip("."), depth - 1)
