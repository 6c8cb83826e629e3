"""`jacobiflow sample`: it writes what the library draws, resumes, and compares; tests/storage has the rest."""

from __future__ import annotations

import os
import re
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import jacobiflow as jf
from jacobiflow import memory
from jacobiflow.baselines import growing_cache_sample
from jacobiflow.cli.options import parse_labels
from jacobiflow.latents import draw_labels
from jacobiflow.storage import FirstProcessFailed, Processes
from tests.helpers.running import figures
from tests.helpers.sample_folders import read
from tests.helpers.scoring import levels


def drawn(out: Path) -> dict[str, Any]:
    """The arrays of the first shard: images and, where there are any, labels."""
    with np.load(out / "shards" / "00000.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("strategy", ["sequential", "jacobi", "[1-4-3-5]", "window.json"])
def test_it_writes_what_the_library_draws(strategy: str, run: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    line = f"sample --model model --num 5 --batch-size 3 --labels 0,2 --seed 4 --strategy {strategy} --out {out}"
    result = run(f"{line} --json {tmp_path}/f.json")
    assert result.code == 0
    assert sorted(os.listdir(out)) == [".lock", "manifest.json", "samples.png", "shards", "strategy.json"]
    labels = torch.tensor([0, 2, 0, 2, 0])
    want = jf.sample(jf.load("./model"), 5, labels, 4, strategy=strategy, batch_size=3)
    assert want.certificate is not None
    found = drawn(out)
    assert np.array_equal(found.pop("arr_0"), levels(want.images))
    assert found.pop("labels").tolist() == labels.tolist()
    assert found.pop("certificate").tolist() == want.certificate.tolist()
    assert not found.pop("resolved").any() and not found.pop("lost").any() and not found
    with Image.open(out / "samples.png") as sheet:
        assert sheet.size == (5 * (8 * 14 + 4) + 4, 8 * 14 + 8)  # 8 pixels are drawn as 112

    shown = figures(tmp_path / "f.json")
    assert (shown["model"], shown["num"], shown["batch_size"], shown["seed"]) == ("model", 5, 3, 4)
    assert list(shown["runs"]) == [shown["strategy"]] == [strategy]
    figure = shown["runs"][strategy]
    assert (figure["network_calls"], figure["token_evaluations"]) == (want.network_calls, want.token_evaluations)
    assert figure["sweeps"] == [block.sweeps for block in want.stats]
    assert figure["resolved_sequentially"] == want.resolved_sequentially == 0
    assert figure["status"]["max_sweeps" if strategy == "[1-4-3-5]" else "converged"] == 5
    assert figure["images_per_second"] == pytest.approx(5 / figure["seconds"])
    assert sum(figure["block_seconds"]) <= figure["seconds"]
    assert figure["certificate"] == pytest.approx(float(want.certificate.max()))
    assert f"wrote {out}: 1 shard, manifest.json, strategy.json, samples.png\n" in result.out
    assert shown["outcome"] == asdict(want.outcome)
    assert (f"{want.outcome}\n" in result.out) == (strategy != "[1-4-3-5]")


def test_samples_by_a_number_of_sweeps_are_not_certified_and_one_warning_says_so(run: Any, tmp_path: Path) -> None:
    line = f"sample --model model --num 5 --shard-size 2 --batch-size 2 --strategy jacobi-2 --out {tmp_path}"
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = run(f"{line} --json {tmp_path}/f.json")
    largest = figures(tmp_path / "f.json")["outcome"]["residual"]
    assert largest > 1e-2
    assert result.err == (
        "warning: 5 samples: not certified, since the strategy stops after a fixed number of sweeps; the largest "
        f"residual is {largest:.1e}\n"
    )


def test_compare_prints_both_rows_and_the_error(run: Any, tmp_path: Path) -> None:
    strategy, labels = "[1-4-3-5]", torch.tensor([0, 1, 2, 0])
    result = run(f"sample --model model --num 4 --strategy {strategy} --compare --out {tmp_path} --json {tmp_path}/f")
    assert result.code == 0
    shown = figures(tmp_path / "f")
    assert list(shown["runs"]) == ["growing cache", strategy]
    for name, row in shown["runs"].items():
        cells = next(line for line in result.out.splitlines() if line.startswith(name)).removeprefix(name).split()
        assert cells[:2] == [f"{row['seconds']:.3f}", f"{row['images_per_second']:.1f}"]
    assert cells[2:] == [
        str(row["network_calls"]), f"{row['token_evaluations']:,}", f"{row['certificate']:.1e}", "0",
    ]  # fmt: skip
    flow = jf.load("./model")
    samples = jf.sample(flow, 4, labels, strategy=strategy)
    one, other = growing_cache_sample(flow, samples.latents, labels), samples.images
    error = (one - other).abs()
    assert error.max() > 0
    assert (shown["error"]["max"], shown["error"]["mean"]) == pytest.approx((float(error.max()), float(error.mean())))
    line = f"{shown['speed_up']:.1f} times as fast as the original sampler, growing cache\n"
    assert f"{line}difference from its images: max {error.max():.1e}, mean {error.mean():.1e}\n" in result.out
    exact = run(f"sample --model model --num 2 --strategy sequential --out {tmp_path}-exact")
    assert re.search(r"^sequential .* exact +0 *$", exact.out, re.MULTILINE)
    assert np.array_equal(drawn(tmp_path)["arr_0"], levels(other))
    with Image.open(tmp_path / "samples.png") as sheet:
        assert sheet.size[1] == 32 + 3 * (32 + 8 * 14 + 8)  # the classes, and three panels below their captions
    assert max(map(len, result.out.splitlines()[:-1])) <= 80, "the table does not fit a terminal"


def test_guidance_and_denoising_reach_the_library(run: Any, tmp_path: Path) -> None:
    line = "--guidance 0.7,attn_temperature=0.8,annealed=false,on=shift --denoise 0.9"
    line = f"sample --model model --num 3 --strategy jacobi {line} --tolerance 1e-5 --out {tmp_path}"
    assert run(f"{line} --json {tmp_path}/f").code == 0
    guidance = jf.Guidance(0.7, annealed=False, on="shift", attn_temperature=0.8)
    want = jf.sample(
        jf.load("./model").guided(guidance), 3, torch.arange(3), strategy="jacobi", denoise=0.9, tolerance=1e-5,
    )  # fmt: skip
    assert np.array_equal(drawn(tmp_path)["arr_0"], levels(want.images))
    shown = figures(tmp_path / "f")
    assert shown["settings"] == "--guidance 0.7,attn_temperature=0.8,annealed=false,on=shift --denoise 0.9"
    assert shown["runs"]["jacobi"]["certificate"] <= 1e-5
    assert shown["runs"]["jacobi"]["denoise_seconds"] > 0
    result = run(f"{line} --no-certify --dtype float64 --overwrite --json {tmp_path}/f")
    assert "not measured" in result.out
    assert figures(tmp_path / "f")["runs"]["jacobi"]["certificate"] is None


def test_guesses_come_from_a_report(run: Any, tmp_path: Path) -> None:
    assert run(f"sample --model model --num 4 --strategy window:5 --report report.json --out {tmp_path}").code == 0
    flow, labels = jf.load("./model"), torch.tensor([0, 1, 2, 0])
    plan = jf.Strategy.parse("window:5", jf.Report.load("report.json"))
    assert plan != jf.Strategy.parse("window:5", num_blocks=3, num_tokens=16)
    want = jf.sample(flow, 4, labels, strategy=plan)
    assert np.array_equal(drawn(tmp_path)["arr_0"], levels(want.images))


def test_lost_samples_are_black_and_counted(run: Any, tmp_path: Path) -> None:
    flow = jf.load("./plain")
    flow.blocks[0].proj_out.bias[:4] = 200  # exp(200) overflows float32: so does the exact inverse
    flow.save_pretrained(tmp_path / "overflowing")
    out = tmp_path / "out"
    line = f"sample --model {tmp_path}/overflowing --num 2 --strategy jacobi --compare --out {out}"
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = run(f"{line} --json {tmp_path}/f")
    assert result.code == 0
    assert re.match("warning: 2 samples: .*; 2 lost, since the exact inverse overflows too", result.err)
    shown = figures(tmp_path / "f")
    assert (shown["runs"]["jacobi"]["status"]["nonfinite"], shown["runs"]["jacobi"]["certificate"]) == (2, np.inf)
    assert shown["error"] == {"max": 0, "mean": 0, "rms": 0}  # both answers say that there is none
    assert not drawn(out)["arr_0"].any()


def test_the_same_command_again_has_nothing_to_draw(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = f"sample --model plain --num 10 --strategy jacobi-3 --batch-size 2 --shard-size 4 --out {out}"
    first = run(f"{line} --json {tmp_path}/1.json")
    assert re.search(r"drew 10 in \d+ s: [\d.]+ images a second, processes: 1\n", first.out)
    assert f"wrote {out}: 3 shards, manifest.json, strategy.json, samples.png\n" in first.out
    again = run(f"{line} --json {tmp_path}/2.json")
    assert (again.code, again.err) == (0, "")
    assert f"all 10 were in {out} already, and match their checksums; --overwrite draws them again\n" in again.out
    one, two = figures(tmp_path / "1.json"), figures(tmp_path / "2.json")
    assert one["runs"] == two["runs"]
    assert (one["drawn"], two["drawn"], one["shards"], one["processes"]) == (10, 0, 3, 1)
    calls = [read(out / "shards" / f"0000{i}.json")["cost"]["network_calls"] for i in range(3)]
    assert one["runs"]["jacobi-3"]["network_calls"] == sum(calls)


def test_a_batch_that_fits_and_then_the_one_that_was_begun_with(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"sample --model model --num 5 --strategy jacobi-1 --batch-size auto --out {tmp_path}/out"
    needed = memory.batch_bytes(jf.load("./model"), 1)
    assert needed is not None
    for free in (6 * needed, needed):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert "5 images, batch size 4\n" in run(line).out
    failed = run(f"{line}-of-its-own")
    assert (failed.code, "a sample needs" in failed.err) == (2, True)


def test_the_first_process_says_the_batch_size_whatever_another_one_sees(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or one would wait for an answer that the other does not ask for."""
    line = f"sample --model model --num 4 --out {tmp_path}"
    assert run(f"{line} --batch-size 2 --strategy jacobi-1").code == 0
    answers, sizes = [3], list[int]()  # the batch size
    monkeypatch.setattr("jacobiflow.storage.processes", lambda: nullcontext(Processes(1, 2)))
    monkeypatch.setattr(Processes, "on_first", lambda self, work: answers.pop(0))
    monkeypatch.setattr("jacobiflow.storage.sample_to_folder", lambda *_, batch_size, **__: sizes.append(batch_size))
    assert run(f"{line} --batch-size auto").code == 0
    assert (sizes, answers) == ([3], [])


def test_a_line_that_is_refused_loses_nothing(run: Any, refuse: Any, tmp_path: Path) -> None:
    line = f"sample --model model --num 2 --strategy jacobi-1 --out {tmp_path}/out"
    assert run(line).code == 0
    for options, message in {
        "--batch-size 2 --shard-size 3": "shard_size=3: give a multiple of the batch size, 2",
        "--seed 4": "holds samples of seed 0, not 4; give another folder, or overwrite=True to replace them",
        "--num 1 --batch-size 2": "holds a run of 2 samples, more than 1; give num=2, or give another folder",
        "--strategy s.json --report r.json": "--report r.json: s.json has its own guesses",
    }.items():
        refuse(f"{line} {options}", message)


def test_only_the_first_process_says_why_it_failed(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(*_: Any, **__: Any) -> None:
        raise FirstProcessFailed("no room")

    monkeypatch.setattr("jacobiflow.storage.sample_to_folder", failed)
    result = run(f"sample --model plain --num 2 --out {tmp_path}/out")
    assert (result.code, result.out, result.err) == (2, "", "")


def test_labels(work: Path, tmp_path: Path) -> None:
    flow = jf.load(work / "model")
    (tmp_path / "lines.txt").write_text("2\n0\n-1\n1\n")
    (tmp_path / "commas.txt").write_text("  2, 0,-1 , 1")
    np.save(tmp_path / "big-endian.npy", np.array([2, 0, -1, 1], ">i4"))
    for text, want in {
        "balanced": [0, 1, 2, 0], "0,-1": [0, -1, 0, -1], "2,1,0,0,1": [2, 1, 0, 0],
        "random": draw_labels(4, 3, 9).tolist(), f"{tmp_path}/lines.txt": [2, 0, -1, 1],
        f"{tmp_path}/commas.txt": [2, 0, -1, 1], f"{tmp_path}/big-endian.npy": [2, 0, -1, 1],
    }.items():  # fmt: skip
        labels = parse_labels(text, 4, flow, seed=9)
        assert labels is not None and labels.tolist() == want
    assert parse_labels("none", 4, flow, seed=9) is None
    assert parse_labels("balanced", 4, jf.load(work / "plain"), seed=9) is None


def test_a_bad_file_of_labels_is_one_line(refuse: Any, tmp_path: Path) -> None:
    line = f"sample --model model --num 4 --strategy jacobi-1 --out {tmp_path}/out --labels {tmp_path}"
    refuse(f"{line}/missing.npy", "cannot be read as whole numbers ([Errno 2]")
    (tmp_path / "three.txt").write_text("0 1 2")
    refuse(f"{line}/three.txt", "int64 of shape (3,); give 4 whole numbers, one per image")
    np.save(tmp_path / "objects.npy", np.array([0, 1, 2, None]), allow_pickle=True)
    refuse(f"{line}/objects.npy", "cannot be read as whole numbers")
