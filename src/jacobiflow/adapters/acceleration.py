"""`Acceleration`: accelerates the modules of a flow, reports on them, and restores the flow."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

from jacobiflow.adapters.adapter import AcceleratedModule, Adapter
from jacobiflow.adapters.fault import EXPECTED, report_fault
from jacobiflow.adapters.library_module import is_accelerated, library_class
from jacobiflow.adapters.native_module import LibraryCall, TransformOutput, flatten_batch
from jacobiflow.adapters.part import Part
from jacobiflow.adapters.summary import describe
from jacobiflow.errors import UnsupportedError
from jacobiflow.native.tensors import check_autocast, check_untraced
from jacobiflow.utils.deprecation import renamed_attributes

if TYPE_CHECKING:
    from typing_extensions import Self


@renamed_attributes(ways="backends", untouched="reasons")
class Acceleration:
    """Reports what `accelerate` did to a flow, and restores the flow.

    At the end of a `with` block, the flow is as it was before the block. Inside another block it stays accelerated.

    Attributes:
        tolerance: `None` for exact to rounding, 0 for the library's own bits, or the tolerance at which passes end.
        transforms: The accelerated transforms: name of the module in the flow to "library class". Empty if nothing in
            the flow can be accelerated.
        reasons: Why parts of the flow were left alone: name of the masked or coupling transform or TarFlow block to the
            reason. If the flow has neither, "" for the flow itself.
        parts: The accelerated modules.

    Example:
        >>> flows = torch.nn.ModuleList([zuko.flows.MAF(3), zuko.flows.NICE(3, normalize=True)])
        >>> print(jf.accelerate(flows))
        accelerated, exact to rounding: 3 transforms
          0.transform.transforms.0, 1, 2: zuko MaskedAutoregressiveTransform, by native code
          1.transform.transforms.0, 1, 2: left alone, native code does not take the activation LayerNorm
    """

    def __init__(
        self, tolerance: float | None, adapters: dict[nn.Module, tuple[str, Adapter]], reasons: dict[str, str]
    ) -> None:
        self.tolerance, self.reasons = tolerance, reasons
        self.parts = {
            module: Part(module, name, adapter, self._accelerate_run) for module, (name, adapter) in adapters.items()
        }
        self._transforms = [part for part in self.parts.values() if not part.adapter.is_composition]
        self.transforms = {
            part.name: f"{part.adapter.library} {library_class(part.module).__name__}" for part in self._transforms
        }
        self._classes: dict[tuple[type[nn.Module], type[AcceleratedModule]], type[nn.Module]] = {}
        for part in self.parts.values():
            part.parts = [self.parts[child] for child in part.module.modules() if child in self.parts]
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
        """For each transform that was used, "native", "passes", or "library" for the library's own code."""
        return {part.name: part.latest_use[1] for part in self._transforms if part.latest_use is not None}

    def restore(self) -> None:
        """Gives every module the library's own class back, however often it was accelerated."""
        for module in self.parts:
            module.__class__ = library_class(module)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for module, part in self.parts.items():
            if is_accelerated(module):
                module.__class__ = part.class_before

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{type(self).__name__} has no {name!r}; the flow itself was accelerated: call flow.{name}"
        )

    def __repr__(self) -> str:
        return describe(self.parts, self.tolerance, self.reasons)

    def record_use(self, module: nn.Module, passes: int, backend: str) -> None:
        """Records the latest use of a transform, for `passes` and `backends`."""
        if module in self.parts:  # DataParallel makes replicas.
            self.parts[module].latest_use = passes, backend

    def record_fallback(self, module: nn.Module, reason: str) -> None:
        """Records that a call of a module is left to the library's own code, and why."""
        if module in self.parts:
            for part in self.parts[module].parts:
                part.latest_use, part.fallback_reason = (0, "library"), reason

    def _accelerate_run(self, run: nn.Module, adapter: Adapter) -> None:
        """Accelerates a run of layers, see `Part`. Its use is recorded as that of these layers."""
        part = Acceleration(self.tolerance, {run: ("", adapter)}, {}).parts[run]
        part.parts = [self.parts[layer] for layer in run.modules() if layer in self.parts]

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
        part = self.parts.get(module)
        is_library_exact = self.tolerance == 0 and library_call is not None
        if part is None or is_library_exact or not isinstance(x, Tensor):
            return None
        try:
            check_untraced()
            check_autocast()
            native = part.find_native(context is not None)
            if (obstacle := native.obstacle) is None:
                rows, contexts, batch = flatten_batch(x, context)
                in_pytorch = None if library_call is None else partial(native.evaluate_in_pytorch, library_call)
                values, log_dets, failed = native.chain.evaluate(
                    native.tensors(), rows, contexts, is_inverse, log_det, in_pytorch
                )
            elif native.mixed is None or library_call is None:
                raise UnsupportedError(obstacle)
        except UnsupportedError as error:
            self.record_fallback(module, str(error))
            return None
        except EXPECTED:
            raise
        except Exception as error:
            self.record_fallback(module, report_fault(module, error))
            return None
        if obstacle is not None and library_call is not None:
            return library_call(native.mixed, x, context)
        if failed is not None:
            if library_call is None:
                return None
            indices = failed.nonzero().flatten()
            contexts = None if contexts is None else contexts.expand(len(rows), -1)[indices]
            values[indices], new_log_dets = library_call(module, rows[indices], contexts)
            if log_dets is not None and new_log_dets is not None:
                log_dets[indices] = new_log_dets
        for each in part.parts:
            each.latest_use, each.fallback_reason = (0, "native"), ""
        if len(batch) == 1:
            return values, log_dets
        values = values.view((*batch, values.shape[-1]))
        return values, None if log_dets is None else log_dets.view((*batch, *log_dets.shape[1:]))
