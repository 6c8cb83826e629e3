"""`accelerate`: the user's own zuko, nflows, normflows or pyro flow, made fast where it is."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from torch import nn
from torch.distributions import Distribution, Transform

from jacobiflow.adapters.swapped import Acceleration, Adapter, Swapped
from jacobiflow.checks import check_flag, check_number
from jacobiflow.errors import InputValueError

_SUPPORTED = {"zuko": ((1, 2), (2,)), "nflows": ((0, 14), (0, 15)), "normflows": ((1, 7), (2,)),
              "pyro": ((1, 9), (2,))}  # from, to below  # fmt: skip
_DISTRIBUTIONS = {"pyro": "pyro-ppl"}  # where its name is not the package's
_DEPTH = 3  # an ensemble of posteriors holds a list of posteriors, which hold modules


def accelerate(flow: Any, tolerance: float = 0.0, retry_float64: bool = False) -> Acceleration:
    """Make the slow side of a zuko, nflows, normflows or pyro flow fast, in place: its own methods are called.

    These libraries invert a masked autoregressive transform of D features by D passes x <- g(x) of its network, from
    x = 0. Where there are few rows the passes reach the answer much earlier, and are ended there. Where there are many,
    each hidden unit is computed once, which gives x to rounding, and passes start from that. At tolerance 0 they end
    when one returns its argument bit for bit, so that the answer has the very bits that D passes give. Above 0 a row
    ends when a pass changes it by at most `tolerance`. That bounds the residual |g(x) - x| of the iterate before, not
    the error: the error is this residual amplified by (I - dg/dx)^-1 and by later transforms. No inverse of finite
    values makes more passes than the library's own. pyro's affine transform sets one feature in each of its D passes
    and ends at the same bits.

    Gradients are those of the inverse, by the implicit function theorem at the solution (first derivatives only).

    A copy of an accelerated module, by `copy`, `pickle` or `torch.save`, is the library's own and not accelerated. So
    accelerate the posterior of sbi, as `build_posterior` copies its network. A zuko distribution, `flow(c)`, is
    accelerated as long as its flow is. Posteriors that sample by MCMC do not invert, and get no faster.

    These inverses are left to the library's own loop, at each call:

    - of fewer than 6 features and few rows, where nothing is to be gained;
    - of networks in training mode with batch or spectral normalisation, dropout or hooks, and of networks in which a
        `forward` was replaced on an object: a pass may draw random numbers or change the network;
    - under `torch.func` transforms and forward-mode derivatives, `torch.jit.trace` and `torch.export`, and on the meta
        device;
    - with a gradient, of a batch of several dimensions that is not contiguous: PyTorch rounds it differently then;
    - with values that are not finite, if the passes made here may spread them in another way than the library's.

    **Arguments:**

    - `flow`: any module with masked autoregressive transforms of these libraries in it, or an sbi posterior or another
        object whose attributes (or lists or dicts of them) hold such modules. If it is accelerated a second time, the
        latest tolerance counts.
    - `tolerance`: in the units of each transform's input; 0 for identical bits.
    - `retry_float64`: solve rows of zuko, nflows and normflows again in float64 whose inverse in float32 is not finite,
      although they are, or all rows if a spline refuses one of them, as those of nflows do when a discriminant
      rounds to less than 0. The result is rounded to float32. Not for inverses with a gradient.

    **Returns:** an `Acceleration`, which says what was sped up, counts passes, and undoes it.

    **Raises:** `ValueError` where nothing in `flow` can be accelerated, a library's version is not supported, or the
    tolerance is negative or not finite; `TypeError` for other kinds of them. Then nothing was changed.
    """
    tolerance = check_number("tolerance", tolerance, give="0, for identical bits, or a positive number")
    check_flag("retry_float64", retry_float64)
    adapters = [(library, adapter) for library in _SUPPORTED for adapter in _adapters(library, flow)]
    done = Acceleration(float(tolerance), retry_float64)
    classes: dict[nn.Module, type[nn.Module]] = {}
    for name, module in _named_modules(flow):
        own = Swapped.library_class_of(module) or type(module)
        for library, adapter in adapters:
            if not issubclass(own, adapter.transform):
                continue
            if (why := adapter.obstacle(module, own)) is not None:
                done.untouched[name] = why
            else:
                done.note(name, module, f"{library} {own.__name__}")
                classes[module] = adapter.accelerated.of(own, done)
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
    """The library's adapters, where a module of it is in the flow. **Raises** `ValueError` for another version."""
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
