"""Settings of sampling: they go through JSON unchanged, and what is wrong there is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

import jacobiflow as jf

GUIDANCE = jf.Guidance(3, annealed=False, on="scale", attn_temperature=1.4)


@pytest.mark.parametrize("guidance", [None, GUIDANCE, jf.Guidance(0.5)])
@pytest.mark.parametrize("denoise", [0.0, 1])
def test_they_come_back_from_json(guidance: jf.Guidance | None, denoise: float) -> None:
    settings = jf.SamplingSettings(guidance, denoise)
    assert jf.SamplingSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_what_is_left_out_takes_its_default() -> None:
    assert jf.SamplingSettings.from_json({}) == jf.SamplingSettings(None, 0.0)
    assert jf.SamplingSettings.from_json({"guidance": {"weight": 2}}) == jf.SamplingSettings(jf.Guidance(2.0))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (7, "recommended=7: give an object with guidance, denoise"),
        (None, "recommended=None: give an object"),
        ({"denoise": -1}, "denoise=-1: give 0"),
        ({"denoise": "1"}, "denoise='1' of type str: give 0"),
        ({"denoising": 1}, "recommended with an unknown 'denoising': give guidance, denoise only"),
        ({"guidance": 3}, "guidance=3: give an object with weight, annealed, on, attn_temperature"),
        ({"guidance": {"annealed": True}}, "guidance={'annealed': True}: give its weight"),
        ({"guidance": {"weight": True}}, "guidance weight=True of type bool"),
        ({"guidance": {"weight": 1, "attn_temperature": 0}}, "attn_temperature=0: give a positive number"),
        ({"guidance": {"weight": 1, "temperature": 2}}, "guidance with an unknown 'temperature'"),
    ],
)
def test_a_wrong_entry_is_named(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match="^" + words.replace("(", r"\(").replace("{", r"\{")):
        jf.SamplingSettings.from_json(value)
