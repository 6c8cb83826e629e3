"""What commands load: recommended settings and guidance, which options replace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jacobiflow as jf
from jacobiflow.cli.loading import resolve_settings, settings_text
from jacobiflow.models.flow import Flow
from jacobiflow.sampling import denoise
from tests.helpers.running import figures

BEST = jf.Guidance(0.7, attn_temperature=1.4)
OWN = jf.Guidance(1.0, annealed=False, on="shift", attn_temperature=2.0)


@pytest.fixture
def flow(work: Path) -> Flow:
    """It recommends settings."""
    flow = jf.load(work / "model")
    flow.recommended = jf.SamplingSettings(BEST, denoise=0.9)
    return flow


@pytest.mark.parametrize(
    ("guidance", "denoise", "plain", "want", "text"),
    [
        (None, None, False, (BEST, 0.9),
         "--guidance 0.7,attn_temperature=1.4 --denoise 0.9 (recommended by the model; --plain turns it off)"),
        (None, None, True, (None, 0.0), "no guidance, no denoising"),
        ("0", None, False, (None, 0.9), "--denoise 0.9"),
        (str(OWN), 1.0, False, (OWN, 1.0), "--guidance 1,attn_temperature=2,annealed=false,on=shift --denoise 1"),
    ],
)  # fmt: skip
def test_options_win_and_the_other_settings_are_recommended(
    guidance: str | None, denoise: float | None, plain: bool, want: Any, text: str, flow: Flow
) -> None:
    settings, line = resolve_settings(flow, guidance, denoise, plain, has_context=True)
    assert (settings, line) == (jf.SamplingSettings(*want), f"settings: {text}")
    assert settings_text(settings) == text.partition(" (")[0]


def test_guidance_is_recommended_for_labels_only(flow: Flow) -> None:
    settings, line = resolve_settings(flow, None, None, False, has_context=False)
    assert settings == jf.SamplingSettings(denoise=0.9)
    assert line == "settings: --denoise 0.9; the recommended guidance needs --labels"
    assert resolve_settings(flow, "1", None, False, has_context=False)[0].guidance == jf.Guidance(1.0)


def test_samples_are_drawn_as_recommended_and_resumed_in_no_other_way(
    flow: Flow, run: Any, refuse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow.save_pretrained(tmp_path / "model")
    line = f"sample --model {tmp_path}/model --num 3 --strategy jacobi --out {tmp_path}/out"
    result = run(f"{line} --compare --json {tmp_path}/f")
    assert (result.code, result.err) == (0, "drawing the first batch again, also by the original sampler\n")
    text = "--guidance 0.7,attn_temperature=1.4 --denoise 0.9"
    assert f"\nsettings: {text} (recommended by the model; --plain turns it off)\n" in result.out
    entries = figures(tmp_path / "f")
    assert entries["error"]["max"] < 0.05  # the original sampler was guided and denoised alike
    assert "first batch of 3 again, denoising included: original sampler " in result.out
    assert re.search(r"denoising included: .* here [\d.e+-]+ s \(\d+% of it denoising\): ", result.out)
    assert run(f"{line} {text}").code == 0  # the same settings by hand
    refuse(f"{line} --denoise-dtype bfloat16", "holds samples of denoise dtype None, not 'bfloat16'")
    refuse(
        f"{line} --plain",
        "; denoise 0.9, not 0.0; give another folder, or overwrite this one (--overwrite)",
    )
    refuse(
        f"{line} --plain --denoise 1.0",
        "--plain: excludes --guidance, --denoise and --denoise-dtype; leave one of them out",
    )
    refuse(f"{line} --denoise 0 --denoise-dtype bfloat16", "--denoise-dtype bfloat16: there is no denoising step")
    monkeypatch.setattr(denoise, "has_bf16_products", lambda: True)
    again = run(f"{line} --num 64 --denoise-dtype bfloat16 --overwrite")
    assert f"settings: {text} --denoise-dtype bfloat16" in again.out
    change = (
        r"denoised in bfloat16: images change by \S+ of 255 grey levels on average, by \S+ of 255 grey levels at most"
    )
    assert re.search(change, again.out)


@given(st.floats(0, 1e6), st.booleans(), st.sampled_from(["both", "scale", "shift"]), st.floats(1e-3, 1e3))
def test_guidance_is_read_from_its_text(weight: float, annealed: bool, on: Any, temperature: float) -> None:
    guidance = jf.Guidance(weight, annealed, on, temperature)
    assert jf.Guidance.parse(str(guidance)) == guidance


def test_guidance_refuses_other_text() -> None:
    options = ("", "on", "on=up", "annealed=1", "attn_temperature=0", "on=scale,on=shift")
    for text in ("", "x", "nan", "-1", *(f"3,{option}" for option in options)):
        with pytest.raises(ValueError, match="give"):
            jf.Guidance.parse(text)


def test_bench_and_plan_take_the_recommended_guidance(flow: Flow, run: Any, refuse: Any, tmp_path: Path) -> None:
    flow.save_pretrained(tmp_path / "model")
    bench = f"bench --model {tmp_path}/model --strategy jacobi-1 --batch-size 1 --repeats 1 --out {tmp_path}/bench"
    plan = f"plan --model {tmp_path}/model --batch-size 1 --out {tmp_path}/plan.json"
    for line in (bench, plan):
        assert (
            "settings: --guidance 0.7,attn_temperature=1.4 (recommended by the model; --plain turns it off)\n"
            in run(line).out
        )
        refuse(f"{line} --plain --guidance 1", "--plain: excludes --guidance")
    assert (
        "settings: no guidance, no denoising; the recommended guidance needs --labels\n"
        in run(f"{bench} --labels none").out
    )
