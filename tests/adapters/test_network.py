"""Inverses that are left to the library's own loop, and products of masks and weights that are formed once."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from library_flows import CASES, MAIN, Additive, made, masked_layers, normal, same_bits
from nflows.transforms import MaskedAffineAutoregressiveTransform
from nflows.transforms.made import MADE
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from zuko.bayesian import BayesianModel

import jacobiflow as jf

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

FEATURES = 24


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


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: affine(use_batch_norm=True),
    "dropout": lambda: affine(dropout_probability=0.4),
    "random slopes": lambda: affine(activation=nn.RReLU()),
    "spectral norm": lambda: affine(parametrizations.spectral_norm),
    "older spectral norm": lambda: affine(spectral_norm),
}
HOWS = ("forward_pre_hook", "forward_hook", "forward")
MOVING = {how: lambda how=how: affine(activation=Moving(how)) for how in HOWS}
STILL = {"weight norm": lambda: affine(parametrizations.weight_norm), "older weight norm": lambda: affine(weight_norm)}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 1.0])
@pytest.mark.parametrize("kind", NETWORKS | MOVING)
def test_networks_that_draw_or_move_are_left_to_the_library(kind: str, tolerance: float, grad: bool) -> None:
    y, answers = normal(6, FEATURES), []
    for accelerated in (False, True):
        torch.manual_seed(0)
        flow = (NETWORKS | MOVING)[kind]().train()
        flow.training = False  # the mode of the part that draws or moves is what counts
        if accelerated:
            done = jf.accelerate(flow, tolerance)
        with torch.set_grad_enabled(grad):
            answers.append([*flow.inverse(y), torch.get_rng_state(), *flow.state_dict().values()])
    assert same_bits(*answers)
    assert done.passes == {"": FEATURES}


@pytest.mark.parametrize("kind", [*NETWORKS, *STILL, "dropout of 0"])
def test_networks_in_evaluation_mode_are_fast(kind: str) -> None:
    torch.manual_seed(0)
    flow = affine().train() if kind == "dropout of 0" else (NETWORKS | STILL)[kind]().eval()
    with torch.no_grad():
        expected = flow.inverse(y := normal(6, FEATURES))
        with jf.accelerate(flow, 0.0) as done:
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


@pytest.mark.parametrize("name", ["zuko MAF", "nflows affine"])
def test_function_transforms_and_dual_numbers_are_left_to_the_library(name: str) -> None:
    case = CASES[name]
    flow, y = case.make(features=8, dtype=torch.float64), normal(3, 8, dtype=torch.float64)

    def derived() -> list[Tensor]:
        inverse = lambda y: case.invert(flow, y[None])[0][0]  # noqa: E731
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(inverse(forward_ad.make_dual(y[0], y[1])))
        return [*dual, torch.func.vmap(inverse)(y), *torch.func.jvp(inverse, (y[0],), (y[1],))]

    expected = derived()
    with jf.accelerate(flow, 1e-2):
        assert same_bits(expected, derived())


@pytest.mark.parametrize("name", ["zuko MAF", "nflows feed-forward"])
def test_traces_exports_compiled_callers_and_meta_tensors(name: str) -> None:
    case, y, other = CASES[name], normal(3, 6), normal(3, 6, seed=1)

    class Inverse(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return case.invert(self.flow, y)[0]

    module = Inverse()
    module.flow = case.make(features=6)
    with torch.no_grad():
        expected = module(other)
        jf.accelerate(module, 0.0)
        traced = torch.jit.trace(module, (y,))
        exported = torch.export.export(module, (y,), strict=False).module()
        compiled = torch.compile(module, backend="eager")
        assert same_bits([expected] * 3, [traced(other), exported(other), compiled(other)])
        assert copy.deepcopy(module).to("meta")(y.to("meta")).shape == y.shape


def test_private_names_of_pytorch_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    case, flow, y, c = made("nflows affine")
    y.requires_grad_()

    def gradient() -> Tensor:
        return torch.autograd.grad(case.invert(flow, y, c)[0].sum(), y)[0]

    expected = gradient()
    with jf.accelerate(flow, 0.0) as done:
        monkeypatch.delattr(torch._C._functorch, "is_legacy_batchedtensor")
        runpy.run_module("jacobiflow.adapters.fixed_point")  # its import
        torch.testing.assert_close(gradient(), expected, rtol=1e-3, atol=1e-3)
        assert done.ways == {"": "passes"}
        monkeypatch.delattr(forward_ad, "_current_level")
        with torch.no_grad():
            case.invert(flow, y, c)
        assert done.ways == {"": "library"}


class Products(TorchDispatchMode):
    """Counts the products of tensors of the shapes of these layers."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.shapes, self.count = {layer.weight.shape for layer in layers}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mul.Tensor and args[0].shape in self.shapes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*MAIN, "zuko MAF residual", "nflows affine"])
def test_products_are_formed_once_for_each_inverse(name: str) -> None:
    case, flow, y, c = made(name)
    layers = masked_layers(flow)
    with torch.no_grad(), jf.accelerate(flow, 0.0) as done:
        with Products(layers) as products:
            case.invert(flow, y, c)
        assert products.count == len(layers)
        layers[0].register_forward_hook(lambda *_: None)  # it may do anything, so this layer is called in each pass
        layers[1].forward = layers[1].forward  # zuko leaves it so
        with Products(layers) as products:
            case.invert(flow, y, c)
        assert products.count == len(layers) - 2 + 2 * next(iter(done.passes.values()))


class Recording(MADE):
    """A user's network that keeps what it was called with last."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        self.seen = inputs
        return super().forward(inputs, context)


def test_a_network_of_the_user_is_called_itself() -> None:
    flow = Additive(FEATURES, network=Recording(FEATURES, 32, output_multiplier=1)).eval()
    with torch.no_grad(), jf.accelerate(flow, 0.0):
        x, _ = flow.inverse(normal(4, FEATURES))
    assert same_bits(flow.autoregressive_net.seen, x)
