"""Flows by name."""

from __future__ import annotations

import pytest

import jacobiflow as jf
from jacobiflow.flows import register
from jacobiflow.flows.image_flow import FLOWS
from tests.extending.recurrent_flow import RecurrentFlow


def test_a_name_has_one_flow() -> None:
    assert [FLOWS[name] for name in ("tarflow", "maf", "recurrent")] == [jf.TarFlow, jf.MAF, RecurrentFlow]
    with pytest.raises(ValueError, match=r"'recurrent': taken by .*RecurrentFlow"):
        register(type("Other", (RecurrentFlow,), {}))
    assert FLOWS["recurrent"] is RecurrentFlow
    again = type("RecurrentFlow", (RecurrentFlow,), {"__module__": RecurrentFlow.__module__})  # its module reloaded
    assert register(again) is again is FLOWS["recurrent"]
    register(RecurrentFlow)
    with pytest.raises(TypeError, match="give a class that derives from ImageFlow"):
        register(jf.TarFlowConfig)  # type: ignore[type-var]
