"""Flows of zuko, nflows, glasflow, normflows and pyro, and checks against the library's own code."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import glasflow.nflows.nn.nets as gn
import glasflow.nflows.transforms as gf
import nflows.nn.nets as nn_of_nflows
import nflows.transforms as nf
import normflows
import pyro.distributions.transforms as pt
import torch
import zuko
from nflows.transforms.autoregressive import AutoregressiveTransform
from nflows.transforms.made import MADE
from torch import Tensor, nn
from zuko.flows.autoregressive import MaskedAutoregressiveTransform

import jacobiflow as jf

Values = tuple[Tensor, Tensor]
CONTEXT = 3

torch.distributions.Distribution.set_default_validate_args(False)  # Importing pyro turns the checks on.


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def masked_layers(flow: nn.Module) -> list[nn.Module]:
    """The masked layers of a flow, or the layers of its couplings."""
    layers = {
        name: [part for part in flow.modules() if type(part).__name__ == name] for name in ("MaskedLinear", "Linear")
    }
    return layers["MaskedLinear"] or layers["Linear"]


def coupling_net(
    inputs: int, outputs: int, hidden: int = 16, context: int = 0, library: Any = nf, **settings: Any
) -> nn.Module:
    """A residual network of a coupling with random weights; those that the library draws are near 0."""
    nets = gn if library is gf else nn_of_nflows
    net = nets.ResidualNet(inputs, outputs, hidden, context or None, **settings)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net


def couplings(features: int, context: int, hidden: int, library: Any = nf) -> nn.Module:
    """An affine and a spline coupling, a spline of the features that stay, and linear layers between them."""
    net = partial(coupling_net, hidden=hidden, context=context, library=library)
    odd, bounded = torch.arange(features) % 2, {"tails": "linear", "tail_bound": 3.0}
    spline = library.PiecewiseRationalQuadraticCouplingTransform(
        odd, net, num_bins=5, apply_unconditional_transform=True, **bounded
    )
    linear, actnorm = library.LULinear(features, identity_init=False), library.ActNorm(features)
    for parameter in actnorm.parameters():
        nn.init.normal_(parameter, std=0.4)
    affine = library.AffineCouplingTransform(1 - odd, net)
    return library.CompositeTransform([spline, linear, actnorm, affine, library.ReversePermutation(features)])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """With the default dtype, in which pyro's passes start and normflows sums."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def same_bits(a: Any, b: Any) -> bool:
    """True if tensors, or tuples of them, have one dtype, shape and bits: a NaN equals itself, and 0 is not -0."""
    if not isinstance(a, Tensor):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.detach().flatten().contiguous().view(torch.uint8) for x in (a, b)))


def values(flow: Any, x: Tensor, context: Tensor | None, is_inverse: bool) -> Values:
    """The values of a flow of any library, and the logarithm of the determinant of its Jacobian."""
    arguments = () if context is None else (context,)
    if hasattr(flow, "forward_and_log_det"):
        return (flow.inverse_and_log_det if is_inverse else flow.forward_and_log_det)(x, *arguments)
    if hasattr(flow, "inverse"):
        return (flow.inverse if is_inverse else flow)(x, *arguments)
    if hasattr(flow, "bijective"):  # pyro's; it keeps values for the tensor that it saw last
        original, x = flow.condition(context) if hasattr(flow, "condition") else flow, x.clone()
        out = original.inv(x) if is_inverse else original(x)
        log_det = original.log_abs_det_jacobian(*((out, x) if is_inverse else (x, out)))
        return out, -log_det if is_inverse else log_det
    original = flow(context)
    original = getattr(original, "transform", original)
    return (original.inv if is_inverse else original).call_and_ladj(x)


@default_dtype(torch.float64)
def exact(flow: nn.Module, x: Tensor, context: Tensor | None, is_inverse: bool) -> Values:
    """By the library's own code, in float64."""
    return values(copy.deepcopy(flow).double(), x.double(), None if context is None else context.double(), is_inverse)


def gradients(
    flow: nn.Module, x: Tensor, context: Tensor | None, is_inverse: bool, cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of `values` with cotangents for both, in `x`, the context and the parameters that need one."""
    inputs = [t for t in (x, context, *flow.parameters()) if t is not None and t.requires_grad]
    pairs = zip(values(flow, x, context, is_inverse), cotangents, strict=True)
    # A spline of one bin and one feature has a constant log-determinant, without a graph in some libraries.
    pairs = [(out, cotangent) for out, cotangent in pairs if cotangent is not None and out.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    outputs, weights = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, inputs, weights, allow_unused=True))


def gradient_gap(expected: Any, result: Any) -> float:
    """The largest difference, of each tensor relative to its largest entry; no gradient is one of 0."""
    gaps = [0.0]
    for original, other in zip(expected, result, strict=True):
        if original is None or not original.any():
            assert other is None or bool((other.abs() < 1e-12).all())  # A spline with one bin has rounding errors.
        else:
            assert original.isfinite().all() and other.isfinite().all()
            gaps.append(float((original - other).abs().max() / original.abs().max()))
    return max(gaps)


@torch.no_grad()
def steep(flow: nn.Module, gain: float = 1.5) -> nn.Module:
    """In evaluation mode, with weights so large that entries depend strongly on those before."""
    for weight in flow.parameters():
        if weight.ndim == 2:
            weight *= gain
    return flow.eval()


@contextmanager
def counted(flow: nn.Module) -> Iterator[dict[str, int]]:
    """Counts the passes of each transform of a flow in evaluation mode: calls of its network's first masked layer."""
    calls: Counter[str] = Counter()
    names: dict[nn.Module, str] = {}
    for name, module in flow.named_modules():
        if any(hasattr(module, network) for network in ("autoregressive_net", "hyper", "arn", "nn")):
            names.setdefault(masked_layers(module)[0], name)
    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: calls.update([name])) for layer, name in names.items()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def exact_bisection(f: Any, y: Tensor, a: Tensor, b: Tensor, n: int, phi: Any = ()) -> Tensor:
    """zuko's own, which ends at an error of 1e-6, with steps to rounding."""
    return zuko.utils.bisection(f, y, a, b, 60, phi)


@dataclass(frozen=True)
class Case:
    """A kind of flow: `build(features, context, hidden)`, and how its slow side is called."""

    library: str
    build: Callable[[int, int, int], nn.Module]
    gain: float
    features: int = 24
    is_inverse: bool = True  # the slow side

    def make(
        self, context: int = 0, features: int = 0, dtype: torch.dtype = torch.float32, hidden: int = 32
    ) -> nn.Module:
        """A steep flow, the same at each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return steep(self.build(features or self.features, context, hidden), self.gain).to(dtype)

    def invert(self, flow: nn.Module, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        """The slow side: (x,) of zuko's, (x, logabsdet) of the others'."""
        if self.library == "zuko":  # Its inverse has no log-determinant.
            lazy = flow(context)
            return (getattr(lazy, "transform", lazy).inv(y),)
        if self.library == "pyro":
            with default_dtype(y.dtype):
                return values(flow, y, context, True)
        return values(flow, y, context, self.is_inverse)


def problem_of(
    name: str, dtype: torch.dtype = torch.float32, features: int = 24
) -> tuple[Case, nn.Module, Tensor, Tensor]:
    """A case, its flow, and five rows to invert with their contexts."""
    case, c = CASES[name], normal(5, CONTEXT, seed=1, dtype=dtype)
    features = min(features, case.features)
    return case, case.make(CONTEXT, features, dtype), normal(5, features, dtype=dtype), c


def both(case: Case, flow: nn.Module, y: Tensor, context: Tensor | None = None, tolerance: float = 0.0) -> Any:
    """The library's answer, the accelerated one, and the passes of both, of which the latter are never more."""
    with counted(flow) as original:
        expected = case.invert(flow, y, context)
    with jf.accelerate(flow, tolerance) as handle, counted(flow) as calls:
        result = case.invert(flow, y, context)
    assert handle.passes == calls
    assert calls.keys() == original.keys()
    assert all(calls[name] <= original[name] for name in original)
    return expected, result, calls, original


class Additive(AutoregressiveTransform):
    """A user's transform that defines only what the inverse takes: x = y - shift(x before it)."""

    def __init__(self, features: int, context: int | None = None, network: nn.Module | None = None) -> None:
        super().__init__(network or MADE(features, 32, context, output_multiplier=1, activation=torch.tanh))

    def _elementwise_inverse(self, inputs: Tensor, autoregressive_params: Tensor) -> tuple[Tensor, Tensor]:
        return inputs - autoregressive_params, inputs.new_zeros(len(inputs))


class Carry(nn.Module):
    """In `Additive`: x_i = y_i + c x_(i-1), of contexts c (B, 1); of y = (1, 0, ...) pass k changes entry k - 1."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return -context * nn.functional.pad(x[:, :-1], (1, 0))


class Scaled(MaskedAutoregressiveTransform):
    """A user's transform of zuko that changes what it is at a context and point, not how it is inverted."""

    def meta(self, c: Tensor | None, x: Tensor) -> Any:
        return super().meta(c, 0.5 * x)


def _zuko(kind: Callable[..., nn.Module], gain: float, features: int = 24, **settings: Any) -> Case:
    return Case("zuko", lambda d, c, h: kind(d, c, hidden_features=(h, h), transforms=2, **settings), gain, features)


def _nflows(kind: Callable[..., nn.Module], gain: float, **settings: Any) -> Case:
    return Case(kind.__module__.split(".")[0], lambda d, c, h: kind(d, h, context_features=c or None, **settings), gain)


def _pyro(name: str, gain: float) -> Case:
    plain, conditional = (getattr(pt, f"{prefix}{name}_autoregressive") for prefix in ("", "conditional_"))
    return Case("pyro", lambda d, c, h: conditional(d, c, [h, h]) if c else plain(d, [h, h]), gain)


def _pyro_coupling(features: int, context: int, hidden: int) -> nn.Module:
    """pyro has no conditional coupling of splines."""
    if context:
        return pt.conditional_affine_coupling(features, context, [hidden, hidden])
    return pt.spline_coupling(features, hidden_dims=[hidden, hidden])


def _normflows_coupling(features: int, context: int, hidden: int) -> nn.Module:
    kind = normflows.ConditionalNormalizingFlow if context else normflows.NormalizingFlow
    spline = normflows.flows.CoupledRationalQuadraticSpline(features, 2, hidden, num_context_channels=context or None)
    return kind(normflows.distributions.DiagGaussian(features), [spline, normflows.flows.LULinearPermute(features)])


_affine, _rational = nf.MaskedAffineAutoregressiveTransform, nf.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
_bounded = {"num_bins": 5, "tails": "linear", "tail_bound": 3.0}
_normflows_affine = normflows.flows.MaskedAffineAutoregressive
_spline = partial(normflows.flows.AutoregressiveRationalQuadraticSpline, init_identity=False)

CASES = {
    "zuko MAF": _zuko(zuko.flows.MAF, 2.0),
    "zuko MAF residual": _zuko(zuko.flows.MAF, 1.2, residual=True, randperm=True),
    "zuko NSF": _zuko(zuko.flows.NSF, 3.0),
    "zuko BPF": _zuko(zuko.flows.BPF, 1.5, 8, degree=6),
    "zuko SOSPF": _zuko(zuko.flows.SOSPF, 1.5, 8, degree=2),
    "zuko NAF": _zuko(zuko.flows.NAF, 1.5, 6, signal=4, network={"hidden_features": (8,)}),  # inverts to 1e-6
    "zuko coupling": Case("zuko", lambda d, c, h: zuko.flows.NICE(d, c, hidden_features=(h, h)), 1.5),
    "zuko user's own": Case("zuko", lambda d, c, _: Scaled(d, c), 4.0),
    "nflows affine": _nflows(_affine, 1.4),
    "nflows feed-forward": _nflows(_affine, 2.5, use_residual_blocks=False),
    "nflows rational": _nflows(_rational, 4.0, **_bounded),
    "glasflow rational": _nflows(gf.MaskedPiecewiseRationalQuadraticAutoregressiveTransform, 4.0, **_bounded),
    "nflows coupling": Case("nflows", couplings, 1.5),
    "nflows user's own": Case("nflows", lambda d, c, _: Additive(d, c or None), 2.5),
    "normflows affine": Case("normflows", lambda d, c, h: _normflows_affine(d, h, c or None), 1.5),
    "normflows spline": Case("normflows", lambda d, c, h: _spline(d, 2, h, c or None), 4.0, is_inverse=False),
    "normflows coupling": Case("normflows", _normflows_coupling, 1.5),
    "pyro affine": _pyro("affine", 2.0),
    "pyro spline": _pyro("spline", 2.0),
    "pyro coupling": Case("pyro", _pyro_coupling, 1.5),
}
MASKED = [name for name in CASES if "coupling" not in name]
NATIVE = (
    "zuko MAF", "zuko NSF", "zuko BPF", "zuko SOSPF", "zuko coupling", "nflows affine", "nflows rational",
    "nflows coupling", "glasflow rational", "normflows affine", "normflows spline", "normflows coupling", "pyro affine",
    "pyro spline", "pyro coupling",
)  # fmt: skip
BISECTED = ("zuko BPF", "zuko SOSPF")  # in float64, to 1e-6; zuko has no second derivatives of them
LARGE = {  # more features than a block of native code has, and hidden units
    "zuko NSF": (50, 100), "zuko MAF residual": (40, 70), "nflows affine": (70, 100), "normflows spline": (50, 100),
    "pyro spline": (50, 100),
}  # fmt: skip


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same entries, or for "expanded" the first row again and again, with other strides."""
    if layout == "expanded" and x.ndim > 1 and len(x):
        return x[:1].expand(x.shape)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return torch.stack([x, x], dim=-1)[..., 0] if layout == "strided" else x


def gaps(result: Values, expected: Values, period: float) -> list[Tensor]:
    """Errors of the values, on a circle if there is a period, and of the log-determinants."""
    error = (result[0] - expected[0]).abs()
    return [torch.minimum(error, (error - period).abs()), (result[1] - expected[1]).abs()]


@torch.no_grad()
def check(flow: nn.Module, x: Tensor, context: Tensor | None, domain: str = "line", threads: int = 1) -> None:
    """Both directions, against the library in float64 and, for float32, the errors that it makes itself."""
    period = 2 * math.pi if domain == "circle" else 0.0
    for is_inverse in (False, True):
        with default_dtype(x.dtype):
            original = values(flow, x, context, is_inverse)
            expected = original if x.dtype == torch.float64 else exact(flow, x, context, is_inverse)
            with jf.accelerate(flow, 0.0):
                assert same_bits(original, values(flow, x, context, is_inverse))
        torch.set_num_threads(threads)  # here alone: those of PyTorch would cost time
        with jf.accelerate(flow) as handle:
            result = values(flow, x, context, is_inverse)
        torch.set_num_threads(1)
        assert set(handle.backends.values()) == {"native"}, handle
        assert [(part.shape, part.dtype) for part in result] == [(part.shape, x.dtype) for part in original]
        pairs = zip(gaps(result, expected, period), gaps(original, expected, period), expected, strict=True)
        for error, error_of_library, answer in pairs:
            if x.dtype == torch.float64:
                assert error.max() <= 1e-10 * (1 + answer.abs().max())
            else:
                rows = len(x.unique(dim=0))  # A single row is no statistic.
                floor = (1e-6 + 2e-5 / rows) * (1 + answer.abs().mean())
                assert error.mean() <= 2 * error_of_library.mean() + floor
