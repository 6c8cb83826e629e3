"""`jacobiflow sample`: it writes what the library draws, resumes, and compares; tests/storage has the rest."""

from __future__ import annotations

import importlib
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
from running import figures
from sample_folders import read
from scoring import levels

import jacobiflow as jf
from jacobiflow.baselines.growing_cache import growing_cache_sample
from jacobiflow.latents import draw_labels
from jacobiflow.storage import FirstProcessFailed, Processes
from jacobiflow.strategy import memory


def drawn(out: Path) -> dict[str, Any]:
    """The arrays of the first shard: images and, where there are any, labels."""
    with np.load(out / "shards" / "00000.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("strategy", ["sequential", "jacobi", "gs-jacobi:4-3", "[1-4-3-5]", "window.json"])
def test_it_writes_what_the_library_draws(strategy: str, run: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    line = f"sample --model model --num 5 --batch-size 3 --labels 0,2 --seed 4 --strategy {strategy} --out {out}"
    result = run(f"{line} --json {tmp_path}/f.json")
    assert result.code == 0
    assert sorted(os.listdir(out)) == [".lock", "manifest.json", "samples.png", "shards", "strategy.json"]
    labels = torch.tensor([0, 2, 0, 2, 0])
    want = jf.sample(jf.load("./model"), 5, labels, 4, strategy=strategy, batch_size=3, progress=False)
    assert want.certificate is not None
    found = drawn(out)
    assert np.array_equal(found.pop("arr_0"), levels(want.images))
    assert found.pop("labels").tolist() == labels.tolist()
    assert not found
    with Image.open(out / "samples.png") as sheet:
        assert sheet.size == (5 * (8 * 14 + 4) + 4, 8 * 14 + 8)  # 8 pixels are drawn as 112

    shown = figures(tmp_path / "f.json")
    assert (shown["model"], shown["num"], shown["batch_size"], shown["seed"]) == ("model", 5, 3, 4)
    assert list(shown["runs"]) == [shown["strategy"]] == [strategy]
    figure = shown["runs"][strategy]
    assert (figure["network_calls"], figure["token_evaluations"]) == (want.network_calls, want.token_evaluations)
    assert figure["sweeps"] == [block.sweeps for block in want.stats]
    assert figure["resolved_sequentially"] == want.resolved_sequentially == 0
    assert figure["status"]["max_sweeps" if strategy in ("gs-jacobi:4-3", "[1-4-3-5]") else "converged"] == 5
    assert figure["images_per_second"] == pytest.approx(5 / figure["seconds"])
    assert sum(figure["block_seconds"]) <= figure["seconds"]
    assert figure["certificate"] == pytest.approx(float(want.certificate.max()))
    assert f"wrote {out}: 1 shard, manifest.json, strategy.json, samples.png\n" in result.out
    assert shown["outcome"] == asdict(want.outcome)
    assert (f"{want.outcome}\n" in result.out) == (strategy not in ("gs-jacobi:4-3", "[1-4-3-5]"))


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
    samples = jf.sample(flow, 4, labels, strategy=strategy, progress=False)
    one, other = growing_cache_sample(flow, samples.latents, labels), samples.images
    error = (one - other).abs()
    assert error.max() > 0
    assert shown["error"] == {"max": float(error.max()), "mean": pytest.approx(float(error.mean()))}
    speed = shown["runs"]["growing cache"]["seconds"] / shown["runs"][strategy]["seconds"]
    line = f"{speed:.1f} times as fast as the original code's loop, growing cache\n"
    assert f"{line}error max {error.max():.1e}, mean {error.mean():.1e}\n" in result.out
    exact = run(f"sample --model model --num 2 --strategy sequential --out {tmp_path}-exact")
    assert re.search(r"^sequential .* exact +0 *$", exact.out, re.MULTILINE)
    assert np.array_equal(drawn(tmp_path)["arr_0"], levels(other))
    with Image.open(tmp_path / "samples.png") as sheet:
        assert sheet.size[1] == 32 + 3 * (32 + 8 * 14 + 8)  # the classes, and three panels below their captions
    assert max(map(len, result.out.splitlines()[:-1])) <= 80, "the table does not fit a terminal"


def test_guidance_and_denoising_reach_the_library(run: Any, tmp_path: Path) -> None:
    line = "--guidance 0.7 --guidance-on shift --constant-guidance --attn-temperature 0.8 --denoise 0.9"
    line = f"sample --model model --num 3 --strategy jacobi {line} --tolerance 1e-5 --out {tmp_path}"
    assert run(f"{line} --json {tmp_path}/f").code == 0
    guidance = jf.Guidance(0.7, annealed=False, on="shift", attn_temperature=0.8)
    want = jf.sample(
        jf.load("./model"), 3, torch.arange(3), strategy="jacobi", guidance=guidance, denoise=0.9, tolerance=1e-5,
        progress=False,
    )  # fmt: skip
    assert np.array_equal(drawn(tmp_path)["arr_0"], levels(want.images))
    shown = figures(tmp_path / "f")
    assert (shown["guidance"], shown["denoise"]) == (0.7, 0.9)
    assert shown["runs"]["jacobi"]["certificate"] <= 1e-5
    assert shown["runs"]["jacobi"]["denoise_seconds"] > 0
    result = run(f"{line} --no-certify --dtype float64 --overwrite --json {tmp_path}/f")
    assert "not asked" in result.out
    assert figures(tmp_path / "f")["runs"]["jacobi"]["certificate"] is None


@pytest.mark.parametrize("strategy", ["Jacobi-5", "window:5"])
def test_guesses_come_from_a_report(strategy: str, run: Any, tmp_path: Path) -> None:
    line = f"sample --model model --num 4 --strategy {strategy} --report report.json --out {tmp_path}"
    assert run(line).code == 0
    flow, labels = jf.load("./model"), torch.tensor([0, 1, 2, 0])
    plan = jf.Strategy.parse(strategy, jf.Report.load("report.json"))
    assert plan != jf.Strategy.parse(strategy, num_blocks=3, num_tokens=16)
    want = jf.sample(flow, 4, labels, strategy=plan, progress=False)
    assert np.array_equal(drawn(tmp_path)["arr_0"], levels(want.images))
    result = run(f"{line} --guidance 0.4 --overwrite")
    assert result.err == "warning: --report report.json: calibrated under other guidance; its guesses may be poor\n"


def test_lost_samples_are_black_and_counted(run: Any, tmp_path: Path) -> None:
    flow = jf.load("./plain")
    flow.blocks[0].proj_out.bias[:4] = 200  # exp(200) overflows float32: so does the exact inverse
    flow.save_pretrained(tmp_path / "overflowing")
    line = f"sample --model {tmp_path}/overflowing --num 2 --strategy jacobi --compare --out {tmp_path}"
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = run(f"{line} --json {tmp_path}/f")
    assert result.code == 0
    assert re.match("warning: 2 samples: .*; 2 lost, since the exact inverse overflows too", result.err)
    shown = figures(tmp_path / "f")
    assert (shown["runs"]["jacobi"]["status"]["nonfinite"], shown["runs"]["jacobi"]["certificate"]) == (2, None)
    assert shown["error"] == {"max": 0, "mean": 0}  # both answers say that there is none
    assert not drawn(tmp_path)["arr_0"].any()


def test_the_same_command_again_has_nothing_to_draw(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = f"sample --model plain --num 10 --strategy jacobi-3 --batch-size 2 --shard-size 4 --out {out}"
    first = run(f"{line} --json {tmp_path}/1.json")
    assert re.search(r"drew 10 in \d+ s by 1 process: [\d.]+ images a second\n", first.out)
    assert f"wrote {out}: 3 shards, manifest.json, strategy.json, samples.png\n" in first.out
    again = run(f"{line} --json {tmp_path}/2.json")
    assert (again.code, again.err) == (0, "")
    assert f"all 10 were in {out} already, and match their checksums; --overwrite draws them again\n" in again.out
    one, two = figures(tmp_path / "1.json"), figures(tmp_path / "2.json")
    assert one["runs"] == two["runs"]
    assert (one["drawn"], two["drawn"], one["shards"], one["processes"]) == (10, 0, 3, 1)
    calls = [read(out / "shards" / f"0000{i}.json")["figures"]["network_calls"] for i in range(3)]
    assert one["runs"]["jacobi-3"]["network_calls"] == sum(calls)


def test_a_batch_that_fits_and_then_the_one_that_was_begun_with(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"sample --model model --num 5 --strategy jacobi-1 --batch-size auto --out {tmp_path}/out"
    needed = memory.batch_bytes(jf.load("./model"), 1)
    assert needed is not None
    for free in (6 * needed, needed):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        said = run(line).out
        assert "5 images, batch size 4\n" in said
        assert f"memory: at most {4 * needed / 1e6:.1f} MB for a batch, beside the weights\n" in said
    failed = run(f"{line}-of-its-own")
    assert (failed.code, "a sample needs" in failed.err) == (2, True)


def test_the_first_process_says_the_batch_size_whatever_another_one_sees(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or one would wait for an answer that the other does not ask for."""
    module, line = importlib.import_module("jacobiflow.cli.sample"), f"sample --model model --num 4 --out {tmp_path}"
    assert run(f"{line} --batch-size 2 --strategy jacobi-1").code == 0
    answers, sizes = [None, 3], list[int]()  # that no sample of other settings is there; the batch size
    monkeypatch.setattr(module, "processes", lambda: nullcontext(Processes(1, 2)))
    monkeypatch.setattr(Processes, "once", lambda self, work: answers.pop(0))
    monkeypatch.setattr(module, "sample_to_folder", lambda *_, batch_size, **__: sizes.append(batch_size))
    assert run(f"{line} --batch-size auto").code == 0
    assert (sizes, answers) == ([3], [])


REFUSED = {
    "--batch-size few": "--batch-size 'few': give a positive whole number, or auto",
    "--batch-size 2 --shard-size 3": "--shard-size 3: give a multiple of the batch size, 2",
    "--compare": "holds samples already; give --overwrite to draw them again, or another folder as --out",
    "--seed 4": "holds samples of seed 0, not 4; give another folder, or --overwrite to replace them",
    "--num 1 --batch-size 2": "holds a run of 2 samples, more than 1; give --num 2; or give another folder",
    "--strategy s.json --report r.json": "--report r.json: the strategy in s.json has its own guesses",
    "--json {out}/images/x.json": "x.json: is one of the files that this command writes into --out ",
}


@pytest.mark.parametrize("options", REFUSED)
def test_a_line_that_is_refused_loses_nothing(options: str, run: Any, refuse: Any, tmp_path: Path) -> None:
    line = f"sample --model model --num 2 --strategy jacobi-1 --out {tmp_path}/out"
    assert run(line).code == 0
    refuse(f"{line} {options.format(out=tmp_path / 'out')}", REFUSED[options])


FOREIGN = {
    "samples.png": "samples.png: is not a picture that jacobiflow made; move it away",
    "manifest.json": "manifest.json: not a manifest of samples (format_version is None, not 1); restore it, or move",
}


@pytest.mark.parametrize("options", ["", "--overwrite"])
@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_are_refused(name: str, options: str, refuse: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"name": "app"}')
    refuse(f"sample --model model --num 2 --strategy jacobi-1 --out {tmp_path} {options}", FOREIGN[name])


def test_sizes_have_limits(refuse: Any, tmp_path: Path) -> None:
    for num in (10**12, 10**30):
        refuse(f"sample --model model --num {num} --out {tmp_path}/new", f"--num {num}: the limit is 100,000,000")


def test_only_the_first_process_says_why_it_failed(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(*_: Any, **__: Any) -> None:
        raise FirstProcessFailed("no room")

    monkeypatch.setattr(importlib.import_module("jacobiflow.cli.sample"), "sample_to_folder", failed)
    result = run(f"sample --model plain --num 2 --out {tmp_path}/out")
    assert (result.code, result.out, result.err) == (2, "", "")


def test_labels(run: Any, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("2\n0\n-1\n1\n")
    (tmp_path / "commas.txt").write_text("  2, 0,-1 , 1")
    np.save(tmp_path / "big-endian.npy", np.array([2, 0, -1, 1], ">i4"))
    for given, want in {
        "balanced": [0, 1, 2, 0], "0,-1": [0, -1, 0, -1], "2,1,0,0,1": [2, 1, 0, 0], "none": None,
        "random": draw_labels(4, 3, 9).tolist(), "lines.txt": [2, 0, -1, 1], "commas.txt": [2, 0, -1, 1],
        "big-endian.npy": [2, 0, -1, 1],
    }.items():  # fmt: skip
        labels = tmp_path / given if "." in given else given
        line = f"sample --model model --num 4 --seed 9 --strategy jacobi-1 --labels {labels} --out {tmp_path}"
        assert run(f"{line} --overwrite").code == 0
        arrays = drawn(tmp_path)
        assert (arrays["labels"].tolist() if "labels" in arrays else None) == want
        ids = None if want is None else torch.tensor(want)
        images = jf.sample(jf.load("./model"), 4, ids, 9, strategy="jacobi-1", progress=False).images
        assert np.array_equal(arrays["arr_0"], levels(images))


def test_a_bad_file_of_labels_is_one_line(refuse: Any, tmp_path: Path) -> None:
    line = f"sample --model model --num 4 --strategy jacobi-1 --out {tmp_path}/out --labels {tmp_path}"
    refuse(f"{line}/missing.npy", "cannot be read as whole numbers (No such file or directory)")
    (tmp_path / "three.txt").write_text("0 1 2")
    refuse(f"{line}/three.txt", "int64 of shape (3,); give 4 whole numbers, one per image")
    with (tmp_path / "huge.npy").open("wb") as file:  # 80 TB by its header
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (10**13,)})
        file.write(bytes(32))
    refuse(f"{line}/huge.npy", "cannot be read as whole numbers")
    np.save(tmp_path / "objects.npy", np.array([0, 1, 2, None]), allow_pickle=True)
    refuse(f"{line}/objects.npy", "cannot be read as whole numbers")
