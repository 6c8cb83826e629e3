"""`jacobiflow calibrate`: the report is the library's, and the tables are the report's."""

from __future__ import annotations

import math
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch

import jacobiflow as jf
from jacobiflow.calibration import Components, gs_jacobi_notation
from jacobiflow.data import Noise, load_images, noisy_images
from jacobiflow.utils.files import write_json
from tests.helpers.process_groups import Job, run_jobs
from tests.helpers.running import figures
from tests.helpers.scoring import levels

GUESSES = ("latent", "zeros", "mean_affine")
GUIDANCE = jf.Guidance(0.4, annealed=False, on="shift", attn_temperature=0.9)
GUIDED = "--guidance 0.4,attn_temperature=0.9,annealed=false,on=shift"


def assert_tables(out: str, report: jf.CalibrationReport) -> None:
    """Every block's row is there, each number whole and in its place, and no line is wider than the terminal."""

    def cells(values: Any) -> list[str]:
        return [f"{value:.2f}" for value in values]

    screen = out[: out.index("wrote ")].splitlines()
    assert max(map(len, screen)) <= 80, "a table does not fit a terminal"
    rows = [line.replace("mean affine", "mean_affine").split() for line in screen]
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
            spread = report.class_spread()[i]
            assert spread.crm_rank is not None and spread.crm_percent is not None
            columns = [spread.crm_rank, spread.crm_percent, *(spread.igm[guess] for guess in GUESSES)]
            wins = "/".join(str(spread.num_best[guess]) for guess in GUESSES)
            assert [str(i), *(f"{column.mean:.2f}±{column.std:.2f}" for column in columns), wins] in rows
    for metric in ("crm", "gamma"):
        value = report.rank_correlation(metric)  # type: ignore[arg-type]
        text = "not defined, since all blocks are alike" if math.isnan(value) else f"{value:.2f}"
        assert f"rank correlation of {METRICS[metric]} with the sweeps: {text}" in screen
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4):
        assert f"to {tolerance:g}: {gs_jacobi_notation(report, tolerance)}" in screen
    assert screen[0] == f"{report.settings.num_images} images" + " (guided)" * (report.settings.guidance is not None)


METRICS = {"crm": "CRM", "gamma": "|Gamma|"}
CALIBRATIONS: dict[str, dict[str, Any]] = {
    "--model model --segments 4 --per-class --norm fro": {"segments": 4, "norm": "fro", "per_class": True},
    f"--model model --clean --norm 1 --batch-size 4 --seed 5 {GUIDED}": {
        "clean": True, "norm": 1, "batch_size": 4, "seed": 5, "guidance": GUIDANCE,
    },
    "--model plain --convergence-samples 1": {"num_convergence_samples": 1},  # no classes, uniform noise
}  # fmt: skip


def calibrated(options: str) -> jf.CalibrationReport:
    """The library's report under these options, of images with the noise of the flow's training."""
    flow, settings = jf.load(f"./{options.split()[1]}"), dict(CALIBRATIONS[options])
    data, every = load_images("pets", 8, 1), torch.arange(9)
    noise = Noise("gaussian", 0.1) if flow.config.noise_std else Noise("uniform")
    images = data.batch(every)[0] if settings.pop("clean", False) else noisy_images(data, every, noise)
    labels = data.labels if flow.config.num_classes else None
    return jf.calibrate(flow.guided(settings.pop("guidance", None)), images, labels, **settings)


@pytest.mark.parametrize("options", CALIBRATIONS)
def test_it_writes_and_prints_what_the_library_measures(options: str, run: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    result = run(f"calibrate --images pets {options} --out {path} --json {tmp_path}/new/json/f")
    assert (result.code, result.err) == (0, "")
    assert sorted(os.listdir(path.parent)) == ["json", "report.json"]
    want = calibrated(options)
    assert jf.CalibrationReport.load(path).to_json() == want.to_json()
    assert figures(path.parent / "json" / "f")["igm"] == [dict(igm) for igm in want.igm]
    assert_tables(result.out, want)
    assert f"wrote {path}\n" in result.out


def test_the_proposed_command_certifies_its_samples(run: Any, tmp_path: Path) -> None:
    """They are of the guided map, and of the labels, that the report is of."""
    options = f"--model model --images pets {GUIDED} --unconditional --convergence-samples 3"
    line = f"calibrate {options} --out '{tmp_path}/my $1 r.json'"
    proposed = re.search(r"^use it: jacobiflow (sample .*)$", run(line).out, re.MULTILINE)
    assert proposed is not None
    assert f"{tmp_path}/my $1 r.json" in shlex.split(proposed[1])
    result = run(f"{proposed[1]} --num 3 --out {tmp_path}/s")
    assert (result.code, result.err) == (0, "")
    want = jf.sample(jf.load("./model").guided(GUIDANCE), 3, strategy="sequential")
    with np.load(tmp_path / "s" / "shards" / "00000.npz") as arrays:
        assert abs(arrays["arr_0"].astype(int) - levels(want.images)).max() <= 1
        assert arrays["residual"].max() <= 1e-3


def test_num_draws_some_images_by_the_seed(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate = Mock(return_value=jf.CalibrationReport.load("report.json"))
    monkeypatch.setattr("jacobiflow.api.calibrate", calibrate)
    data = load_images("pets", 8, 1)
    assert data.labels is not None
    drawn = []
    for num, seed in ((4, 0), (4, 1), (1000, 0)):
        line = f"calibrate --model model --images pets --num {num} --seed {seed} --out {tmp_path}/r.json"
        assert run(line).code == 0
        noisy = noisy_images(data, torch.arange(9), Noise("gaussian", 0.1), seed)
        _, images, labels = calibrate.call_args.args
        places = [next(i for i in range(9) if torch.equal(noisy[i], image)) for image in images]
        assert len(set(places)) == len(places) == min(num, 9), "an image is drawn twice"
        assert labels.tolist() == data.labels[places].tolist()
        drawn.append(places)
    assert drawn[0] != drawn[1]


def test_interrupted_it_goes_on_to_the_same_report(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "r.json"
    line = f"calibrate --model plain --images pets --segments 2 --convergence-samples 2 --out {report}"
    with monkeypatch.context() as patch:
        patch.setattr(
            "jacobiflow.utils.store.write_json", Mock(wraps=write_json, side_effect=[DEFAULT, KeyboardInterrupt])
        )
        result = run(line)
    kept = f"interrupted: finished measurements are kept in {report}.partial; run the same command to resume\n"
    assert (result.code, result.out, result.err) == (130, "", kept)
    assert sorted(os.listdir(tmp_path)) == ["r.json.partial"]
    reports = []
    for _ in range(2):  # with what is kept, and without
        assert run(line).code == 0
        reports.append(report.read_bytes())
        report.unlink()
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model model --per-class --unconditional", "--per-class: leave out --unconditional"),
        ("--model plain --per-class", "--per-class: this model has no classes; leave it out"),
        ("--model model --convergence-samples 0", "Invalid value for '--convergence-samples'"),
        ("--model model --segments 0", "Invalid value for '--segments'"),
    ],
    ids=range(4),
)
def test_what_cannot_work_is_refused_before_images_are_read(
    options: str, message: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jacobiflow.data.load_images", Mock(side_effect=AssertionError))
    result = run(f"calibrate --images pets {options} --out {tmp_path}/r.json")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {message}")


def test_huge_numbers_stay_on_their_line_and_crm_may_be_undefined(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = jf.CalibrationReport.load("report.json")
    parts = tuple(Components(10.0**i, 123.4, 22.3) for i in (1, 2, 4))
    igms = tuple(dict(zip(GUESSES, (igm, 9.89, 9.12), strict=True)) for igm in (5.4e5, 3.2e37, float("inf")))
    huge, plain = replace(report.metrics[2], igm=igms, components=parts), replace(report.metrics[2], components=None)
    screens = []
    for metrics, classes in ((huge, dict.fromkeys(range(3), huge)), (plain, {})):
        edited = replace(report, metrics=dict.fromkeys(report.metrics, metrics), class_metrics=classes)
        monkeypatch.setattr("jacobiflow.api.calibrate", Mock(return_value=edited))
        result = run(f"calibrate --model model --images pets --out {tmp_path}/r.json")
        assert (result.code, result.err) == (0, "")
        screens.append(result.out.partition("The paper's strategies")[0].splitlines())
    assert max(map(len, screens[0])) <= 80
    for line in screens[0]:  # a folded cell goes on in a line that has no block number
        assert not re.match(r"\s+\S+(\s|$)", line) or re.match(r"\s+([0-2] |IGM)", line), f"folded: {line}"
    assert any(line.startswith("CRM is not defined") for line in screens[1])
    rows = [line.split() for line in screens[1]]
    for i, sweeps in enumerate(report.mean_sweeps("noise", 1e-3)):
        assert [str(i), f"{sweeps:.1f}", f"{np.mean(report.gamma[i]):.2f}"] in rows


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_two_processes_write_the_report_of_one(work: Path, tmp_path: Path) -> None:
    """Each does half of the work. Of a kill only the measurements in work are lost."""
    base = f"calibrate --model {work}/model --images {work}/pets --per-class --segments 4 --convergence-samples 3"
    one, two, killed = ([*base.split(), "--batch-size", "2", "--out", name] for name in ("one", "two", "killed"))
    rounds = run_jobs(
        [[Job(one, 1, name="one")], [Job(two, name="two"), Job(killed, kills={1: 4})], [Job(killed)]], tmp_path
    )
    assert [ended.code for ended in rounds[1]["two"] + rounds[2]["job"]] == [0] * 4
    assert rounds[1]["two"][0].out.replace(" two", " one") == rounds[0]["one"][0].out
    assert (tmp_path / "two").read_bytes() == (tmp_path / "killed").read_bytes() == (tmp_path / "one").read_bytes()
    claimed = [ended.claimed for ended in rounds[1]["two"]]
    assert all(0.25 * sum(claimed) < count < 0.75 * sum(claimed) for count in claimed), claimed
    other, lost = rounds[1]["job"]
    assert (lost.code, other.code) == (-9, 2) and other.err.count("\n") == 1
    assert other.seconds - lost.seconds < 10
    assert not list(tmp_path.glob("*.partial"))
