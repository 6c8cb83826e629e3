"""A snapshot tells changes of modules and dictionaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from jacobiflow.errors import UnsupportedError
from jacobiflow.utils.snapshot import Snapshot


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor, self.settings, self.tensor = 2.0, {"sizes": [1, 2]}, torch.ones(3)
        self.linear = nn.Linear(2, 2, bias=False)
        self.register_buffer("mask", torch.ones(1))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda part: setattr(part, "factor", 3.0),
    "new attribute": lambda part: setattr(part, "forward", print),
    "list in a dictionary": lambda part: part.settings["sizes"].append(3),
    "another tensor": lambda part: setattr(part, "tensor", torch.ones(3)),
    "tensor in place": lambda part: part.tensor.add_(1),
    "submodule": lambda part: setattr(part, "linear", nn.Linear(2, 2)),
    "bias where there was none": lambda part: setattr(part.linear, "bias", nn.Parameter(torch.zeros(2))),
    "class of a submodule": lambda part: setattr(part.linear, "__class__", nn.Bilinear),
    "hook": lambda part: part.linear.register_forward_hook(print),
    "entry of a dictionary": lambda part: setattr(part, "mask", torch.zeros(1)),
    "entry in place": lambda part: part.mask.add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: str) -> None:
    part = Part()
    snapshot = Snapshot(list(part.modules()), [part._buffers])
    part.eval()
    part.linear.weight.data.add_(1)
    part.mask = part.mask.clone()  # An equal entry is no change, but its changes are noticed, too.
    assert snapshot.is_current()
    CHANGES[change](part)
    assert not snapshot.is_current()


@torch.inference_mode()
def test_tensors_whose_changes_pytorch_does_not_count_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="inference mode"):
        Snapshot(dicts=[{"mask": torch.ones(1)}])
