"""The command line: what it writes and prints, and one line and exit 2 for all that is wrong."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from problems import make_flow, to_float32
from running import figures, run_line

import jacobiflow as jf
from jacobiflow import sampling
from jacobiflow.calibration import Components, Metrics
from jacobiflow.data import Noise, digits, load_images, noisy_images, quantize
from jacobiflow.latents import draw_labels
from jacobiflow.plots import image_grid

pytestmark = pytest.mark.usefixtures("one_thread")

COMMANDS = ("sample", "calibrate", "trace", "bench", "train", "convert", "info")
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
GUESSES = ("latent", "zeros", "mean_affine")
GUIDANCE = jf.Guidance(0.4, annealed=False, on="shift", attn_temperature=0.9)
GUIDED = "--guidance 0.4 --guidance-on shift --constant-guidance --attn-temperature 0.9"
FOLDER = [".lock", "manifest.json", "samples.png", "shards", "strategy.json"]
SHARD = "shards/00000.npz"
WROTE = "1 shard, manifest.json, strategy.json, samples.png\n"
TINY = "--patch-size 7 --channels 32 --head-dim 16 --blocks 2 --layers 1 --batch-size 8 --no-bf16"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to work in: models, strategies, images; shared by all tests, which add no more than `out-*`."""
    folder = tmp_path_factory.mktemp("work")
    to_float32(make_flow(num_classes=3, noise_std=0.1)).save_pretrained(folder / "model")
    to_float32(make_flow(image_size=6)).save_pretrained(folder / "plain")
    jf.Strategy.uniform(jf.Solver(jf.Window(4), stopping=jf.Tolerance(1e-4)), 2).save(folder / "window.json")
    jf.Strategy.uniform(jf.Solver(jf.Window(4)), 5).save(folder / "five.json")
    (folder / "broken.json").write_text('{"format_version": 1,')
    (folder / "file").write_text("a regular file")
    for name in ("good", "broken"):
        (folder / name / "cats").mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), 40 * i).save(folder / name / "cats" / f"{i}.png")
    (folder / "empty").mkdir()
    (folder / "broken.txt").write_text("not JSON")
    to_float32(make_flow(num_classes=3, noise_std=0.1, num_blocks=3)).save_pretrained(folder / "tough")
    to_float32(make_flow(num_classes=3, num_blocks=3, nvp=False, noise_std=0.1)).save_pretrained(folder / "volume")
    to_float32(make_flow(num_blocks=3)).save_pretrained(folder / "free")
    noise = np.random.default_rng(0)
    for name, classes, size in (("pets", 3, 8), ("herd", 5, 8), ("small", 2, 5)):
        for i in range(3 * classes):
            place = folder / name / f"class{i // 3}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (size, size), dtype=np.uint8)).save(place / f"{i}.png")
    report = calibrated(folder / "tough", folder / "pets")
    report.save(folder / "report.json")
    replace(report, fingerprint="0" * 64).save(folder / "other.json")
    (folder / "broken" / "cats" / "3.png").write_bytes((folder / "broken" / "cats" / "2.png").read_bytes()[:40])
    return folder


def calibrated(model: str | Path, images: str | Path, seed: int = 0, clean: bool = False, **settings: Any) -> jf.Report:
    """What the library measures of images with the noise of the flow's training."""
    flow = jf.load(f"./{model}" if isinstance(model, str) else model)
    data = load_images(str(images), flow.config.image_size, flow.config.in_channels)
    std = flow.config.noise_std
    noise = Noise("gaussian", std) if std else Noise("uniform")
    everything = torch.arange(len(data))
    noisy = data.batch(everything)[0] if clean else noisy_images(data, everything, noise, seed)
    labels = data.labels if flow.config.num_classes else None
    return jf.calibrate(
        flow, noisy, **{"labels": labels, "segments": 4, "traced": 3, "seed": seed, "progress": False, **settings}
    )


@pytest.fixture(autouse=True)
def _work_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line in this process; gives its exit code, stdout and stderr."""

    return partial(run_line, capsys=capsys)


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in Path().rglob("*")}


# ---------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_whose_options_exist(command: str, run: Any) -> None:
    result = run(f"{command} --help")
    assert (result.code, result.err) == (0, "")
    text = " ".join(result.out.split())
    example = re.search(rf"Example: (jacobiflow {command} .*?) (Arguments|Options):", text)
    assert example is not None
    for option in re.findall(r"--[\w-]+", example[1]):
        assert f"{option} <" in text or f"{option} " in text.split("Options:")[1], option
    assert "--json" in text


def test_help_lists_the_commands_with_and_without_asking(run: Any) -> None:
    asked, unasked = run("--help"), run("")
    assert asked == unasked
    assert (asked.code, asked.err) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\w", asked.out, re.MULTILINE)


def test_the_module_and_the_script_are_the_same_program(folder: Path) -> None:
    programs = [str(Path(sys.executable).with_name("jacobiflow"))], [sys.executable, "-m", "jacobiflow"]
    processes = [
        subprocess.Popen(
            [*program, "sample", "--model", "model", "--labels", "99"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for program in programs
    ]  # fmt: skip
    for process in processes:
        assert process.communicate(timeout=600) == (
            "",
            "error: label 99: this flow has classes 0 to 2 (below 0: no class)\n",
        )
        assert process.returncode == 2


# -------------------------------------------------------------------------------------------------------------- sample


@pytest.mark.parametrize(
    "strategy",
    [
        "auto", "sequential", "jacobi", "jacobi-5", "gs-jacobi:4", "gs-jacobi:4-3", "window:5", "[1-4-3-5]",
        "window.json",
    ],
)  # fmt: skip
def test_sample_writes_what_the_library_draws(strategy: str, run: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    result = run(
        f"sample --model model --num 5 --batch-size 3 --labels 0,2 --seed 4 --strategy {strategy} --out {out} "
        f"--json {tmp_path}/f.json"
    )
    assert (result.code, result.err) == (0, "")
    assert sorted(os.listdir(out)) == FOLDER
    assert sorted(os.listdir(out / "shards")) == ["00000.json", "00000.npz"]

    want = jf.sample(
        jf.load("./model"), 5, torch.tensor([0, 2, 0, 2, 0]), 4, strategy=strategy, batch_size=3, progress=False
    )
    with np.load(out / SHARD) as arrays:
        assert sorted(arrays) == ["arr_0", "labels"]
        assert arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], quantize(want.images).permute(0, 2, 3, 1).numpy())
        assert arrays["labels"].tolist() == [0, 2, 0, 2, 0]
    with Image.open(out / "samples.png") as sheet:
        assert sheet.size == (5 * (8 * 8 + 2) + 2, 8 * 8 + 4)  # 8 pixels are drawn as 64

    shown = figures(f"{tmp_path}/f.json")
    assert (shown["model"], shown["num"], shown["batch_size"], shown["seed"]) == ("model", 5, 3, 4)
    assert list(shown["runs"]) == [shown["strategy"]] == [strategy]
    figure = shown["runs"][strategy]
    assert figure["network_calls"] == want.network_calls
    assert figure["token_evaluations"] == want.token_evaluations
    assert figure["sweeps"] == [block.sweeps for block in want.stats]
    assert figure["resolved_sequentially"] == want.resolved_sequentially == 0
    assert sum(figure["status"].values()) == 5
    assert figure["images_per_second"] == pytest.approx(5 / figure["seconds"])
    assert sum(figure["block_seconds"]) <= figure["seconds"]
    assert want.certificate is not None
    assert figure["certificate"] == pytest.approx(float(want.certificate.max()))
    if strategy in ("jacobi-5", "gs-jacobi:4-3", "[1-4-3-5]"):
        assert figure["status"]["max_sweeps"] == 5
    else:
        assert figure["status"]["converged"] == 5
        assert figure["certificate"] <= (1e-4 if strategy == "window.json" else 1e-3)
    assert f"wrote {out}: {WROTE}" in result.out


@pytest.mark.parametrize("strategy", ["window:5", "[1-4-3-5]"])
def test_compare_prints_both_rows_and_the_error(strategy: str, run: Any, tmp_path: Path) -> None:
    result = run(f"sample --model model --num 4 --strategy {strategy} --compare --out {tmp_path} --json {tmp_path}/f")
    assert (result.code, result.err) == (0, "")
    shown = figures(f"{tmp_path}/f")
    assert list(shown["runs"]) == ["sequential", strategy]
    for name, row in shown["runs"].items():
        cells = next(line.split() for line in result.out.splitlines() if line.startswith(name))
        assert cells[1:] == [
            f"{row['seconds']:.3f}", f"{row['images_per_second']:.1f}", str(row["network_calls"]),
            f"{row['token_evaluations']:,}", f"{row['certificate']:.1e}", "0",
        ]  # fmt: skip
    flow, labels = jf.load("./model"), torch.tensor([0, 1, 2, 0])
    one, other = (jf.sample(flow, 4, labels, strategy=name, progress=False).images for name in ("sequential", strategy))
    error = (one - other).abs()
    assert error.max() > 0
    assert shown["error"] == {"max": float(error.max()), "mean": pytest.approx(float(error.mean()))}
    speed = shown["runs"]["sequential"]["seconds"] / shown["runs"][strategy]["seconds"]
    assert (
        f"speed-up {speed:.2f}x over the sequential loop; error max {error.max():.1e}, mean {error.mean():.1e}\n"
        in result.out
    )
    with np.load(tmp_path / SHARD) as arrays:
        assert np.array_equal(arrays["arr_0"], quantize(other).permute(0, 2, 3, 1).numpy())
    with Image.open(tmp_path / "samples.png") as sheet:
        assert sheet.size[1] == 3 * (22 + 8 * 8 + 4)
    assert max(map(len, result.out.splitlines()[:-1])) <= 80, "the table does not fit a terminal"


def test_guidance_and_denoising_reach_the_library(run: Any, tmp_path: Path) -> None:
    result = run(
        "sample --model model --num 3 --guidance 0.7 --guidance-on shift --constant-guidance --attn-temperature 0.8 "
        f"--denoise 0.9 --tolerance 1e-5 --batch-size 2 --out {tmp_path} --json {tmp_path}/f"
    )
    assert (result.code, result.err) == (0, "")
    guidance = jf.Guidance(0.7, annealed=False, on="shift", attn_temperature=0.8)
    want = jf.sample(
        jf.load("./model"), 3, torch.arange(3), guidance=guidance, denoise=0.9, tolerance=1e-5, batch_size=2,
        progress=False,
    )  # fmt: skip
    with np.load(tmp_path / SHARD) as arrays:
        assert np.array_equal(arrays["arr_0"], quantize(want.images).permute(0, 2, 3, 1).numpy())
    shown = figures(f"{tmp_path}/f")
    assert (shown["guidance"], shown["denoise"]) == (0.7, 0.9)
    assert shown["runs"]["auto"]["certificate"] <= 1e-5
    assert shown["runs"]["auto"]["denoise_seconds"] > 0


def test_labels(run: Any, tmp_path: Path) -> None:
    for given, want in {
        "balanced": [0, 1, 2, 0], "1": [1, 1, 1, 1], "0,-1": [0, -1, 0, -1], "-1": [-1] * 4, "2,1,0,0,1": [2, 1, 0, 0],
        "random": draw_labels(4, 3, 9).tolist(), "none": None,
    }.items():  # fmt: skip
        line = f"sample --model model --num 4 --seed 9 --strategy jacobi-1 --labels {given} --out {tmp_path}"
        result = run(f"{line} --overwrite")
        assert (result.code, result.err) == (0, "")
        with np.load(tmp_path / SHARD) as arrays:
            assert (arrays["labels"].tolist() if "labels" in arrays else None) == want
    assert run(f"sample --model plain --num 2 --strategy jacobi-1 --overwrite --out {tmp_path}").code == 0
    with np.load(tmp_path / SHARD) as arrays:
        assert list(arrays) == ["arr_0"]


def test_no_certificate_is_said(run: Any, tmp_path: Path) -> None:
    result = run(f"sample --model model --num 2 --no-certify --dtype float64 --out {tmp_path} --json {tmp_path}/f")
    assert "not asked" in result.out
    assert figures(f"{tmp_path}/f")["runs"]["auto"]["certificate"] is None


def test_names_in_square_brackets_are_no_markup(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = jf.load("./model")
    monkeypatch.chdir(tmp_path)
    flow.save_pretrained("[/red]")
    result = run("sample --model './[/red]' --num 1 --strategy jacobi-1 --out '[bold]/[/red]'")
    assert result.code == 0
    assert "./[/red]: 1 image, batch size 1\n" in result.out
    assert f"wrote [bold]/[/red]: {WROTE}" in result.out
    assert "./[/red]" in run("info --model './[/red]'").out


def test_lost_samples_are_black_and_said_and_json_stays_json(run: Any, tmp_path: Path) -> None:
    flow = jf.load("./plain")
    flow.blocks[0].proj_out.bias[:4] = 200  # exp(200) overflows float32: so does the exact inverse
    flow.save_pretrained(tmp_path / "overflowing")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = run(f"sample --model {tmp_path}/overflowing --num 2 --compare --out {tmp_path} --json {tmp_path}/f")
    assert result.code == 0
    for line in result.err.splitlines():
        assert line.startswith("warning: 2 of 2 samples: the exact inverse itself overflows")
    shown = figures(f"{tmp_path}/f")
    assert shown["runs"]["auto"]["status"]["nonfinite"] == 2
    assert shown["runs"]["auto"]["certificate"] is None
    assert shown["error"] == {"max": 0, "mean": 0}  # both answers say that there is none
    with np.load(tmp_path / SHARD) as arrays:
        assert not arrays["arr_0"].any()


def test_a_warning_is_one_line_and_warnings_of_the_caller_are_left_alone(run: Any, tmp_path: Path) -> None:
    show = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = run(f"sample --model plain --num 1 --guidance 1 --strategy jacobi-1 --out {tmp_path}")
    assert result.code == 0
    assert result.err == "warning: guidance without labels at attn_temperature 1 changes nothing\n"
    assert warnings.showwarning is show


# ---------------------------------------------------------------------------------------------------- sample --report


@pytest.mark.parametrize(
    "strategy",
    ["sequential", "Original", "jacobi", "Jacobi-5", "gs-jacobi:4-3", "window:5", "[2-4-3-5]", "[0/2-4/2-3-5]"],
)
def test_sample_takes_its_guesses_from_a_report(strategy: str, run: Any, tmp_path: Path) -> None:
    result = run(
        f"sample --model tough --num 4 --strategy {strategy} --report report.json --out {tmp_path} --json {tmp_path}/f"
    )
    assert (result.code, result.err) == (0, "")
    flow, labels = jf.load("./tough"), torch.tensor([0, 1, 2, 0])
    plan = jf.Strategy.parse(strategy, jf.Report.load("report.json"))
    assert [type(solver.guess) for solver in plan.solvers] == [jf.Zeros, jf.MeanAffine, jf.MeanAffine]
    want = jf.sample(flow, 4, labels, strategy=plan, progress=False)
    with np.load(tmp_path / SHARD) as arrays:
        assert np.array_equal(arrays["arr_0"], quantize(want.images).permute(0, 2, 3, 1).numpy())
        without = jf.sample(flow, 4, labels, strategy=strategy, progress=False)
        if strategy in ("Jacobi-5", "[2-4-3-5]"):  # few sweeps do not forget where they started
            assert not np.array_equal(arrays["arr_0"], quantize(without.images).permute(0, 2, 3, 1).numpy())
    shown = figures(f"{tmp_path}/f")
    assert list(shown["runs"]) == [strategy]
    assert shown["runs"][strategy]["sweeps"] == [block.sweeps for block in want.stats]
    assert shown["runs"][strategy]["network_calls"] == want.network_calls


def test_a_report_goes_with_compare_tolerance_and_guidance(run: Any, tmp_path: Path) -> None:
    result = run(
        f"sample --model tough --num 3 --strategy window:5 --report report.json --tolerance 1e-5 --compare {GUIDED} "
        f"--out {tmp_path} --json {tmp_path}/f"
    )
    assert result.code == 0
    assert result.err.startswith("warning: --report report.json: calibrated under other guidance")
    plan = jf.Strategy.parse("window:5", jf.Report.load("report.json"), tolerance=1e-5)
    want = jf.sample(jf.load("./tough"), 3, torch.arange(3), strategy=plan, guidance=GUIDANCE, progress=False)
    shown = figures(f"{tmp_path}/f")
    assert list(shown["runs"]) == ["sequential", "window:5"]
    assert shown["runs"]["window:5"]["certificate"] <= 1e-5
    assert shown["runs"]["window:5"]["sweeps"] == [block.sweeps for block in want.stats]
    assert shown["error"]["max"] < 1e-3


# ----------------------------------------------------------------------------------------------------------- calibrate


def cells(values: Any) -> list[str]:
    """How a table prints numbers."""
    return [f"{value:.2f}" for value in values]


def assert_tables(out: str, report: jf.Report) -> None:
    """Every block's row is there, each number whole and in its place, and no line is wider than the terminal."""
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
    for tolerance in TOLERANCES:
        assert f"proposed to {tolerance:g}: {jf.Strategy.from_report(report, tolerance)}" in screen
    assert ("over 3 classes" in out.lower()) == bool(report.class_metrics)
    assert ("guided" in out.split("\n")[0]) == (report.settings.guidance is not None)
    assert out.startswith(f"{report.settings.num_images} images")


def assert_figures(shown: Any, report: jf.Report) -> None:
    """The figures are the report's; a NaN is null."""
    assert report.components is not None
    assert (shown["num_images"], shown["norm"]) == (report.settings.num_images, report.settings.norm)
    assert shown["igm"] == [dict(row) for row in report.igm]
    assert shown["guess"] == [report.best_guess(i) for i in range(report.num_blocks)]
    assert shown["components"] == [part._asdict() for part in report.components]
    assert (shown["crm"], shown["crm_percent"]) == (list(report.crm), list(report.crm_percent))
    assert shown["tough_blocks"] == list(report.tough_blocks)
    assert shown["gamma"] == pytest.approx([np.mean(norms) for norms in report.gamma])
    assert set(shown["mean_sweeps"]) == set(report.traces)
    for start in report.traces:
        for tolerance in TOLERANCES:
            key = f"{tolerance:g}"
            for guess in GUESSES:
                want = report.mean_sweeps(start, tolerance, guess)
                assert shown["mean_sweeps"][start][guess][key] == list(want)
            for metric in ("crm", "gamma"):
                value = report.rank_correlation(metric, start, tolerance)  # type: ignore[arg-type]
                assert shown["rank_correlation"][metric][start][key] == (None if np.isnan(value) else value)
    assert shown["proposed"] == {f"{t:g}": str(jf.Strategy.from_report(report, t)) for t in TOLERANCES}


CALIBRATIONS: dict[str, dict[str, Any]] = {
    "--model tough": {},
    "--model tough --per-class --norm fro": {"norm": "fro", "per_class": True},
    "--model tough --norm 1 --batch-size 4 --seed 5": {"norm": 1, "batch_size": 4, "seed": 5},
    "--model tough --segments 1 --traced 100": {"segments": 1, "traced": 100},
    "--model tough --segments 16 --traced 1": {"segments": 16, "traced": 1},
    "--model tough --clean": {"clean": True},
    "--model tough --unconditional": {"labels": None},
    f"--model tough --batch-size 4 {GUIDED}": {"batch_size": 4, "guidance": GUIDANCE},
    "--model volume --per-class": {"per_class": True},
    "--model free": {},  # no classes, and uniform noise
    "--model model": {},  # none of two blocks is tough
}


@cache
def calibration(options: str) -> jf.Report:
    """What the library measures under these options."""
    return calibrated(options.split()[1], "pets", **CALIBRATIONS[options])


@pytest.mark.parametrize("options", CALIBRATIONS)
def test_calibrate_writes_and_prints_what_the_library_measures(options: str, run: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    given = options if "--segments" in options else f"{options} --segments 4 --traced 3"
    result = run(f"calibrate --images pets {given} --out {path} --json {tmp_path}/f")
    assert (result.code, result.err) == (0, "")
    assert os.listdir(path.parent) == ["report.json"]
    report, model = jf.Report.load(path), options.split()[1]
    want = calibration(options)
    assert report.to_json() == want.to_json()
    report.check(jf.load(f"./{model}"))
    assert_tables(result.out, want)
    shown = figures(f"{tmp_path}/f")
    assert_figures(shown, want)
    assert (shown["model"], shown["images"], shown["clean"]) == (model, "pets", "--clean" in options)
    assert shown["report"] == str(path)
    assert f"wrote {path}\n" in result.out


def test_settings_that_matter_change_the_report() -> None:
    """Else the comparison above would show little."""
    reports = [calibration(options) for options in CALIBRATIONS]
    assert len({json.dumps(report.to_json()) for report in reports}) == len(reports)


def printed_command(out: str) -> str:
    """What follows "use it: jacobiflow"."""
    match = re.search(r"^use it: jacobiflow (sample .*)$", out, re.MULTILINE)
    assert match is not None
    return match[1]


@pytest.mark.parametrize("model", ["tough", "model", "free"])
def test_the_proposed_command_samples_as_the_report_says(model: str, run: Any, tmp_path: Path) -> None:
    line = f"calibrate --model {model} --images pets --segments 4 --traced 3 --out {tmp_path}/r.json"
    result = run(f"{printed_command(run(line).out)} --num 3 --out {tmp_path}")
    assert (result.code, result.err) == (0, "")
    flow, plan = jf.load(f"./{model}"), jf.Strategy.from_report(jf.Report.load(tmp_path / "r.json"), 1e-2)
    labels = torch.arange(3) if flow.config.num_classes else None
    want = jf.sample(flow, 3, labels, strategy=plan, progress=False)
    with np.load(tmp_path / SHARD) as arrays:
        assert np.array_equal(arrays["arr_0"], quantize(want.images).permute(0, 2, 3, 1).numpy())
    exact = jf.sample(flow, 3, labels, strategy="sequential", progress=False)
    assert (want.images - exact.images).abs().max() < 0.3


@pytest.mark.parametrize("option", [GUIDED, "--unconditional"])
def test_the_proposed_command_samples_under_what_was_calibrated(option: str, run: Any, tmp_path: Path) -> None:
    """The sweeps and guesses are those of the guided map, and of the labels, that the report is of."""
    line = f"calibrate --model tough --images pets {option} --segments 4 --traced 3 --out {tmp_path}/r.json"
    result = run(f"{printed_command(run(line).out)} --num 3 --out {tmp_path}")
    assert (result.code, result.err) == (0, "")
    guidance, labels = (GUIDANCE, torch.arange(3)) if option == GUIDED else (None, None)
    plan = jf.Strategy.from_report(jf.Report.load(tmp_path / "r.json"), 1e-2)
    want = jf.sample(jf.load("./tough"), 3, labels, strategy=plan, guidance=guidance, progress=False)
    with np.load(tmp_path / SHARD) as arrays:
        assert np.array_equal(arrays["arr_0"], quantize(want.images).permute(0, 2, 3, 1).numpy())


def test_the_proposed_command_can_be_pasted_whatever_the_names(run: Any, tmp_path: Path) -> None:
    jf.load("./model").save_pretrained(tmp_path / "my model")
    result = run(
        f"calibrate --model '{tmp_path}/my model' --images pets --segments 4 --traced 2 --out '{tmp_path}/my $1 r.json'"
    )
    assert result.code == 0
    words = shlex.split(printed_command(result.out))
    assert words[words.index("--model") + 1] == f"{tmp_path}/my model"
    assert words[words.index("--report") + 1] == f"{tmp_path}/my $1 r.json"
    assert words[-1] == f"{tmp_path}/my $1 r.json"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The images and labels of every calibration from here on."""
    module: Any = importlib.import_module("jacobiflow.cli.calibrate")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    measure: Callable[..., jf.Report] = module.measure

    def look(flow: Any, images: Any, labels: torch.Tensor, **settings: Any) -> jf.Report:
        seen.append((images[torch.arange(len(images))], labels))
        return measure(flow, images, labels, **settings)

    monkeypatch.setattr(module, "measure", look)
    return seen


def test_num_draws_some_images_by_the_seed(run: Any, tmp_path: Path, measured: list[Any]) -> None:
    data = load_images("pets", 8, 1)
    assert data.labels is not None
    drawn = []
    for seed in (0, 0, 1, 2):
        line = f"--segments 2 --traced 1 --num 4 --seed {seed} --out {tmp_path}/{len(drawn)}.json --json {tmp_path}/f"
        assert run(f"calibrate --model model --images pets {line}").code == 0
        assert figures(f"{tmp_path}/f")["num_images"] == 4
        noisy = noisy_images(data, torch.arange(9), Noise("gaussian", 0.1), seed)
        images, labels = measured[-1]
        places = [next(i for i in range(9) if torch.equal(noisy[i], image)) for image in images]
        assert len(set(places)) == 4, "an image is drawn twice"
        assert labels.tolist() == data.labels[places].tolist()
        drawn.append(tuple(places))
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()


@pytest.mark.parametrize("num", [9, 10, 1000])
def test_num_of_all_images_takes_each_once(num: int, run: Any, tmp_path: Path, measured: list[Any]) -> None:
    line = f"calibrate --model model --images pets --segments 2 --traced 1 --num {num} --out {tmp_path}/r --clean"
    assert run(line).code == 0
    data = load_images("pets", 8, 1)
    assert torch.equal(measured[0][0], data.batch(slice(None))[0])
    assert torch.equal(measured[0][1], data.labels)


def test_images_without_labels_are_calibrated_without(run: Any, tmp_path: Path) -> None:
    for i in range(4):
        Image.new("L", (8, 8), 60 * i).save(tmp_path / f"{i}.png")
    line = f"calibrate --model model --images {tmp_path} --segments 2 --traced 2 --out {tmp_path}/r.json"
    assert run(line).code == 0
    assert not jf.Report.load(tmp_path / "r.json").settings.labelled
    result = run(f"{line} --per-class")
    assert result.code == 2
    assert re.fullmatch(
        r"error: --per-class: needs a model with classes and labelled images, without --unconditional\n", result.err
    )


def test_the_bundled_digits(run: Any, tmp_path: Path, measured: list[Any]) -> None:
    line = f"--images digits --num 8 --traced 2 --out {tmp_path}/r.json --json {tmp_path}/f"
    result = run(f"calibrate --model digits-p1 {line}")
    assert (result.code, result.err) == (0, "")
    report, flow = jf.Report.load(tmp_path / "r.json"), jf.load("digits-p1")
    report.check(flow)
    assert (report.num_tokens, report.num_blocks, report.settings.segments) == (64, 4, 8)
    assert_tables(result.out, report)
    assert_figures(figures(f"{tmp_path}/f"), report)
    places = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[:8].sort().values
    noise = Noise("gaussian", flow.config.noise_std) if flow.config.noise_std else Noise("uniform")
    assert torch.equal(measured[0][0], noisy_images(digits(), places, noise))
    result = run(f"{printed_command(result.out)} --num 2 --out {tmp_path} --json {tmp_path}/f")
    assert (result.code, result.err) == (0, "")


PATHOLOGICAL = {
    "as the paper's": ((5.4e5, 9.89, 9.12), (1.6, 2.3, 0.4)),  # Img64cond in Table 1, block 0
    "overflow": ((float("inf"), 9.89, 9.12), (1.0, 1.0, 1.0)),
    "nearly overflow": ((3.2e37, 9.89, 9.12), (1.0, 2.0, 3.0)),
}


@pytest.mark.parametrize("case", PATHOLOGICAL)
def test_huge_numbers_stay_on_their_line(case: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    igm, factors = PATHOLOGICAL[case]
    module: Any = importlib.import_module("jacobiflow.cli.calibrate")
    measure: Callable[..., jf.Report] = module.measure

    def huge(*arguments: Any, **settings: Any) -> jf.Report:
        report = measure(*arguments, **settings)
        parts = tuple(Components(10.0**i, 123.4, 22.3) for i in (1, 2, 4))
        worst = Metrics(tuple(dict(zip(GUESSES, igm, strict=True)) for _ in range(3)), parts)
        classes = {
            label: replace(
                worst, igm=tuple({guess: value * factor for guess, value in row.items()} for row in worst.igm)
            )
            for label, factor in enumerate(factors)
        }
        return replace(report, metrics=dict.fromkeys(report.metrics, worst), class_metrics=classes)

    monkeypatch.setattr(module, "measure", huge)
    result = run(
        f"calibrate --model tough --images pets --segments 4 --traced 2 --per-class --out {tmp_path}/r.json "
        f"--json {tmp_path}/f"
    )
    assert (result.code, result.err) == (0, "")
    screen = result.out[: result.out.index("proposed")].splitlines()
    assert max(map(len, screen)) <= 80
    for line in screen:  # a folded cell goes on in a line that has no block number
        assert not re.match(r"\s+\S+(\s|$)", line) or re.match(r"\s+([0-2] |IGM)", line), f"folded: {line}"
    shown = figures(f"{tmp_path}/f")
    assert shown["igm"][0]["latent"] == (None if case == "overflow" else igm[0])
    assert jf.Report.load(tmp_path / "r.json").igm[0]["latent"] == igm[0]


def test_figures_do_not_overwrite_the_report(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    result = run(f"calibrate --model model --images pets --segments 2 --traced 1 --out {path} --json {path}")
    assert result.code == 2, "the report is lost"
    assert str(path) in result.err
    assert not path.exists()


def test_an_interrupted_calibration_leaves_nothing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at its start nor in the middle of its images."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = files()
    line = "calibrate --model model --images pets --segments 2 --traced 1 --out out-x/deep/r.json --json f.json"
    for place, name in (("jacobiflow.cli.calibrate", "measure"), ("jacobiflow.calibration.calibrate", "gamma_norm")):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module(place), name, interrupted)
            result = run(line)
        assert (result.code, result.out, result.err) == (130, "", "interrupted\n")
        assert files() == before


def test_a_flow_that_overflows_is_one_line(run: Any, tmp_path: Path) -> None:
    flow = jf.load("./free")
    flow.blocks[0].proj_out.bias[:4] = 200
    flow.save_pretrained(tmp_path / "overflowing")
    result = run(
        f"calibrate --model {tmp_path}/overflowing --images pets --segments 2 --traced 2 --out {tmp_path}/r.json"
    )
    assert result.code == 2
    assert re.fullmatch(r"error: 2 of 2 fresh latents overflow in the exact inverse of block 0; .+\n", result.err)
    assert not (tmp_path / "r.json").exists()


# --------------------------------------------------------------------------------------------------------------- trace


def png(path: Path) -> np.ndarray:
    """Pixels of a file, which must be a PNG."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def assert_traced(
    folder: Path, shown: Any, model: str, report: jf.Report, num: int, labels: torch.Tensor | None,
    strategy: str | None = None, denoise: float = 0.0, seed: int = 0,
) -> None:  # fmt: skip
    """The sheets show the library's samples, and the figures are their errors; 8 pixels are drawn as 64."""
    flow, guidance = jf.load(f"./{model}"), report.settings.guidance
    plan = jf.Strategy.parse(strategy, report) if strategy else jf.Strategy.from_report(report, 1e-2)
    same: dict[str, Any] = {"guidance": guidance, "progress": False, "certify": False}
    exact = jf.sample(flow, num, labels, seed, strategy="sequential", denoise=denoise, return_trace=True, **same)
    assert exact.trace is not None
    columns = len(exact.trace)
    assert columns == 1 + report.num_blocks + (denoise > 0)
    few = min(num, 4)
    sampling_sheet = png(folder / "sampling.png")
    lines = torch.stack([images[:few] for images in exact.trace], dim=1).flatten(0, 1)
    assert np.array_equal(sampling_sheet[22:], np.asarray(image_grid(lines, columns, 8)))

    raw = exact.trace[report.num_blocks]
    sheet, height = png(folder / "guesses.png"), 22 + 8 * 8 + 4
    assert len(sheet) == height * (len(shown["guesses"]) + 1)
    most = max(report.slowest_sweeps("noise", 1e-2))
    least = max(1, most // 3)
    choices = {f"guess by IGM, {plan}": plan}
    for sweeps in (least, 2 * most // 3, most):
        choices[f"guess by IGM, Jacobi-{sweeps}"] = jf.Strategy.parse(f"jacobi-{sweeps}", report)
    for name, guess in (("0", jf.Zeros()), ("z", jf.Latent())):
        solver = jf.Solver(jf.Whole(), guess, jf.MaxSweeps(least))
        choices[f"guess {name}, Jacobi-{least}"] = jf.Strategy.uniform(solver, report.num_blocks)
    assert {row["name"] for row in shown["guesses"]} == set(choices)
    for i, row in enumerate(shown["guesses"]):
        got = jf.sample(flow, num, labels, seed, strategy=choices[row["name"]], **same).images
        assert row["max_error"] == pytest.approx(float((got - raw).abs().max()))
        assert row["mean_error"] == pytest.approx(float((got - raw).abs().mean()))
        grid = np.asarray(image_grid(got, num, 8))
        assert np.array_equal(sheet[i * height + 22 : (i + 1) * height, : grid.shape[1]], grid), row["name"]
        assert f"error max {row['max_error']:.1e}, mean {row['mean_error']:.1e}" in row["caption"]
    assert np.array_equal(sheet[-height + 22 :, : grid.shape[1]], np.asarray(image_grid(raw, num, 8)))

    compared = jf.sample(flow, num, labels, seed, strategy=plan, denoise=denoise, **same)
    sheet = png(folder / "comparison.png")
    assert len(sheet) == 3 * height
    for i, images in enumerate((exact.images, compared.images)):
        grid = np.asarray(image_grid(images, num, 8))
        assert np.array_equal(sheet[i * height + 22 : (i + 1) * height, : grid.shape[1]], grid)
    assert (shown["model"], shown["num"], shown["seed"], shown["strategy"]) == (model, num, seed, str(plan))


def test_trace_draws_the_report_and_samples(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    result = run(f"trace --model tough --report report.json --num 5 --out {out} --json {tmp_path}/f")
    assert (result.code, result.err) == (0, "")
    written = ["comparison.png", "convergence.png", "guesses.png", "sampling.png", "segments.png"]
    assert sorted(os.listdir(out)) == written
    shown = figures(f"{tmp_path}/f")
    assert_traced(out, shown, "tough", jf.Report.load("report.json"), 5, torch.tensor([0, 1, 2, 0, 1]), denoise=1.0)
    two, one = png(out / "convergence.png").shape, png(out / "segments.png").shape
    assert two[0] == one[0] > 400
    assert two[1] == 2 * one[1] > 1000  # a panel from images, and one from noise
    lines = result.out.splitlines()
    assert lines[:-1] == [row["caption"] for row in shown["guesses"]]
    for name in written:
        assert name in lines[-1]
    assert lines[-1].startswith("wrote ") and lines[-1].endswith(f" to {out}")


TRACES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "free": ({}, "--num 1", {"num": 1, "labels": None}),  # no classes, no noise to remove
    "model": (  # no tough block
        {}, "--num 3 --labels 2 --strategy [1-4-2-3] --seed 3 --denoise 0.5",
        {"num": 3, "labels": torch.tensor([2, 2, 2]), "strategy": "[1-4-2-3]", "seed": 3, "denoise": 0.5},
    ),
    "tough": (
        {"guidance": GUIDANCE}, "--num 20 --strategy window:5",
        {"num": 20, "labels": torch.arange(20) % 3, "strategy": "window:5", "denoise": 1.0},
    ),
    "volume": ({}, "--num 2 --denoise 0", {"num": 2, "labels": torch.arange(2)}),
}  # fmt: skip


@pytest.mark.parametrize("model", TRACES)
def test_trace_of_other_flows_and_settings(model: str, run: Any, tmp_path: Path) -> None:
    settings, options, given = TRACES[model]
    report = calibrated(model, "pets", **settings)
    report.save(tmp_path / "r.json")
    out = tmp_path / "out"
    result = run(f"trace --model {model} --report {tmp_path}/r.json {options} --out {out} --json {tmp_path}/f")
    assert (result.code, result.err) == (0, "")
    assert_traced(out, figures(f"{tmp_path}/f"), model, report, **given)
    written = {"comparison.png", "convergence.png", "guesses.png", "sampling.png"}
    assert set(os.listdir(out)) == written | ({"segments.png"} if report.tough_blocks else set())
    assert ("segments.png" in result.out) == bool(report.tough_blocks)
    panels = 1 if report.settings.guidance else 2
    assert png(out / "convergence.png").shape[1] == panels * 728


def test_an_interrupted_trace_leaves_nothing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.import_module("jacobiflow.cli.trace")
    draw, calls = module.sample, []

    def interrupted(*arguments: Any, **settings: Any) -> jf.Samples:
        calls.append(settings)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*arguments, **settings)

    monkeypatch.setattr(module, "sample", interrupted)
    before = files()
    result = run("trace --model tough --report report.json --num 1 --out out-x")
    assert (result.code, result.out, result.err) == (130, "", "interrupted\n")
    assert files() == before


def test_a_file_is_no_mend_where_none_is_taken(run: Any, tmp_path: Path) -> None:
    jf.Strategy.uniform(jf.Solver(jf.Window(4)), 3).save(tmp_path / "three.json")
    result = run(
        f"trace --model tough --report report.json --num 1 --strategy {tmp_path}/three.json --out {tmp_path}/o"
    )
    if result.code:
        assert ".json file" not in result.err, "asks for what it refuses"


# ------------------------------------------------------------------------------------------------------ other commands


def test_convert_then_sample(run: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = jf.TarFlowConfig(3, 4, 2, channels=64, num_blocks=2, layers_per_block=1, num_classes=2)
    flow = jf.TarFlow(config)
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.02)
    flow.to_original(tmp_path / "original.pth")
    result = run(
        f"convert {tmp_path}/original.pth --patch-size 2 --noise-std 0.2 --out {tmp_path}/folder --json {tmp_path}/f"
    )
    assert (result.code, result.out, result.err) == (0, f"wrote the model folder {tmp_path}/folder\n", "")
    read = jf.load(tmp_path / "folder")
    assert read.config.noise_std == 0.2
    for name, tensor in flow.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)
    shown = figures(f"{tmp_path}/f")
    assert (shown["model"], shown["in_channels"], shown["num_classes"]) == (f"{tmp_path}/folder", 3, 2)

    assert run(f"sample --model {tmp_path}/folder --num 2 --denoise 1 --out {tmp_path}/out").code == 0
    with np.load(tmp_path / "out" / SHARD) as arrays:
        assert arrays["arr_0"].shape == (2, 4, 4, 3)


def test_info(run: Any, tmp_path: Path) -> None:
    result = run(f"info --model model --json {tmp_path}/f")
    assert (result.code, result.err) == (0, "")
    shown, flow = figures(f"{tmp_path}/f"), jf.load("./model")
    assert shown["parameters"] == sum(parameter.numel() for parameter in flow.parameters())
    assert (shown["num_tokens"], shown["token_channels"], shown["noise_std"]) == (16, 4, 0.1)
    for name, value in shown.items():
        assert name in result.out
        assert str(value) in result.out.replace(",", "")


def test_train_writes_a_model_that_sample_takes(run: Any, tmp_path: Path) -> None:
    line = (
        f"train --images fashion-512 {TINY} --steps 3 --sample-every 2 --warmup 2 --out {tmp_path}/run "
        f"--json {tmp_path}/f"
    )
    result = run(line)
    assert (result.code, result.out, result.err) == (0, f"wrote the model folder {tmp_path}/run\n", "")
    written = {"README.md", "checkpoint.pt", "config.json", "metrics.jsonl", "model.safetensors", "samples-000002.png"}
    assert set(os.listdir(tmp_path / "run")) == written
    with Image.open(tmp_path / "run" / "samples-000002.png") as sheet:
        assert sheet.size == (10 * (28 * 2 + 2) + 2, 2 * (28 * 2 + 2) + 2)
    shown = figures(f"{tmp_path}/f")
    assert shown["last_step"]["step"] == shown["training"]["steps"] == 3
    assert (shown["num_classes"], shown["noise_std"], shown["training"]["noise"]["kind"]) == (10, 0.1, "gaussian")

    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert run(line).code == 0  # is done already
    assert figures(f"{tmp_path}/f")["last_step"] == shown["last_step"]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    assert run(f"sample --model {tmp_path}/run --num 2 --out {tmp_path}/out").code == 0


def test_train_options(run: Any, tmp_path: Path) -> None:
    line = (
        f"train --images good --image-size 8 {TINY.replace('--patch-size 7', '--patch-size 4')} --batch-size 3 "
        f"--steps 1 --noise uniform --volume-preserving --unconditional --out {tmp_path}"
    )
    assert run(line).code == 0
    config = jf.load(tmp_path).config
    assert (config.nvp, config.num_classes, config.noise_std, config.in_channels) == (False, 0, 0.0, 1)


# -------------------------------------------------------------------------------------------------------------- errors

SAMPLE, TRAIN = "sample --model model --out out-x", "train --steps 2 --image-size 8 --out out-x"
REPORTED = "sample --model tough --num 1 --report report.json --out out-x"
MEASURE = "calibrate --model tough --images pets --segments 4 --traced 2 --out out-x/r.json"
TRACE = "trace --model tough --num 2 --out out-x"
ERRORS = {
    f"{SAMPLE} --labels 99": "label 99: this flow has classes 0 to 2",
    f"{SAMPLE} --labels -0x": "--labels -0x: give balanced, random, none, whole numbers with commas between",
    f"{SAMPLE} --labels abc": "--labels abc: give balanced",
    f"{SAMPLE} --labels 1,,2": "--labels 1,,2: give balanced",
    f"{SAMPLE} --num 0": "'--num'",
    f"{SAMPLE} --num -3": "'--num'",
    f"{SAMPLE} --num many": "'--num'",
    f"{SAMPLE} --batch-size 0": "'--batch-size'",
    f"{SAMPLE} --seed -1": "'--seed'",
    f"{SAMPLE} --seed 99999999999999999999": "'--seed'",
    f"{SAMPLE} --strategy gs-jacobi:17": "'gs-jacobi:17': G 17 asks for more segments than there are tokens, 16",
    f"{SAMPLE} --strategy gs-jacobi:0": "'gs-jacobi:0': G 0",
    f"{SAMPLE} --strategy window:0": "'window:0': N 0: give a positive",
    f"{SAMPLE} --strategy jacobi-0": "'jacobi-0': J 0: give a positive",
    f"{SAMPLE} --strategy quickest": "strategy 'quickest': unknown; give auto, sequential",
    f"{SAMPLE} --strategy quickest --compare": "strategy 'quickest': unknown",
    f"{SAMPLE} --strategy [1-4-3": "strategy '[1-4-3': give four fields",
    f"{SAMPLE} --strategy [1-4-x-5]": "J 'x' is not a whole number",
    f"{SAMPLE} --strategy [2-4-3-5]": "Stack names block 2, the flow has 0 to 1",
    f"{SAMPLE} --strategy missing.json": "strategy missing.json: cannot be read (No such file or directory)",
    f"{SAMPLE} --strategy broken.json": "strategy broken.json: ",
    f"{SAMPLE} --strategy five.json": "strategy for 5 blocks, but the flow has 2",
    f"{SAMPLE} --tolerance -0.1": "tolerance -0.1: give 0",
    f"{SAMPLE} --tolerance nan": "tolerance nan: give 0",
    f"{SAMPLE} --guidance -1": "guidance weight -1.0: give 0",
    f"{SAMPLE} --guidance nan": "guidance weight nan: give 0",
    f"{SAMPLE} --guidance 1 --guidance-on colour": "guidance on 'colour': give 'both', 'scale' or 'shift'",
    f"{SAMPLE} --guidance-on colour": "guidance on 'colour'",
    f"{SAMPLE} --guidance 1 --attn-temperature 0": "attn_temperature 0.0: give a positive",
    f"{SAMPLE} --denoise -1": "--denoise -1.0: give 0",
    f"{SAMPLE} --device abacus": "--device abacus: not available here; give cpu",
    f"{SAMPLE} --device meta": "--device meta: not available here; give cpu",
    f"{SAMPLE} --dtype int8": "--dtype int8: give one of float16",
    f"{SAMPLE} --json missing/f.json": "--json missing/f.json: give a file in a folder that exists",
    f"{SAMPLE} --json good": "--json good: give a file",
    f"{SAMPLE} --json file/f.json": "--json file/f.json: give a file",
    f"{SAMPLE} --quickly": "No such option: --quickly",
    f"{SAMPLE} extra": "extra",
    "sample --model model --num 1 --out file": "--out file: cannot write there (Not a directory)",
    "sample --model model --num 1 --out file/out": "--out file/out: cannot write there (Not a directory)",
    "sample --model nothing --out out-x": "'nothing': no such model; give a bundled name",
    "sample --model good --out out-x": "good/config.json: missing",
    "sample --model file --out out-x": "'file': no such model",
    "sample --model plain --out out-x --denoise 1": "noise_std is 0",
    "sample --model plain --out out-x --labels 1": "this flow is unconditional",
    "sing": "No such command 'sing'",
    "info --model nothing": "'nothing': no such model",
    "info --model model --json missing/f.json": "--json missing/f.json: give a file",
    "convert file --patch-size 2 --noise-std 0 --out out-x": "file: ",
    "convert missing.pth --patch-size 2 --noise-std 0 --out out-x": "missing.pth: cannot be read",
    "convert file --noise-std 0 --out out-x": "Missing option '--patch-size'; see ",
    "train --images good --steps 2": "Missing option '--out'; see ",
    f"{TRAIN} --images broken": "broken/cats/3.png: not a usable image",
    f"{TRAIN} --images fashion-512": "images are 1x28x28, the flow takes 1x8x8",
    f"{TRAIN} --images nowhere": "--images nowhere: neither a folder nor one of",
    f"{TRAIN} --images good --image-size 16": "8x8 pixels, smaller than 16x16",
    f"{TRAIN} --images good --batch-size 4": "--batch-size 4: there are only 3 images",
    f"{TRAIN} --images good --patch-size 3": "--patch-size 3 does not divide --image-size 8",
    f"{TRAIN} --images good --noise pink": "noise 'pink': give 'gaussian' or 'uniform'",
    f"{TRAIN} --images good --noise-std 0": "gaussian needs one above 0",
    f"{TRAIN} --images good --drop-label 1.5": "--drop-label 1.5: give a number from 0 to below 1",
    f"{TRAIN} --images good --device abacus": "--device abacus: not available here",
    f"{TRAIN} --images good --json missing/f.json": "--json missing/f.json: give a file",
    "train --images good --image-size 8 --steps 0 --out out-x": "--steps 0: give a positive whole number",
    "train --images good --image-size 8 --steps 2 --batch-size 3 --out file/out": "--out file/out: cannot write there",
    f"{REPORTED} --strategy [7-0-3-2]": "strategy '[7-0-3-2]': Stack names block 7, the flow has 0 to 2",
    f"{REPORTED} --strategy [2-0-3-2]": "strategy '[2-0-3-2]': GS 0: give a positive whole number",
    f"{REPORTED} --strategy [0-99-3-2]": "GS 99 asks for more segments than there are tokens, 16",
    f"{REPORTED} --strategy [5-2-3-2]": "strategy '[5-2-3-2]': Stack names block 5, the flow has 0 to 2",
    f"{REPORTED} --strategy [0-2-3]": "strategy '[0-2-3]': give four fields, [Stack-GS-J-Else], such as",
    f"{REPORTED} --strategy [0-2-3-4-5]": "strategy '[0-2-3-4-5]': give four fields",
    f"{REPORTED} --strategy []": "strategy '[]': give four fields",
    f"{REPORTED} --strategy [---]": "strategy '[---]': Stack '' is not a whole number",
    REPORTED: "this report has no tuning: calibrate with --chord",
    f"{REPORTED} --strategy ''": "strategy '': unknown; give auto",
    f"{REPORTED} --strategy jacobi-0": "strategy 'jacobi-0': J 0: give a positive whole number",
    f"{REPORTED} --strategy jacobi--1": "strategy 'jacobi--1': unknown; give auto",
    f"{REPORTED} --strategy [0-2-0-1]": "strategy '[0-2-0-1]': J 0: give a positive",
    f"{REPORTED} --strategy [0-2-3-0]": "strategy '[0-2-3-0]': Else 0: give a positive",
    f"{REPORTED} --strategy [0-2-3-1/2]": "Else is one number, not '1/2'",
    f"{REPORTED} --strategy [0/0-2-3-1]": "Stack '0/0' names a block twice",
    f"{REPORTED} --strategy [0/1/2-2/3-3-1]": "give GS '2/3' one number, or one for each of '0/1/2'",
    f"{REPORTED} --strategy [0/1-2-3/4/5-1]": "give J '3/4/5' one number, or one for each of '0/1'",
    f"{REPORTED} --strategy [0,1-2-3-1]": "Stack '0,1' is not a whole number, or several with slashes between",
    f"{REPORTED} --strategy [0-2-3.5-1]": "J '3.5' is not a whole number",
    f"{REPORTED} --strategy '[0-2-3-1'": "strategy '[0-2-3-1': give four fields",
    f"{REPORTED} --strategy gs-jacobi:17": "G 17 asks for more segments than there are tokens, 16",
    f"{REPORTED} --strategy [0-2-3-1] --tolerance 1e-3": "tolerance 0.001: strategy '[0-2-3-1]' stops after",
    f"{REPORTED} --strategy window.json": "--report report.json: the strategy in window.json has its own guesses",
    f"{REPORTED} --report other.json": "the report is of another flow (weights 000000000000, this ",
    f"{REPORTED} --report missing.json": "report missing.json: cannot be read (No such file or directory)",
    f"{REPORTED} --report good": "report good: cannot be read (Is a directory)",
    f"{REPORTED} --report broken.json": "report broken.json: ",
    f"{REPORTED} --report broken.txt": "make it anew with jacobiflow calibrate",
    f"{REPORTED} --report window.json": "report window.json: not a calibration report of schema_version 1; make it",
    "calibrate --model tough --images pets": "Missing option '--out'; see ",
    "calibrate --model tough --out out-x/r.json": "Missing option '--images'; see ",
    f"{MEASURE} --images empty": "empty: no image in it (looked for .bmp",
    f"{MEASURE} --images small": "small/class0/0.png: 5x5 pixels, smaller than 8x8; remove it, or enlarge it",
    f"{MEASURE} --images herd": "--images herd: 5 classes, the model has 3",
    f"{MEASURE} --images fashion-512": "--images fashion-512: images are 1x28x28, the flow takes 1x8x8; give other",
    f"{MEASURE} --images nowhere": "--images nowhere: neither a folder nor one of",
    f"{MEASURE} --images broken": "broken/cats/3.png: not a usable image",
    f"{MEASURE} --num 1": "--num 1: give at least 2 images",
    f"{MEASURE} --num 0": "--num 0: give at least 2 images",
    f"{MEASURE} --num -4": "--num -4: give at least 2 images",
    f"{MEASURE} --num many": "'--num'",
    f"{MEASURE} --norm 3": "--norm 3: give 2, fro or 1",
    f"{MEASURE} --norm ''": "--norm : give 2, fro or 1",
    f"{MEASURE} --segments 0": "count=0): give a positive whole number of segments",
    f"{MEASURE} --segments -2": "count=-2): give a positive whole number of segments",
    f"{MEASURE} --segments 17": "count=17): there are only 16 tokens; give at most 16 segments",
    f"{MEASURE} --traced 0": "--traced 0: give a positive whole number",
    f"{MEASURE} --traced -1": "--traced -1: give a positive whole number",
    f"{MEASURE} --batch-size 0": "--batch-size 0: give a positive whole number",
    f"{MEASURE} --seed -1": "'--seed'",
    f"{MEASURE} --per-class --unconditional": "--per-class: needs a model with classes and labelled images",
    f"{MEASURE} --model free --per-class": "--per-class: needs a model with classes and labelled images",
    f"{MEASURE} --guidance -1": "guidance weight -1.0: give 0",
    f"{MEASURE} --guidance 1 --guidance-on colour": "guidance on 'colour': give 'both', 'scale' or 'shift'",
    f"{MEASURE} --guidance 1 --attn-temperature 0": "attn_temperature 0.0: give a positive",
    f"{MEASURE} --out good": "--out good: a folder; give a file",
    f"{MEASURE} --out .": "--out .: a folder; give a file",
    f"{MEASURE} --out file/r.json": "--out file/r.json: cannot write there (Not a directory)",
    f"{MEASURE} --out file/deep/r.json": "cannot write there (Not a directory); give another",
    f"{MEASURE} --out /proc/r.json": "cannot write there (No such file or directory); give another",
    f"{MEASURE} --json missing/f.json": "--json missing/f.json: give a file in a folder that exists",
    f"{MEASURE} --json good": "--json good: give a file",
    f"{MEASURE} --model nothing": "'nothing': no such model; give a bundled name",
    f"{MEASURE} --device abacus": "--device abacus: not available here; give cpu",
    f"{MEASURE} --dtype int8": "--dtype int8: give one of float16",
    f"{MEASURE} --quickly": "No such option: --quickly",
    TRACE: "Missing option '--report'; see ",
    f"{TRACE} --report other.json": "the report is of another flow (weights 000000000000, this ",
    f"{TRACE} --model model --report report.json": "the report is of another flow",
    f"{TRACE} --report missing.json": "report missing.json: cannot be read (No such file or directory)",
    f"{TRACE} --report broken.json": "make it anew with jacobiflow calibrate",
    f"{TRACE} --report report.json --num 0": "--num 0: give 1 to 20 images",
    f"{TRACE} --report report.json --num 21": "--num 21: give 1 to 20 images",
    f"{TRACE} --report report.json --num -1": "--num -1: give 1 to 20 images",
    f"{TRACE} --report report.json --strategy quickest": "strategy 'quickest': unknown; give auto",
    f"{TRACE} --report report.json --strategy [7-2-3-2]": "Stack names block 7, the flow has 0 to 2",
    f"{TRACE} --report report.json --labels 9": "label 9: this flow has classes 0 to 2",
    f"{TRACE} --report report.json --labels x": "--labels x: give balanced",
    f"{TRACE} --report report.json --denoise -1": "--denoise -1.0: give 0 (off) or a positive rate",
    f"{TRACE} --report report.json --denoise nan": "--denoise nan: give 0 (off) or a positive rate",
    f"{TRACE} --report report.json --out file": "--out file: cannot write there (Not a directory)",
    f"{TRACE} --report report.json --json missing/f": "--json missing/f: give a file in a folder that exists",
    f"{TRACE} --report report.json --device abacus": "--device abacus: not available here",
    f"{TRACE} --report report.json --model nothing": "'nothing': no such model",
}


@pytest.mark.parametrize("line", ERRORS)
def test_bad_input_is_one_line_and_leaves_nothing(line: str, run: Any) -> None:
    before = files()
    result = run(line)
    assert result.code == 2
    assert result.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.err)
    assert ERRORS[line] in result.err
    assert files() == before


def test_a_full_disk_is_one_line_and_leaves_no_half_file(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    result = run(f"sample --model model --num 1 --strategy jacobi-1 --out {tmp_path}")
    assert (result.code, result.out, result.err) == (2, "", "error: [Errno 28] No space left on device\n")
    assert set(os.listdir(tmp_path)) <= {".lock"}


@pytest.mark.parametrize(
    "line",
    [
        "calibrate --model model --images pets --segments 2 --traced 1 --out",
        "trace --model tough --report report.json --out",
    ],
)
def test_a_full_disk_leaves_no_half_report_and_no_half_picture(
    line: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    result = run(f"{line} {tmp_path}" + "/r.json" * line.startswith("calibrate"))
    assert (result.code, result.out, result.err) == (2, "", "error: [Errno 28] No space left on device\n")
    assert os.listdir(tmp_path) == []


def test_an_exhausted_memory_is_one_line(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(importlib.import_module("jacobiflow.storage.sample"), "sample", exhausted)
    result = run(f"{SAMPLE} --out {tmp_path}")
    assert (result.code, result.out, result.err) == (2, "", "error: out of memory; give a smaller --batch-size\n")


def test_an_interruption_is_exit_130_and_the_same_command_goes_on(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Any:
        if "batch_size" not in options:  # the check of the settings, which draws a sample too
            return jf.sample(*arguments, **options)
        raise KeyboardInterrupt

    line = f"sample --model model --num 2 --strategy jacobi-1 --out {tmp_path}"
    before = files()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("jacobiflow.storage.sample"), "sample", interrupted)
        result = run(line)
    assert (result.code, result.out, result.err) == (130, "", "interrupted\n")
    assert files() == before
    assert sorted(os.listdir(tmp_path)) == [".lock", "manifest.json", "strategy.json"]
    assert run(line).code == 0
    want = jf.sample(jf.load("./model"), 2, torch.arange(2), strategy="jacobi-1", progress=False)
    with np.load(tmp_path / SHARD) as arrays:
        assert np.array_equal(arrays["arr_0"], quantize(want.images).permute(0, 2, 3, 1).numpy())


def test_an_interruption_before_the_first_sample_leaves_nothing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "sample", interrupted)
    before = files()
    result = run(f"{SAMPLE} --compare")
    assert (result.code, result.out, result.err) == (130, "", "interrupted\n")
    assert files() == before
