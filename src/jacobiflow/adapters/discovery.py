"""`accelerate`: finds the modules of a user's flow that can be accelerated."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, overload

from torch import nn
from torch.distributions import Distribution, Transform

from jacobiflow.adapters.acceleration import Acceleration
from jacobiflow.adapters.adapter import Adapter, find_adapter
from jacobiflow.adapters.fault import fault_as_unsupported
from jacobiflow.adapters.library_acceleration import LibraryAcceleration
from jacobiflow.adapters.library_module import LIBRARIES
from jacobiflow.adapters.registry import BUILDERS, load_adapters
from jacobiflow.adapters.tarflow import is_block, try_block
from jacobiflow.adapters.tarflow_trial import TrialResult
from jacobiflow.errors import InputTypeError, InputValueError, UnsupportedError
from jacobiflow.utils.checks import check_number, format_value

_MAX_DEPTH = 4  # An ensemble holds a list of posteriors, each holds a potential, and this holds the module.


@overload
def accelerate(flow: ModuleType, tolerance: float | None = None) -> LibraryAcceleration: ...
@overload
def accelerate(flow: Any, tolerance: float | None = None) -> Acceleration: ...
def accelerate(flow: Any, tolerance: float | None = None) -> Acceleration | LibraryAcceleration:
    """Makes the masked and coupling transforms of a flow of another library, or a live TarFlow, fast.

    The libraries are zuko, nflows, glasflow, normflows and pyro. The flow is changed in place, and you call its own
    methods as before. On a CPU, native code computes all transforms at once, in both directions and with their
    gradients. The libraries' own inverse of a masked transform takes D passes of the network for D features. The result
    is exact to rounding. Rows that are not finite, or overflow on the way, go through the library's own code.

    Some masked transforms are beyond native code: those on a GPU, or with an activation that it does not know. They are
    inverted by passes x <- g(x) of the library's own network, which end as soon as one changes nothing. The result has
    the library's own bits. Its gradients are those of the implicit function theorem (first derivatives only).

    Of a TarFlow (the original code, that of SBG, and forks that compute the same) the blocks' `reverse` becomes native
    code, with its arguments and results; the tolerance plays no part. A trial compares the two first. The block's own
    code computes what native code cannot (gradients, a GPU, dropout in training mode) and what the trial did not
    compare.

    Weights are read at every call. Copies and pickles of an accelerated module are the library's own and not
    accelerated. A distribution `flow(c)` of zuko is accelerated as long as its flow is. The guide lists all that is
    left to the library's own code.

    If a package makes or copies the flow, pass the library before: `jf.accelerate(zuko)`, or `jf.accelerate(sbi)` for
    the flows of nflows and zuko that sbi makes. All flows that the library makes, copies or loads in this process from
    then on are accelerated. Flows that exist already are left alone.

    Other coupling layers than those in the guide, continuous flows and all other modules are left as they are, and
    native code computes the layers between them. If nothing in the flow can be accelerated, the
    result is a handle that says why.

    Args:
        flow: A module with masked or coupling transforms of these libraries in it, or an sbi posterior or another
            object whose attributes (or lists or dicts of them) hold such modules. Or a library: `zuko`, `nflows`,
            `glasflow`, `normflows`, `pyro` or `sbi`. If a flow is accelerated a second time, the latest tolerance
            counts.
        tolerance: `None` for exact to rounding. 0 for the library's own bits, always by passes. Above 0, passes
            end when one changes no entry by more than this, in the units of each transform's input. Native code is
            exact to rounding at any tolerance above 0.

    Returns:
        An `Acceleration`, which says how each transform is computed, or why it was left alone, and restores the flow.
        For a library, a `LibraryAcceleration`, which restores the library and the flows that were made since.

    Raises:
        ValueError: If `flow` is another library, a library's version is not supported, or the tolerance is negative or
            not finite.
        TypeError: If `flow` holds no PyTorch module, or the tolerance is not a number.

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
    visited: set[nn.Module] = set()  # named_modules yields a module once, although several attributes may hold it.
    modules = [entry for name, root in _find_roots(flow, "", _MAX_DEPTH) for entry in root.named_modules(visited, name)]
    if not modules and isinstance(flow, Distribution | Transform):
        raise InputValueError(
            f"{type(flow).__name__}: a distribution; accelerate the flow that made it, if one did; nothing was changed"
        )
    if isinstance(flow, str | os.PathLike) and Path(flow).suffix:
        raise InputTypeError(
            f"{format_value(flow)}: a file; give the flow in it; for the weights of a TarFlow, use jacobiflow convert, "
            f"or call jf.TarFlow.from_original({str(flow)!r}), then jf.sample; nothing was changed"
        )
    if not modules:
        raise InputTypeError(
            f"{format_value(flow)}: no PyTorch module in it; give a flow or a posterior; if training makes "
            "the network, as in sbi, call jf.accelerate(sbi) before; nothing was changed"
        )
    packages = {kind.__module__.split(".")[0] for _, module in modules for kind in type(module).__mro__}
    library_adapters = [adapter for library in LIBRARIES if library in packages for adapter in load_adapters(library)]
    accelerated: dict[nn.Module, tuple[str, Adapter]] = {}
    reasons: dict[str, str] = {}
    trials: dict[bytes | None, TrialResult] = {}
    for name, module in modules:
        adapter = find_adapter(module, library_adapters)
        try:
            with fault_as_unsupported(module):
                if adapter is None and is_block(module):
                    adapter = try_block(module, trials)
                if adapter is not None:
                    adapter.check(module)
                    accelerated[module] = name, adapter
        except UnsupportedError as error:
            if adapter is None or not adapter.is_composition:
                reasons[name] = str(error)
    if all(adapter.is_composition for _, adapter in accelerated.values()):
        accelerated = {}
        reasons = reasons or {"": _reason_of(module for _, module in modules)}
    acceleration = Acceleration(tolerance, accelerated, reasons)
    if not accelerated:
        warnings.warn(f"{type(flow).__name__}: {acceleration}", stacklevel=2)
    return acceleration


def _reason_of(modules: Iterable[nn.Module]) -> str:
    """Returns why nothing can be accelerated in a flow without transforms of the libraries and TarFlow blocks."""
    kinds = {type(module) for module in modules}
    if any(kind.__module__.startswith("jacobiflow.") for kind in kinds):
        return "jf.sample and jf.decode make it fast"
    return f"it has no transform of {', '.join(LIBRARIES)} that can be accelerated, and no TarFlow block"


def _accelerate_library(name: str, tolerance: float | None) -> LibraryAcceleration:
    libraries = BUILDERS.get(name, (name,))
    if not LIBRARIES.keys() >= {*libraries}:
        raise InputValueError(
            f"{name}: supported are {', '.join([*LIBRARIES, *BUILDERS])}; if it builds on one of these, pass "
            "that library; nothing was changed"
        )
    adapters = [adapter for each in libraries for adapter in load_adapters(each)]
    return LibraryAcceleration(name, tolerance, adapters)


def _find_roots(flow: Any, name: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
    """Yields (name, module) for the outermost modules in an object's attributes, at most `depth` levels down."""
    if isinstance(flow, nn.Module):
        yield name, flow
    elif depth:
        entries = flow if isinstance(flow, dict) else getattr(flow, "__dict__", {})
        parts = enumerate(flow) if isinstance(flow, list | tuple) else entries.items()
        # Modules come first, since their names are the shortest.
        for key, part in sorted(parts, key=lambda item: not isinstance(item[1], nn.Module)):
            yield from _find_roots(part, f"{name}.{key}".lstrip("."), depth - 1)
