"""Changes of a flow between two calls, and calls from several threads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import nflows.transforms as nf
import normflows
import pyro.distributions.transforms as pt
import pytest
import torch
import zuko
from pyro.nn import AutoRegressiveNN
from torch import Tensor, nn

import jacobiflow as jf
from tests.helpers.fake_device import FakeDevice
from tests.helpers.library_flows import (
    Values,
    default_dtype,
    exact,
    gradient_gap,
    gradients,
    masked_layers,
    same_bits,
    values,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def mixed_zuko() -> nn.Module:
    """Two runs of transforms that native code takes, and one between them that it does not take."""
    first, second = (BUILDS["zuko"]().transform.transforms for _ in range(2))
    unknown = zuko.lazy.UnconditionalTransform(zuko.transforms.RotationTransform, torch.randn(5, 5))
    return zuko.lazy.Flow([*first, unknown, *second], zuko.flows.MAF(5).base)


def mixed_nflows() -> nn.Module:
    first, second = BUILDS["nflows"](), BUILDS["nflows"]()
    return nf.CompositeTransform([*first._transforms, nf.LeakyReLU(0.5), second, nf.ReversePermutation(5)])


def mixed_normflows() -> nn.Module:
    first, second = ([*BUILDS["normflows"]().flows, normflows.flows.Permute(5)] for _ in range(2))
    unknown = normflows.flows.MaskedAffineFlow(
        torch.arange(5.0) % 2, *(normflows.nets.MLP([5, 8, 5]) for _ in range(2))
    )
    return normflows.NormalizingFlow(None, [*first, unknown, *second])


MIXED = {"zuko mixed": mixed_zuko, "nflows mixed": mixed_nflows, "normflows mixed": mixed_normflows}
BUILDS: dict[str, Callable[[], nn.Module]] = MIXED | {
    "zuko": lambda: zuko.flows.NSF(5, hidden_features=(16,), activation=lambda: nn.LeakyReLU(0.2)),
    "nflows": lambda: nf.CompositeTransform([
        nf.MaskedAffineAutoregressiveTransform(5, 16, activation=nn.LeakyReLU(0.2)), nf.ReversePermutation(5),
    ]),
    "normflows": lambda: normflows.NormalizingFlow(None, [
        normflows.flows.MaskedAffineAutoregressive(5, 16, activation=nn.LeakyReLU(0.2)),
    ]),
    "pyro": lambda: pt.AffineAutoregressive(AutoRegressiveNN(5, [16], nonlinearity=nn.LeakyReLU(0.2))),
}  # fmt: skip


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with default_dtype(torch.float64):
        yield


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILDS[name]().eval()


def is_right(flow: nn.Module) -> bool:
    """True if the values in both directions, and their gradients, are those of the library's own code."""
    weight = next(flow.parameters())
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(1)).to(weight.dtype)
    double, ones, gaps = copy.deepcopy(flow).double(), [torch.ones_like(x), torch.ones_like(x[:, 0])], []
    for is_inverse in (False, True):
        with torch.enable_grad():
            with default_dtype(weight.dtype):
                derived = gradients(flow, x.requires_grad_(), None, is_inverse, ones)
            expected = gradients(double, x.detach().double().requires_grad_(), None, is_inverse, ones)
        gaps.append(gradient_gap(expected, derived))
        x = x.detach()
        pairs = zip(values(flow, x, None, is_inverse), exact(flow, x, None, is_inverse), strict=True)
        gaps += [float((ours - its).abs().max()) for ours, its in pairs]
    return max(gaps) < (1e-9 if weight.dtype == torch.float64 else 1e-4)


def step(flow: nn.Module) -> None:
    for weight in flow.parameters():
        weight.grad = torch.ones_like(weight)
    torch.optim.SGD(flow.parameters(), 0.1).step()


def replace_activations(flow: nn.Module) -> None:
    for module in list(flow.modules()):
        for name, part in module.named_children():
            if isinstance(part, nn.LeakyReLU):
                setattr(module, name, nn.Tanh())
        if isinstance(vars(module).get("f"), nn.LeakyReLU):
            module.f = nn.Tanh()


def turn_into_plain_tensor(layer: Any) -> None:
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = 2 * weight


CHANGES: dict[str, Callable[[nn.Module, list[Any]], Any]] = {
    "optimizer": lambda flow, _: step(flow),
    "data": lambda _, layers: setattr(layers[0].weight, "data", (layers[0].weight.data.t() * 2).contiguous().t()),
    "strides": lambda _, layers: setattr(
        layers[0].weight, "data", layers[0].weight.data.as_strided((16, 5), (1, 16))
    ),
    "type": lambda flow, _: flow.float(),
    "module": lambda flow, _: replace_activations(flow),
    "setting": lambda flow, _: [
        setattr(part, "negative_slope", 0.9) for part in flow.modules() if isinstance(part, nn.LeakyReLU)
    ],
    "mask": lambda _, layers: layers[0].mask[:, 0].zero_(),
    "hook": lambda _, layers: layers[0].register_forward_hook(lambda module, args, out: 2 * out),
    "no parameter": lambda _, layers: turn_into_plain_tensor(layers[0]),
    "another shape": lambda _, layers: setattr(layers[0], "weight", nn.Parameter(layers[0].weight[:1].clone())),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", BUILDS)
@torch.no_grad()
def test_a_change_counts_at_once(name: str, change: str) -> None:
    flow = build(name)
    with jf.accelerate(flow):
        assert is_right(flow)
        before = exact(flow, torch.ones(1, 5), None, is_inverse=True)
        CHANGES[change](flow, masked_layers(flow))
        after = exact(flow, torch.ones(1, 5), None, is_inverse=True)
        assert change == "type" or not torch.equal(before[0], after[0])
        assert is_right(flow)


@pytest.mark.parametrize("name", BUILDS)
@torch.no_grad()
def test_a_bias_of_a_layer_that_had_none_counts_at_once(name: str) -> None:
    flow = build(name)
    layer = masked_layers(flow)[0]
    bias, layer.bias = layer.bias, None
    with jf.accelerate(flow):
        for layer.bias in (None, bias, None):
            assert is_right(flow)


@torch.no_grad()
def test_an_option_of_a_conditional_transform_counts_at_once() -> None:
    flow, x, context = pt.conditional_affine_autoregressive(5, 2, [16]), torch.full((3, 5), 0.5), torch.ones(3, 2)
    flow.kwargs["log_scale_max_clip"] = 0.1
    with jf.accelerate(flow):
        for clip in (0.1, -0.5):
            flow.kwargs["log_scale_max_clip"] = clip
            ours, own = (kind.condition(flow, context)(x) for kind in (type(flow), pt.ConditionalAffineAutoregressive))
            torch.testing.assert_close(ours, own, rtol=0, atol=1e-12)


class Direction(nn.Module):
    """One direction of a flow as a module."""

    def __init__(self, flow: nn.Module, is_inverse: bool) -> None:
        super().__init__()
        self.flow, self.is_inverse = flow, is_inverse

    def forward(self, x: Tensor) -> Values:
        return values(self.flow, x, None, self.is_inverse)


@pytest.mark.parametrize("is_inverse", [False, True])
@pytest.mark.parametrize("name", BUILDS)
def test_weights_of_a_functional_call_and_their_gradients(name: str, is_inverse: bool) -> None:
    module = Direction(build(name), is_inverse)
    weights = {key: (0.5 * weight).detach().requires_grad_() for key, weight in module.named_parameters()}
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))

    def call() -> list[Tensor]:
        with torch.no_grad():
            result = torch.func.functional_call(module, weights, (x,))
        loss = sum(part.sin().sum() for part in torch.func.functional_call(module, weights, (x,)))
        first = torch.autograd.grad(loss, [*weights.values()], create_graph=True)  # The module has its own again.
        return [*result, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), [*weights.values()])]

    expected = call()
    with jf.accelerate(module) as handle:
        result = call()
        assert set(handle.backends.values()) == {"native"}
        before = module(torch.ones(3, 5))
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(before, module(torch.ones(3, 5)), rtol=1e-9, atol=1e-9)


def first_derivatives(flow: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        result = values(flow, x, None, True)[0]
    return [result, *torch.autograd.grad(values(flow, x, None, True)[0].sin().sum(), [*flow.parameters()])]


def second_derivatives(flow: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(values(flow, x, None, False)[0].sin().sum(), x, create_graph=True)
    return [score, *torch.autograd.grad(score.square().sum(), [*flow.parameters()], allow_unused=True)]


@pytest.mark.parametrize(
    ("derive", "tolerance"), [(first_derivatives, None), (first_derivatives, 0.0), (second_derivatives, None)]
)
@pytest.mark.parametrize("name", BUILDS)
def test_threads_on_one_flow_get_what_each_gets_alone(name: str, derive: Any, tolerance: float | None) -> None:
    flow = build(name)
    rows = [torch.randn(3 + 30 * (i % 4), 5) for i in range(8)]
    with jf.accelerate(flow, tolerance), ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(derive, flow, x) for x in rows]
        while not all(future.done() for future in futures):
            layers = copy.deepcopy(masked_layers(flow))
            assert all(weight.is_leaf for layer in layers for weight in layer.parameters())
        for future, x in zip(futures, rows, strict=True):
            for in_thread, alone in zip(future.result(), derive(flow, x), strict=True):
                assert in_thread is alone is None or same_bits(in_thread, alone)


def test_a_flow_on_a_gpu_is_left_to_its_library_and_native_again_on_the_cpu() -> None:
    flow, x = zuko.flows.MAF(3), torch.randn(5, 3)
    expected = flow().log_prob(x)
    with FakeDevice(), jf.accelerate(flow) as handle:
        flow.to("cuda")
        found = flow().log_prob(x.to("cuda")).cpu()
        assert str(handle).endswith("native code does not take tensors on cuda")
        assert set(handle.backends.values()) == {"library"}
        flow.cpu()
        flow().log_prob(x)
        assert set(handle.backends.values()) == {"native"} and str(handle).endswith("by native code")
    torch.testing.assert_close(found, expected)
