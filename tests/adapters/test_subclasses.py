"""Subclasses of a user, of every class that adapters know: `jf.accelerate` changes nothing that they return."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import glasflow
import glasflow.nflows.transforms as gf
import nflows
import nflows.transforms as nf
import normflows
import pyro.distributions.transforms as pt
import pytest
import torch
import zuko
from normflows.nets import MLP
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.flows.gaussianization import ElementWiseTransform
from zuko.flows.neural import MNN

import jacobiflow as jf
from jacobiflow.adapters import registry
from jacobiflow.adapters.adapter import Adapter
from tests.helpers.library_flows import CONTEXT, Values, coupling_net, normal, values

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

D = 8
SPLINE: dict[str, Any] = {"num_bins": 5, "tails": "linear", "tail_bound": 3.0}
Arguments = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]


def given(*arguments: Any, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return arguments, options


def of_pyro(kind: type) -> tuple[Any, Any]:
    """The arguments with which pyro's own function makes a transform of this class."""
    name = kind.__name__.removeprefix("Conditional")
    stem = "".join("_" * c.isupper() + c.lower() for c in name).strip("_")
    is_conditional = kind.__name__ != name
    function = getattr(pt, "conditional_" * is_conditional + stem)
    with patch.dict(function.__globals__, {kind.__name__: given}):
        arguments, options = function(D, *[CONTEXT] * is_conditional)
    return arguments, options


def of_nflows(library: Any) -> dict[Any, Arguments]:
    half, made = torch.arange(D) % 2, partial(given, D, 16, CONTEXT)
    net = partial(coupling_net, context=CONTEXT, library=library)
    return {
        library.AffineCouplingTransform: partial(given, half, net),
        library.PiecewiseRationalQuadraticCouplingTransform: partial(given, half, net, **SPLINE),
        library.MaskedAffineAutoregressiveTransform: made,
        library.MaskedPiecewiseRationalQuadraticAutoregressiveTransform: partial(
            given, features=D, hidden_features=16, context_features=CONTEXT, **SPLINE
        ),
        library.CompositeTransform: lambda: given([library.MaskedAffineAutoregressiveTransform(D, 16, CONTEXT)]),
    }


_flows = normflows.flows
_coupled = partial(_flows.CoupledRationalQuadraticSpline, D, 2, 16)
_targets = {library: [adapter.target for adapter in registry.load_adapters(library)] for library in registry.LIBRARIES}
ARGUMENTS: dict[Any, Arguments] = {
    MaskedAutoregressiveTransform: partial(given, D, CONTEXT), GeneralCouplingTransform: partial(given, D, CONTEXT),
    ElementWiseTransform: partial(given, D, CONTEXT),
    zuko.lazy.LazyComposedTransform: lambda: given(*(MaskedAutoregressiveTransform(D, CONTEXT) for _ in range(2))),
    zuko.lazy.Flow: lambda: given((flow := zuko.flows.MAF(D, CONTEXT)).transform, flow.base),
    **of_nflows(nf), **of_nflows(gf),
    _flows.CoupledRationalQuadraticSpline: partial(given, D, 2, 16),
    _flows.AffineCouplingBlock: lambda: given(MLP([D // 2, 16, D])),
    _flows.MaskedAffineAutoregressive: partial(given, D, 16, CONTEXT),
    normflows.NormalizingFlow: lambda: given(normflows.distributions.DiagGaussian(D), [_coupled()]),
    normflows.ConditionalNormalizingFlow: lambda: given(
        normflows.distributions.DiagGaussian(D), [_coupled(num_context_channels=CONTEXT)]
    ),
    **{kind: partial(of_pyro, kind) for kind in _targets["pyro"]},
}  # fmt: skip
WITHOUT_CONTEXT = (
    _flows.CoupledRationalQuadraticSpline, _flows.AffineCouplingBlock, normflows.NormalizingFlow,
    *(kind for kind in _targets["pyro"] if not kind.__name__.startswith("Conditional")),
)  # fmt: skip
LIBRARIES: dict[str, Any] = {
    "zuko": zuko, "nflows": nflows, "glasflow": glasflow, "normflows": normflows, "pyro": pt
}  # fmt: skip


def make_own(kind: Any) -> Any:
    """A subclass with a constructor, an attribute and a forward direction of its own."""
    method = next(name for name in ("condition", "_call", "forward") if hasattr(kind, name))

    class Own(kind):
        def __init__(self) -> None:
            arguments, options = ARGUMENTS[kind]()
            super().__init__(*arguments, **options)
            self.factor = 2.0

        def forward_of_its_own(self, first: Any, *others: Any) -> Any:
            return getattr(super(), method)(self.factor * first, *others)

    setattr(Own, method, Own.forward_of_its_own)
    torch.manual_seed(0)
    return Own


def outcome(flow: Any, kind: Any) -> list[Values | None]:
    """The values in both directions; `None` for an inverse that pyro does not have."""
    results: list[Values | None] = []
    context = None if kind in WITHOUT_CONTEXT else normal(5, CONTEXT, seed=1)
    for is_inverse in (False, True):
        try:
            results.append(values(flow, normal(5, D), context, is_inverse))
        except NotImplementedError:
            results.append(None)
    return results


def library_of(kind: Any) -> str:
    return kind.__module__.split(".")[0]


def test_no_class_is_left_out() -> None:
    for library, targets in _targets.items():
        kinds = [kind for kind in ARGUMENTS if library_of(kind) == library]
        assert [target for target in targets if not any(issubclass(kind, target) for kind in kinds)] == []


@pytest.mark.parametrize("kind", ARGUMENTS, ids=lambda kind: f"{library_of(kind)} {kind.__name__}")
@torch.no_grad()
def test_a_subclass_works_as_without_us(kind: Any) -> None:
    flow = make_own(kind)()
    expected, state = outcome(flow, kind), flow.state_dict()
    with jf.accelerate(copy.deepcopy(flow)) as handle:
        pass
    assert "jacobiflow raised" not in str(handle)
    with jf.accelerate(LIBRARIES[library_of(kind)]) as of_library:
        new = make_own(kind)()
        new.load_state_dict(state)
        assert new.factor == 2
        assert (type(new).__name__ in of_library.reasons) == ("library_class" not in vars(type(new)))
        assert ("  left alone, Own: " in str(of_library)) == ("Own" in of_library.reasons)
        for made in (new, flow):
            with jf.accelerate(flow):
                found = outcome(made, kind)
            for ours, own in zip(found, expected, strict=True):
                assert own is None or torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4) is None


class Halved(MaskedAutoregressiveTransform):
    def meta(self, c: Any, x: Any) -> Any:
        return super().meta(c, 0.5 * x)


@torch.no_grad()
def test_the_search_of_a_feature_is_not_that_of_another_meta() -> None:
    torch.manual_seed(0)
    flow, y = Halved(3, univariate=MNN(signal=4, stack=3, hidden_features=(8,)), shapes=[(4,)]), normal(5, 3)
    expected = values(flow, y, None, True)
    with jf.accelerate(flow):
        torch.testing.assert_close(values(flow, y, None, True), expected)


def test_a_fault_of_an_adapter_leaves_the_module_to_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError("shape")

    flow, x = zuko.flows.NICE(4), normal(3, 4)
    expected, kind = flow().log_prob(x), type(flow.transform.transforms[0])
    warning = r"is left to its library, since jacobiflow raised KeyError: 'shape'; please report it at https://"
    for place, name in ((Adapter, "check"), (jf.native.chain.TransformChain, "evaluate")):
        with monkeypatch.context() as patched, pytest.warns(UserWarning, match=warning):
            patched.setattr(place, name, fail)
            with jf.accelerate(zuko) as of_library, jf.accelerate(flow) as handle:
                torch.testing.assert_close(flow().log_prob(x), expected)
                assert type(zuko.flows.NICE(4).transform.transforms[0]) is kind or place is not Adapter
        assert "jacobiflow raised KeyError: 'shape'" in str(handle)
        assert place is not Adapter or "GeneralCouplingTransform: jacobiflow raised KeyError" in str(of_library)
