"""Flows by name, and a config that asks for far too much."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from recurrent_flow import RecurrentBlock, RecurrentConfig, RecurrentFlow
from torch import nn

import jacobiflow as jf
from jacobiflow.flows import register
from jacobiflow.flows.registry import find_flow, flow_names


def test_flows_are_found_by_their_name() -> None:
    assert [find_flow(name) for name in ("tarflow", "maf", "recurrent")] == [jf.TarFlow, jf.MAF, RecurrentFlow]
    assert find_flow("glow") is None
    assert set(flow_names()) >= {"tarflow", "maf", "recurrent"}


def test_a_name_has_one_flow() -> None:
    class Other(RecurrentFlow):
        pass

    with pytest.raises(ValueError, match=r"'recurrent': taken by recurrent_flow\.RecurrentFlow"):
        register(Other)
    assert find_flow("recurrent") is RecurrentFlow
    again = type("RecurrentFlow", (RecurrentFlow,), {"__module__": RecurrentFlow.__module__})  # its module reloaded
    assert register(again) is again is find_flow("recurrent")
    register(RecurrentFlow)


@dataclass(frozen=True)
class WithAList(RecurrentConfig):
    widths: tuple[int, ...] = ()


@pytest.mark.parametrize(("config", "words"), [(WithAList, "with fields .'widths'."), (int, "give a dataclass")])
def test_a_config_that_no_json_holds_is_refused(config: Any, words: str) -> None:
    other = type("Other", (RecurrentFlow,), {"model_type": "other", "config_type": config})
    with pytest.raises(TypeError, match=words):
        register(other)
    assert find_flow("other") is None


class Deep(RecurrentBlock):
    """A block of as many layers as it has channels."""

    def __init__(self, config: RecurrentConfig, permutation: Any) -> None:
        nn.Module.__init__(self)
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(config.channels))


@pytest.mark.parametrize("change", [{"num_blocks": 10**9}, {"channels": 10**9}])
def test_a_config_of_a_million_layers_is_refused_at_once(
    change: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a flow whose shapes say nothing of its config."""
    flow = RecurrentFlow(RecurrentConfig(1, 4, channels=4, num_blocks=2))
    flow.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    if "channels" in change:
        monkeypatch.setattr(RecurrentFlow, "block_type", Deep)
    with pytest.raises(jf.CheckpointError, match="the config has more weights than the 15 tensors here"):
        jf.load(tmp_path)


def test_the_module_of_an_unknown_flow_is_to_be_imported(tmp_path: Path) -> None:
    RecurrentFlow(RecurrentConfig(1, 4, channels=4, num_blocks=1)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace("recurrent", "glow"))
    with pytest.raises(jf.CheckpointError, match=r"'glow'; there are .*: import the module that registers another"):
        jf.load(tmp_path)
