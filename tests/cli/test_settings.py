"""Which guidance and denoising `jacobiflow sample` draws with."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from running import figures
from scoring import levels

import jacobiflow as jf
from jacobiflow.cli.settings import Given, settings_words, settle
from jacobiflow.flows.image_flow import ImageFlow

BEST = jf.Guidance(0.7, attn_temperature=1.4)
NOTHING = Given(False, None, None, False, None, None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, work: Any) -> Any:
    """A folder whose model recommends settings."""
    flow = jf.load(work / "model")
    flow.recommended = jf.SamplingSettings(BEST, denoise=0.9)
    place = tmp_path_factory.mktemp("recommending") / "model"
    flow.save_pretrained(place)
    return place


@pytest.fixture
def flow(model: Any) -> ImageFlow:
    return jf.load(model)


MODELS_OWN, DENOISING = "--guidance 0.7 --attn-temperature 1.4", "recommended: --denoise 0.9 (--plain: without)"
ALL = {"guidance": 1.0, "guidance_on": "shift", "constant_guidance": True, "attn_temperature": 2.0, "denoise": 1.0}
GIVEN: list[tuple[dict[str, Any], jf.Guidance | None, float, str]] = [
    ({}, BEST, 0.9, f"recommended: {MODELS_OWN} --denoise 0.9 (--plain: without)"),
    ({"plain": True}, None, 0.0, "no guidance, no denoising"),
    ({"guidance": 2.0}, jf.Guidance(2.0), 0.9, f"given: --guidance 2; {DENOISING}"),
    ({"guidance": 0.0}, None, 0.9, DENOISING),
    ({"denoise": 0.0}, BEST, 0.0, f"recommended: {MODELS_OWN} (--plain: without)"),
    ({"guidance": 0.0, "denoise": 0.0}, None, 0.0, "no guidance, no denoising"),
    (ALL, jf.Guidance(1.0, annealed=False, on="shift", attn_temperature=2.0), 1.0,
     "given: --guidance 1 --guidance-on shift --constant-guidance --attn-temperature 2 --denoise 1"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "guidance", "denoise", "words"), GIVEN)
def test_what_is_given_wins_and_the_rest_is_recommended(
    given: dict[str, Any], guidance: jf.Guidance | None, denoise: float, words: str, flow: ImageFlow
) -> None:
    settings, said = settle(flow, NOTHING._replace(**given), labelled=True)
    assert (settings, said) == (jf.SamplingSettings(guidance, denoise), words)
    assert settings_words(settings) == (re.findall(r"--(?!plain:)[^ ;:]+|[\d.]+|shift", words) or ["--plain"])


def test_guidance_is_recommended_for_labels_only(flow: ImageFlow) -> None:
    settings, said = settle(flow, NOTHING, labelled=False)
    assert settings == jf.SamplingSettings(denoise=0.9)
    assert said.endswith("without the recommended guidance, which needs labels")
    assert settle(flow, NOTHING._replace(guidance=1.0), labelled=False)[0].guidance == jf.Guidance(1.0)


def test_samples_are_drawn_as_recommended_and_resumed_in_no_other_way(
    model: Any, run: Any, refuse: Any, tmp_path: Any
) -> None:
    line = f"sample --model {model} --num 3 --strategy jacobi --out {tmp_path}/out"
    result = run(f"{line} --compare --json {tmp_path}/f")
    assert (result.code, result.err) == (0, "")
    flow, labels = jf.load(model), torch.arange(3)
    drawing = {"strategy": "jacobi", "progress": False}
    want = jf.sample(flow, 3, labels, **drawing, guidance=flow.recommended.guidance, denoise=flow.recommended.denoise)
    with np.load(tmp_path / "out" / "shards" / "00000.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], levels(want.images))
    words = "--guidance 0.7 --attn-temperature 1.4 --denoise 0.9"
    assert f"\nrecommended: {words} (--plain: without)\n" in result.out
    assert f"\nboth rows: {words}; seconds are before denoising\n" in result.out
    shown = figures(tmp_path / "f")
    assert (shown["settings"], shown["guidance"], shown["denoise"]) == (words, 0.7, 0.9)
    assert shown["error"]["max"] < 0.05  # the loop beside it was guided and denoised alike
    assert run(f"{line} {words}").code == 0  # the same settings by hand
    refuse(f"{line} --plain", f"holds samples of other settings; give theirs, {words}, or another folder, or")
    assert run(f"{line} --plain --overwrite").code == 0
    refuse(line, "holds samples of other settings; give theirs, --plain, or another folder, or --overwrite to")
    refuse(f"{line} --plain --denoise 1.0", "--plain: excludes --denoise 1.0; leave one of them out")
    refuse(f"{line} --plain --constant-guidance", "--plain: excludes --constant-guidance; leave one of them out")
    refuse(f"{line} --attn-temperature 2.0", "--attn-temperature 2.0: is for guidance that is given; give --guidance")


def test_a_model_that_recommends_nothing_says_so(run: Any, tmp_path: Any) -> None:
    out = run(f"sample --model plain --num 1 --strategy jacobi-1 --out {tmp_path}").out
    assert "\nno guidance, no denoising: the model recommends none\n" in out
