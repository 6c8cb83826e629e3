"""normflows: `Autoregressive`, whose slow side is `inverse`: `log_prob` of an affine one, `sample` of a spline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from normflows.core import ConditionalNormalizingFlow, NormalizingFlow
from normflows.flows.affine.autoregressive import Autoregressive, MaskedAffineAutoregressive
from normflows.flows.mixing import Permute
from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive
from normflows.flows.neural_spline.wrapper import AutoregressiveRationalQuadraticSpline
from normflows.nets import made
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


class NormFlows(ElementwiseLibrary):
    """normflows's transforms."""

    made = made

    def links(self, module: Any) -> Iterator[Link]:
        """See `Library`."""
        kind, is_plain = Swapped.library_class_of(module) or type(module), is_plain_module(module, "forward", "inverse")
        if kind in (NormalizingFlow, ConditionalNormalizingFlow):
            for part in module.flows:
                yield from self.links(part)
        elif kind is AutoregressiveRationalQuadraticSpline and is_plain:
            yield module.mprqat, True
        else:
            yield module, False

    def describe(self, module: Any, is_conditional: bool) -> Description:
        """See `Library`."""
        kind = Swapped.library_class_of(module) or type(module)
        if kind is MaskedAffineAutoregressive:
            affine = {"kind": Elementwise.SIGMOID_AFFINE, "first": 2.0, "second": 1e-3}
            return self.masked(module, affine, 2, is_conditional)
        if kind is MaskedPiecewiseRationalQuadraticAutoregressive:
            return self.masked(module, *rational_quadratic(module), is_conditional)
        if kind is Permute:
            attributes = tuple((vars(module), name) for name in ("mode", "num_channels"))
            if module.mode == "shuffle":
                slots = ((module._buffers, "perm"),)
                return Description(module, order=module.perm.tolist(), constants=slots, attributes=attributes)
            if module.mode == "swap":
                half = module.num_channels // 2
                order = [*range(half, module.num_channels), *range(half)]
                return Description(module, order=order, attributes=attributes)
        raise UnsupportedError(kind.__name__)


NORMFLOWS = NormFlows()


class Accelerated(AcceleratedTransform):
    """A masked transform."""

    made, library = made, NORMFLOWS


class AcceleratedFlow(Swapped):
    """A flow: native code takes its transforms together. A context is there in a conditional flow only."""

    q0: Any
    flows: Any

    def forward_and_log_det(self, z: Tensor, *context: Any, **contexts: Any) -> tuple[Tensor, Tensor]:
        """x of latents z, and log|det dx/dz| (B,), as normflows's."""
        result = through_native_code(self, NORMFLOWS, z, _context(*context, **contexts), is_inverse=False)
        return super().forward_and_log_det(z, *context, **contexts) if result is None else result  # type: ignore[misc]

    def inverse_and_log_det(self, x: Tensor, *context: Any, **contexts: Any) -> tuple[Tensor, Tensor]:
        """Latents z of x, and log|det dz/dx| (B,), as normflows's."""
        result = through_native_code(self, NORMFLOWS, x, _context(*context, **contexts), is_inverse=True)
        return super().inverse_and_log_det(x, *context, **contexts) if result is None else result  # type: ignore[misc]

    def forward(self, z: Tensor, *context: Any, **contexts: Any) -> Tensor:
        return self.forward_and_log_det(z, *context, **contexts)[0]

    def inverse(self, x: Tensor, *context: Any, **contexts: Any) -> Tensor:
        """Latents z of x."""
        return self.inverse_and_log_det(x, *context, **contexts)[0]

    def sample(self, num_samples: int = 1, *context: Any, **contexts: Any) -> tuple[Tensor, Tensor]:
        """Samples x and their log-densities (N,)."""
        z, log_prob = self.q0(num_samples, *context, **contexts)
        result = through_native_code(self, NORMFLOWS, z, _context(*context, **contexts), is_inverse=False)
        if result is not None:
            return result[0], log_prob - result[1]
        for flow in self.flows:  # forward_and_log_det would sum in the default dtype
            z, log_det = flow(z, *context, **contexts)
            log_prob = log_prob - log_det
        return z, log_prob

    def log_prob(self, x: Tensor, *context: Any, **contexts: Any) -> Tensor:
        """Log-densities (B,) of x."""
        result = through_native_code(self, NORMFLOWS, x, _context(*context, **contexts), is_inverse=True)
        if result is None:
            return super().log_prob(x, *context, **contexts)  # type: ignore[misc]
        return result[1] + self.q0.log_prob(result[0], *context, **contexts)


def _context(context: Tensor | None = None) -> Tensor | None:
    return context


_ENTRIES = ("forward", "inverse", "forward_and_log_det", "inverse_and_log_det", "sample", "log_prob")
ADAPTERS = (
    Adapter(Autoregressive, ("inverse",), Accelerated, NORMFLOWS),
    Adapter(ConditionalNormalizingFlow, _ENTRIES, AcceleratedFlow, NORMFLOWS, is_composition=True),
    Adapter(NormalizingFlow, _ENTRIES, AcceleratedFlow, NORMFLOWS, is_composition=True),
)
