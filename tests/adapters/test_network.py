"""Inverses that are left to the library's own loop, and products of masks and weights that are formed once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zuko
from library_flows import CASES, CONTEXT, MAIN, Additive, made, masked_layers, normal, same_bits
from nflows.transforms import MaskedAffineAutoregressiveTransform
from nflows.transforms.made import MADE
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from zuko.bayesian import BayesianModel

import jacobiflow as jf

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

FEATURES = 24


# ---------------------------------------------------------------------------------------- networks that draw or move


class Moving(nn.Module):
    """An activation that changes with each call: by a hook, or by a `forward` of the object."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        if how == "forward":
            self.forward = lambda x: x.tanh() + 1e-3 * self.calls.add_(1)  # type: ignore[method-assign]
        else:
            getattr(self, f"register_{how}")(lambda _, args, *out: (out or args)[0] + 1e-3 * self.calls.add_(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


def affine(norm: Callable[..., Any] = lambda layer: layer, **settings: Any) -> nn.Module:
    flow = MaskedAffineAutoregressiveTransform(FEATURES, 32, **settings)
    norm(flow.autoregressive_net.initial_layer)
    return flow


def made_of(activation: Callable[[], nn.Module]) -> nn.Module:
    """nflows's transform with a network of zuko, which takes any activation."""
    i = torch.arange(FEATURES)
    return Additive(FEATURES, network=Contextless(i[:, None] > i, (32, 32), activation))


class Contextless(zuko.nn.MaskedMLP):
    def forward(self, x: Tensor, context: None) -> Tensor:
        return super().forward(x)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: affine(use_batch_norm=True),
    "batch norm, feed-forward": lambda: affine(use_batch_norm=True, use_residual_blocks=False),
    "dropout": lambda: affine(dropout_probability=0.4),
    "dropout of a user": lambda: made_of(lambda: nn.Dropout(0.3)),
    "random slopes": lambda: made_of(nn.RReLU),
    "spectral norm": lambda: affine(parametrizations.spectral_norm),
    "older spectral norm": lambda: affine(spectral_norm),
    "pre-hook": lambda: made_of(lambda: Moving("forward_pre_hook")),
    "hook": lambda: made_of(lambda: Moving("forward_hook")),
    "replaced forward": lambda: made_of(lambda: Moving("forward")),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 1.0])
@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_that_draw_or_move_are_left_to_the_library(kind: str, tolerance: float, grad: bool) -> None:
    y, answers, passes = normal(6, FEATURES), [], {}
    for accelerated in (False, True):
        torch.manual_seed(0)
        flow = NETWORKS[kind]().train()
        flow.training = False  # the mode of the part that draws or moves is what counts
        if accelerated:
            done = jf.accelerate(flow, tolerance)
        with torch.set_grad_enabled(grad):
            answers.append([*flow.inverse(y), torch.get_rng_state(), *flow.state_dict().values()])
    passes = done.passes
    assert same_bits(*answers)
    assert passes == {"": FEATURES}


STILL = {kind: build for kind, build in NETWORKS.items() if kind not in ("pre-hook", "hook", "replaced forward")}
STILL |= {"weight norm": lambda: affine(parametrizations.weight_norm), "older weight norm": lambda: affine(weight_norm)}


@pytest.mark.parametrize("kind", [*STILL, "dropout of 0"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_networks_in_evaluation_mode_are_fast(kind: str) -> None:
    torch.manual_seed(0)
    flow, y = affine().train() if kind == "dropout of 0" else STILL[kind]().eval(), normal(6, FEATURES)
    with torch.no_grad():
        expected = flow.inverse(y)
        with jf.accelerate(flow) as done:
            assert same_bits(expected, flow.inverse(y))
    assert 2 <= done.passes[""] < FEATURES


@pytest.mark.parametrize("local_trick", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 1e-4])
def test_bayesian_models_of_zuko(local_trick: bool, tolerance: float) -> None:
    # The local trick samples what masked layers put out, in a forward of theirs that it replaces meanwhile.
    _, flow, y, c = made("zuko MAF", torch.float64)
    model, answers = BayesianModel(flow, init_logvar=-4.0), []
    for accelerated in (False, True):
        if accelerated:
            jf.accelerate(flow, tolerance)
        torch.manual_seed(1)
        with model.reparameterize(local_trick) as sampled:
            log_prob, x = sampled(c).log_prob(y), sampled(c).transform.inv(y)
            grads = torch.autograd.grad(log_prob.mean() + x.sin().mean(), [*model.means.values()])
        answers.append([log_prob, x, model.sample_model()(c).sample((2,)), *grads])
    assert same_bits(answers[0][0], answers[1][0])
    assert tolerance > 0 or same_bits(answers[0][:3], answers[1][:3])
    for expected, found in zip(*answers, strict=True):
        assert (expected - found).abs().max() <= max(1e-9, 1e3 * tolerance) * expected.abs().max()


# ------------------------------------------------------------------------------------------------ functions of PyTorch


def dual(f: Callable[[Tensor], Tensor], y: Tensor) -> Any:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(f(forward_ad.make_dual(y[0], y[1]))))


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "vmap": lambda f, y: torch.func.vmap(f)(y),
    "grad": lambda f, y: torch.func.grad(lambda y: f(y).pow(2).sum())(y[0]),
    "jvp": lambda f, y: torch.func.jvp(f, (y[0],), (y[1],)),
    "dual numbers": dual,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["zuko MAF", "nflows affine"])
def test_function_transforms_and_dual_numbers_are_left_to_the_library(name: str, transform: str) -> None:
    case = CASES[name]
    flow, y = case.make(features=8, dtype=torch.float64), normal(3, 8, dtype=torch.float64)
    run = lambda: TRANSFORMS[transform](lambda y: case.invert(flow, y[None])[0][0], y)  # noqa: E731
    expected = run()
    with jf.accelerate(flow, 1e-2):
        assert same_bits(expected, run())


@pytest.mark.parametrize("name", ["zuko MAF", "nflows feed-forward"])
@pytest.mark.filterwarnings("ignore")
def test_traces_exports_and_meta_tensors_are_left_to_the_library(name: str) -> None:
    case = CASES[name]
    flow, y, other = case.make(features=6), normal(3, 6), normal(3, 6, seed=1)

    class Inverse(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return case.invert(self.flow, y)[0]

    module = Inverse()
    module.flow = flow
    with torch.no_grad():
        expected = module(other)
        jf.accelerate(flow)
        traced = torch.jit.trace(module, (y,))
        exported = torch.export.export(module, (y,), strict=False).module()
        assert same_bits([expected] * 2, [traced(other), exported(other)])
        assert copy.deepcopy(module).to("meta")(y.to("meta")).shape == y.shape


def test_compiled_callers() -> None:
    case, y = CASES["nflows affine"], normal(3, 6)
    flow = case.make(features=6)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = case.invert(flow, y)[0] + 1
        jf.accelerate(flow)
        torch._dynamo.reset()
        assert same_bits(expected, torch.compile(lambda y: case.invert(flow, y)[0] + 1, backend="eager")(y))


# ------------------------------------------------------------------------------------------------- masks times weights


class Products(TorchDispatchMode):
    """Counts the products of tensors of the shapes of these layers."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.shapes, self.count = {layer.weight.shape for layer in layers}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mul.Tensor and args[0].shape in self.shapes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*MAIN, "zuko MAF residual", "nflows affine"])
def test_products_are_formed_once_for_each_inverse(name: str) -> None:
    case, flow, y, c = made(name)
    layers = masked_layers(flow)
    with torch.no_grad(), jf.accelerate(flow) as done:
        with Products(layers) as products:
            case.invert(flow, y, c)
        assert products.count == len(layers)
        layers[0].register_forward_hook(lambda *_: None)  # it may do anything, so this layer is called in each pass
        layers[1].forward = layers[1].forward  # zuko leaves it so
        with Products(layers) as products:
            case.invert(flow, y, c)
        assert products.count == len(layers) - 2 + 2 * next(iter(done.passes.values()))


@pytest.mark.parametrize("name", ["zuko MAF", "nflows affine"])
def test_weights_that_change_between_calls_count(name: str) -> None:
    case, flow, y, c = made(name)
    jf.accelerate(flow)
    first = masked_layers(flow)[0]
    changes: list[Callable[[], Any]] = [
        lambda: [p.mul_(0.9) for p in flow.parameters()],
        lambda: flow.load_state_dict(case.make(CONTEXT, seed=5).state_dict()),
        lambda: first.mask[:, 1].zero_(),
        lambda: setattr(first, "weight", nn.Parameter(0.7 * first.weight)),
    ]
    for change in changes:
        with torch.no_grad():
            change()
            plain = case.make(CONTEXT)
            plain.load_state_dict(flow.state_dict())
            assert same_bits(case.invert(plain, y, c), case.invert(flow, y, c))


class Recording(MADE):
    """A user's network that keeps what it was called with last."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        self.seen = inputs
        return super().forward(inputs, context)


def test_what_networks_and_hooks_store_is_on_the_modules_themselves() -> None:
    hooked, user = Additive(FEATURES), Additive(FEATURES, network=Recording(FEATURES, 32, output_multiplier=1))
    hooked.autoregressive_net.register_forward_hook(lambda net, args, _: setattr(net, "seen", args[0]))
    flows = nn.ModuleList([hooked, user]).eval()
    with torch.no_grad(), jf.accelerate(flows):
        for flow in flows:
            x, _ = flow.inverse(normal(4, FEATURES))
            assert same_bits(flow.autoregressive_net.seen, x)
