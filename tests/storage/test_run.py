"""Runs that need no flow: the same bytes however often one is stopped, and nothing lost or drawn twice."""

from __future__ import annotations

import errno
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock

import jacobiflow as jf
from jacobiflow.latents import draw_latents
from jacobiflow.sampling import Samples
from jacobiflow.storage import Processes, SampleFolderError
from tests.helpers.sample_folders import everything, facts, flip, read, run, times

OTHER = jf.Strategy.uniform(jf.Solver(jf.Window(5)), 1)
REPLACE = "give another folder, or overwrite=True to replace them"


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Undisturbed runs, by the kind of their files."""
    folder = tmp_path_factory.mktemp("reference")
    return {files: run(folder / files, files=files).path for files in ("npz", "png")}


@pytest.fixture
def out(reference: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the undisturbed run."""
    return Path(shutil.copytree(reference["npz"], tmp_path / "out", ignore=shutil.ignore_patterns(".lock")))


def test_a_shard_is_drawn_of_its_latents_and_handed_over(tmp_path: Path) -> None:
    seen: list[tuple[int, Samples]] = []
    counts: list[tuple[int, int, str]] = []
    folder = run(tmp_path, on_shard=lambda *given: seen.append(given), progress=lambda *given: counts.append(given))
    assert folder.drawn == 10
    assert [start for start, _ in seen] == [0, 4, 8]
    assert torch.equal(torch.cat([samples.latents for _, samples in seen]), draw_latents(10, 4, 4))
    assert torch.cat([samples.labels for _, samples in seen]).tolist() == [i % 3 for i in range(10)]
    assert counts == [(4, 10, "samples"), (8, 10, "samples"), (10, 10, "samples")]


def test_stopped_after_a_shard_and_resumed(reference: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_shard=interrupt)
    seen, counts = list[int](), list[int]()
    assert jf.SampleFolder.open(tmp_path).manifest.checksums is None
    with FileLock(tmp_path / ".lock", timeout=0):
        pass  # it was released
    folder = run(tmp_path, on_shard=lambda start, _: seen.append(start), progress=lambda done, *_: counts.append(done))
    assert (seen, counts, folder.drawn) == ([4, 8], [8, 10], 6)
    assert facts(tmp_path) == facts(reference["npz"])
    assert run(tmp_path).drawn == 0


def test_a_full_disk_costs_one_shard(
    reference: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes = Path.write_bytes

    def write_half(path: Path, data: bytes) -> int:
        if "00001.npz" not in path.name:
            return write_bytes(path, data)
        write_bytes(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left", str(path))

    words = r"00001\.npz: No space left; the finished shards stay: make room, then sample into the"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=words):
        patch.setattr(Path, "write_bytes", write_half)
        run(tmp_path)
    assert not list(tmp_path.rglob("*.partial"))
    assert run(tmp_path).drawn == 6
    assert facts(tmp_path) == facts(reference["npz"])


@pytest.mark.parametrize("files, place", [("npz", "shards/00001.npz"), ("png", "images/2/00000005.png")])
def test_a_damaged_shard_is_drawn_again_and_named(
    files: str, place: str, reference: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(reference[files], tmp_path, dirs_exist_ok=True)
    flip(tmp_path / place)
    (tmp_path / "shards" / f".00001.npz.{16 * '7'}.partial").write_bytes(b"half")  # of a killed process
    before = {name: when for name, when in times(tmp_path).items() if "00001" not in name}
    with pytest.warns(UserWarning, match=r": 1 of 3 shards do not match their checksums, 00001 for one; drawn again$"):
        assert run(tmp_path, files=files).drawn == 4
    assert before.items() <= times(tmp_path).items()
    assert facts(tmp_path) == facts(reference[files])


@pytest.mark.parametrize("text", ['{"name": "app", "icons": []}', '{"format_version": 1,', "[]"])
def test_a_manifest_that_is_not_ours_is_not_touched(text: str, out: Path) -> None:
    (out / "manifest.json").write_text(text)
    before = everything(out)
    for overwrite in (False, True):
        with pytest.raises(SampleFolderError, match=r"manifest\.json: .*; restore it, or move the folder away"):
            run(out, overwrite=overwrite)
        assert everything(out) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_files_is_not_written_to(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("mine")
    run(tmp_path, 2, overwrite=overwrite)
    (tmp_path / "other" / "shards").mkdir(parents=True)
    (tmp_path / "other" / "shards" / "00000.npz").write_text("mine")
    with pytest.raises(ValueError, match=r"other: holds files that this command did not write; give a new or empty"):
        run(tmp_path / "other", overwrite=overwrite)
    assert everything(tmp_path / "other") == {"shards/00000.npz": b"mine"}


def test_what_is_no_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/in"):
        with pytest.raises(OSError, match=rf"{name}: cannot be used as a folder \(.*\); give another folder"):
            run(tmp_path / name)
    assert everything(tmp_path) == {"file": b"mine"}


def test_other_settings_are_refused_before_anything_is_changed(out: Path) -> None:
    before = everything(out)
    changes: dict[str, dict[str, Any]] = {
        "holds a run of 10 samples, more than 9; give num=10; or ": {"num": 9},
        "holds samples of seed 0, not 1; ": {"seed": 1},
        "holds samples of other labels; ": {"labels": None},
        "holds samples of another strategy of this name; ": {"plan": lambda: OTHER},
    }
    for words, changed in changes.items():
        with pytest.raises(SampleFolderError, match=f"^{re.escape(str(out))}: {words}{REPLACE}$"):
            run(out, **changed)
        assert everything(out) == before
    assert run(out).drawn == 0
    assert run(out, plan=lambda: OTHER, keep_plan=True).drawn == 0
    OTHER.save(out / "strategy.json")
    for keep_plan in (False, True):
        with pytest.raises(SampleFolderError, match=r"strategy\.json: has changed since its run wrote it; restore"):
            run(out, keep_plan=keep_plan)


def test_a_run_that_was_stopped_before_its_first_shard_has_settled_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, draw=interrupt)
    assert run(tmp_path, seed=3, plan=lambda: OTHER).strategy() == OTHER


def test_another_machine_is_said_and_the_first_one_stays_in_the_manifest(out: Path) -> None:
    machine = {"device": "cuda", "threads": 2}
    assert run(out, machine=machine).drawn == 0  # nothing to say
    (out / "shards" / "00001.json").unlink()
    words = "begun on cpu with 1 threads, resumed on cuda with 2 threads: equal to rounding, not to the bit"
    with pytest.warns(UserWarning, match=words):
        assert run(out, machine=machine).drawn == 4
    assert read(out / "manifest.json")["machine"] == {"device": "cpu", "threads": 1}


def test_overwriting_draws_anew(reference: dict[str, Path], tmp_path: Path) -> None:
    run(tmp_path, 12, files="png", seed=3, plan=lambda: OTHER)
    before = everything(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, plan=interrupt, overwrite=True)
    assert everything(tmp_path) == before, "lost before the new run began"
    assert run(tmp_path, overwrite=True).drawn == 10
    assert facts(tmp_path) == facts(reference["npz"])


def test_room_is_needed_for_what_is_missing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    before = everything(out)
    assert run(out).drawn == 0
    words = r": the samples to draw take 0\.\d MB, 0\.0 MB are free; make room, or give another folder$"
    for path in (out, out.parent / "new"):
        with pytest.raises(SampleFolderError, match=words):
            run(path, 10_000)
    assert everything(out) == before


def test_the_first_process_waits_for_the_shards_of_the_others(
    reference: dict[str, Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Processes, "on_first", lambda self, work: work())
    theirs, seen = out / "shards" / "00001.json", []
    record = theirs.read_bytes()
    for path in (theirs, out / "shards" / "00000.json"):
        path.unlink()

    def on_shard(start: int, _: Samples) -> None:
        seen.append(start)
        threading.Timer(0.3, theirs.write_bytes, [record]).start()

    assert run(out, processes=Processes(0, 2), on_shard=on_shard).drawn == 8
    assert seen == [0]
    assert facts(out) == facts(reference["npz"])


def test_a_folder_that_a_process_does_not_see_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "on_first", lambda self, work: [work(), (out / "manifest.json").unlink()][0])
    with pytest.raises(SampleFolderError, match=r": process 1 does not see it; give one on a shared disk$"):
        run(out, processes=Processes(1, 2))
