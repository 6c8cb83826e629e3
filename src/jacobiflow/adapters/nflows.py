"""nflows: `AutoregressiveTransform`, affine, spline or your own, whose slow side is `inverse`; and compositions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nflows.transforms import made
from nflows.transforms.autoregressive import (
    AutoregressiveTransform,
    MaskedAffineAutoregressiveTransform,
    MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
)
from nflows.transforms.base import CompositeTransform, InputOutsideDomain, InverseTransform
from nflows.transforms.permutations import Permutation, RandomPermutation, ReversePermutation
from nflows.transforms.standard import AffineTransform, PointwiseAffineTransform
from torch import Tensor

from jacobiflow.adapters.chain import Link, is_plain_module
from jacobiflow.adapters.elementwise import (
    AcceleratedTransform,
    ElementwiseLibrary,
    rational_quadratic,
    through_native_code,
)
from jacobiflow.adapters.masked import UnsupportedError
from jacobiflow.adapters.part import Description
from jacobiflow.adapters.swapped import Adapter, Swapped
from jacobiflow.native.structures import Elementwise


class NFlows(ElementwiseLibrary):
    """nflows's transforms."""

    made = made

    def links(self, module: Any) -> Iterator[Link]:
        """See `Library`."""
        kind, is_plain = Swapped.library_class_of(module) or type(module), is_plain_module(module, "forward", "inverse")
        if kind is CompositeTransform and is_plain:
            for part in module._transforms:
                yield from self.links(part)
        elif kind is InverseTransform and is_plain:
            for part, is_reversed in reversed(list(self.links(module._transform))):
                yield part, not is_reversed
        else:
            yield module, False

    def describe(self, module: Any, is_conditional: bool) -> Description:
        """See `Library`."""
        kind = Swapped.library_class_of(module) or type(module)
        if kind is MaskedAffineAutoregressiveTransform:
            affine = {"kind": Elementwise.SOFTPLUS_AFFINE, "second": module._epsilon}
            return self.masked(module, affine, 2, is_conditional)
        if kind is MaskedPiecewiseRationalQuadraticAutoregressiveTransform:
            return self.masked(module, *rational_quadratic(module), is_conditional)
        if kind in (Permutation, RandomPermutation, ReversePermutation) and module._dim == 1:
            slot = (module._buffers, "_permutation")
            return Description(module, order=module._permutation.tolist(), constants=(slot,))
        if kind in (PointwiseAffineTransform, AffineTransform):
            return Description(module, tensors=((module._buffers, "_scale"), (module._buffers, "_shift")))
        raise UnsupportedError(kind.__name__)


NFLOWS = NFlows()


class Accelerated(AcceleratedTransform):
    """A masked transform."""

    made, library = made, NFLOWS
    refusals = (AssertionError, InputOutsideDomain)


class AcceleratedComposition(Swapped):
    """A composition: native code takes its transforms together."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        result = through_native_code(self, NFLOWS, inputs, context, is_inverse=False)
        return super().forward(inputs, context) if result is None else result

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The x with forward(x) = `inputs`, and log|det dx/dinputs| (B,), as nflows's."""
        result = through_native_code(self, NFLOWS, inputs, context, is_inverse=True)
        return super().inverse(inputs, context) if result is None else result  # type: ignore[misc]


ADAPTERS = (
    Adapter(AutoregressiveTransform, ("inverse",), Accelerated, NFLOWS),
    Adapter(CompositeTransform, ("forward", "inverse"), AcceleratedComposition, NFLOWS, is_composition=True),
)
