"""Inverses that are left to the library's own loop, and products of masks and weights that are formed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nflows.transforms import MaskedAffineAutoregressiveTransform
from nflows.transforms.made import MADE
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from zuko.bayesian import BayesianModel

import jacobiflow as jf
from tests.helpers.library_flows import CASES, Additive, normal, problem_of, same_bits, values

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

FEATURES = 24


class Mode(TorchDispatchMode):
    """Sees all that PyTorch computes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


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
@pytest.mark.parametrize("tolerance", [None, 0.0])
@pytest.mark.parametrize("kind", NETWORKS | MOVING)
def test_networks_that_draw_or_move_are_left_to_the_library(kind: str, tolerance: float | None, grad: bool) -> None:
    y, answers = normal(6, FEATURES), []
    for accelerated in (False, True):
        torch.manual_seed(0)
        flow = (NETWORKS | MOVING)[kind]().train()
        flow.training = False  # the mode of the part that draws or moves is what counts
        if accelerated:
            handle = jf.accelerate(flow, tolerance)
        with torch.set_grad_enabled(grad):
            answers.append([*flow(y), *flow.inverse(y), torch.get_rng_state(), *flow.state_dict().values()])
    assert same_bits(*answers)
    assert handle.passes == {"": FEATURES}


@pytest.mark.parametrize("kind", [*NETWORKS, *STILL, "dropout of 0"])
def test_networks_in_evaluation_mode_are_fast(kind: str) -> None:
    torch.manual_seed(0)
    flow = affine().train() if kind == "dropout of 0" else (NETWORKS | STILL)[kind]().eval()
    with torch.no_grad():
        expected = flow.inverse(y := normal(6, FEATURES))
        with jf.accelerate(flow, 0.0) as handle:
            assert same_bits(expected, flow.inverse(y))
    assert 2 <= handle.passes[""] < FEATURES


@pytest.mark.parametrize("local_trick", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 1e-4])
def test_bayesian_models_of_zuko(local_trick: bool, tolerance: float) -> None:
    # The local trick samples what masked layers put out, in a forward of theirs that it replaces meanwhile.
    _, flow, y, c = problem_of("zuko MAF", torch.float64)
    model, answers = BayesianModel(flow, init_logvar=-4.0), []
    for accelerated in (False, True):
        if accelerated:
            jf.accelerate(flow, tolerance)
        torch.manual_seed(1)
        with model.reparameterize(local_trick) as sampled:
            log_prob, x = sampled(c).log_prob(y), sampled(c).transform.inv(y)
            grads = torch.autograd.grad(log_prob.mean() + x.sin().mean(), [*model.means.values()])
        answers.append([log_prob, x, model.sample_model()(c).sample((2,)), *grads])
    assert tolerance > 0 or same_bits(answers[0][:3], answers[1][:3])
    torch.testing.assert_close(answers[1][0], answers[0][0], rtol=1e-9, atol=0)
    for expected, result in zip(*answers, strict=True):
        assert (expected - result).abs().max() <= max(1e-9, 1e3 * tolerance) * expected.abs().max()


class Subclass(Tensor):
    """A user's tensors."""


@pytest.mark.parametrize("is_inverse", [False, True])
@pytest.mark.parametrize("name", ["zuko MAF", "nflows affine"])
def test_traced_or_transformed_calls_are_left_to_the_library(name: str, is_inverse: bool) -> None:
    flow, y = CASES[name].make(features=8, dtype=torch.float64), normal(3, 8, dtype=torch.float64)

    def derived() -> list[Tensor]:
        call = lambda y: values(flow, y[None], None, is_inverse)[0][0]  # noqa: E731
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(call(forward_ad.make_dual(y[0], y[1])))
        with Mode():
            mode = call(y[0])
        of_rows = torch.func.vmap(torch.func.grad(lambda y: call(y).sin().sum()))
        return [*dual, mode, torch.func.vmap(call)(y), of_rows(y), *torch.func.jvp(call, (y[0],), (y[1],))]

    expected = derived()
    for tolerance in (None, 1e-2):
        with jf.accelerate(flow, tolerance):
            assert same_bits(expected, derived())
    subclass = y.as_subclass(Subclass)
    with torch.no_grad(), jf.accelerate(flow) as handle:
        assert type(values(flow, subclass, None, is_inverse)[0]) is Subclass
    assert "native" not in handle.backends.values()


class Both(nn.Module):
    """Both directions of a flow as a module."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*values(self.flow, x, None, False)[:1], *values(self.flow, x, None, True)[:1]])


TRACERS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "trace": lambda module, y: torch.jit.trace(module, (y,)),
    "export": lambda module, y: torch.export.export(module, (y,), strict=False).module(),
    "compile": lambda module, _: torch.compile(module, backend="eager"),
}


@pytest.mark.parametrize(
    "how", ["trace", *(pytest.param(how, marks=pytest.mark.slow) for how in ("export", "compile"))]
)
def test_traced_modules(how: str) -> None:
    flow: Any = CASES["zuko MAF"].make(features=6).requires_grad_(how == "compile")
    module, y, other = Both(flow.transform.transforms[0]), normal(3, 6), normal(3, 6, seed=1).requires_grad_()
    expected = module(other)
    with jf.accelerate(module):
        result = TRACERS[how](module, y)(other)
        assert module.to("meta")(y.to("meta")).shape == (6, 6)
    assert same_bits(
        [expected, *torch.autograd.grad(expected.sum(), other)], [result, *torch.autograd.grad(result.sum(), other)]
    )


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
