"""`Acceleration`: accelerates the modules of a flow, reports on them, and restores the flow."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jacobiflow.adapters.adapter import AcceleratedModule, Adapter
from jacobiflow.adapters.library_module import is_accelerated, library_class
from jacobiflow.adapters.native_module import LibraryCall, NativeModule, TransformOutput, flatten_batch
from jacobiflow.errors import UnsupportedError
from jacobiflow.native import describe as describe_native
from jacobiflow.native import load_library
from jacobiflow.native.tensors import is_traced

if TYPE_CHECKING:
    from typing_extensions import Self

MIN_PASSES = 6  # With fewer passes from x = 0, comparing iterates costs more time than it saves.
_MAX_NAMES = 8  # Number of names of modules in a line of a handle's summary.


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
        self._parts = {module: _Part(module, name, adapter) for module, (name, adapter) in adapters.items()}
        self._transforms = [part for part in self._parts.values() if not part.adapter.is_composition]
        self.transforms = {
            part.name: f"{part.adapter.library} {library_class(part.module).__name__}" for part in self._transforms
        }
        self._classes: dict[tuple[type[nn.Module], type[AcceleratedModule]], type[nn.Module]] = {}
        for part in self._parts.values():
            part.parts = [self._parts[child] for child in part.module.modules() if child in self._parts]
            self.replace_class(part.module, part.adapter.mixin)

    def replace_class(self, module: nn.Module, mixin: type[AcceleratedModule]) -> None:
        """Gives the module a subclass of its library's class, with the methods of the mixin."""
        kind = library_class(module)
        if (kind, mixin) not in self._classes:
            names = {"library_class": kind, "acceleration": self, "__module__": kind.__module__}
            self._classes[kind, mixin] = type(kind.__name__, (mixin, kind), names)
        module.__class__ = self._classes[kind, mixin]

    @property
    def passes(self) -> dict[str, int]:
        """For each transform that was used, the passes of its network in the latest inverse; 0 by native code."""
        return {part.name: part.latest_use[0] for part in self._transforms if part.latest_use is not None}

    @property
    def backends(self) -> dict[str, str]:
        """For each transform that was used, "native", "passes", or "library" for the library's own loop."""
        return {part.name: part.latest_use[1] for part in self._transforms if part.latest_use is not None}

    def restore(self) -> None:
        """Gives every module the library's own class back, however often it was accelerated."""
        for module in self._parts:
            module.__class__ = library_class(module)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for module, part in self._parts.items():
            if is_accelerated(module):
                module.__class__ = part.class_before

    def __repr__(self) -> str:
        count = len(self.transforms)
        what = f"{count} autoregressive transform{'s' * (count > 1)}"
        methods = {
            part.name: f"{self.transforms[part.name]}, by {part.expected_backend(self.tolerance)}"
            for part in self._transforms
        }
        return "\n".join([
            f"accelerated, {describe_tolerance(self.tolerance)}: {what}" if count else "nothing was accelerated",
            *_lines_of(methods),
            *_lines_of({name: f"left alone, {reason}" for name, reason in self.reasons.items()}),
        ])  # fmt: skip

    def record_use(self, module: nn.Module, passes: int, backend: str) -> None:
        """Records the latest use of a transform, for `passes` and `backends`."""
        if module in self._parts:  # DataParallel makes replicas.
            self._parts[module].latest_use = passes, backend

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
        part = self._parts.get(module)
        is_library_exact = self.tolerance == 0 and library_call is not None
        if part is None or is_library_exact or is_traced() or torch.is_autocast_enabled("cpu"):
            return None
        try:
            rows, contexts, batch = flatten_batch(x, context)
            native = part.find_native(context is not None)
            in_pytorch = None if library_call is None else partial(native.evaluate_in_pytorch, library_call)
            values, log_dets, failed = native.chain.evaluate(
                native.tensors(), rows, contexts, is_inverse, log_det, in_pytorch
            )
        except UnsupportedError:
            return None
        if failed is not None:
            if library_call is None:
                return None
            indices = failed.nonzero().flatten()
            contexts = None if contexts is None else contexts.expand(len(rows), -1)[indices]
            values[indices], new_log_dets = library_call(module, rows[indices], contexts)
            if log_dets is not None and new_log_dets is not None:
                log_dets[indices] = new_log_dets
        for each in part.parts:
            each.latest_use = 0, "native"
        if len(batch) == 1:
            return values, log_dets
        values = values.view((*batch, values.shape[-1]))
        return values, None if log_dets is None else log_dets.view((*batch, *log_dets.shape[1:]))


@dataclass(eq=False)
class _Part:
    """An accelerated module of a flow.

    Attributes:
        parts: The accelerated modules in it, itself included.
        latest_use: The passes of the latest call, and its backend.
    """

    module: nn.Module
    name: str
    adapter: Adapter
    parts: list[_Part] = field(default_factory=list)
    latest_use: tuple[int, str] | None = None

    def __post_init__(self) -> None:
        self.class_before = type(self.module)
        self._natives: dict[bool, NativeModule] = {}

    def find_native(self, is_conditional: bool) -> NativeModule:
        """Returns the module as native code takes it now; raises UnsupportedError if it does not."""
        native = self._natives.get(is_conditional)
        if native is None or not native.snapshot.is_current():
            if self.adapter.list_transforms is None or load_library() is None:
                raise UnsupportedError(f"native code is {describe_native()}")
            native = self._natives[is_conditional] = NativeModule(
                self.module, self.adapter.list_transforms, is_conditional
            )
        if native.obstacle is not None:
            raise UnsupportedError(f"native code does not know {native.obstacle}")
        return native

    def expected_backend(self, tolerance: float | None) -> str:
        """Returns in words how the module is inverted."""
        if self.adapter.list_transforms is None:
            return "native code"
        if tolerance == 0:
            return "passes"
        try:
            self.find_native(is_conditional=False)
        except UnsupportedError as error:
            condition = "" if self.adapter.has_search(self.module) else f", if there are {MIN_PASSES} features or more"
            return f"passes{condition}: {error}"
        return "native code"
