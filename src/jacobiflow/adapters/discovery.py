"""`accelerate`: finds the modules of a user's flow that have fast classes here."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib.metadata import version
from types import ModuleType
from typing import Any, overload

from packaging.version import Version
from torch import nn
from torch.distributions import Distribution, Transform

from jacobiflow.adapters.acceleration import Acceleration, Adapter, find_adapter
from jacobiflow.adapters.libraries import LibraryAcceleration
from jacobiflow.adapters.state import BlockState
from jacobiflow.adapters.tarflow import recognise, resembles
from jacobiflow.adapters.trial import TrialResult
from jacobiflow.errors import InputValueError
from jacobiflow.utils.checks import check_number

_LIBRARIES = {  # name of its module here: package, first supported version, version from which it is not supported
    "zuko": ("zuko", "1.2", "2"), "nflows": ("nflows", "0.14", "0.15"),
    "normflows": ("normflows", "1.7", "2"), "pyro": ("pyro-ppl", "1.9", "2"),
}  # fmt: skip
_BUILDERS = {"sbi": ("nflows", "zuko")}  # packages that make flows of these libraries
_DEPTH = 3  # an ensemble of posteriors holds a list of posteriors, which hold modules


@overload
def accelerate(flow: ModuleType, tolerance: float | None = None) -> LibraryAcceleration: ...
@overload
def accelerate(flow: Any, tolerance: float | None = None) -> Acceleration: ...
def accelerate(flow: Any, tolerance: float | None = None) -> Acceleration | LibraryAcceleration:
    """Makes the masked autoregressive transforms of a zuko, nflows, normflows or pyro flow, or a live TarFlow, fast.

    It does so in place, and the flow's own methods are called as before. On a CPU, without gradients, native code then
    computes all transforms at once in both directions: the inverse, which takes these libraries D passes of the network
    for D features, and the forward direction with its log-determinant. The result is exact to rounding. Rows that are
    not finite, or overflow on the way, go through the library's own code.

    If native code does not take a transform (a gradient, a GPU, an activation that it does not know), it is inverted by
    passes x <- g(x) of the library's own network, which end when one changes nothing, with the library's own bits.
    Gradients are those of the inverse, by the implicit function theorem (first derivatives only).

    Of a TarFlow (the original code, that of SBG, and forks that compute the same) the blocks' `reverse` becomes native
    code, with its arguments and results; the tolerance plays no part. A trial compares the two first. If native code
    cannot compute a call (a gradient, a GPU, dropout in training mode), or the trial did not compare such arguments,
    the block's own code does.

    Weights are read at every call. Copies and pickles of an accelerated module are the library's own and not
    accelerated. A distribution `flow(c)` of zuko is accelerated as long as its flow is. The guide lists all that is
    left to the library's own code.

    If a package makes or copies the flow, pass the library before: `jf.accelerate(zuko)`, or `jf.accelerate(sbi)` for
    the flows of nflows and zuko that sbi makes. All flows that the library makes, copies or loads in this process from
    then on are accelerated. Flows that exist already are left alone.

    Args:
        flow: A module with masked autoregressive transforms of these libraries in it, or an sbi posterior or another
            object whose attributes (or lists or dicts of them) hold such modules. Or a library: `zuko`, `nflows`,
            `normflows`, `pyro` or `sbi`. If a flow is accelerated a second time, the latest tolerance counts.
        tolerance: `None` for exact to rounding. 0 for the library's own bits, always by passes. Above 0, passes
            end when one changes no entry by more than this, in the units of each transform's input; native code stays
            exact to rounding.

    Returns:
        An `Acceleration`, which says how each transform is computed and restores the flow. For a library, a
        `LibraryAcceleration`, which restores the library and the flows that were made since.

    Raises:
        ValueError: If nothing in `flow` can be accelerated, it is a module of another package, a library's version is
            not supported, or the tolerance is negative or not finite.
        TypeError: If the tolerance is not a number.

    Example:
        >>> flow = zuko.flows.NSF(5, context=3)
        >>> with jf.accelerate(flow):
        ...     x = flow(torch.zeros(3)).sample((1000,))
        >>> x.shape
        torch.Size([1000, 5])
        >>> with jf.accelerate(zuko):  # before a package makes the flow
        ...     flow = zuko.flows.MAF(5)
    """
    if tolerance is not None:
        tolerance = float(
            check_number("tolerance", tolerance, expected="None, 0 for identical bits, or a positive number")
        )
    if isinstance(flow, ModuleType):
        return _accelerate_library(flow.__name__.split(".")[0], tolerance)
    seen: set[nn.Module] = set()  # each module once, with a dotted name
    modules = [entry for prefix, root in _roots(flow, "", _DEPTH) for entry in root.named_modules(seen, prefix)]
    if not modules and isinstance(flow, Distribution | Transform):
        raise InputValueError(
            f"{type(flow).__name__}: made by a flow for one context; accelerate the flow itself; nothing was changed"
        )
    packages = {kind.__module__.split(".")[0] for _, module in modules for kind in type(module).__mro__}
    adapters = [adapter for library in _LIBRARIES if library in packages for adapter in _adapters(library)]
    results: list[tuple[BlockState, TrialResult]] = []  # of the trials of live blocks
    accelerated: dict[nn.Module, tuple[str, Adapter]] = {}
    untouched: dict[str, str] = {}
    for name, module in modules:
        adapter = find_adapter(module, adapters)
        if adapter is None and resembles(module):
            adapter, reason = recognise(module, results)
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


def _accelerate_library(name: str, tolerance: float | None) -> LibraryAcceleration:
    libraries = _BUILDERS.get(name, (name,))
    if not _LIBRARIES.keys() >= {*libraries}:
        raise InputValueError(f"{name}: supported are {', '.join([*_LIBRARIES, *_BUILDERS])}; nothing was changed")
    return LibraryAcceleration(name, tolerance, [adapter for library in libraries for adapter in _adapters(library)])


def _adapters(library: str) -> tuple[Adapter, ...]:
    package, least, below = _LIBRARIES[library]
    installed = version(package)
    if not Version(least).release <= Version(installed).release < Version(below).release:
        raise InputValueError(f"{library} {installed}: supported are {least} to below {below}; nothing was changed")
    return importlib.import_module(f"jacobiflow.adapters.{library}").ADAPTERS


def _roots(flow: Any, name: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules in the attributes of an object, at most `depth` levels down; a module is its own."""
    if isinstance(flow, nn.Module):
        yield name, flow
    elif depth:
        entries = flow if isinstance(flow, dict) else getattr(flow, "__dict__", {})
        parts = enumerate(flow) if isinstance(flow, list | tuple) else entries.items()
        # An attribute's own modules come first: they have the shorter names.
        for key, part in sorted(parts, key=lambda item: not isinstance(item[1], nn.Module)):
            yield from _roots(part, f"{name}.{key}".lstrip("."), depth - 1)
