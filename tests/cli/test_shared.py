"""What commands share: recommended settings, files that are not written to, and lines about long work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jacobiflow as jf
from jacobiflow.cli import output
from jacobiflow.cli.loading import resolve_settings, settings_text
from jacobiflow.cli.output_files import check_output
from jacobiflow.models.checkpoints.folder import bundled
from jacobiflow.models.flow import Flow
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
        (None, None, True, (None, 0.0), "--plain"),
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
    assert line == "settings: --denoise 0.9; the recommended guidance needs labels"
    assert resolve_settings(flow, "1", None, False, has_context=False)[0].guidance == jf.Guidance(1.0)


def test_samples_are_drawn_as_recommended_and_resumed_in_no_other_way(
    flow: Flow, run: Any, refuse: Any, tmp_path: Path
) -> None:
    flow.save_pretrained(tmp_path / "model")
    line = f"sample --model {tmp_path}/model --num 3 --strategy jacobi --out {tmp_path}/out"
    result = run(f"{line} --compare --json {tmp_path}/f")
    assert (result.code, result.err) == (0, "")
    text = "--guidance 0.7,attn_temperature=1.4 --denoise 0.9"
    assert f", settings: {text} (recommended by the model; --plain turns it off)\n" in result.out
    entries = figures(tmp_path / "f")
    assert entries["error"]["max"] < 0.05  # the original sampler was guided and denoised alike
    cost = entries["runs"]["jacobi"]
    rate = 3 / (cost["seconds"] + cost["denoise_seconds"])
    assert cost["samples_per_second"] == pytest.approx(rate)
    assert f", and {cost['denoise_seconds']:.3g} s of denoising: {rate:.3g} samples a second\n" in result.out
    assert " for the first batch, without denoising\n" in result.out
    assert run(f"{line} {text}").code == 0  # the same settings by hand
    refuse(f"{line} --plain", "holds samples of guidance ")
    refuse(f"{line} --plain --denoise 1.0", "--plain: excludes --guidance and --denoise; leave one of them out")


@given(st.floats(0, 1e6), st.booleans(), st.sampled_from(["both", "scale", "shift"]), st.floats(1e-3, 1e3))
def test_guidance_is_read_from_its_text(weight: float, annealed: bool, on: Any, temperature: float) -> None:
    guidance = jf.Guidance(weight, annealed, on, temperature)
    assert jf.Guidance.parse(str(guidance)) == guidance
    assert jf.Guidance.parse(str(guidance).replace(",", " , ")) == guidance


def test_guidance_refuses_other_text() -> None:
    options = ("", "on", "on=up", "annealed=1", "attn_temperature=0", "on=scale,on=shift")
    for text in ("", "x", "nan", "-1", *(f"3,{option}" for option in options)):
        with pytest.raises(ValueError, match="give"):
            jf.Guidance.parse(text)


def test_an_output_is_no_file_of_a_bundled_model() -> None:
    """As the commands take it: by its name."""
    for name, folder in bundled().items():
        for option, inputs in (("--out", ()), ("--json", (name,))):
            with pytest.raises(jf.InputError, match=rf"^{option} .*model\.safetensors: .*reads.*; give another file$"):
                check_output(option, folder / "model.safetensors", name, *inputs)
        check_output("--out", folder / "report.json", name, replaces="report*.json")  # as `make calibration` does
        with pytest.raises(jf.InputError, match="this command reads or writes that file itself"):
            check_output("--out", folder / "report.json", name)


OUTPUTS = {
    "train --images digits --steps 1 --out D --json D/config.json": "--json D/config.json",
    "train --images digits --steps 1 --out D --json D/samples-000500.png": "--json D/samples-000500.png",
    "sample --num 2 --out D --json D/shards/00000.json": "--json D/shards/00000.json",
    "sample --num 2 --out D --json D": "--json D",
    "sample --num 2 --out D/inner --json D": "--json D",
    "evaluate --images pets --save-stats q --json q --model model": "--json q",
    "evaluate --images pets --save-stats E/evaluation.json --out E --model model": "--save-stats E/evaluation.json",
    "bench --out D --json D/bench.png": "--json D/bench.png",
    "calibrate --images pets --out r.json --json r.json --model model": "--json r.json",
    "calibrate --images pets --out model/tuning.json --model model": "--out model/tuning.json",
    "plan --out model/report.json --model model": "--out model/report.json",
    "plan --out model/new/../report-new.json --model model": "--out model/new/../report-new.json",
    "plan --tune --out model/tuning.json --model model": "--out model/tuning.json",
    "plan --tune --out P/tuning.json --model digits-p1": "--out P/tuning.json",
    "plan --tune --out P/p.json --json P/tuning-guided.json --model digits-p1": "--json P/tuning-guided.json",
}


@pytest.mark.parametrize("line", OUTPUTS)
def test_no_output_replaces_what_the_command_reads_or_writes(line: str, refuse: Any) -> None:
    refuse(line, f"{OUTPUTS[line]}: this command reads or writes that file itself; give another file")


def test_an_output_is_no_code_that_the_command_runs(refuse: Any, tmp_path: Path) -> None:
    code = tmp_path / "f.py"
    code.touch()
    line = f"evaluate --images pets --features {code}:f --model model"
    refuse(f"{line} --json {code}", f"is in {code}:f, which this command reads")
    refuse(f"{line} --save-stats {code}", f"is in {code}:f, which this command reads")


def test_options_have_their_names_at_a_shell(run: Any, refuse: Any, tmp_path: Path) -> None:
    line = f"sample --model model --strategy jacobi-1 --certify-always --batch-size 2 --out {tmp_path}/out"
    refuse(f"{line} --num 4 --shard-size 3", "error: --shard-size 3: give a multiple of the batch size, 2\n")
    assert run(f"{line} --num 4").code == 0
    for options, words in {
        "--num 4 --seed 1": "holds samples of seed 0, not 1; give another folder, or --overwrite to replace them",
        "--num 3": "samples, more than 3; give --num 4, or give another folder, or --overwrite to replace them",
        "--num 4 --guidance 0.5": "of guidance None, not 0.5; give",
    }.items():
        refuse(f"{line} {options}", words)


def test_bench_and_plan_take_the_recommended_guidance(flow: Flow, run: Any, refuse: Any, tmp_path: Path) -> None:
    flow.save_pretrained(tmp_path / "model")
    bench = f"bench --model {tmp_path}/model --strategy jacobi --batch-size 1 --repeats 1 --out {tmp_path}/bench"
    plan = f"plan --model {tmp_path}/model --out {tmp_path}/plan.json"
    for line in (bench, plan):
        assert "guidance: 0.7,attn_temperature=1.4 (recommended by the model; --plain turns it off)\n" in run(line).out
        assert "guidance: none\n" in run(f"{line} --plain").out
        refuse(f"{line} --plain --guidance 1", "--plain: excludes --guidance")
    assert "guidance: none; the recommended guidance needs labels\n" in run(f"{bench} --labels none").out


def test_a_log_has_a_line_a_minute(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0, 0, 30, 61, 90, 150])
    monkeypatch.setattr(output, "perf_counter", lambda: next(seconds))
    lines = output.ProgressLines()
    for done in (200, 250, 300, 350, 450):
        lines(done, 1200, "samples")
    assert capsys.readouterr().err == (
        "samples: 300 of 1,200, about 9 min left\nsamples: 450 of 1,200, about 8 min left\n"
    )
