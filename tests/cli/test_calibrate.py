"""`jacobiflow calibrate`: the report is the library's, and the tables are the report's."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import jacobiflow as jf
from jacobiflow.calibration import gs_jacobi_notation
from jacobiflow.cli.calibrate import CalibrateConfig, CalibrateResult, show
from jacobiflow.data import Noise, load_images, noisy_images
from jacobiflow.jobs import CompletedJob
from tests.helpers.running import figures
from tests.helpers.scoring import levels

GUESSES = ("latent", "zeros")
GUIDANCE = jf.Guidance(0.4, annealed=False, on="shift", attn_temperature=0.9)
GUIDED = "--guidance 0.4,attn_temperature=0.9,annealed=false,on=shift"


def assert_tables(out: str, report: jf.CalibrationReport) -> None:
    """Every block's row is there, each number whole and in its place, and no line is wider than the terminal."""

    def cells(values: Any) -> list[str]:
        return [f"{value:.2f}" for value in values]

    screen = out[: out.index("use it: ")].splitlines()[1:]  # below the path
    assert max(map(len, screen)) <= 80, "a table does not fit a terminal"
    rows = [line.split() for line in screen]
    for i in range(report.num_blocks):
        sweeps = [report.mean_sweeps("noise", 1e-3, guess)[i] for guess in GUESSES]
        start = [*cells(report.igm[i][guess] for guess in GUESSES), *(f"{count:.1f}" for count in sweeps)]
        assert [str(i), *start, report.best_guess(i)] in rows
        best, gamma = f"{report.mean_sweeps('noise', 1e-3)[i]:.1f}", f"{np.mean(report.gamma[i]):.2f}"
        assert report.components is not None
        part, tough = report.components[i], ["yes"] * (i in report.tough_blocks)
        crm = cells([part.scaled_input, part.scale_weight, part.shift_weight, report.crm[i], report.crm_percent[i]])
        assert [str(i), *crm, *tough, best, gamma] in rows
        if report.class_metrics:
            spread = report.class_spread()[i].igm["zeros"]
            assert any(row[0] == str(i) and f"{spread.mean:.2f}±{spread.std:.2f}" in row for row in rows if row)
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4):
        assert f"to {tolerance:g}: {gs_jacobi_notation(report, tolerance)}" in screen
    assert screen[0] == f"{report.settings.num_images} images" + " (guided)" * (report.settings.guidance is not None)


CALIBRATIONS: dict[str, dict[str, Any]] = {
    "--model model --segments 4 --per-class --norm fro --convergence-samples 3": {
        "segments": 4, "norm": "fro", "per_class": True, "num_convergence_samples": 3,
    },
    f"--model model --clean --norm 1 --batch-size 4 --seed 5 {GUIDED} --convergence-samples 2": {
        "clean": True, "norm": 1, "batch_size": 4, "seed": 5, "guidance": GUIDANCE, "num_convergence_samples": 2,
    },
    "--model plain --convergence-samples 1": {"num_convergence_samples": 1},  # no classes, uniform noise
}  # fmt: skip


def calibrated(options: str) -> jf.CalibrationReport:
    """The library's report under these options, of images with the noise of the flow's training."""
    flow, settings = jf.load(f"./{options.split()[1]}"), dict(CALIBRATIONS[options])
    data, every = load_images("pets", 8, 1), torch.arange(9)
    noise = Noise(flow.config.noise_std)
    images = data.batch(every)[0] if settings.pop("clean", False) else noisy_images(data, every, noise)
    labels = data.labels if flow.config.num_classes else None
    return jf.calibrate(flow.guided(settings.pop("guidance", None)), images, labels, **settings)


@pytest.mark.parametrize("options", CALIBRATIONS)
def test_it_writes_and_prints_what_the_library_measures(options: str, run: Any, tmp_path: Path) -> None:
    line = f"calibrate --images pets {options} --out {tmp_path}/new --json {tmp_path}/f"
    result, want = run(line), calibrated(options)
    assert (result.code, result.err) == (0, "")
    assert jf.CalibrationReport.load(tmp_path / "new" / "report.json").to_json() == want.to_json()
    assert figures(tmp_path / "f")["report"] == want.to_json()
    assert_tables(result.out, want)
    assert result.out.startswith(f"wrote {tmp_path}/new/report.json\n")
    again = result.out.replace("wrote ", "was there already: ")
    assert run(line).out == again, "a complete calibration is printed again"


def test_the_proposed_command_certifies_its_samples(run: Any, tmp_path: Path) -> None:
    """They are of the guided map, and of the labels, that the report is of."""
    options = f"--model model --images pets {GUIDED} --unconditional --convergence-samples 3"
    line = f"calibrate {options} --out '{tmp_path}/my $1 r'"
    proposed = re.search(r"^use it: jacobiflow (sample .*)$", run(line).out, re.MULTILINE)
    assert proposed is not None
    assert f"{tmp_path}/my $1 r/report.json" in shlex.split(proposed[1])
    result = run(f"{proposed[1]} --num 3 --out {tmp_path}/s")
    assert (result.code, result.err) == (0, "")
    want = jf.sample(jf.load("./model").guided(GUIDANCE), 3, strategy="sequential")
    with np.load(tmp_path / "s" / "shards" / "00000.npz") as arrays:
        assert abs(arrays["arr_0"].astype(int) - levels(want.images)).max() <= 1
        assert arrays["residual"].max() <= 1e-3


def test_num_draws_some_images_by_the_seed(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jacobiflow.calibration.measure.CalibrationJob", job := Mock(side_effect=jf.InputError("no")))
    drawn = []
    for seed in (0, 1):
        run(f"calibrate --model model --images pets --num 4 --seed {seed} --clean --out {tmp_path}/r")
        drawn.append(job.call_args.args[1])
        assert len(drawn[-1].unique(dim=0)) == len(drawn[-1]) == 4
    assert not torch.equal(*drawn)


def test_ctrl_c_says_how_to_go_on(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jacobiflow.jobs.run", Mock(side_effect=KeyboardInterrupt))
    result = run(f"calibrate --model plain --images pets --out {tmp_path}/r")
    kept = f"interrupted: finished units are kept in {tmp_path}/r; run the same command to resume\n"
    assert (result.code, result.err) == (130, kept)


def test_the_process_that_does_not_make_the_report_says_who_did(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jacobiflow.jobs.run", Mock(return_value=CompletedJob(Mock(), {}, False, False, (), 0)))
    result = run(f"calibrate --model plain --images pets --out {tmp_path}/r")
    assert (result.code, result.out) == (0, f"another process wrote {tmp_path}/r/report.json\n")


def test_crm_may_be_undefined(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = jf.CalibrationReport.load(work / "report.json")
    metrics = dict.fromkeys(report.metrics, replace(report.metrics[2], components=None))
    edited = replace(report, metrics=metrics, class_metrics={})
    result = CalibrateResult(edited, use="", machine={})
    show(CalibrateConfig(model="", images="", out=Path()), result)
    out = capsys.readouterr().out
    assert "\nCRM is not defined: " in out and "The paper's strategies" not in out
    rows = [line.split() for line in out.splitlines()]
    for i, sweeps in enumerate(report.mean_sweeps("noise", 1e-3)):
        assert [str(i), f"{sweeps:.1f}", f"{np.mean(report.gamma[i]):.2f}"] in rows
