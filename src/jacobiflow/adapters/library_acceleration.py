"""`LibraryAcceleration`: accelerates the flows that a library makes, and restores the library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from threading import RLock
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch import nn

from jacobiflow.adapters.acceleration import Acceleration
from jacobiflow.adapters.adapter import Adapter, find_adapter
from jacobiflow.adapters.fault import fault_as_unsupported
from jacobiflow.adapters.library_module import is_accelerated
from jacobiflow.adapters.summary import describe_tolerance
from jacobiflow.errors import UnsupportedError

if TYPE_CHECKING:
    from typing_extensions import Self

_CONSTRUCTORS = ("__init__", "__setstate__")  # __setstate__ makes copies and loaded flows.
_lock = RLock()  # Flows may be made in several threads.
_active: list[LibraryAcceleration] = []
_originals: dict[type[nn.Module], dict[str, Any]] = {}  # The library's constructors that are replaced now.


class LibraryAcceleration:
    """The acceleration of the flows that a library makes from now on.

    It ends with `restore()` or with its `with` block. Inside another block, flows stay accelerated as that one says.
    Print `jf.accelerate(flow)` to see how the transforms of one flow are computed.

    Attributes:
        tolerance: `None` for exact to rounding, 0 for the library's own bits, or the tolerance at which passes end.
        reasons: Why modules were left alone: their class to the latest reason.

    Example:
        >>> with jf.accelerate(zuko) as handle:
        ...     flow = zuko.flows.MAF(3, transforms=2)
        >>> print(handle)
        new flows of zuko are accelerated, exact to rounding: 2 transforms so far
    """

    def __init__(self, name: str, tolerance: float | None, adapters: Sequence[Adapter]) -> None:
        self.tolerance, self._name, self._adapters = tolerance, name, adapters
        self.reasons: dict[str, str] = {}
        self._count = 0
        # An acceleration holds its module, so a strong reference would keep every flow alive.
        self._accelerations: WeakSet[Acceleration] = WeakSet()
        with _lock:
            _active.append(self)
            _replace_constructors()

    def restore(self) -> None:
        """Gives the library its constructors back, and its own classes to all modules that were accelerated."""
        self._end(Acceleration.restore)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end(Acceleration.__exit__)

    def __repr__(self) -> str:
        # An equal call before this one, if it is still in force, has counted the flows that were made in between.
        same = [each for each in _active if (each._name, each.tolerance) == (self._name, self.tolerance)]
        count = f"{max(each._count for each in (self, *same))} transforms so far"
        reasons = "".join(f"\n  left alone, {name}: {reason}" for name, reason in self.reasons.items())
        return f"new flows of {self._name} are accelerated, {describe_tolerance(self.tolerance)}: {count}{reasons}"

    def add(self, module: nn.Module) -> None:
        """Accelerates a new module if it can be."""
        adapter = find_adapter(module, self._adapters)
        if adapter is None:
            return
        try:
            with fault_as_unsupported(module):
                adapter.check(module)
                self._accelerations.add(Acceleration(self.tolerance, {module: ("", adapter)}, {}))
                self._count += not adapter.is_composition
        except UnsupportedError as error:
            self.reasons[type(module).__name__] = str(error)

    def _end(self, undo: Callable[[Acceleration], None]) -> None:
        with _lock:
            if self in _active:
                _active.remove(self)
                _replace_constructors()
            for acceleration in self._accelerations:
                undo(acceleration)


def _replace_constructors() -> None:
    """Replaces the constructors of the classes that are accelerated now, and restores those of all others."""
    kinds = {adapter.target for library in _active for adapter in library._adapters}
    for kind in kinds - _originals.keys():
        _originals[kind] = {name: vars(kind).get(name) for name in _CONSTRUCTORS}
        for name in _CONSTRUCTORS:
            setattr(kind, name, _accelerating_constructor(getattr(kind, name)))
    for kind in _originals.keys() - kinds:
        for name, constructor in _originals.pop(kind).items():
            delattr(kind, name)
            if constructor is not None:  # None is an inherited constructor.
                setattr(kind, name, constructor)


def _accelerating_constructor(constructor: Callable[..., None]) -> Callable[..., None]:
    """Returns a constructor that accelerates the module at its end."""

    @wraps(constructor)
    def construct(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        constructor(module, *args, **kwargs)
        # The constructor of a base class may have accelerated the module already.
        with _lock:
            if not is_accelerated(module):
                for library in _active:
                    library.add(module)

    return construct
