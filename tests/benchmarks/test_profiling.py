"""benchmarks/profiling.py: seconds of a part are without those of the parts inside it, and patches are undone."""

from __future__ import annotations

from itertools import count

import pytest
import torch

pytestmark = pytest.mark.slow


def test_seconds_are_those_of_the_innermost_part():
    from benchmarks.profiling import OTHER, Profile  # which imports sbi

    watch = Profile(count(0.0).__next__)
    inner = watch.timed("inner", lambda: None)
    outer = watch.timed("outer", inner)
    outer()  # before any phase: not counted
    with watch.phase("sampling"):
        with watch.phase("training"):
            outer()
        inner()
    # the clock goes on by a second at each change of part
    assert watch.seconds == {"sampling": {OTHER: 3, "inner": 1}, "training": {OTHER: 2, "outer": 2, "inner": 1}}
    assert watch.calls["training"] == {OTHER: 1, "outer": 1, "inner": 1}


def test_a_step_of_an_optimizer_and_its_clipping_are_parts_while_they_are_watched():
    from benchmarks.profiling import CLIPPING, OPTIMIZER, OTHER, Profile

    weight, clip = torch.nn.Parameter(torch.ones(3)), torch.nn.utils.clip_grad_norm_
    optimizer, watch = torch.optim.Adam([weight]), Profile()
    weight.grad = torch.ones(3)
    with watch.watching(), watch.phase("training"):
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
    optimizer.step()
    assert torch.nn.utils.clip_grad_norm_ is clip
    assert watch.calls["training"] == {OTHER: 1, CLIPPING: 1, OPTIMIZER: 1}
