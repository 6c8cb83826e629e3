"""The registry of flows."""

from __future__ import annotations

import pytest

import jacobiflow as jf
from examples.extending.recurrent_flow import RecurrentFlow
from jacobiflow.models import register_flow
from jacobiflow.models.registry import FLOWS


def test_a_name_has_one_flow() -> None:
    assert [FLOWS[name] for name in ("tarflow", "maf", "recurrent")] == [jf.TarFlow, jf.MAF, RecurrentFlow]
    with pytest.raises(ValueError, match=r"'recurrent': taken by .*RecurrentFlow"):
        register_flow(type("Other", (RecurrentFlow,), {}))
    again = type("RecurrentFlow", (RecurrentFlow,), {"__module__": RecurrentFlow.__module__})  # its module reloaded
    assert register_flow(again) is again is FLOWS["recurrent"]
    assert register_flow(RecurrentFlow) is RecurrentFlow is FLOWS["recurrent"]
    with pytest.raises(TypeError, match="give a class that derives from Flow"):
        register_flow(jf.TarFlowConfig)  # type: ignore[type-var]
