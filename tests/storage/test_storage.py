"""Samples on disk: the same bytes however often a run is stopped, killed or shared, and nothing lost without a word."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from problems import make_flow, to_float32
from running import figures, run_line
from torch import Tensor

import jacobiflow as jf
from jacobiflow.latents import draw_latents
from jacobiflow.storage import (
    Drawn,
    FirstProcessFailed,
    Manifest,
    Processes,
    Record,
    SampleFolderError,
    generate,
)

pytestmark = pytest.mark.usefixtures("one_thread")

MODULE: Any = importlib.import_module("jacobiflow.storage.generate")
NUM = 10
SETTINGS: dict[str, Any] = {"strategy": "jacobi-3", "batch_size": 2, "shard_size": 4}
GUIDANCE = jf.Guidance(0.7, annealed=False, on="shift", attn_temperature=0.8)
SHARDS = ["00000", "00001", "00002"]
KILLS = 20


@cache
def small(seed: int = 0) -> jf.TarFlow:
    return to_float32(make_flow(num_classes=3, noise_std=0.1, seed=seed))


@cache
def colour() -> jf.TarFlow:
    return to_float32(make_flow(in_channels=3, image_size=4))


@cache
def bundled() -> jf.TarFlow:
    flow = jf.load("digits-p1")
    assert isinstance(flow, jf.TarFlow)
    return flow


def classes(flow: jf.TarFlow, num: int) -> Tensor | None:
    return torch.arange(num) % flow.config.num_classes if flow.config.num_classes else None


def draw(out: Path, num: int = NUM, flow: jf.TarFlow | None = None, **changed: Any) -> jf.SampleFolder:
    flow = small() if flow is None else flow
    return jf.sample_to_folder(
        flow, num, out, **{"labels": classes(flow, num), "progress": False, **SETTINGS, **changed}
    )


def eight_bit(images: Tensor) -> Any:
    """Pixels (n, h, w, c) of images, black where they are lost."""
    pixels = np.nan_to_num(images.float().numpy().transpose(0, 2, 3, 1), nan=-1.0, posinf=-1.0, neginf=-1.0)
    return np.round((pixels.clip(-1, 1) + np.float32(1)) * np.float32(127.5)).astype(np.uint8)


def oracle(flow: jf.TarFlow, num: int, shard_size: int, seed: int = 0, **settings: Any) -> list[jf.Samples]:
    """What the library's sampler gives for every shard by itself."""
    labels, found = settings.pop("labels", classes(flow, num)), []
    for start in range(0, num, shard_size):
        stop = min(start + shard_size, num)
        latents = draw_latents(stop - start, flow.config.num_tokens, flow.config.token_channels, seed, start)
        part = None if labels is None else labels[start:stop]
        found.append(jf.sample(flow, latents=latents, labels=part, progress=False, **settings))
    return found


def pictures(out: Path) -> dict[str, bytes]:
    """The files that hold samples."""
    paths = [*(out / "shards").rglob("*.npz"), *(out / "images").rglob("*.png")]
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(paths)}


def everything(out: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name != ".lock"}


def record(out: Path, shard: str) -> dict[str, Any]:
    return json.loads((out / "shards" / f"{shard}.json").read_text())


def signed(value: dict[str, Any]) -> dict[str, Any]:
    """The record with the checksum of its entries."""
    value = {key: entry for key, entry in value.items() if key != "record_sha256"}
    return value | {"record_sha256": hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()}


def facts(out: Path) -> Any:
    """All that two runs of the same samples must share: images, records and manifest; not what they cost."""
    records = {path.name: json.loads(path.read_text()) for path in sorted((out / "shards").glob("*.json"))}
    for value in records.values():
        assert value == signed(value)
        del value["figures"], value["record_sha256"]
    return pictures(out), records, json.loads((out / "manifest.json").read_text()), (out / "strategy.json").read_text()


def times(out: Path) -> dict[str, int]:
    """When the files of the shards that have a record were written."""
    done = [path.stem for path in (out / "shards").glob("*.json")]
    return {str(p): p.stat().st_mtime_ns for p in (out / "shards").glob("*") if p.stem in done}


def spoilt(few: str, shard: str) -> str:
    return rf": {few} shards lack their images or do not match their checksums, {shard} for one; drawn again$"


def partials(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if "partial" in path.name]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Undisturbed runs, by the kind of their files."""
    folder = tmp_path_factory.mktemp("reference")
    with warnings.catch_warnings():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for files in ("npz", "png"):
            draw(folder / files, files=files)
        torch.set_num_threads(threads)
    return {files: folder / files for files in ("npz", "png")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    small().save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "80")
    return partial(run_line, capsys=capsys)


# --------------------------------------------------------------------------------------------------------------- bytes

STRATEGIES: dict[str, dict[str, Any]] = {
    "auto": {"strategy": "auto"},
    "sequential": {"strategy": "sequential"},
    "window": {"strategy": "window:5", "tolerance": 1e-4},
    "counted": {"strategy": "[1-4-3-5]", "certify": False},
    "object": {"strategy": jf.Strategy.uniform(jf.Solver(stopping=jf.Tolerance(1e-4) | jf.MaxSweeps(12)), 2)},
    "guided": {"strategy": "jacobi", "guidance": GUIDANCE, "denoise": 0.9},
    "one batch": {"batch_size": 4},
    "odd batches": {"batch_size": 3, "shard_size": 3},
    "as many as there are": {"batch_size": None, "shard_size": None},
    "more than there are": {"batch_size": 20, "shard_size": 40},
    "none": {"labels": None},
    "negative": {"labels": torch.arange(NUM) % 4 - 1},
    "other seed": {"seed": 2**63 - 1},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_shard_is_what_sample_draws_of_its_latents(name: str, tmp_path: Path) -> None:
    given = {"labels": classes(small(), NUM), **SETTINGS, **STRATEGIES[name]}
    seen: dict[int, tuple[Tensor, Tensor | None, Drawn]] = {}

    def hear(start: int, latents: Tensor, labels: Tensor | None, drawn: Drawn) -> None:
        seen[start] = latents, labels, drawn

    folder = jf.sample_to_folder(small(), NUM, tmp_path / "new" / "out", progress=False, on_shard=hear, **given)
    size = given.pop("shard_size") or 1020  # 102 batches of 10
    want = oracle(small(), NUM, size, **{**given, "batch_size": given["batch_size"] or NUM})
    out, labels = tmp_path / "new" / "out", given["labels"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert sorted(os.listdir(out)) == [".lock", "manifest.json", "shards", "strategy.json"]
    assert sorted(os.listdir(out / "shards")) == [f"{i:05}.{e}" for i in range(len(want)) for e in ("json", "npz")]
    assert len(manifest["checksums"]) == len(want)
    assert (manifest["num"], manifest["shard_size"], folder.drawn) == (NUM, size, NUM)
    assert sorted(seen) == list(range(0, NUM, size))
    assert hashlib.sha256((out / "strategy.json").read_bytes()).hexdigest() == manifest["strategy_sha256"]
    all_latents = draw_latents(NUM, 16, 4, given.get("seed", 0))
    for i, samples in enumerate(want):
        start, stop = size * i, min(size * (i + 1), NUM)
        file = out / "shards" / f"{i:05}.npz"
        with np.load(file, allow_pickle=False) as arrays:
            assert set(arrays) == {"arr_0"} | ({"labels"} if labels is not None else set())
            assert arrays["arr_0"].dtype == np.uint8
            assert np.array_equal(arrays["arr_0"], eight_bit(samples.images))
            if labels is not None:
                assert arrays["labels"].dtype == np.int64
                assert arrays["labels"].tolist() == labels[start:stop].tolist()
        found = record(out, f"{i:05}")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert digest == found["sha256"] == manifest["checksums"][i]
        assert (found["start"], found["num"]) == (start, stop - start)
        assert found["labels"] == (None if labels is None else labels[start:stop].tolist())
        certificate = None if samples.certificate is None else samples.certificate.tolist()
        assert found["certificate"] == certificate
        again = torch.stack([block.resolved_sequentially for block in samples.stats]).any(dim=0)
        assert found["resolved"] == again.nonzero().flatten().tolist()
        assert found["lost"] == []
        cost = found["figures"]
        assert (cost["network_calls"], cost["sweeps"]) == (samples.network_calls, [b.sweeps for b in samples.stats])
        assert torch.equal(seen[start][0], all_latents[start:stop])
        assert torch.equal(seen[start][2].images, samples.images)


def test_the_share_that_is_solved_again_is_in_the_records(tmp_path: Path) -> None:
    strategy = STRATEGIES["object"]["strategy"]
    folder = draw(tmp_path, strategy=strategy)
    want = oracle(small(), NUM, 4, strategy=strategy, batch_size=2)
    again = torch.cat([torch.stack([b.resolved_sequentially for b in s.stats]).any(dim=0) for s in want])
    assert again.any(), "none to tell apart"
    assert torch.equal(folder.resolved(), again)
    assert torch.equal(jf.SampleFolder.open(tmp_path).resolved(), again)
    certificate = folder.certificate()
    assert certificate is not None
    assert torch.equal(certificate, torch.cat([s.certificate for s in want if s.certificate is not None]))


def test_the_trained_digits(tmp_path: Path) -> None:
    given = {"strategy": "window:16", "batch_size": 5, "denoise": 1.0 if bundled().config.noise_std else 0.0}
    draw(tmp_path, 22, bundled(), seed=3, shard_size=10, **given)
    for i, samples in enumerate(oracle(bundled(), 22, 10, seed=3, **given)):
        with np.load(tmp_path / "shards" / f"{i:05}.npz") as arrays:
            assert np.array_equal(arrays["arr_0"], eight_bit(samples.images))
            assert arrays["labels"].tolist() == [j % 10 for j in range(10 * i, 10 * i + len(samples.images))]


def test_batch_sizes_are_one_level_apart_at_most(tmp_path: Path) -> None:
    drawn = []
    for size in (7, 64):
        folder = draw(tmp_path / str(size), 64, bundled(), strategy="window:16", batch_size=size, shard_size=None)
        drawn.append(torch.cat(list(folder.batches())).int())
    assert len(drawn[0]) == len(drawn[1]) == 64
    assert (drawn[0] - drawn[1]).abs().max() <= 1


def test_defaults_of_the_sizes(tmp_path: Path) -> None:
    flow = to_float32(make_flow(image_size=4))
    for num, batch_size, want in ((3, None, (3, 1023)), (70, None, (64, 1024)), (3, 2000, (2000, 2000))):
        folder = jf.sample_to_folder(
            flow, num, tmp_path / str(want[0]), strategy="jacobi-1", certify=False, batch_size=batch_size,
            progress=False,
        )  # fmt: skip
        assert (folder.manifest.batch_size, folder.manifest.shard_size) == want


@given(num=st.integers(1, 5000), batch_size=st.integers(1, 100), batches=st.integers(1, 20))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_spans_are_all_samples_in_order(num: int, batch_size: int, batches: int) -> None:
    spans = manifest_of(num, batch_size, batch_size * batches).spans()
    assert [i for start, stop in spans for i in range(start, stop)] == list(range(num))
    assert {stop - start for start, stop in spans[:-1]} <= {batch_size * batches}
    assert 0 < spans[-1][1] - spans[-1][0] <= batch_size * batches


def manifest_of(num: int, batch_size: int, shard_size: int) -> Manifest:
    return Manifest(
        num=num, image_shape=(1, 4, 4), seed=0, labels_sha256=None, num_classes=0, batch_size=batch_size,
        shard_size=shard_size, files="npz", model="", fingerprint="", dtype="float32", strategy="invented",
        strategy_sha256=None, guidance=None, denoise=0.0, tolerance=None, certify=False, machine={},
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("files", ["npz", "png"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_stopped_after_any_shard_and_resumed(
    files: str, error: type[BaseException], reference: dict[str, Path], tmp_path: Path
) -> None:
    for after in range(1, 4):
        out, heard = tmp_path / str(after), []

        def stop(start: int, *_: Any, heard: list[int] = heard, after: int = after) -> None:
            heard.append(start)
            if len(heard) == after:
                raise error("enough")

        with pytest.raises(error):
            draw(out, files=files, on_shard=stop)
        before = times(out)
        assert [name.split("/")[-1] for name in sorted(before) if name.endswith("json")] == [
            f"{shard}.json" for shard in SHARDS[:after]
        ]
        assert json.loads((out / "manifest.json").read_text())["checksums"] is None
        folder = draw(out, files=files, on_shard=lambda start, *_, heard=heard: heard.append(start))
        assert heard == [0, 4, 8]
        assert folder.drawn == NUM - min(4 * after, NUM)
        assert before.items() <= times(out).items(), "a finished shard was drawn again"
        assert facts(out) == facts(reference[files])
        assert not partials(out)


@pytest.mark.parametrize("fault", ["before", "after", "full"])
@pytest.mark.parametrize("files", ["npz", "png"])
def test_stopped_at_any_write_and_resumed(
    files: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before or after a file gets its name, or with half of it on a full disk."""
    num = 3 if files == "png" else 5
    draw(tmp_path / "want", num, files=files, shard_size=2)
    rename, write_bytes, place = os.replace, Path.write_bytes, 0
    while True:
        out, calls = tmp_path / str(place), 0

        def reached(place: int = place) -> bool:
            nonlocal calls
            calls += 1
            return calls == place + 1

        def replacing(*names: Any) -> None:
            now = reached()
            if not now or fault == "after":
                rename(*names)
            if now:
                raise KeyboardInterrupt

        def writing(path: Path, data: bytes) -> int:
            if reached():
                write_bytes(path, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write_bytes(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(*((Path, "write_bytes", writing) if fault == "full" else (os, "replace", replacing)))
            try:
                draw(out, num, files=files, shard_size=2)
            except (KeyboardInterrupt, OSError) as error:
                assert "No space left on device" in str(error) or fault != "full"
            else:
                break  # more than there are
        assert not partials(out)
        before = times(out)
        draw(out, num, files=files, shard_size=2)
        assert before.items() <= times(out).items()
        assert facts(out) == facts(tmp_path / "want")
        place += 1
    assert place == (3 + 3 + 3 if files == "npz" else 3 + 3 + 2)  # the folder's own, images, records


DRIVER = """
import json, os, random, signal, sys, time
import torch
import jacobiflow as jf
from test_generation import times
from pathlib import Path

torch.set_num_threads(1)
model, want, out, num, kills = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
flow, noise = jf.load(model), random.Random(0)
jf.sample_to_folder(flow, 1, want.parent / "first use", strategy="jacobi-2", progress=False)

def start(folder):
    child = os.fork()
    if not child:
        status = 1
        try:
            jf.sample_to_folder(flow, num, folder, torch.arange(num) % 3, strategy="jacobi-2", certify=False,
                                batch_size=1, shard_size=1, progress=False)
            status = 0
        finally:
            os._exit(status)
    return child

def shards():
    return len(list((out / "shards").glob("*.json")))

began = time.perf_counter()
assert os.waitstatus_to_exitcode(os.waitpid(start(want), 0)[1]) == 0
whole = time.perf_counter() - began
counts, kept, before = [], True, {}
for i in range(kills):
    child, seen, limit = start(out), shards(), time.monotonic() + 5
    while i % 2 and shards() == seen and time.monotonic() < limit:  # every other one is killed while it draws
        time.sleep(0.001)
    time.sleep(noise.uniform(0, 1.5) * whole / kills)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    now = times(out)
    kept = kept and before.items() <= now.items()
    before = now
    if os.WIFSIGNALED(status):
        counts.append(sum(name.endswith(".json") for name in now))
end = os.waitstatus_to_exitcode(os.waitpid(start(out), 0)[1])
print(json.dumps({"counts": counts, "kept": kept and before.items() <= times(out).items(), "end": end}))
"""


def test_killed_twenty_times(model: Path, tmp_path: Path) -> None:
    num = 300
    want, out = tmp_path / "want", tmp_path / "out"
    said = subprocess.run(
        [sys.executable, "-c", DRIVER, str(model), str(want), str(out), str(num), str(KILLS)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert len(found["counts"]) >= KILLS // 2, "the run ended before it was killed"
    assert sum(0 < count < num for count in found["counts"]) >= 5, "no kill hit in the middle"
    assert len(set(found["counts"])) >= 5, "no progress between kills"
    assert found["kept"], "a finished shard was drawn again"
    assert found["end"] == 0
    assert facts(out) == facts(want)
    assert not partials(out)
    jf.SampleFolder.open(out).check()


def test_what_killed_processes_left_half_written_is_removed(reference: dict[str, Path], tmp_path: Path) -> None:
    for files in ("npz", "png"):
        out = tmp_path / files
        shutil.copytree(reference[files], out)
        (out / "images" / "2").mkdir(parents=True, exist_ok=True)
        names = [
            ".manifest.json.77.partial", ".strategy.json.asked.partial", "shards/.00001.npz.77.partial",
            "shards/.00001.json.77.partial", "images/2/.00000002.png.77.partial",
        ]  # fmt: skip
        for name in names:
            (out / name).write_bytes(b"half")
        draw(out, files=files)
        assert partials(out) == []


def test_half_written_files_of_others_stay(reference: dict[str, Path], tmp_path: Path) -> None:
    """Of a run into a folder inside, which may be writing them, and of other programs."""
    out = tmp_path / "out"
    shutil.copytree(reference["npz"], out)
    draw(out / "inside")
    names = ("inside/shards/.00001.npz.77.partial", "downloads/.film.mp4.partial")
    (out / "downloads").mkdir()
    for name in names:
        (out / name).write_bytes(b"half")
    draw(out)
    assert sorted(str(path.relative_to(out)) for path in partials(out)) == sorted(names)


# ------------------------------------------------------------------------------------------------------------ torchrun


def torchrun(*words: str) -> subprocess.Popen[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "jacobiflow"]
    return subprocess.Popen(
        [*launch, "sample", *words], env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def worker(parent: int, rank: int) -> int | None:
    """The process of that rank that torchrun has started."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            ours = int((place / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if ours and f"RANK={rank}".encode() in (place / "environ").read_bytes().split(b"\0"):
                return int(place.name)
        except OSError:
            continue
    return None


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_two_processes_one_killed_write_what_one_does(tmp_path: Path) -> None:
    num, out, want = 48, tmp_path / "out", tmp_path / "want"
    words = ["--model", "digits-p1", "--num", str(num), "--strategy", "sequential", "--batch-size", "1"]
    words += ["--shard-size", "1", "--out", str(out), "--json", str(tmp_path / "f.json")]
    killed = torchrun(*words)
    limit = time.monotonic() + 120
    while len(list((out / "shards").glob("*.json"))) < 4 and time.monotonic() < limit:
        time.sleep(0.005)
    child = worker(killed.pid, rank=1)
    assert child is not None
    os.kill(child, signal.SIGKILL)
    assert killed.communicate(timeout=120)[0] == ""
    assert killed.returncode != 0
    before = times(out)
    assert 4 <= len(before) // 2 < num, "the kill did not hit in the middle"

    resumed = torchrun(*words)
    said, told = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, told
    assert "Traceback" not in told
    draw(want, num, bundled(), strategy="sequential", batch_size=1, shard_size=1, model="digits-p1")
    assert before.items() <= times(out).items(), "a finished shard was drawn again"
    assert facts(out) == facts(want)
    assert not partials(out)
    jf.SampleFolder.open(out).check()
    assert said.count("wrote ") == 1, "more than one process has printed"
    shown = figures(tmp_path / "f.json")
    assert (shown["processes"], shown["shards"], shown["drawn"]) == (2, num, num - len(before) // 2)

    kept = everything(out)
    refused = torchrun(*words, "--seed", "5")
    said, told = refused.communicate(timeout=120)
    assert (refused.returncode, said) == (1, "")
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    mend = "give another --out, or --overwrite to lose them"
    assert set(lines) == {f"error: {out}: holds samples of seed 0, not 5; {mend}"}
    assert "jacobiflow/generation" not in told, "a traceback of ours"
    assert everything(out) == kept
    assert len(lines) == 1, "said by every process"


def test_the_first_process_says_what_it_raised_and_the_others_that_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[Any]] = []

    def broadcast(values: list[Any], src: int) -> None:
        assert src == 0
        if process is first:
            sent.append(list(values))
        else:
            values[:] = sent.pop()

    monkeypatch.setattr(importlib.import_module("torch.distributed"), "broadcast_object_list", broadcast)
    first, second = Processes(0, 2), Processes(1, 2)
    for work in (lambda: (7, [1, 2]), lambda: None):
        for process in (first, second):
            assert process.once(work if process is first else lambda: pytest.fail("twice")) == work()
    for error in (OSError(errno.EACCES, "denied"), SampleFolderError("no room"), KeyError(), RuntimeError()):
        for process in (first, second):
            with pytest.raises(type(error) if process is first else FirstProcessFailed) as caught:
                process.once(partial(throw, error))
            assert caught.value is error or str(caught.value) == (str(error) or type(error).__name__)
    assert not sent


def throw(error: Exception) -> None:
    raise error


def test_the_command_line_of_the_other_processes_is_silent(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("jacobiflow.cli.sample")
    monkeypatch.setattr(module, "sample_to_folder", lambda *_, **__: throw(FirstProcessFailed("no room")))
    result = run(f"sample --model {model} --num 2 --out {tmp_path}/out")
    assert (result.code, result.out, result.err) == (2, "", "")
    assert not (tmp_path / "out").exists()


def test_a_process_alone_and_its_devices() -> None:
    with jf.processes() as among:
        assert among == Processes(0, 1, 0)
        assert among.once(lambda: 7) == 7
    assert [among.device(name) for name in ("cpu", "cuda", "cuda:3", "mps")] == ["cpu", "cuda", "cuda:3", "mps"]
    third = Processes(rank=5, count=8, local_rank=1)
    assert [third.device(name) for name in ("cpu", "cuda", "cuda:3", "mps")] == ["cpu", "cuda:1", "cuda:3", "mps"]


# ---------------------------------------------------------------------------------------------------- what is damaged


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("files", ["npz", "png"])
def test_a_damaged_shard_is_drawn_again_and_named(
    files: str, harm: Callable[[Path], None], reference: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(reference[files], out)
    assert draw(out, files=files).drawn == 0
    harm(out / ("shards/00001.npz" if files == "npz" else "images/2/00000005.png"))
    folder = jf.SampleFolder.open(out)
    assert [folder.verify(i) for i in range(3)] == [True, False, True]
    place = "shards/00001.npz" if files == "npz" else "images/1/00000004.png"
    with pytest.raises(SampleFolderError, match=rf"{place}: does not match its checksum; give the same"):
        folder.check()
    before = {name: when for name, when in times(out).items() if "00001" not in name}
    with pytest.warns(UserWarning, match=spoilt("1 of 3", "00001")):
        folder = draw(out, files=files)
    assert folder.drawn == 4
    assert before.items() <= times(out).items()
    assert facts(out) == facts(reference[files])
    folder.check()


RECORDS: dict[str, str] = {
    "empty": "", "half": '{"start": 4, "num"', "a list": "[]", "null": "null", "a number": "4", "deep": "[" * 100_000,
    "no fields": "{}", "unknown field": '{"start": 4, "num": 4, "colour": 1}',
}  # fmt: skip


EDITED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "lost": lambda found: found | {"lost": [0]},
    "certificate": lambda found: found | {"certificate": [0.0] * 4},
    "figures": lambda found: found | {"figures": found["figures"] | {"network_calls": 1}},
    "without its checksum": lambda found: {key: value for key, value in found.items() if key != "record_sha256"},
    "its checksum": lambda found: found | {"record_sha256": "0" * 64},
    "without a field": lambda found: signed({key: value for key, value in found.items() if key != "figures"}),
    "with another field": lambda found: signed(found | {"colour": 1}),
    "no field": lambda _: signed({}),
}


@pytest.mark.parametrize("text", [*RECORDS, *EDITED, "missing", "binary", "of other samples"])
def test_a_shard_without_its_record_is_drawn_again(text: str, reference: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(reference["npz"], out)
    path = out / "shards" / "00001.json"
    if text == "missing":
        path.unlink()
    elif text == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    elif text == "of other samples":
        shutil.copyfile(out / "shards" / "00000.json", path)
    elif text in EDITED:
        path.write_text(json.dumps(EDITED[text](record(out, "00001"))))
    else:
        path.write_text(RECORDS[text])
    folder = jf.SampleFolder.open(out)
    assert folder.record(1) is None
    assert not folder.verify(1)
    for read in (folder.check, folder.records, folder.certificate, folder.lost, folder.resolved):
        with pytest.raises(SampleFolderError, match=r"1 of 3 shards are missing, 00001\.json for one; give the same"):
            read()
    with pytest.raises(SampleFolderError, match=r"00001\.json: missing; give the same"):
        folder.labels(1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert draw(out).drawn == 4
    assert bool(said) == (text != "missing")
    assert all(re.search(spoilt("1 of 3", "00001"), str(warning.message)) for warning in said)
    assert len(said) <= 1
    assert facts(out) == facts(reference["npz"])


def test_a_record_counts_however_it_is_laid_out(reference: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(reference["npz"], out)
    found = record(out, "00001")
    (out / "shards" / "00001.json").write_text(json.dumps(dict(reversed(found.items()))))
    assert draw(out).drawn == 0


def test_no_flipped_bit_of_a_record_is_believed(run: Any, model: Path, tmp_path: Path) -> None:
    line = f"sample --model {model} --num 2 --strategy jacobi-2 --out {tmp_path}"
    assert run(line).code == 0
    folder = jf.SampleFolder.open(tmp_path)
    want, path = folder.record(0), tmp_path / "shards" / "00000.json"
    assert want is not None
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 2]) + data[place + 1 :])
        found = folder.record(0)
        assert found is None or found == want, f"byte {place}"  # a number's last digit may be beyond its precision


MANIFESTS: dict[str, Any] = {
    "empty": "", "half": '{"format_version": 1,', "a list": "[]", "null": "null", "deep": "[" * 100_000,
    "of something else": '{"name": "my web page", "icons": []}',
    "other version": {"format_version": 2}, "unknown field": {"colour": 1}, "num": {"num": "10"},
    "shape": {"image_shape": 8}, "shard size": {"shard_size": 0}, "machine": {"machine": None},
    "one number": {"checksums": 3}, "yes": {"num": True}, "no shape": {"image_shape": None},
    "files": {"files": "bmp"}, "batch size": {"batch_size": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("text", [*MANIFESTS, "one checksum", "binary", "without a field"])
def test_a_broken_manifest_is_one_error_and_loses_nothing(
    text: str, reference: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(reference["npz"], out)
    path = out / "manifest.json"
    good = json.loads(path.read_text())
    if text == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    elif text == "without a field":
        path.write_text(json.dumps({key: value for key, value in good.items() if key != "seed"}))
    elif text == "one checksum":
        path.write_text(json.dumps(good | {"checksums": good["checksums"][:1]}))
    else:
        put = MANIFESTS[text]
        path.write_text(put if isinstance(put, str) else json.dumps(good | put))
    before = everything(out)
    words = r"manifest\.json: no manifest of samples \(.+\); restore it, or draw anew with --overwrite$"
    with pytest.raises(SampleFolderError, match=words):
        jf.SampleFolder.open(out)
    with pytest.raises(SampleFolderError, match=words):
        draw(out)
    assert everything(out) == before
    draw(out, overwrite=True)
    assert facts(out) == facts(reference["npz"])


@pytest.mark.parametrize("number", ["3", None, -1, 2.5])
def test_a_manifest_of_no_number_of_classes(number: Any, reference: dict[str, Path], tmp_path: Path) -> None:
    """PNGs lie in folders by class."""
    out = tmp_path / "out"
    shutil.copytree(reference["png"], out)
    good = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(good | {"num_classes": number}))
    with pytest.raises(SampleFolderError, match=r"manifest\.json: no manifest of samples"):
        jf.SampleFolder.open(out)


def test_other_checksums_in_the_manifest_are_taken_again(reference: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(reference["npz"], out)
    path = out / "manifest.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"checksums": good["checksums"][::-1]}))
    with pytest.raises(SampleFolderError, match=r"00000\.npz: does not match its checksum; give the same"):
        jf.SampleFolder.open(out).check()
    assert draw(out).drawn == 0
    assert facts(out) == facts(reference["npz"])


def test_shards_without_a_manifest_are_not_touched(reference: dict[str, Path], tmp_path: Path) -> None:
    for files, name in (("npz", "shards"), ("png", "shards"), ("png", "images")):
        out = tmp_path / f"{files}-{name}"
        shutil.copytree(reference[files], out)
        (out / "manifest.json").unlink()
        if name == "images":
            shutil.rmtree(out / "shards")
        before = everything(out)
        for overwrite in (False, True):
            with pytest.raises(SampleFolderError, match=rf"has {name} but no manifest\.json; give another"):
                draw(out, files=files, overwrite=overwrite)
        assert everything(out) == before


@pytest.mark.parametrize("strategy", ["auto", "jacobi-3"])
def test_another_strategy_file_in_the_folder_is_refused(strategy: str, tmp_path: Path) -> None:
    draw(tmp_path, strategy=strategy)
    path, others = tmp_path / "strategy.json", jf.Strategy.uniform(jf.Solver(jf.Window(4)), 2)
    good = path.read_bytes()
    for harm in (others.save, flip, Path.unlink):
        path.write_bytes(good)
        harm(path)
        before = everything(tmp_path)
        with pytest.raises(SampleFolderError, match=r"strategy\.json: not as its run left it; restore it, or --over"):
            draw(tmp_path, strategy=strategy)
        assert everything(tmp_path) == before
    path.write_bytes(good)
    assert draw(tmp_path, strategy=strategy).drawn == 0


def test_a_strategy_of_a_file_that_has_changed_is_refused(tmp_path: Path) -> None:
    path, out = tmp_path / "s.json", tmp_path / "out"
    jf.Strategy.uniform(jf.Solver(jf.Window(4)), 2).save(path)
    draw(out, strategy=path)
    assert draw(out, strategy=str(path)).drawn == 0
    jf.Strategy.uniform(jf.Solver(jf.Window(5)), 2).save(path)
    before = everything(out)
    with pytest.raises(SampleFolderError, match=r"holds samples of strategy_sha256 [0-9a-f]+.*, not [0-9a-f]+.*; give"):
        draw(out, strategy=path)
    assert everything(out) == before


# ------------------------------------------------------------------------------------------------------ other settings

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 5}, "seed 0, not 5"),
    "model": ({"flow": small(1)}, "fingerprint [0-9a-f]+.*, not [0-9a-f]+"),
    "classes": ({"flow": to_float32(make_flow(num_classes=4))}, "other labels|num_classes 3, not 4"),
    "images": ({"flow": colour(), "labels": None}, r"image_shape \(1, 8, 8\), not \(3, 4, 4\)"),
    "strategy": ({"strategy": "sequential"}, "strategy jacobi-3, not sequential"),
    "auto": ({"strategy": "auto"}, "strategy jacobi-3, not auto"),
    "guidance": ({"guidance": GUIDANCE}, r"guidance None, not \{'weight': 0\.7"),
    "denoise": ({"denoise": 1.0}, r"denoise 0\.0, not 1\.0"),
    "certify": ({"certify": False}, "certify True, not False"),
    "dtype": ({"flow": make_flow(num_classes=3, noise_std=0.1)}, "dtype float32, not float64"),
    "batch size": ({"batch_size": 4}, "batch_size 2, not 4"),
    "shard size": ({"shard_size": 6}, "shard_size 4, not 6"),
    "files": ({"files": "png"}, "files npz, not png"),
    "labels": ({"labels": torch.zeros(NUM, dtype=torch.int64)}, "holds samples of other labels"),
    "no labels": ({"labels": None}, "holds samples of other labels"),
    "last label": ({"labels": torch.arange(NUM) % 3 * (torch.arange(NUM) != NUM - 2)}, "holds samples of other labels"),
    "fewer": ({"num": 9}, "holds a run of 10 samples, more than 9; give --num 10"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings_in_the_same_folder_are_refused(name: str, reference: dict[str, Path]) -> None:
    out = reference["npz"]
    before = everything(out)
    changed, words = OTHERS[name]
    with pytest.raises(SampleFolderError, match=f"{re.escape(str(out))}: .*{words}") as error:
        draw(out, **changed)
    assert "--out" in str(error.value)
    assert "--overwrite" in str(error.value)
    assert everything(out) == before
    assert draw(out).drawn == 0


def test_another_tolerance_is_refused(tmp_path: Path) -> None:
    draw(tmp_path, strategy="window:4")
    with pytest.raises(SampleFolderError, match=r"tolerance None, not 1e-05"):
        draw(tmp_path, strategy="window:4", tolerance=1e-5)


def test_overwrite_draws_anew(reference: dict[str, Path], tmp_path: Path) -> None:
    draw(tmp_path, files="png", seed=3, num=12)
    (tmp_path / "mine.txt").write_text("not of the run")
    assert draw(tmp_path, overwrite=True).drawn == NUM
    assert facts(tmp_path) == facts(reference["npz"])
    assert (tmp_path / "mine.txt").exists()
    assert not (tmp_path / "images").exists()


def test_overwrite_interrupted_in_planning_loses_nothing(
    reference: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(reference["npz"], out)
    before = everything(out)
    monkeypatch.setattr(MODULE, "auto", interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw(out, strategy="auto", overwrite=True)
    assert everything(out) == before


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "strategy": ({"strategy": "quickest"}, "strategy 'quickest': unknown"),
    "strategy of another flow": ({"strategy": "[2-4-3-5]"}, "Stack names block 2"),
    "missing file": ({"strategy": "missing.json"}, "cannot be read"),
    "tolerance": ({"strategy": "auto", "tolerance": -0.1}, r"tolerance -0\.1: give 0"),
    "tolerance of a count": ({"tolerance": 1e-3}, r"'jacobi-3' stops after a number of sweeps and would not heed it"),
    "guidance": (
        {"flow": jf.MAF(jf.MAFConfig(1, 4, 8, 2)), "guidance": GUIDANCE, "labels": None, "strategy": "jacobi"},
        "a MAF has no attention",
    ),
    "num": ({"num": 0, "labels": None}, "num=0: give a positive whole number"),
    "a fraction": ({"num": 2.5, "labels": None}, r"num=2\.5: give a positive whole number"),
    "batch size": ({"batch_size": -1}, "batch_size=-1: give a positive whole number"),
    "shard size": ({"shard_size": 3}, "shard_size=3: give a multiple of the batch size, 2"),
    "files": ({"files": "bmp"}, "files='bmp': give npz; or png"),
    "seed": ({"seed": -1}, "seed=-1: give a whole number of at least 0"),
    "denoise": ({"denoise": -1.0}, r"denoise=-1\.0: give 0"),
    "denoise without noise": (
        {"flow": to_float32(make_flow(num_classes=3)), "denoise": 1.0},
        r"denoise=1\.0: this flow's noise_std is 0",
    ),
    "label": ({"labels": torch.arange(NUM)}, "label 9: this flow has classes 0 to 2"),
    "number of labels": ({"labels": torch.zeros(9, dtype=torch.int64)}, "give 10 whole numbers"),
    "fractions": ({"labels": torch.zeros(NUM)}, "give 10 whole numbers"),
    "one label": ({"labels": torch.tensor(1)}, "give 10 whole numbers"),
    "a number": ({"labels": 1}, r"labels of type int: give a torch\.Tensor"),
    "a list": ({"labels": [0] * NUM}, r"labels of type list: give a torch\.Tensor"),
    "a weight": ({"guidance": 0.5}, r"guidance=0\.5: give a Guidance"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_do_not_fit_are_refused_and_lose_nothing(
    name: str, reference: dict[str, Path], tmp_path: Path
) -> None:
    changed, words = REFUSED[name]
    out = tmp_path / "out"
    shutil.copytree(reference["npz"], out)
    before = everything(out)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=words):
            draw(out, overwrite=overwrite, **changed)
        assert everything(out) == before
    with pytest.raises(ValueError, match=words):
        draw(tmp_path / "new", **changed)
    assert not (tmp_path / "new").exists()


def test_overwrite_keeps_the_strategy_file_that_it_is_given(reference: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(reference["npz"], out)
    assert draw(out, strategy=out / "strategy.json", overwrite=True).drawn == NUM
    assert pictures(out) == pictures(reference["npz"])


@pytest.mark.parametrize("files", ["npz", "png"])
def test_a_larger_num_goes_on_with_the_folder(files: str, reference: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(reference[files], out)
    before = {name: when for name, when in times(out).items() if "00002" not in name}
    with pytest.raises(KeyboardInterrupt):
        draw(out, 17, files=files, on_shard=interrupt)
    with pytest.raises(SampleFolderError, match="holds a run of 17 samples, more than 10; give --num 17"):
        draw(out, files=files)
    folder = draw(out, 17, files=files)
    assert folder.drawn == 17 - 8 - 4  # two shards were whole, one was drawn before the interruption
    draw(tmp_path / "at once", 17, files=files)
    assert facts(out) == facts(tmp_path / "at once")
    assert before.items() <= times(out).items()


@pytest.mark.parametrize("num, shard", [(10, "00000"), (8, "00000"), (8, "00001")])
def test_a_damaged_shard_is_named_where_the_run_grows(num: int, shard: str, tmp_path: Path) -> None:
    """But not the last one, where it was a part of a shard."""
    draw(tmp_path, num)
    flip(tmp_path / "shards" / f"{shard}.npz")
    with pytest.warns(UserWarning, match=spoilt("1 of 5", shard)):
        assert draw(tmp_path, 17).drawn == 17 - 4


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_auto_is_planned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans, auto = [], MODULE.auto

    def planned(*arguments: Any) -> jf.Strategy:
        assert not plans, "planned again"
        plans.append(auto(*arguments))
        return plans[0]

    monkeypatch.setattr(MODULE, "auto", planned)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path, strategy="auto", on_shard=interrupt)
    draw(tmp_path, strategy="auto")
    draw(tmp_path, 17, strategy="auto")
    want = oracle(small(), 17, 4, strategy=replace(plans[0], prediction=None), batch_size=2)
    for i, samples in enumerate(want):
        with np.load(tmp_path / "shards" / f"{i:05}.npz") as arrays:
            assert np.array_equal(arrays["arr_0"], eight_bit(samples.images))


def test_another_number_of_threads_is_said(reference: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(reference["npz"], tmp_path / "out")
    torch.set_num_threads(2)
    assert draw(tmp_path / "out").drawn == 0  # and nothing to say
    (tmp_path / "out" / "shards" / "00001.json").unlink()
    with pytest.warns(UserWarning, match="begun on cpu with 1 threads, goes on on cpu with 2 threads: equal to round"):
        assert draw(tmp_path / "out").drawn > 0
    machine = json.loads((tmp_path / "out" / "manifest.json").read_text())["machine"]
    assert machine["threads"] == 1, "the manifest names what the run began on"


# ---------------------------------------------------------------------------------------------------------------- disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 128 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_more_than_the_disk_holds_is_refused_before_drawing(disk: Path, tmp_path: Path) -> None:
    few = {"strategy": "jacobi-1", "certify": False, "batch_size": 500, "shard_size": 500}
    with pytest.raises(SampleFolderError, match=r"the samples to draw take 0\.2 MB, 0\.1 MB are free; make room, or"):
        draw(disk / "out", 3000, on_shard=lambda *_: pytest.fail("drawn"), **few)
    subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
    draw(disk / "out", 3000, **few)
    draw(tmp_path / "want", 3000, **few)
    assert facts(disk / "out") == facts(tmp_path / "want")


@pytest.mark.parametrize("files", ["npz", "png"])
def test_a_disk_that_fills_up_in_the_middle(files: str, disk: Path, reference: dict[str, Path]) -> None:
    out, filler, heard = disk / "out", disk / "filler", []

    def fill(start: int, *_: Any) -> None:
        heard.append(start)
        if len(heard) == 2:
            with open(filler, "wb", buffering=0) as file, pytest.raises(OSError):
                while True:
                    file.write(bytes(4096))

    words = rf"{re.escape(str(out))}.*: No space left on device; the finished shards are kept: make room, or give anoth"
    with pytest.raises(OSError, match=words):
        draw(out, files=files, on_shard=fill)
    assert sorted(path.stem for path in (out / "shards").glob("*.json")) == SHARDS[:2]
    assert not partials(out)
    before = times(out)
    filler.unlink()
    assert draw(out, files=files).drawn == 2
    assert before.items() <= times(out).items()
    assert facts(out) == facts(reference[files])


def small_disk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 600, 400))  # type: ignore[attr-defined]


@pytest.mark.parametrize("strategy", ["auto", "jacobi-3"])
def test_too_small_a_disk_leaves_no_new_folder(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_disk(monkeypatch)
    (tmp_path / "there").mkdir()
    for name in ("new", "new/and/deep", "there", "there/and/deep"):
        with pytest.raises(SampleFolderError, match="are free; make room, or give another --out"):
            draw(tmp_path / name, 40, strategy=strategy)
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize("refused", ["room", "tolerance", "room for its own strategy"])
def test_a_run_that_is_refused_keeps_the_files_of_others(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jf.Strategy.uniform(jf.Solver(jf.Window(4)), 2).save(tmp_path / "strategy.json")
    before = everything(tmp_path)
    if refused != "tolerance":
        small_disk(monkeypatch)
    strategy = {"room": "jacobi-3", "tolerance": "auto"}.get(refused, tmp_path / "strategy.json")
    with pytest.raises(ValueError, match=r"are free|tolerance|has strategy.json but no manifest"):
        draw(tmp_path, 40, strategy=strategy, tolerance=-0.1 if refused == "tolerance" else None)
    assert everything(tmp_path) == before


def test_overwrite_on_too_small_a_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path)
    before = everything(tmp_path)
    small_disk(monkeypatch)
    with pytest.raises(SampleFolderError, match="are free; make room, or give another --out"):
        draw(tmp_path, 4000, overwrite=True)
    assert everything(tmp_path) == before


def test_too_small_a_disk_leaves_an_earlier_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path)
    before = everything(tmp_path)
    with monkeypatch.context() as patch:
        small_disk(patch)
        assert draw(tmp_path).drawn == 0, "needs no room"
        assert everything(tmp_path) == before
        with pytest.raises(SampleFolderError, match=r"MB, 0\.0 MB are free; make room, or give another --out"):
            draw(tmp_path, 40)
    assert everything(tmp_path) == before
    draw(tmp_path, 40)


# ------------------------------------------------------------------------------------------------------------- two runs


def test_a_second_run_into_the_folder_is_refused(run: Any, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = f"sample --model {model} --num 2 --strategy jacobi-1 --out {out}"
    assert run(line).code == 0
    before = everything(out)
    with FileLock(out / ".lock"):
        for words in (line, f"{line} --overwrite"):
            result = run(words)
            assert (result.code, result.out) == (2, "")
            assert (
                result.err
                == f"error: {out}: another run is writing to it; wait for it, stop it, or give another --out\n"
            )
    assert everything(out) == before
    assert run(line).code == 0


def test_the_lock_is_held_to_the_end_and_let_go_on_errors(reference: dict[str, Path], tmp_path: Path) -> None:
    tried = []

    def another(start: int, *_: Any) -> None:
        with pytest.raises(SampleFolderError, match="another run is writing to it"):
            draw(tmp_path)
        tried.append(start)

    draw(tmp_path, on_shard=another)
    assert tried == [0, 4, 8]
    with pytest.raises(SampleFolderError, match="seed"):
        draw(tmp_path, seed=1)
    assert draw(tmp_path).drawn == 0
    assert facts(tmp_path) == facts(reference["npz"])


# -------------------------------------------------------------------------------------------------------- lost samples


@pytest.mark.parametrize("files", ["npz", "png"])
def test_lost_samples_are_black_and_listed(files: str, tmp_path: Path) -> None:
    flow = to_float32(make_flow(image_size=6))
    with torch.no_grad():
        flow.blocks[0].proj_out.bias[:4] = 1  # some samples grow token by token, until their exact inverse overflows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = oracle(flow, NUM, 4, strategy="jacobi", batch_size=2)
        folder = draw(tmp_path, flow=flow, strategy="jacobi", files=files)
    images = torch.cat([samples.images for samples in want])
    lost = ~images.isfinite().flatten(1).all(dim=1)
    assert 0 < lost.sum() < NUM, "not some of them"
    assert torch.equal(folder.lost(), lost)
    drawn = torch.cat(list(folder.batches()))
    assert not drawn[lost].any()
    assert np.array_equal(drawn.permute(0, 2, 3, 1).numpy(), eight_bit(images))
    for i, shard in enumerate(SHARDS):
        assert record(tmp_path, shard)["lost"] == lost[4 * i : 4 * i + 4].nonzero().flatten().tolist()
        found = figures(tmp_path / "shards" / f"{shard}.json")["certificate"]  # JSON has no infinity
        assert [value is None for value in found] == lost[4 * i : 4 * i + 4].tolist()
    certificate = jf.SampleFolder.open(tmp_path).certificate()
    assert certificate is not None
    assert torch.equal(certificate, torch.cat([s.certificate for s in want if s.certificate is not None]))
    assert torch.equal(certificate.isinf(), lost)
    assert draw(tmp_path, flow=flow, strategy="jacobi", files=files).drawn == 0


# ------------------------------------------------------------------------------------------------------------- reading


def test_a_folder_gives_back_what_was_drawn(reference: dict[str, Path]) -> None:
    want = oracle(small(), NUM, 4, strategy="jacobi-3", batch_size=2)
    for path in reference.values():
        folder = jf.SampleFolder.open(str(path))
        folder.check()
        assert (folder.path, folder.drawn) == (path, 0)
        manifest = folder.manifest
        assert (manifest.num, manifest.image_shape, manifest.seed, manifest.num_classes) == (NUM, (1, 8, 8), 0, 3)
        assert manifest.labels_sha256 == hashlib.sha256((np.arange(NUM) % 3).astype("<i8").tobytes()).hexdigest()
        assert manifest.spans() == [(0, 4), (4, 8), (8, 10)]
        images = [folder.images(i) for i in range(3)]
        for found, batch, samples in zip(images, folder.batches(), want, strict=True):
            assert torch.equal(found, batch)
            assert found.dtype == torch.uint8
            assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), eight_bit(samples.images))
        labels = [folder.labels(i) for i in range(3)]
        assert [part.tolist() for part in labels if part is not None] == [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0]]
        certificate = folder.certificate()
        assert certificate is not None
        assert torch.equal(certificate, torch.cat([s.certificate for s in want if s.certificate is not None]))
        assert folder.resolved().tolist() == folder.lost().tolist() == [False] * NUM
        records = folder.records()
        assert all(isinstance(found, Record) for found in records)
        assert [found.sha256 for found in records] == list(manifest.checksums or ())


def test_a_folder_without_certificates_and_labels(tmp_path: Path) -> None:
    folder = draw(tmp_path, flow=colour(), certify=False)
    assert folder.certificate() is None
    assert folder.labels(0) is None
    assert folder.images(0).shape == (4, 3, 4, 4)


def test_a_folder_that_is_none_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "odd" / "manifest.json").mkdir(parents=True)
    for name, words in {
        "missing": r"missing: no manifest\.json in it; give a folder that jacobiflow sample wrote",
        ".": r": no manifest\.json in it; give a folder that jacobiflow sample wrote",
        "file": r"manifest\.json: cannot be read \(Not a directory\)",
        "odd": r"manifest\.json: cannot be read \(Is a directory\)",
    }.items():
        with pytest.raises(SampleFolderError, match=words):
            jf.SampleFolder.open(tmp_path / name)


def test_an_unfinished_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path, on_shard=interrupt)
    folder = jf.SampleFolder.open(tmp_path)
    assert folder.manifest.checksums is None
    assert [folder.has(i) for i in range(3)] == [folder.verify(i) for i in range(3)] == [True, False, False]
    with pytest.raises(SampleFolderError, match=r"2 of 3 shards are missing, 00001\.json for one; give the same"):
        folder.check()


# ---------------------------------------------------------------------------------------------------------------- PNGs


def test_pngs_lie_by_class_and_index(reference: dict[str, Path]) -> None:
    images = reference["png"] / "images"
    names = {f"{i % 3}/{i:08}.png" for i in range(NUM)}
    assert {str(path.relative_to(images)) for path in images.rglob("*.png")} == names
    assert sorted(os.listdir(reference["png"] / "shards")) == [f"{shard}.json" for shard in SHARDS]
    for i, shard in enumerate(SHARDS):
        with np.load(reference["npz"] / "shards" / f"{shard}.npz") as arrays:
            pixels = arrays["arr_0"]
        digest = hashlib.sha256()
        for j, want in enumerate(pixels, 4 * i):
            path = images / str(j % 3) / f"{j:08}.png"
            with Image.open(path) as image:
                assert (image.format, image.mode, image.size) == ("PNG", "L", (8, 8))
                assert np.array_equal(np.asarray(image), want[..., 0])
            digest.update(path.read_bytes())
        assert digest.hexdigest() == record(reference["png"], shard)["sha256"]


def test_pngs_of_colour_of_many_classes_and_of_none(tmp_path: Path) -> None:
    draw(tmp_path / "npz", 5, colour())
    folder = draw(tmp_path / "png", 5, colour(), files="png")
    assert sorted(os.listdir(tmp_path / "png" / "images")) == [f"{i:08}.png" for i in range(5)]
    for i in range(5):
        with np.load(tmp_path / "npz" / "shards" / f"{i // 4:05}.npz") as arrays:
            want = arrays["arr_0"][i % 4]
        with Image.open(tmp_path / "png" / "images" / f"{i:08}.png") as image:
            assert image.mode == "RGB"
            assert np.array_equal(np.asarray(image), want)
    assert folder.images(0).shape == (4, 3, 4, 4)
    many = to_float32(make_flow(image_size=4, num_classes=11))
    draw(tmp_path / "many", 3, many, labels=torch.tensor([10, 7, -1]), files="png")
    found = {str(path.relative_to(tmp_path / "many" / "images")) for path in (tmp_path / "many").rglob("*.png")}
    assert found == {"10/00000000.png", "07/00000001.png", "none/00000002.png"}


def test_two_channels_are_no_png(tmp_path: Path) -> None:
    flow = to_float32(make_flow(in_channels=2, image_size=4))
    with pytest.raises(ValueError, match="files='png': give npz; or png, for images of 1 or 3 channels, not 2"):
        draw(tmp_path / "png", 2, flow, files="png")
    assert not (tmp_path / "png").exists()
    assert draw(tmp_path / "npz", 2, flow).images(0).shape == (2, 2, 4, 4)


# ------------------------------------------------------------------------------------------------------------ progress


def test_a_short_run_without_a_terminal_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path, progress=True)
    assert capsys.readouterr() == ("", "")
    assert draw(tmp_path, progress=True).drawn == 0
    assert capsys.readouterr() == ("", "")
    (tmp_path / "shards" / "00001.json").unlink()
    draw(tmp_path, progress=True)
    assert capsys.readouterr() == ("", f"{tmp_path}: goes on, with 1 of 3 shards to draw\n")


def test_a_line_from_time_to_time_says_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawing(_: jf.SampleFolder) -> Any:
        def invented(start: int, latents: Tensor, labels: Tensor | None, told: Callable[[float], None]) -> Drawn:
            told(0.5)
            time.sleep(0.02)
            told(1.0)
            resolved = torch.arange(start, start + len(latents)) % 4 == 0
            return Drawn(latents.view(-1, 1, 4, 4), None, resolved, {})

        return invented

    assert MODULE._QUIET == 30
    monkeypatch.setattr(MODULE, "_QUIET", 0)
    folder = jf.SampleFolder(tmp_path, manifest_of(1400, 100, 500))
    began = time.perf_counter()
    done = generate(folder, None, drawing, (4, 4))
    taken = time.perf_counter() - began
    assert done.resolved().tolist() == [i % 4 == 0 and i % 500 % 4 == 0 for i in range(1400)]
    out, err = capsys.readouterr()
    assert out == ""
    pattern = r"([\d,]+) of 1,400 samples, ([\d,.]+) a second, (none finished yet|[\d.]+% re-solved)"
    found = [re.fullmatch(pattern, line) for line in err.splitlines()]
    assert all(found)
    rows = [match.groups() for match in found if match is not None]
    assert [count for count, _, _ in rows[:2]] == ["250", "500"]
    assert rows[-1][0] == "1,400"
    counts = [int(count.replace(",", "")) for count, _, _ in rows]
    assert counts == sorted(counts)
    assert {share for _, _, share in rows} == {"none finished yet", "25.00% re-solved"}
    assert float(rows[-1][1].replace(",", "")) >= 1400 / taken
    generate(folder, None, drawing, (4, 4))
    assert capsys.readouterr() == ("", ""), "nothing to draw, nothing to say"


def test_sample_tells_how_far_it_is() -> None:
    told: list[float] = []
    jf.sample(small(), 40, classes(small(), 40), strategy="jacobi-1", batch_size=1, progress=told.append)
    assert told == pytest.approx([i / 6 for i in range(1, 7)])  # two blocks, three groups of 16 batches


# -------------------------------------------------------------------------------------------------------- command line


def test_the_same_command_again_has_nothing_to_draw(run: Any, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = f"sample --model {model} --num 10 --strategy jacobi-3 --batch-size 2 --shard-size 4 --out {out}"
    first = run(f"{line} --json {tmp_path}/1.json")
    assert (first.code, first.err) == (0, "")
    assert re.search(r"drew 10 in \d+ s by 1 process: [\d.]+ images a second; 0\.00% of all were solved", first.out)
    assert f"wrote {out}: 3 shards, manifest.json, strategy.json, samples.png\n" in first.out
    before = pictures(out)
    again = run(f"{line} --json {tmp_path}/2.json")
    assert (again.code, again.err) == (0, "")
    assert f"all 10 were in {out} already, and match their checksums; --overwrite draws them anew\n" in again.out
    assert pictures(out) == before
    one, two = figures(tmp_path / "1.json"), figures(tmp_path / "2.json")
    assert one["runs"] == two["runs"]
    assert (one["drawn"], two["drawn"], one["shards"], one["processes"]) == (10, 0, 3, 1)
    calls = [record(out, shard)["figures"]["network_calls"] for shard in SHARDS]
    assert one["runs"]["jacobi-3"]["network_calls"] == sum(calls)
    (out / "shards" / "00001.npz").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        mended = run(line)
    assert mended.code == 0
    assert re.fullmatch(r"warning: .* 00001 for one; drawn again\n.*: goes on, with 1 of 3 shards.*\n", mended.err)
    assert pictures(out) == before


LINES = {
    "--files bmp": "--files bmp: give npz or png",
    "--shard-size 0": "--shard-size 0: give a positive number of images",
    "--batch-size 2 --shard-size 3": "shard_size=3: give a multiple of the batch size, 2",
    "--compare": "holds samples already; give --overwrite to draw them anew, or another --out",
    "--seed 4": "holds samples of seed 0, not 4; give another --out, or --overwrite to lose them",
    "--labels 1": "holds samples of other labels",
    "--num 1 --batch-size 2": "holds a run of 2 samples, more than 1; give --num 2",
    "--dtype float64": "holds samples of dtype float32, not float64",
    "--overwrite --strategy quickest": "strategy 'quickest': unknown",
    "--overwrite --labels 7": "label 7: this flow has classes 0 to 2",
}  # fmt: skip


@pytest.mark.parametrize("options", LINES)
def test_a_line_that_is_refused_loses_nothing(options: str, run: Any, model: Path, tmp_path: Path) -> None:
    line = f"sample --model {model} --num 2 --strategy jacobi-1 --out {tmp_path}/out"
    assert run(line).code == 0
    before = everything(tmp_path)
    result = run(f"{line} {options}")
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", result.err)
    assert LINES[options] in result.err
    assert everything(tmp_path) == before


def test_figures_do_not_overwrite_the_run(run: Any, model: Path, tmp_path: Path) -> None:
    line = f"sample --model {model} --num 2 --strategy jacobi-1 --out {tmp_path}"
    assert run(line).code == 0
    before = everything(tmp_path)
    for name in ("manifest.json", "strategy.json", "samples.png", "shards/00000.json", "shards/new.json"):
        result = run(f"{line} --json {tmp_path}/{name}")
        assert result.code == 2, name
        assert name in result.err
        assert everything(tmp_path) == before


def test_compare_draws_both_in_the_same_batches(run: Any, model: Path, tmp_path: Path) -> None:
    line = f"sample --model {model} --num 70 --strategy sequential --labels 1 --compare --out {tmp_path}"
    assert run(f"{line.replace('sequential', 'window:16')} --json {tmp_path}/f").code == 0
    shown = figures(tmp_path / "f")
    want = jf.sample(
        small(), 70, torch.ones(70, dtype=torch.int64), strategy="sequential", batch_size=64, progress=False
    )
    assert shown["batch_size"] == 64
    assert shown["runs"]["sequential"]["network_calls"] == want.network_calls


LABELS: dict[str, tuple[Any, str]] = {
    "missing.txt": (None, "cannot be read as whole numbers (No such file or directory)"),
    "missing.npy": (None, "cannot be read as whole numbers (No such file or directory)"),
    "empty.txt": (b"", "cannot be read as whole numbers"),
    "empty.npy": (b"", "cannot be read as whole numbers"),
    "words.txt": (b"0 1 cat 0", "cannot be read as whole numbers (invalid literal for int() with base 10: 'cat')"),
    "floats.txt": (b"0 1.0 2 0", "cannot be read as whole numbers"),
    "binary.txt": (b"\xff\xfe\x00", "cannot be read as whole numbers"),
    "three.txt": (b"0 1 2", "int64 of shape (3,); give 4 whole numbers, one per image"),
    "five.npy": (np.arange(5) % 3, "int64 of shape (5,); give 4 whole numbers, one per image"),
    "square.npy": (np.zeros((2, 2), int), "int64 of shape (2, 2); give 4 whole numbers"),
    "floats.npy": (np.zeros(4), "float64 of shape (4,); give 4 whole numbers"),
    "marks.npy": (np.zeros(4, bool), "bool of shape (4,); give 4 whole numbers"),
    "objects.npy": (np.array([0, 1, 2, None]), "cannot be read as whole numbers"),
    "text.npy": (b"0 1 2 0", "cannot be read as whole numbers"),
    "half.npy": (b"\x93NUMPY\x01\x00", "cannot be read as whole numbers"),
    "zip.npy": (b"PK\x03\x04 and no more", "cannot be read as whole numbers"),
    "several.npy": ({"labels": np.zeros(4, int)}, "whole numbers"),
    "huge.npy": (np.full(4, 2**64 - 1, np.uint64), "label"),
    "huge.txt": (f"{10**30} 0 1 2".encode(), "whole numbers"),
    "beyond.txt": (b"0 1 2 3", "label 3: this flow has classes 0 to 2"),
}


@pytest.mark.parametrize("name", LABELS)
def test_bad_files_of_labels_are_one_line(name: str, run: Any, model: Path, tmp_path: Path) -> None:
    path, (content, words) = tmp_path / name, LABELS[name]
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        with open(path, "wb") as file:
            np.savez(file, **content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    result = run(f"sample --model {model} --num 4 --strategy jacobi-1 --labels {path} --out {tmp_path}/out")
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", result.err)
    assert words in result.err
    assert name in result.err or "this flow has" in result.err
    assert not (tmp_path / "out").exists()


def test_labels_from_files(run: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("2\n0\n-1\n1\n")
    (tmp_path / "commas.txt").write_text("  2, 0,-1 , 1")
    for kind in (np.int64, np.int8, np.dtype(">i4")):
        np.save(tmp_path / f"{np.dtype(kind).name}.npy", np.array([2, 0, -1, 1], kind))
    np.save(tmp_path / "unsigned.npy", np.array([2, 0, 1, 1], np.uint8))
    paths = [*tmp_path.glob("*.txt"), *tmp_path.glob("*.npy")]
    assert len(paths) == 6
    for path in paths:
        out = tmp_path / f"out-{path.stem}"
        result = run(f"sample --model {model} --num 4 --strategy jacobi-1 --labels {path} --out {out}")
        assert (result.code, result.err) == (0, "")
        want = [2, 0, 1 if path.stem == "unsigned" else -1, 1]
        (samples,) = oracle(small(), 4, 4, strategy="jacobi-1", labels=torch.tensor(want))
        with np.load(out / "shards" / "00000.npz") as arrays:
            assert arrays["labels"].tolist() == want
            assert np.array_equal(arrays["arr_0"], eight_bit(samples.images))
