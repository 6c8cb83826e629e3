"""`jacobiflow calibrate`: the report is the library's, and the tables are the report's."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jacobiflow as jf
from jacobiflow.calibration import Components, gs_jacobi_notation
from jacobiflow.data import Noise, load_images, noisy_images
from jacobiflow.files import write_json
from tests.helpers.scoring import levels

GUESSES = ("latent", "zeros", "mean_affine")
GUIDANCE = jf.Guidance(0.4, annealed=False, on="shift", attn_temperature=0.9)
GUIDED = "--guidance 0.4,attn_temperature=0.9,annealed=false,on=shift"


def assert_tables(out: str, report: jf.Report) -> None:
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
            assert spread.rank is not None and spread.percent is not None
            columns = [spread.rank, spread.percent, *(spread.igm[guess] for guess in GUESSES)]
            wins = "/".join(str(spread.wins[guess]) for guess in GUESSES)
            assert [str(i), *(f"{column.mean:.2f}±{column.std:.2f}" for column in columns), wins] in rows
    for metric in ("crm", "gamma"):
        value = report.rank_correlation(metric)  # type: ignore[arg-type]
        assert f"rank correlation of {metric} with the sweeps: {value:.2f}" in screen
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4):
        assert f"to {tolerance:g}: {gs_jacobi_notation(report, tolerance)}" in screen
    assert screen[0] == f"{report.settings.num_images} images" + " (guided)" * (report.settings.guidance is not None)


CALIBRATIONS: dict[str, dict[str, Any]] = {
    "--model model --segments 4 --traced 3 --per-class --norm fro": {"norm": "fro", "per_class": True},
    f"--model model --segments 4 --traced 3 --norm 1 --batch-size 4 --seed 5 {GUIDED}": {
        "norm": 1, "batch_size": 4, "seed": 5, "guidance": GUIDANCE,
    },
    "--model model --segments 16 --traced 1 --clean --unconditional": {
        "segments": 16, "traced": 1, "clean": True, "labels": None,
    },
    "--model plain --segments 1 --traced 100": {"segments": 1, "traced": 100},  # no classes, uniform noise
}  # fmt: skip


def calibrated(options: str) -> jf.Report:
    """The library's report under these options, of images with the noise of the flow's training."""
    flow, settings = jf.load(f"./{options.split()[1]}"), dict(CALIBRATIONS[options])
    data, every = load_images("pets", 8, 1), torch.arange(9)
    noise = Noise("gaussian", 0.1) if flow.config.noise_std else Noise("uniform")
    clean, seed = settings.pop("clean", False), settings.get("seed", 0)
    images = data.batch(every)[0] if clean else noisy_images(data, every, noise, seed)
    given = {"labels": data.labels if flow.config.num_classes else None, "segments": 4, "traced": 3, **settings}
    return jf.calibrate(flow.guided(given.pop("guidance", None)), images, **given)


@pytest.mark.parametrize("options", CALIBRATIONS)
def test_it_writes_and_prints_what_the_library_measures(options: str, run: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    result = run(f"calibrate --images pets {options} --out {path}")
    assert (result.code, result.err) == (0, "")
    assert os.listdir(path.parent) == ["report.json"]
    want = calibrated(options)
    assert jf.Report.load(path).to_json() == want.to_json()
    assert_tables(result.out, want)
    assert f"wrote {path}\n" in result.out


@pytest.mark.parametrize("options", [GUIDED, "--unconditional"])
def test_the_proposed_command_certifies_its_samples(options: str, run: Any, tmp_path: Path) -> None:
    """They are of the guided map, and of the labels, that the report is of."""
    line = f"calibrate --model model --images pets {options} --segments 4 --traced 3 --out '{tmp_path}/my $1 r.json'"
    proposed = re.search(r"^use it: jacobiflow (sample .*)$", run(line).out, re.MULTILINE)
    assert proposed is not None
    assert f"{tmp_path}/my $1 r.json" in shlex.split(proposed[1])
    result = run(f"{proposed[1]} --num 3 --out {tmp_path}/s")
    assert (result.code, result.err) == (0, "")
    guidance, labels = GUIDANCE if options == GUIDED else None, None if options != GUIDED else torch.arange(3)
    want = jf.sample(jf.load("./model").guided(guidance), 3, labels, strategy="sequential")
    with np.load(tmp_path / "s" / "shards" / "00000.npz") as arrays:
        assert abs(arrays["arr_0"].astype(int) - levels(want.images)).max() <= 1
        assert arrays["certificate"].max() <= 1e-3


def test_num_draws_some_images_by_the_seed(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.import_module("jacobiflow.calibration")
    measure, seen = module.calibrate, []

    def look(flow: Any, images: Any, labels: torch.Tensor, **settings: Any) -> jf.Report:
        seen.append((images, labels))
        return measure(flow, images, labels, **settings)

    monkeypatch.setattr(module, "calibrate", look)
    data = load_images("pets", 8, 1)
    assert data.labels is not None
    drawn = []
    for num, seed in ((4, 0), (4, 1), (1000, 0)):
        line = f"--segments 2 --traced 1 --num {num} --seed {seed} --out {tmp_path}/{len(drawn)}.json"
        assert run(f"calibrate --model model --images pets {line}").code == 0
        noisy = noisy_images(data, torch.arange(9), Noise("gaussian", 0.1), seed)
        images, labels = seen[-1]
        places = [next(i for i in range(9) if torch.equal(noisy[i], image)) for image in images]
        assert len(set(places)) == len(places) == min(num, 9), "an image is drawn twice"
        assert labels.tolist() == data.labels[places].tolist()
        drawn.append(places)
    assert drawn[0] != drawn[1]


def test_interrupted_it_goes_on_to_the_same_report(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, writes = tmp_path / "r.json", itertools.count()
    line = f"calibrate --model plain --images pets --segments 2 --traced 2 --out {report}"

    def interrupt(*arguments: Any, **settings: Any) -> None:
        if next(writes) == 1:
            raise KeyboardInterrupt
        write_json(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("jacobiflow.calibration.calibrate"), "write_json", interrupt)
        assert run(line).code == 130
    assert sorted(os.listdir(tmp_path)) == ["r.json.partial"]
    reports = []
    for _ in range(2):  # with what is kept, and without
        assert run(line).code == 0
        reports.append(report.read_bytes())
        report.unlink()
    assert reports[0] == reports[1]


def test_huge_numbers_stay_on_their_line(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tuple(Components(10.0**i, 123.4, 22.3) for i in (1, 2, 4))
    igms = tuple(dict(zip(GUESSES, (igm, 9.89, 9.12), strict=True)) for igm in (5.4e5, 3.2e37, float("inf")))
    report = jf.Report.load("report.json")
    worst = replace(report.metrics[2], igm=igms, components=parts)
    report = replace(report, metrics=dict.fromkeys(report.metrics, worst), class_metrics=dict.fromkeys(range(3), worst))
    monkeypatch.setattr(importlib.import_module("jacobiflow.calibration"), "calibrate", lambda *_, **__: report)
    result = run(f"calibrate --model model --images pets --out {tmp_path}/r.json")
    assert (result.code, result.err) == (0, "")
    screen = result.out[: result.out.index("The paper's strategies")].splitlines()
    assert max(map(len, screen)) <= 80
    for line in screen:  # a folded cell goes on in a line that has no block number
        assert not re.match(r"\s+\S+(\s|$)", line) or re.match(r"\s+([0-2] |IGM)", line), f"folded: {line}"


def test_without_crm_the_other_columns_are_shown(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = jf.Report.load("report.json")
    metrics = {norm: replace(each, components=None) for norm, each in report.metrics.items()}
    report = replace(report, metrics=metrics)
    monkeypatch.setattr(importlib.import_module("jacobiflow.calibration"), "calibrate", lambda *_, **__: report)
    result = run(f"calibrate --model model --images pets --out {tmp_path}/r.json")
    assert "CRM is not defined" in result.out and "strategies" not in result.out
    for i, sweeps in enumerate(report.mean_sweeps("noise", 1e-3)):
        assert [str(i), f"{sweeps:.1f}", f"{np.mean(report.gamma[i]):.2f}"] in [
            *map(str.split, result.out.splitlines())
        ]
