"""normflows: `Autoregressive`; the slow `inverse` of an affine one is its density."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from normflows.core import ConditionalNormalizingFlow, NormalizingFlow
from normflows.flows.affine.autoregressive import Autoregressive, MaskedAffineAutoregressive
from normflows.flows.affine.coupling import AffineConstFlow, AffineCouplingBlock
from normflows.flows.mixing import LULinearPermute, Permute
from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive
from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling
from normflows.flows.neural_spline.wrapper import AutoregressiveRationalQuadraticSpline, CoupledRationalQuadraticSpline
from normflows.flows.normalization import ActNorm
from normflows.nets import MLP, made
from normflows.nets.resnet import ResidualBlock, ResidualNet
from torch import Tensor, nn

from jacobiflow.adapters.adapter import AcceleratedModule, Adapter
from jacobiflow.adapters.library_module import library_class
from jacobiflow.adapters.made import (
    AcceleratedComposition,
    AcceleratedTransform,
    constant_spline,
    context_args,
    evaluate_by_native,
    lu_layer_transform,
    made_transform,
    places_of,
    spline_coupling,
    spline_transform,
)
from jacobiflow.adapters.network import LibraryNetwork
from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import ScaleActivation, TransformKind
from jacobiflow.native.transforms import (
    ChainTransform,
    constant_transform,
    coupling_transform,
    invert_transforms,
    permutation_transform,
)


def list_transforms(module: Any, is_conditional: bool) -> Iterator[ChainTransform]:
    """Yields the transforms of a module of normflows, see `ListTransforms`."""
    kind: Any = library_class(module)
    if kind in (NormalizingFlow, ConditionalNormalizingFlow):
        for flow in module.flows:
            yield from list_transforms(flow, is_conditional)
    elif kind is AutoregressiveRationalQuadraticSpline:
        yield spline_transform(module.mprqat, made, is_conditional).inverse()
    elif kind is MaskedPiecewiseRationalQuadraticAutoregressive:
        yield spline_transform(module, made, is_conditional)
    elif kind is MaskedAffineAutoregressive:
        scale: dict[str, Any] = {
            "kind": TransformKind.MASKED_AFFINE, "scale_activation": ScaleActivation.SIGMOID, "logit_shift": 2.0,
            "min_scale": 1e-3,
        }  # fmt: skip
        yield made_transform(module, made, is_conditional, **scale)
    elif kind is CoupledRationalQuadraticSpline:
        yield from invert_transforms(list_transforms(module.prqct, is_conditional))
    elif kind is PiecewiseRationalQuadraticCoupling:
        yield spline_coupling(module, (ResidualNet, ResidualBlock), is_conditional)
        if module.unconditional_transform is not None:
            yield constant_spline(module.unconditional_transform, module.features, module.identity_features.tolist())
    elif kind is LULinearPermute:
        order = permutation_transform(module.permutation._permutation.tolist())
        yield from invert_transforms([order, lu_layer_transform(module.linear)])
    elif kind is AffineCouplingBlock:
        yield _affine_coupling(module)
    elif kind in (AffineConstFlow, ActNorm):
        scale = {"kind": TransformKind.MASKED_AFFINE, "scale_activation": ScaleActivation.EXP}
        features = range(module.s.numel())
        yield constant_transform(places_of(module, "s", "t"), len(features), features, **scale)
    elif kind is Permute and module.mode == "shuffle":
        yield permutation_transform(module.perm.tolist())
    elif kind is Permute and module.mode == "swap":
        half = module.num_channels // 2
        yield permutation_transform([*range(half, module.num_channels), *range(half)])
    else:
        raise UnsupportedError(kind.__name__)


def _affine_coupling(module: Any) -> ChainTransform:
    """Returns a coupling that splits the features into two halves. Shifts and scales take turns in its outputs."""
    split, coupling, merge = module.flows
    scales = {"exp": (ScaleActivation.EXP, 0.0), "sigmoid_inv": (ScaleActivation.SIGMOID, 2.0)}
    if (
        split.mode not in ("channel", "channel_inv")
        or merge.mode != split.mode
        or not coupling.scale
        or coupling.scale_map not in scales
    ):
        raise UnsupportedError("a coupling with another split or scale")
    if type(coupling.param_map) is not MLP:
        raise UnsupportedError(f"the network {type(coupling.param_map).__name__}")
    layers = [layer for layer in coupling.param_map.net if type(layer) is nn.Linear]
    inputs, outputs = layers[0].in_features, torch.arange(layers[-1].out_features, device="cpu").view(-1, 2)
    network = LibraryNetwork(outputs, inputs=inputs)
    network.add_layers(0, coupling.param_map.net)
    size = inputs + len(outputs)
    first, last = range((size + 1) // 2), range((size + 1) // 2, size)
    if split.mode == "channel_inv":
        first, last = last, first
    activation, shift = scales[coupling.scale_map]
    return coupling_transform(
        network, first, last, kind=TransformKind.MASKED_AFFINE, scale_activation=activation, logit_shift=shift,
        scale_index=1,
    )  # fmt: skip


def _cascade(is_inverse: bool, module: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Calls all flows in turn. The library's own loop sums log-determinants in the default dtype."""
    log_det = x.new_zeros(len(x))
    for flow in reversed(module.flows) if is_inverse else module.flows:
        if isinstance(flow, AcceleratedFlow):  # a run, see `Part`
            x, each = flow.evaluate(x, context, is_inverse) or _cascade(is_inverse, flow, x, context)
        else:
            x, each = (flow.inverse if is_inverse else flow)(x, *context_args(context))
        log_det = log_det + each
    return x, log_det


class AcceleratedFlow(AcceleratedModule):
    """A flow whose transforms native code computes together. Only a conditional flow has a context."""

    q0: Any
    flows: Any

    def evaluate(self, x: Tensor, context: Tensor | None, is_inverse: bool) -> tuple[Tensor, Tensor] | None:
        """Returns the results by native code; `None` if they are left to the library."""
        return evaluate_by_native(self, partial(_cascade, is_inverse), x, context, is_inverse)

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns x of latents z and log|det dx/dz| (B,), as normflows does."""
        result: Any = self.evaluate(z, context, is_inverse=False)
        return result or super().forward_and_log_det(z, *context_args(context))  # type: ignore[misc]

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns latents z of x and log|det dz/dx| (B,), as normflows does."""
        result: Any = self.evaluate(x, context, is_inverse=True)
        return result or super().inverse_and_log_det(x, *context_args(context))  # type: ignore[misc]

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.forward_and_log_det(z, context)[0]

    def inverse(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns latents z of x."""
        return self.inverse_and_log_det(x, context)[0]

    def sample(self, num_samples: int = 1, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns samples x and their log-densities (N,)."""
        z, log_prob = self.q0(num_samples, *context_args(context))
        result = self.evaluate(z, context, is_inverse=False)
        if result is not None:
            return result[0], log_prob - result[1]
        for flow in self.flows:  # forward_and_log_det would sum in the default dtype.
            z, log_det = flow(z, *context_args(context))
            log_prob = log_prob - log_det
        return z, log_prob

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns log-densities (B,) of x."""
        result = self.evaluate(x, context, is_inverse=True)
        if result is None:
            return super().log_prob(x, *context_args(context))  # type: ignore[misc]
        return result[1] + self.q0.log_prob(result[0], *context_args(context))


_METHODS = ("forward", "inverse", "forward_and_log_det", "inverse_and_log_det", "sample", "log_prob")
ADAPTERS: tuple[Adapter, ...] = (
    *(
        Adapter(kind, ("forward", "inverse"), AcceleratedComposition, list_transforms, needs_native=True)
        for kind in (CoupledRationalQuadraticSpline, AffineCouplingBlock)
    ),
    Adapter(Autoregressive, ("inverse",), AcceleratedTransform, list_transforms),
    Adapter(ConditionalNormalizingFlow, _METHODS, AcceleratedFlow, list_transforms, True, "flows"),
    Adapter(NormalizingFlow, _METHODS, AcceleratedFlow, list_transforms, True, "flows"),
)
