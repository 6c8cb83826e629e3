"""Things that `jf.accelerate` leaves as they were: modules, copies, files, programs without the other libraries."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from textwrap import dedent
from typing import Any, ClassVar, Generic, TypeVar

import nflows
import nflows.transforms as nf
import pyro.distributions.transforms as pt
import pytest
import torch
import zuko
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn
from zuko.transforms import ComposedTransform

import jacobiflow as jf
from tests.helpers.library_flows import NATIVE, counted, problem_of, same_bits

pytestmark = pytest.mark.usefixtures("one_thread")


def classes(flow: nn.Module) -> list[type]:
    return [type(module) for module in flow.modules()]


@pytest.mark.parametrize("name", NATIVE)
def test_nothing_changes_but_the_class_of_transforms(name: str) -> None:
    flow = problem_of(name)[1]

    def look() -> list[Any]:
        weights = flow.state_dict(keep_vars=True)
        everything = str([vars(module) for module in flow.modules()])
        return [everything, repr(flow), {key: (id(w), w.sum().item()) for key, w in weights.items()}]

    before, kinds = look(), classes(flow)
    with pytest.raises(KeyError), jf.accelerate(flow, 0.0) as handle:
        assert look() == before
        for (key, module), kind in zip(flow.named_modules(), kinds, strict=True):
            assert isinstance(module, kind)
            assert key not in handle.transforms or type(module) is not kind
        raise KeyError
    assert look() == before
    handle.restore()
    assert classes(flow) == kinds


def file_of(thing: Any) -> bytes:
    torch.save(thing, file := io.BytesIO())
    return file.getvalue()


def saved(thing: Any) -> Any:
    data = file_of(thing)
    assert b"jacobiflow" not in data  # so it loads without this package
    return torch.load(io.BytesIO(data), weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {"copy": copy.copy, "deepcopy": copy.deepcopy, "torch.save": saved}


@pytest.mark.parametrize(
    "name", ["zuko NSF", "zuko coupling", "nflows feed-forward", "normflows affine", "pyro affine"]
)
@pytest.mark.parametrize("way", COPIES)
def test_copies_are_the_library_s_own(way: str, name: str) -> None:
    case, flow, y, c = problem_of(name)
    flow = flow.transform.transforms[0] if case.library == "zuko" else flow
    kind, data = type(flow), file_of(flow)
    with torch.no_grad(), jf.accelerate(flow, 0.0) as handle:
        assert file_of(flow) == data  # so torch.load(weights_only=True) needs no other classes
        expected, seen = case.invert(flow, y, c), handle.passes
        copied = COPIES[way](flow)
        assert type(copied) is kind
        assert same_bits(expected, case.invert(copied, y, c))
        assert handle.passes == seen
        first, second = COPIES[way]([flow, flow])
        assert first is second or way == "copy"


class Rebuilt(zuko.flows.MAF):
    """A user's flow that says how it is copied."""

    def __reduce__(self) -> Any:
        return type(self), (3,), {"is_rebuilt": True}


@pytest.mark.parametrize("way", COPIES)
def test_a_flow_with_a_reduce_of_its_own_is_copied_by_it(way: str) -> None:
    flow = Rebuilt(3)
    with jf.accelerate(flow):
        copied = COPIES[way](flow)
    assert type(copied) is Rebuilt and copied.is_rebuilt and copied().sample().shape == (3,)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [(zuko.flows.MAF, (3,)), (nf.MaskedAffineAutoregressiveTransform, (3, 8)),
     (pt.ConditionalAffineAutoregressive, (ConditionalAutoRegressiveNN(3, 2, [8]),))],
)  # fmt: skip
def test_subclasses_that_a_user_registers_are_the_user_s(kind: Any, arguments: tuple[Any, ...]) -> None:
    class Registered:
        names: ClassVar[list[str]] = []

        def __init_subclass__(cls, name: str) -> None:
            cls.names.append(name)

    class Own(kind, Registered, name="own"):  # type: ignore[misc, call-arg]
        pass

    with jf.accelerate(Own(*arguments)) as handle:
        assert handle.transforms
    assert Registered.names == ["own"]


class Typed(Generic[TypeVar("T")], nf.MaskedAffineAutoregressiveTransform):  # type: ignore[misc]
    """A user's transform, of a class that Python does not let us replace."""


def test_a_class_that_cannot_be_replaced_is_left_alone() -> None:
    with jf.accelerate(nflows):
        flow = Typed(3, 8)
    assert type(flow) is Typed
    assert jf.accelerate(flow).reasons == {"": "the first base of Typed is not nflows's"}


def test_transforms_at_a_context_share_a_class() -> None:
    with jf.accelerate(flow := pt.conditional_affine_autoregressive(3, 2)):
        assert type(flow.condition(torch.ones(2))) is type(flow.condition(torch.zeros(2)))


@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_distributions_of_zuko_follow_their_flow_and_their_copies_are_zuko_s(way: str) -> None:
    _, flow, _, c = problem_of("zuko MAF")

    def sample(distribution: Any) -> Tensor:
        torch.manual_seed(0)
        return distribution.sample((3,))

    expected = sample(flow(c))
    with jf.accelerate(flow, 0.0) as handle:
        distribution = flow(c)
        copied = COPIES[way](distribution)
        assert same_bits(sample(copied), expected)
        assert type(COPIES[way](distribution.transform.inv)) is ComposedTransform
        assert distribution.expand((2, *distribution.batch_shape)).event_shape == (24,)
        assert not handle.passes
        assert same_bits(sample(distribution), expected)
        assert handle.passes
    with counted(flow) as calls:
        assert same_bits(sample(distribution), expected)
    assert set(calls.values()) == {24}
    with jf.accelerate(flow, 0.5) as handle:
        assert not same_bits(sample(distribution), expected)


def test_one_library_suffices_and_an_import_needs_none() -> None:
    script = """
        import sys
        import torch
        import jacobiflow as jf
        assert not [name for name in sys.modules if name.split(".")[0] in ("zuko", "nflows", "normflows")]
        sys.modules |= {"zuko": None, "normflows": None}
        from nflows.transforms import MaskedAffineAutoregressiveTransform
        flow, y = MaskedAffineAutoregressiveTransform(8, 16), torch.randn(3, 8)
        expected, done = flow.inverse(y)[0], jf.accelerate(flow, 0.0)
        assert torch.equal(expected, flow.inverse(y)[0])
        assert done.passes
    """
    handle = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True, timeout=120)
    assert handle.returncode == 0, handle.stderr
