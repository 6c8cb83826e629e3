"""The report of a guidance in a model's folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from invented import GUIDANCE, make_report, small

import jacobiflow as jf


def save(place: Path, guidance: jf.Guidance | None) -> None:
    made = make_report([1, 1])
    replace(made, settings=replace(made.settings, guidance=guidance)).save(place)


def test_a_report_is_found_by_its_guidance(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    assert jf.find_report(jf.load(tmp_path)) is jf.find_report(jf.load(tmp_path), GUIDANCE) is None
    save(tmp_path / "report-b.json", GUIDANCE)
    save(tmp_path / "report-a.json", jf.Guidance(2.0))
    save(tmp_path / "reporting.json", jf.Guidance(3.0))
    assert jf.find_report(jf.load(tmp_path), GUIDANCE) == tmp_path / "report-b.json"
    assert jf.find_report(jf.load(tmp_path)) == tmp_path / "report-a.json"  # for want of a better one
    save(tmp_path / "report.json", jf.Guidance(0.0, attn_temperature=2.0))  # which is off
    flow = jf.load(tmp_path)
    for guidance, name in (
        (None, "report.json"), (jf.Guidance(0.0), "report.json"), (GUIDANCE, "report-b.json"),
        (jf.Guidance(2.0), "report-a.json"), (jf.Guidance(3.0), "report.json"),
        (jf.Guidance(2.0, attn_temperature=1.1), "report.json"),
    ):  # fmt: skip
        assert jf.find_report(flow, guidance) == tmp_path / name
    (tmp_path / "report-a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"report-a\.json"):
        jf.find_report(jf.load(tmp_path), GUIDANCE)
