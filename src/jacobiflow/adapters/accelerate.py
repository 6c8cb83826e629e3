"""`accelerate`: the user's own zuko, nflows, normflows or pyro flow, made fast in place."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from torch import nn
from torch.distributions import Distribution, Transform

from jacobiflow.adapters.swapped import Acceleration, Adapter, Swapped
from jacobiflow.checks import check_number
from jacobiflow.errors import InputValueError

_SUPPORTED = {"zuko": ((1, 2), (2,)), "nflows": ((0, 14), (0, 15)), "normflows": ((1, 7), (2,)),
              "pyro": ((1, 9), (2,))}  # from, to below  # fmt: skip
_DISTRIBUTIONS = {"pyro": "pyro-ppl"}  # where its name is not the package's
_DEPTH = 3  # an ensemble of posteriors holds a list of posteriors, which hold modules


def accelerate(flow: Any, tolerance: float | None = None) -> Acceleration:
    """Makes the masked autoregressive transforms of a zuko, nflows, normflows or pyro flow fast, in place.

    The flow's own methods are called as before. On a CPU, without gradients, native code then computes both directions
    of all transforms at once: the inverse, which these libraries make in D passes of the network for D features, and
    the forward direction with its log-determinant. The result is exact to rounding. Rows that are not finite, or
    overflow on the way, go through the library's own code.

    What native code does not take (a gradient, a GPU, an activation that it does not know) is inverted by passes
    x <- g(x) of the library's own network, which end when one changes nothing. The answer then has the library's own
    bits. Gradients are those of the inverse, by the implicit function theorem (first derivatives only).

    Weights are read at every call. A copy of an accelerated module, by `copy`, `pickle` or `torch.save`, is the
    library's own and not accelerated: so accelerate the posterior of sbi, which copies its network. A distribution
    `flow(c)` of zuko is accelerated as long as its flow is.

    These are left to the library's own code, at each call: networks in training mode with batch or spectral
    normalisation or dropout, hooks, a `forward` that was replaced on an object, `torch.func` transforms, forward-mode
    derivatives, `torch.jit.trace`, `torch.compile`, `torch.export`, and the meta device.

    Args:
        flow: Any module with masked autoregressive transforms of these libraries in it, or an sbi posterior or another
            object whose attributes (or lists or dicts of them) hold such modules. If it is accelerated a second time,
            the latest tolerance counts.
        tolerance: `None` for exact to rounding. 0 for the library's own bits, always by passes. Above 0, passes end for
            a row when one changes it by at most this, in the units of each transform's input; what native code takes is
            exact to rounding still.

    Returns:
        An `Acceleration`: how each transform is computed, and the way back.

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
    adapters = [adapter for library in _SUPPORTED for adapter in _adapters(library, flow)]
    done = Acceleration(tolerance)
    classes: dict[nn.Module, type[nn.Module]] = {}
    for name, module in _named_modules(flow):
        own = Swapped.library_class_of(module) or type(module)
        adapter = next((adapter for adapter in adapters if issubclass(own, adapter.transform)), None)
        if adapter is None:
            continue
        if (why := adapter.obstacle(module, own)) is None:
            library = adapter.transform.__module__.split(".")[0]
            done.note(name, module, adapter.library, None if adapter.is_composition else f"{library} {own.__name__}")
            classes[module] = adapter.accelerated.of(own, done)
        elif not adapter.is_composition:
            done.untouched[name] = why
    if isinstance(flow, Distribution | Transform) and not any(True for _ in _named_modules(flow)):
        raise InputValueError(
            f"{type(flow).__name__}: made by a flow for one context; accelerate the flow itself; nothing was changed"
        )
    if not done.transforms:
        reasons = "".join(f"; {name}: {why}" for name, why in done.untouched.items())
        raise InputValueError(
            f"{type(flow).__name__}: no masked autoregressive transform of {', '.join(_SUPPORTED)} in it to accelerate"
            f"{reasons}; nothing was changed"
        )
    for module, accelerated in classes.items():
        module.__class__ = accelerated
    return done


def _adapters(library: str, flow: Any) -> Sequence[Adapter]:
    """The library's adapters, if a module of it is in the flow.

    Raises:
        ValueError: For another version.
    """
    if library not in sys.modules or not any(
        kind.__module__.split(".")[0] == library for _, module in _named_modules(flow) for kind in type(module).__mro__
    ):
        return ()
    have, (least, below) = version(_DISTRIBUTIONS.get(library, library)), _SUPPORTED[library]
    numbers = tuple(int(part) for part in have.split(".")[:2] if part.isdigit())
    if not least <= numbers < below:
        raise InputValueError(
            f"{library} {have}: supported are {_dotted(least)} to below {_dotted(below)}; nothing was changed"
        )
    return importlib.import_module(f"jacobiflow.adapters.{library}").ADAPTERS


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _named_modules(flow: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules in a module, or in the attributes of another object, each once, with dotted names."""
    seen: set[int] = set()
    for name, module in _roots(flow, "", _DEPTH):
        for inner, part in module.named_modules(prefix=name):
            if id(part) not in seen:
                seen.add(id(part))
                yield inner, part


def _roots(flow: Any, name: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(flow, nn.Module):
        yield name, flow
    elif depth:
        entries = flow if isinstance(flow, dict) else getattr(flow, "__dict__", {})
        parts = enumerate(flow) if isinstance(flow, list | tuple) else entries.items()
        # What an attribute holds itself comes first: it has the shorter name.
        for key, part in sorted(parts, key=lambda item: not isinstance(item[1], nn.Module)):
            yield from _roots(part, f"{name}.{key}".lstrip("."), depth - 1)
