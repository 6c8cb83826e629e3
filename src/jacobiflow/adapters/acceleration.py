"""`Acceleration`: accelerates the modules of a flow, reports on them, and restores the flow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacobiflow.adapters.library_module import is_accelerated, library_class, shallow_copy
from jacobiflow.adapters.native_module import LibraryCall, ListTransforms, NativeModule, TransformOutput, flatten_batch
from jacobiflow.errors import UnsupportedError
from jacobiflow.native import describe as describe_native
from jacobiflow.native import load_library
from jacobiflow.native.tensors import is_traced

if TYPE_CHECKING:
    from typing_extensions import Self

MIN_PASSES = 6  # With fewer passes from x = 0, comparing iterates costs more time than it saves.
_MAX_NAMES = 8  # Number of names of modules in a line of a handle's summary.


class AcceleratedModule(nn.Module):
    """Mixin that replaces methods of a library's class.

    A module is accelerated by a change of its class, so that its attributes stay as they are. Copies and pickles are of
    the library's class.
    """

    library_class: ClassVar[type[nn.Module]]
    acceleration: ClassVar[Acceleration]

    def __init_subclass__(cls, **_: Any) -> None:
        """Leaves out that of the user's class, which may register its subclasses or have parameters."""

    @property
    def __class__(self) -> type:
        """The library's class, since pickle compares it with the class that it writes."""
        return library_class(self)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        vars(object)["__class__"].__set__(self, kind)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return shallow_copy(self, self.library_class).__reduce_ex__(protocol)


def accelerate_module(module: nn.Module, mixin: type[AcceleratedModule], acceleration: Acceleration) -> None:
    """Gives the module a subclass of its library's class, with the methods of the mixin."""
    kind, classes = library_class(module), acceleration.classes
    if (kind, mixin) not in classes:
        names = {"library_class": kind, "acceleration": acceleration, "__module__": kind.__module__}
        classes[kind, mixin] = type(kind.__name__, (mixin, kind), names)
    module.__class__ = classes[kind, mixin]


@dataclass(frozen=True)
class Adapter:
    """A class of a library that can be accelerated.

    Attributes:
        target: The library's class: a transform with a slow loop, or a composition of transforms.
        methods: Its methods that are replaced. A subclass is accelerated if it leaves them unchanged.
        mixin: The class that replaces them.
        list_transforms: Lists the transforms of a module for native code; `None` if `mixin` calls native code itself.
    """

    target: type[nn.Module]
    methods: tuple[str, ...]
    mixin: type[AcceleratedModule]
    list_transforms: ListTransforms | None
    is_composition: bool = False

    @property
    def library(self) -> str:
        return self.target.__module__.split(".")[0]

    def obstacle(self, module: nn.Module) -> str | None:
        """Returns why the module cannot be accelerated, or `None` if it can."""
        kind = library_class(module)
        if _layout(kind) is not _layout(self.mixin):  # Python refuses to change the class of a module.
            return f"the first base of {kind.__name__} is not {self.library}'s"
        for method in self.methods:
            if getattr(kind, method) is not getattr(self.target, method):
                return f"{kind.__name__} overrides {self.library}'s {method}"
            if method in vars(module):
                return f"its {method} was replaced"
        return None


def _layout(kind: type) -> type:
    """Returns the nearest base whose objects have no attributes."""
    while kind.__dictoffset__ and kind.__base__ is not None:
        kind = kind.__base__
    return kind


def find_adapter(module: nn.Module, adapters: Iterable[Adapter]) -> Adapter | None:
    """Returns the first adapter of the module's class, or `None`."""
    return next((adapter for adapter in adapters if issubclass(library_class(module), adapter.target)), None)


def describe_tolerance(tolerance: float | None) -> str:
    """Returns in words how exact an inverse is."""
    if tolerance is None:
        return "exact to rounding"
    return f"to a tolerance of {tolerance:g}" if tolerance else "to the library's own bits"


def _lines_of(texts: dict[str, str]) -> list[str]:
    """Returns a line for each text, after the names of the modules that it holds for."""
    names: dict[str, list[str]] = {}
    for name, text in texts.items():
        names.setdefault(text, []).append(name)
    return [f"  {_join_names(some)}: {text}" if any(some) else f"  {text}" for text, some in names.items()]


def _join_names(names: list[str]) -> str:
    """Returns the names of modules in a row. A parent that all of them share is written once."""
    parent, _, _ = names[0].rpartition(".")
    if all(name.rpartition(".")[0] == parent for name in names):
        names = [names[0], *(name.rpartition(".")[2] for name in names[1:])]
    return ", ".join(names if len(names) <= _MAX_NAMES else [*names[: _MAX_NAMES - 1], "...", names[-1]])


class Acceleration:
    """Reports what `accelerate` did to a flow, and restores the flow.

    At the end of a `with` block, the flow is as it was before the block. Inside another block it stays accelerated.

    Attributes:
        tolerance: `None` for exact to rounding, 0 for the library's own bits, or the tolerance at which passes end.
        transforms: The accelerated transforms: name of the module in the flow to "library class". Empty if nothing in
            the flow can be accelerated.
        reasons: Why parts of the flow were left alone: name of the masked autoregressive transform or TarFlow block to
            the reason. If the flow has neither, "" for the flow itself.

    Example:
        >>> print(jf.accelerate(zuko.flows.MAF(3)))
        accelerated, exact to rounding: 3 autoregressive transforms
          transform.transforms.0, 1, 2: zuko MaskedAutoregressiveTransform, by native code
        >>> print(jf.accelerate(zuko.flows.NICE(3)))
        nothing was accelerated
          left alone, its coupling layers already invert in one pass
    """

    def __init__(
        self, tolerance: float | None, adapters: dict[nn.Module, tuple[str, Adapter]], reasons: dict[str, str]
    ) -> None:
        self.tolerance, self.reasons = tolerance, reasons
        self._adapters = {module: adapter for module, (_, adapter) in adapters.items()}
        self.classes: dict[tuple[type[nn.Module], type[AcceleratedModule]], type[nn.Module]] = {}
        self._names = {module: name for module, (name, adapter) in adapters.items() if not adapter.is_composition}
        self._classes_before = {module: type(module) for module in adapters}
        self._native_modules: dict[tuple[nn.Module, bool], NativeModule] = {}
        self._latest_use: dict[nn.Module, tuple[int, str]] = {}
        self.transforms = {
            name: f"{self._adapters[module].library} {library_class(module).__name__}"
            for module, name in self._names.items()
        }
        for module, adapter in self._adapters.items():
            accelerate_module(module, adapter.mixin, self)

    @property
    def passes(self) -> dict[str, int]:
        """For each transform that was used, the passes of its network in the latest inverse; 0 by native code."""
        return {name: self._latest_use[module][0] for module, name in self._names.items() if module in self._latest_use}

    @property
    def backends(self) -> dict[str, str]:
        """For each transform that was used, "native", "passes", or "library" for the library's own loop."""
        return {name: self._latest_use[module][1] for module, name in self._names.items() if module in self._latest_use}

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
        count = len(self.transforms)
        what = f"{count} autoregressive transform{'s' * (count > 1)}"
        methods = {
            name: f"{self.transforms[name]}, by {self._expected_backend(module)}"
            for module, name in self._names.items()
        }
        return "\n".join([
            f"accelerated, {describe_tolerance(self.tolerance)}: {what}" if count else "nothing was accelerated",
            *_lines_of(methods),
            *_lines_of({name: f"left alone, {reason}" for name, reason in self.reasons.items()}),
        ])  # fmt: skip

    def _expected_backend(self, module: nn.Module) -> str:
        list_transforms = self._adapters[module].list_transforms
        if list_transforms is None:
            return "native code" if load_library() is not None else f"its own loop: native code is {describe_native()}"
        if self.tolerance == 0:
            return "passes"
        if load_library() is None:
            return f"passes: native code is {describe_native()}"
        obstacle = NativeModule(module, list_transforms, is_conditional=False).obstacle
        if obstacle is None:
            return "native code"
        return f"passes, if there are {MIN_PASSES} features or more: native code does not know {obstacle}"

    def record_use(self, module: nn.Module, passes: int, backend: str) -> None:
        """Records the latest use of a transform, for `passes` and `backends`."""
        self._latest_use[module] = passes, backend

    def evaluate(
        self,
        module: nn.Module,
        x: Float[Tensor, "*batch d"],
        context: Float[Tensor, "*batch c"] | None,
        is_inverse: bool,
        library_call: LibraryCall | None,
        log_det: str | None = None,
    ) -> TransformOutput | None:
        """Computes a transform, composition or flow by native code; `None` if it is left to the library.

        The output has gradients if anything requires one.

        Args:
            x: Its batch is broadcast with that of the context.
            library_call: Computes the rows that are not finite, or overflow on the way. Without it the output is `None`
                if there are such rows; it only starts the passes, so it is computed at any tolerance.
            log_det: That of `TransformChain.evaluate`.
        """
        if (self.tolerance == 0 and library_call is not None) or is_traced() or torch.is_autocast_enabled("cpu"):
            return None
        try:
            rows, contexts, batch = flatten_batch(x, context)
        except (IndexError, RuntimeError):  # The library raises its own error for these shapes.
            return None
        native = self._native_module(module, context is not None)
        if native is None or native.obstacle is not None:
            return None
        in_pytorch = None
        if library_call is not None and torch.is_grad_enabled():
            in_pytorch = partial(native.evaluate_in_pytorch, library_call)
        try:
            values, log_dets, failed = native.chain.evaluate(
                native.tensors(), rows, contexts, is_inverse, log_det, in_pytorch
            )
        except UnsupportedError:
            return None
        if failed is not None:
            if library_call is None:
                return None
            _replace_rows(values, log_dets, failed, partial(library_call, module), rows, contexts)
        self._latest_use.update(native.uses)
        if len(batch) == 1:
            return values, log_dets
        values = values.view((*batch, values.shape[-1]))
        return values, None if log_dets is None else log_dets.view((*batch, *log_dets.shape[1:]))

    def _native_module(self, module: nn.Module, is_conditional: bool) -> NativeModule | None:
        """Returns the module as native code takes it now; `None` for a replica that DataParallel made."""
        native = self._native_modules.get((module, is_conditional))
        if native is not None and native.snapshot.is_current():
            return native
        adapter = self._adapters.get(module)
        if adapter is None or adapter.list_transforms is None or load_library() is None:
            return None
        native = NativeModule(module, adapter.list_transforms, is_conditional)
        native.uses = {part: (0, "native") for part in module.modules() if part in self._names}
        self._native_modules[module, is_conditional] = native
        return native


def _replace_rows(
    values: Tensor, log_dets: Tensor | None, failed: Tensor, library_call: Callable[..., TransformOutput],
    x: Tensor, context: Tensor | None,
) -> None:  # fmt: skip
    """Writes the library's own results into the rows that have failed."""
    rows = failed.nonzero().flatten()
    context = None if context is None else context.expand(len(x), -1)[rows]
    values[rows], new_log_dets = library_call(x[rows], context)
    if log_dets is not None and new_log_dets is not None:
        log_dets[rows] = new_log_dets
