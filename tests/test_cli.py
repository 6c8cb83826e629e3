"""The command line: what it writes and prints, and one line and exit 2 for all that is wrong."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flows import make_flow, to_float32
from PIL import Image

import jacobiflow as jf
from jacobiflow import sampling
from jacobiflow.cli import main
from jacobiflow.data import quantize
from jacobiflow.flows.checkpoints import export_original
from jacobiflow.latents import draw_labels

pytestmark = pytest.mark.usefixtures("one_thread")

COMMANDS = ("sample", "train", "convert", "info")
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
    (folder / "broken" / "cats" / "3.png").write_bytes((folder / "broken" / "cats" / "2.png").read_bytes()[:40])
    return folder


@pytest.fixture(autouse=True)
def _work_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line in this process; gives its exit code, stdout and stderr."""

    def run(line: str) -> SimpleNamespace:
        code: Any = 0
        try:
            main(shlex.split(line))
        except SystemExit as stop:
            code = stop.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return run


def figures(path: str) -> Any:
    """The JSON in a file; NaN and infinity, which are not JSON, fail."""

    def no_json(name: str) -> None:
        raise AssertionError(f"{path}: {name} is not JSON")

    return json.loads(Path(path).read_text(), parse_constant=no_json)


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
    assert sorted(os.listdir(out)) == ["samples.npz", "samples.png"]

    want = jf.sample(
        jf.load("./model"), 5, torch.tensor([0, 2, 0, 2, 0]), 4, strategy=strategy, batch_size=3, progress=False
    )
    with np.load(out / "samples.npz") as arrays:
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
    assert f"wrote {out}/samples.png and {out}/samples.npz\n" in result.out


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
    assert shown["error"] == {"max": float(error.max()), "mean": float(error.mean())}
    speed = shown["runs"]["sequential"]["seconds"] / shown["runs"][strategy]["seconds"]
    assert (
        f"speed-up {speed:.2f}x over the sequential loop; error max {error.max():.1e}, mean {error.mean():.1e}\n"
        in result.out
    )
    with np.load(tmp_path / "samples.npz") as arrays:
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
    with np.load(tmp_path / "samples.npz") as arrays:
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
        result = run(f"sample --model model --num 4 --seed 9 --strategy jacobi-1 --labels {given} --out {tmp_path}")
        assert (result.code, result.err) == (0, "")
        with np.load(tmp_path / "samples.npz") as arrays:
            assert (arrays["labels"].tolist() if "labels" in arrays else None) == want
    assert run(f"sample --model plain --num 2 --strategy jacobi-1 --out {tmp_path}").code == 0
    with np.load(tmp_path / "samples.npz") as arrays:
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
    assert "wrote [bold]/[/red]/samples.png and [bold]/[/red]/samples.npz\n" in result.out
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
    with np.load(tmp_path / "samples.npz") as arrays:
        assert not arrays["arr_0"].any()


def test_a_warning_is_one_line_and_warnings_of_the_caller_are_left_alone(run: Any, tmp_path: Path) -> None:
    show = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = run(f"sample --model plain --num 1 --guidance 1 --strategy jacobi-1 --out {tmp_path}")
    assert result.code == 0
    assert result.err == "warning: guidance without labels at attn_temperature 1 changes nothing\n"
    assert warnings.showwarning is show


# ------------------------------------------------------------------------------------------------------ other commands


def test_convert_then_sample(run: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = jf.TarFlowConfig(3, 4, 2, channels=64, num_blocks=2, layers_per_block=1, num_classes=2)
    flow = jf.TarFlow(config)
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.02)
    export_original(flow, tmp_path / "original.pth")
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
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
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
ERRORS = {
    f"{SAMPLE} --labels 99": "label 99: this flow has classes 0 to 2",
    f"{SAMPLE} --labels -0x": "--labels -0x: give balanced, random, none, or whole numbers",
    f"{SAMPLE} --labels abc": "--labels abc: give balanced",
    f"{SAMPLE} --labels 1,,2": "--labels 1,,2: give balanced",
    f"{SAMPLE} --num 0": "--num 0: give a positive number",
    f"{SAMPLE} --num -3": "--num -3: give a positive number",
    f"{SAMPLE} --num many": "'--num'",
    f"{SAMPLE} --batch-size 0": "batch_size=0: give a positive whole number",
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
    f"{SAMPLE} --denoise -1": "denoise=-1.0: give 0",
    f"{SAMPLE} --device abacus": "--device abacus: not available here; give cpu",
    f"{SAMPLE} --device meta": "--device meta: not available here; give cpu",
    f"{SAMPLE} --dtype int8": "dtype='int8': give one of float16",
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
    f"{TRAIN} --images good --batch-size 4": "batch_size=4: there are only 3 images",
    f"{TRAIN} --images good --patch-size 3": "patch_size=3 does not divide image_size=8",
    f"{TRAIN} --images good --noise pink": "noise 'pink': give 'gaussian' or 'uniform'",
    f"{TRAIN} --images good --noise-std 0": "gaussian needs one above 0",
    f"{TRAIN} --images good --drop-label 1.5": "drop_label=1.5: give a number from 0 to below 1",
    f"{TRAIN} --images good --device abacus": "--device abacus: not available here",
    f"{TRAIN} --images good --json missing/f.json": "--json missing/f.json: give a file",
    "train --images good --image-size 8 --steps 0 --out out-x": "steps=0: give a positive whole number",
    "train --images good --image-size 8 --steps 2 --batch-size 3 --out file/out": "--out file/out: cannot write there",
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
    assert (result.code, result.err) == (2, "error: [Errno 28] No space left on device\n")
    assert os.listdir(tmp_path) == []


def test_an_exhausted_memory_is_one_line(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampling, "sample", exhausted)
    result = run(SAMPLE)
    assert (result.code, result.err) == (2, "error: out of memory; give a smaller --batch-size\n")


def test_an_interruption_is_exit_130(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "sample", interrupted)
    before = files()
    result = run(SAMPLE)
    assert (result.code, result.out, result.err) == (130, "", "interrupted\n")
    assert files() == before
