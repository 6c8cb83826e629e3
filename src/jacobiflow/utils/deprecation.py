"""Old names of arguments, attributes and module members, which work and warn, and what is retired."""

import sys
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, TypeVar

from jacobiflow.utils.warn import warn_caller

T = TypeVar("T")
REMOVED_IN = "0.4"
"""First version of the package without the old names."""
LAST_VERSION = "0.1.0"
"""Last version of the package with what is retired."""


def retired(what: str) -> str:
    """Returns the message for something that is retired, without the remedy."""
    return f"{what} is retired; jacobiflow {LAST_VERSION} is the last version with it"


def warn_renamed(old: str, new: str) -> None:
    """Issues a DeprecationWarning that names the new name, and the version without the old one."""
    warn_caller(f"{old} is now {new}; jacobiflow {REMOVED_IN} removes the old name", DeprecationWarning)


def renamed_arguments(**names: str) -> Callable[[T], T]:
    """Decorator of a function or a class that also takes arguments by old names: `renamed_arguments(old="new")`."""

    def decorate(target: Any) -> Any:
        if isinstance(target, type):
            target.__init__ = decorate(target.__init__)  # type: ignore[misc]
            return target

        @wraps(target)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in kwargs.keys() & names.keys():
                if names[old] in kwargs:
                    raise TypeError(f"{old} is the old name of {names[old]}; leave it out")
                warn_renamed(f"{old}=", f"{names[old]}=")
                kwargs[names[old]] = kwargs.pop(old)
            return target(*args, **kwargs)

        call.renamed = names  # type: ignore[attr-defined]
        return call

    return decorate


def renamed_attributes(**names: str) -> Callable[[type[T]], type[T]]:
    """Decorator of a class whose attributes and methods also have old names: `renamed_attributes(old="new")`."""

    def decorate(cls: type[T]) -> type[T]:
        for old, new in names.items():
            setattr(cls, old, property(partial(_read, old, new), doc=f"Old name of {new}."))
        return cls

    return decorate


def _read(old: str, new: str, instance: Any) -> Any:
    warn_renamed(f"{type(instance).__name__}.{old}", new)
    return getattr(instance, new)


def find_renamed(module: str, names: Mapping[str, str], name: str) -> Any:
    """Returns what a module names `names[name]`, for its `__getattr__`; raises AttributeError for other names."""
    if name not in names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warn_renamed(f"{module}.{name}", f"{module}.{names[name]}")
    return getattr(sys.modules[module], names[name])
