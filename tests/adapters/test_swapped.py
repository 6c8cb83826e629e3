"""What `jf.accelerate` leaves as it was: modules, copies, files, and programs without the other libraries."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from textwrap import dedent
from typing import Any

import pytest
import torch
from library_flows import MAIN, Case, counted, made, same_bits
from torch import Tensor, nn

import jacobiflow as jf

pytestmark = pytest.mark.usefixtures("one_thread")


def classes(flow: nn.Module) -> list[type]:
    return [type(module) for module in flow.modules()]


def is_fast(case: Case, flow: nn.Module, y: Tensor, c: Tensor) -> bool:
    """Whether the inverse takes fewer passes than the library's."""
    with torch.no_grad(), counted(flow) as calls:
        case.invert(flow, y, c)
    return all(count < case.features for count in calls.values())


@pytest.mark.parametrize("name", MAIN)
def test_nothing_changes_but_the_class_of_transforms(name: str) -> None:
    case, flow, y, c = made(name)

    def look() -> list[Any]:
        weights = flow.state_dict(keep_vars=True)
        everything = str([vars(module) for module in flow.modules()])
        return [everything, repr(flow), {key: (id(w), w.sum().item()) for key, w in weights.items()}]

    before, kinds = look(), classes(flow)
    with pytest.raises(KeyError), jf.accelerate(flow) as done:
        assert is_fast(case, flow, y, c)
        assert look() == before
        for (key, module), kind in zip(flow.named_modules(), kinds, strict=True):
            assert isinstance(module, kind)
            assert (type(module) is not kind) == (key in done.transforms)
        raise KeyError
    assert look() == before
    assert not is_fast(case, flow, y, c)
    done.restore()
    assert classes(flow) == kinds


def test_accelerated_again_the_latest_tolerance_counts() -> None:
    case, flow, y, c = made("zuko MAF")
    kinds = classes(flow)
    with torch.no_grad():
        exact = case.invert(flow, y, c)
        first = jf.accelerate(flow, 0.5)
        rough, seen = case.invert(flow, y, c), first.passes
        second = jf.accelerate(flow)
        assert same_bits(exact, case.invert(flow, y, c))
        assert first.passes == seen != second.passes
        jf.accelerate(flow, 0.5)
        assert same_bits(rough, case.invert(flow, y, c))
    first.restore()
    assert classes(flow) == kinds


def test_deep_copies_are_accelerated_and_independent() -> None:
    case, flow, y, c = made("zuko MAF")
    kinds = classes(flow)
    done = jf.accelerate(flow)
    with torch.no_grad():
        expected, seen = case.invert(flow, y, c), done.passes
        flow.me = [flow]
        first, copied = copy.deepcopy([flow, flow])
        assert first is copied is copied.me[0]
        assert same_bits(expected, case.invert(copy.copy(flow), y, c))
        [p.mul_(0.5) for p in flow.parameters()]
        assert same_bits(expected, case.invert(copied, y, c))
    assert done.passes == seen
    done.restore()
    assert classes(flow) == kinds
    assert is_fast(case, copied, y, c)
    jf.accelerate(copied).restore()
    assert classes(copied) == kinds


@pytest.mark.parametrize("protocol", [0, pickle.HIGHEST_PROTOCOL])
def test_pickles_hold_the_library_s_own_class(protocol: int) -> None:
    case, flow, y, c = made("zuko NSF")
    kinds = classes(flow)
    jf.accelerate(flow)
    pickled = pickle.dumps(flow, protocol)
    assert b"jacobiflow" not in pickled  # it loads where this package is not installed
    loaded = pickle.loads(pickled)
    assert classes(loaded) == kinds
    assert is_fast(case, flow, y, c)
    with torch.no_grad():
        assert same_bits(case.invert(loaded, y, c), case.invert(flow, y, c))


def test_one_library_is_enough_and_importing_takes_none() -> None:
    script = """
        import sys
        import torch
        import jacobiflow as jf
        assert not [name for name in sys.modules if name.split(".")[0] in ("zuko", "nflows", "normflows")]
        sys.modules |= {"zuko": None, "normflows": None}
        from nflows.transforms import MaskedAffineAutoregressiveTransform
        flow, y = MaskedAffineAutoregressiveTransform(8, 16), torch.randn(3, 8)
        expected, done = flow.inverse(y)[0], jf.accelerate(flow)
        assert torch.equal(expected, flow.inverse(y)[0])
        assert done.passes
    """
    done = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
