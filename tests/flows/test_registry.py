"""Flows by name."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

import jacobiflow as jf
from jacobiflow.flows import register
from jacobiflow.flows.registry import find_flow, flow_names
from tests.extending.recurrent_flow import RecurrentConfig, RecurrentFlow


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


def test_a_fault_of_a_flow_is_not_blamed_on_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = RecurrentFlow(RecurrentConfig(1, 4, channels=4, num_blocks=2))
    flow.save_pretrained(tmp_path)
    for fault in (TypeError("a fault"), ValueError("a fault")):
        monkeypatch.setattr(type(flow.blocks[0]), "__init__", Mock(side_effect=fault))
        with pytest.raises(type(fault), match=r"^a fault$"):
            jf.load(tmp_path)
