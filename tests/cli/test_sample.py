"""`jacobiflow sample`: it writes what the library draws, resumes, and compares; tests/sampling/folder has the rest."""

from __future__ import annotations

import json
import os
import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import jacobiflow as jf
from jacobiflow.cli.options import parse_labels
from jacobiflow.cli.output import format_rate, format_speed_up
from jacobiflow.comparison.baselines import original_sampler
from jacobiflow.jobs import JobStore
from jacobiflow.models import memory
from jacobiflow.models.latents import draw_labels
from jacobiflow.utils.timing import describe_machine
from tests.helpers.running import figures
from tests.helpers.scoring import levels


def drawn(out: Path) -> dict[str, Any]:
    """The arrays of the first shard."""
    with np.load(out / "shards" / "00000.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("strategy", ["[1-4-3-5]", "window.json"])
def test_it_writes_what_the_library_draws(strategy: str, run: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    line = f"sample --model model --num 5 --batch-size 3 --labels 0,2 --seed 4 --strategy {strategy} --out {out}"
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = run(f"{line} --json {tmp_path}/f.json")
    assert result.code == 0
    assert sorted(os.listdir(out)) == [
        ".lock", "manifest.json", "outcome.json", "samples.png", "shards", "strategy.json", "units"
    ]  # fmt: skip
    labels = torch.tensor([0, 2, 0, 2, 0])
    want = jf.sample(jf.load("./model"), 5, labels, 4, strategy=strategy, batch_size=3)
    assert want.residual is not None
    found = drawn(out)
    assert np.array_equal(found["arr_0"], levels(want.images))
    assert found["labels"].tolist() == labels.tolist()
    with Image.open(out / "samples.png") as sheet:
        assert sheet.size == (5 * (8 * 28 + 4) + 4, 8 * 28 + 8 + 40)  # 8 pixels are drawn as 224, below the class

    entries = figures(tmp_path / "f.json")
    assert [entries["spec"][name] for name in ("num", "batch_size", "seed")] == [5, 3, 4]
    assert (entries["version"], entries["machine"]) == (jf.__version__, describe_machine())
    head = f"model: 5 samples by {strategy} on cpu, batch size 3\nsettings: no guidance, no denoising\ndrew 5 in "
    assert result.out.startswith(head)
    assert f" s: {format_rate(entries['num_new'], entries['seconds'])} a second\n" in result.out
    assert f"wrote {out}/samples.png, manifest.json, strategy.json, 1 shard\n" in result.out
    seconds = {name: entries["outcome"][name] for name in ("seconds", "denoise_seconds", "block_seconds")}
    assert entries["outcome"] == json.loads(json.dumps(asdict(want.outcome))) | seconds
    if strategy == "[1-4-3-5]":
        assert result.err == f"warning: {want.outcome}\n"
    else:
        assert f"\n{want.outcome}\n" in result.out


def test_compare_prints_both_rows_and_the_error(run: Any, tmp_path: Path) -> None:
    strategy, labels = "[1-4-3-5]", torch.tensor([0, 1, 2, 0])
    result = run(f"sample --model model --num 4 --strategy {strategy} --compare --out {tmp_path}/o --json {tmp_path}/f")
    assert result.code == 0
    entries = figures(tmp_path / "f")
    original, _, ours = entries["comparison"]["rows"]
    assert (original["strategy"], ours["strategy"]) == ("growing cache", strategy)
    samples = jf.sample(jf.load("./model"), 4, labels, strategy=strategy)
    flow = jf.load("./model")
    _, loop = original_sampler(flow)
    error = (loop(flow, samples.latents, labels) - samples.images).abs()
    largest = float(error.max())
    assert entries["error"]["max"] == pytest.approx(largest) != 0
    seconds = [row["seconds"]["median"] for row in (original, ours)]
    assert ours["speed_up"]["growing cache"] == pytest.approx(seconds[0] / seconds[1])
    line = f"first batch of 4 again, without denoising: original sampler {seconds[0]:.3g} s, here {seconds[1]:.3g} s: "
    rounding = jf.sample(flow, 4, labels, strategy=strategy, sensitivity=True).outcome.sensitivity
    assert entries["rounding"] == rounding
    text = f"largest difference from the original sampler {largest * 127.5:.2g} of 255 grey levels; "
    text += f"rounding changes these samples by up to {rounding * 127.5:.2g} of 255 grey levels"
    ratio = format_speed_up(ours["speed_up"]["growing cache"])
    assert f"\n{line}{ratio}\n{text}\n" in result.out
    assert (tmp_path / "o/samples.png").exists()


def test_latents_of_an_autoencoder_are_no_picture(run: Any, tmp_path: Path) -> None:
    config = jf.TarFlowConfig(4, 4, 2, width=16, num_blocks=2, layers_per_block=1, head_dim=16)
    jf.TarFlow(config).save_pretrained(tmp_path / "latents")
    for more in ("--compare", "--overwrite"):
        result = run(f"sample --model {tmp_path}/latents --num 2 --out {tmp_path}/out {more}")
        assert result.code == 0, result.err
        assert not (tmp_path / "out/samples.png").exists()
    jf.sample(jf.load(str(tmp_path / "latents")), 1).save(tmp_path / "saved")
    assert os.listdir(tmp_path / "saved") == ["samples.npz"]


def test_guidance_denoising_tolerance_and_report_reach_the_library(run: Any, tmp_path: Path) -> None:
    settings = "--guidance 0.7,attn_temperature=0.8,annealed=false,on=shift --denoise 0.9"
    line = f"sample --model model --num 3 --strategy jacobi --report report.json --tolerance 1e-5 {settings}"
    line += f" --out {tmp_path}/o"
    assert run(f"{line} --json {tmp_path}/f").code == 0
    flow = jf.load("./model").guided(jf.Guidance(0.7, annealed=False, on="shift", attn_temperature=0.8))
    plan = jf.Strategy.parse("jacobi", jf.CalibrationReport.load("report.json")).with_tolerance(1e-5)
    want = jf.sample(flow, 3, torch.arange(3), strategy=plan, settings=jf.SamplingSettings(denoise=0.9))
    assert np.array_equal(drawn(tmp_path / "o")["arr_0"], levels(want.images))
    assert jf.SampleFolder.open(tmp_path / "o").strategy() == plan
    entries = figures(tmp_path / "f")
    assert entries["settings"] == f"settings: {settings}"
    assert entries["outcome"]["residual"] <= 1e-5
    result = run(f"{line} --no-certify --sensitivity --dtype float64 --overwrite --json {tmp_path}/f")
    assert figures(tmp_path / "f")["outcome"]["residual"] is None
    assert "; float64 rounding changes samples by up to" in result.out


def test_the_same_command_again_has_nothing_to_draw(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = f"sample --model plain --num 10 --strategy jacobi-3 --batch-size 2 --shard-size 4 --out {out}"
    first = run(f"{line} --json {tmp_path}/1.json")
    assert re.search(r"\ndrew 10 in [\d.]+ s: [\d.,]+ a second\n", first.out)
    assert f"wrote {out}/samples.png, manifest.json, strategy.json, 3 shards\n" in first.out
    again = run(f"{line} --json {tmp_path}/2.json")
    assert (again.code, again.err) == (0, "")
    assert "\nall 10 were there already, and match their checksums; --overwrite draws them again\n" in again.out
    assert again.out.endswith(f"\ncomplete: {out}/samples.png, manifest.json, strategy.json, 3 shards\n")
    assert " a second" not in again.out
    one, two = figures(tmp_path / "1.json"), figures(tmp_path / "2.json")
    assert (one["outcome"], two["num_new"]) == (two["outcome"], 0)
    with Image.open(out / "samples.png") as sheet:
        assert sheet.size[0] == 10 * (8 * 14 + 4) + 4  # of all shards
    assert "\ndrew 4 (8 were there) in " in run(line.replace("--num 10", "--num 12")).out


def test_ctrl_c_says_what_is_kept(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"sample --model plain --num 6 --strategy jacobi-3 --batch-size 2 --shard-size 2 --out {tmp_path}/out"
    write = JobStore.write
    monkeypatch.setattr(JobStore, "write", lambda *args: stop() if "00001" in args[1] else write(*args))
    stop = Mock(side_effect=KeyboardInterrupt)
    result = run(line)
    kept = f"interrupted: 2 of 6 samples are kept in {tmp_path}/out; run the same command to resume\n"
    assert (result.code, result.out, result.err) == (130, "", kept)
    check = run(f"info --check {tmp_path}/out")
    assert check.out.startswith(f"{tmp_path}/out: 2 of 6 samples are drawn; wait for the run, or give the same command")
    assert len(check.out.splitlines()) == 1


def test_a_batch_that_fits_and_then_the_one_that_was_begun_with(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"sample --model model --num 5 --strategy jacobi-1 --batch-size auto --out {tmp_path}/out"
    one, five = (memory.memory_needs(jf.load("./model")).of_batch(num) for num in (1, 5))
    assert one is not None and five is not None
    for free in (1.25 * five - 10, one):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert " on cpu, batch size 4\n" in run(line).out
    failed = run(f"{line}-of-its-own")
    assert (failed.code, "a sample needs" in failed.err) == (2, True)


def test_labels(work: Path, tmp_path: Path) -> None:
    flow = jf.load(work / "model")
    (tmp_path / "labels.txt").write_text("  2, 0\n-1 , 1")
    np.save(tmp_path / "labels.npy", np.array([2, 0, -1, 1], np.int16))
    for text, want in {
        "balanced": [0, 1, 2, 0], "0,-1": [0, -1, 0, -1], "2,1,0,0,1": [2, 1, 0, 0],
        "random": draw_labels(4, 3, 9).tolist(), f"{tmp_path}/labels.txt": [2, 0, -1, 1],
        f"{tmp_path}/labels.npy": [2, 0, -1, 1],
    }.items():  # fmt: skip
        labels = parse_labels((text,), 4, flow, seed=9)
        assert labels is not None and labels.tolist() == want
    labels = parse_labels(("2", "1,0"), 4, flow, seed=9)
    assert labels is not None and labels.tolist() == [2, 1, 0, 2]
    assert parse_labels(("none",), 4, flow, seed=9) is None
    assert parse_labels(("balanced",), 4, jf.load(work / "plain"), seed=9) is None


def test_a_bad_file_of_labels_is_one_line(refuse: Any, tmp_path: Path) -> None:
    line = f"sample --model model --num 4 --strategy jacobi-1 --out {tmp_path}/out --labels {tmp_path}"
    refuse(f"{line}/missing.npy", "cannot be read as whole numbers ([Errno 2]")
    (tmp_path / "three.txt").write_text("0 1 2")
    refuse(f"{line}/three.txt", "--labels an array (3,) of int64: give 4 classes, one for each sample")
    np.save(tmp_path / "large.npy", np.array([2**64 - 1] * 4, np.uint64))
    refuse(f"{line}/large.npy", "cannot be read as whole numbers")
