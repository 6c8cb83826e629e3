"""Flows by name, and a config that asks for far too much."""

from __future__ import annotations

import json
from dataclasses import make_dataclass
from pathlib import Path
from unittest.mock import Mock

import pytest
from recurrent_flow import RecurrentConfig, RecurrentFlow

import jacobiflow as jf
from jacobiflow.flows import register
from jacobiflow.flows.registry import find_flow, flow_names


def test_a_name_has_one_flow() -> None:
    assert [find_flow(name) for name in ("tarflow", "maf", "recurrent")] == [jf.TarFlow, jf.MAF, RecurrentFlow]
    assert find_flow("glow") is None
    assert set(flow_names()) >= {"tarflow", "maf", "recurrent"}
    with pytest.raises(ValueError, match=r"'recurrent': taken by recurrent_flow\.RecurrentFlow"):
        register(type("Other", (RecurrentFlow,), {}))
    assert find_flow("recurrent") is RecurrentFlow
    again = type("RecurrentFlow", (RecurrentFlow,), {"__module__": RecurrentFlow.__module__})  # its module reloaded
    assert register(again) is again is find_flow("recurrent")
    register(RecurrentFlow)


def test_a_config_that_no_json_holds_is_refused() -> None:
    listed = make_dataclass("Listed", [("widths", tuple)], bases=(RecurrentConfig,), frozen=True, kw_only=True)
    for config, words in ((listed, "with fields .'widths'."), (int, "give a dataclass")):
        with pytest.raises(TypeError, match=words):
            register(type("Other", (RecurrentFlow,), {"model_type": "other", "config_type": config}))
        assert find_flow("other") is None


def test_a_fault_of_a_flow_is_not_blamed_on_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = RecurrentFlow(RecurrentConfig(1, 4, channels=4, num_blocks=2))
    flow.save_pretrained(tmp_path)
    for fault in (TypeError("a fault"), ValueError("a fault")):
        monkeypatch.setattr(type(flow.blocks[0]), "__init__", Mock(side_effect=fault))
        with pytest.raises(type(fault), match=r"^a fault$"):
            jf.load(tmp_path)


def test_a_config_of_far_too_many_layers_is_refused_at_once(tmp_path: Path) -> None:
    """Also by a flow whose shapes say nothing of its config."""
    RecurrentFlow(RecurrentConfig(1, 4, channels=4, num_blocks=2)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    for blocks, why in ((1000, "the config has more weights than the 15 tensors here"), (10**9, "the limit is 1,000")):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"num_blocks": blocks}))
        with pytest.raises(jf.CheckpointError, match=why):
            jf.load(tmp_path)
