"""Runs that need no flow: the same bytes however often one is stopped, and nothing lost or drawn twice."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from running import ends_within
from sample_folders import (
    everything,
    facts,
    flip,
    invented,
    manifest_of,
    pixels_in,
    read,
    record_of,
    run,
    signed,
    times,
)
from scoring import levels

import jacobiflow as jf
from jacobiflow.latents import draw_latents
from jacobiflow.locking import FolderInUseError
from jacobiflow.storage import Drawn, Processes, SampleFolderError, problems
from jacobiflow.storage.progress import run_progress

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOW, OTHER = (jf.Strategy.uniform(jf.Solver(jf.Window(size)), 2) for size in (4, 5))
UNIX = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have no names")
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


def test_every_shard_is_kept_with_what_was_said_of_it(tmp_path: Path) -> None:
    seen: list[Any] = []
    folder, latents = run(tmp_path, on_shard=lambda *given: seen.append(given)), draw_latents(10, 4, 4)
    lost = latents.view(10, 1, 4, 4).clone()
    lost[5] = torch.nan
    assert folder.drawn == 10
    assert np.array_equal(pixels_in(folder), levels(lost))
    for i, (start, stop) in enumerate(((0, 4), (4, 8), (8, 10))):
        first, shard, labels, drawn = seen[i]
        assert (first, labels.tolist(), type(drawn)) == (start, [j % 3 for j in range(start, stop)], Drawn)
        assert torch.equal(shard, latents[start:stop])
        found = read(tmp_path / "shards" / f"{i:05}.json")
        certificate = [None if j == 5 else pytest.approx(1e-4 * j) for j in range(start, stop)]
        assert found == signed(found) == {
            "start": start, "num": stop - start, "labels": labels.tolist(), "certificate": certificate,
            "resolved": [2] if i == 1 else [], "lost": [1] if i == 1 else [], "figures": {"first": start},
            "sha256": read(tmp_path / "manifest.json")["checksums"][i], "record_sha256": found["record_sha256"],
        }  # fmt: skip
    jf.SampleFolder.open(tmp_path).check()


def test_stopped_after_a_shard_and_resumed(
    reference: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_shard=interrupt)
    seen = list[int]()
    assert jf.SampleFolder.open(tmp_path).manifest.checksums is None
    with FileLock(tmp_path / ".lock", timeout=0):
        pass  # it was released
    folder = run(tmp_path, on_shard=lambda start, *_: seen.append(start), progress=True)
    assert (seen, folder.drawn) == ([4, 8], 6)
    assert capsys.readouterr() == ("", f"{tmp_path}: resumed, 2 of 3 shards to draw\n")
    assert facts(tmp_path) == facts(reference["npz"])
    assert run(tmp_path, progress=True).drawn == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("fault", ["before", "after", "full"])
@pytest.mark.parametrize("files, writes", [("npz", 9), ("png", 11)])
def test_stopped_at_any_write_and_resumed(
    files: str, writes: int, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before or after a file gets its name, or with half of it on a full disk."""
    given: dict[str, Any] = {"files": files, "shard_size": 2, "plan": lambda: WINDOW}
    run(tmp_path / "want", 5, **given)
    rename, write_bytes = os.replace, Path.write_bytes
    for place in range(writes):
        out, left = tmp_path / str(place), [place]

        def reached(left: list[int] = left) -> bool:
            left[0] -= 1
            return left[0] == -1

        def replacing(*names: Any) -> None:
            now = reached()
            if not now or fault == "after":
                rename(*names)
            if now:
                raise KeyboardInterrupt

        def writing(path: Path, data: bytes) -> int:
            if reached():
                write_bytes(path, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left", str(path))
            return write_bytes(path, data)

        with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, OSError)) as stopped:
            patch.setattr(*((Path, "write_bytes", writing) if fault == "full" else (os, "replace", replacing)))
            run(out, 5, **given)
        if fault == "full" and 2 <= place < writes - 1:  # not the manifest or the strategy
            words = r"(shards|images)/.*: No space left; the finished shards are kept: make room, then sample into the"
            assert re.search(words, str(stopped.value))
        assert not list(out.rglob("*.partial"))
        before = times(out)
        run(out, 5, **given)
        assert before.items() <= times(out).items()
        assert facts(out) == facts(tmp_path / "want")


@pytest.mark.parametrize("files, place", [("npz", "shards/00001.npz"), ("png", "images/2/00000005.png")])
def test_a_damaged_shard_is_drawn_again_and_named(
    files: str, place: str, reference: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(reference[files], tmp_path, dirs_exist_ok=True)
    flip(tmp_path / place)
    (tmp_path / "shards" / f".00001.npz.{16 * '7'}.partial").write_bytes(b"half")  # of a killed process
    before = {name: when for name, when in times(tmp_path).items() if "00001" not in name}
    with pytest.warns(UserWarning, match=r": 1 of 3 shards lack their images .*, 00001 for one; drawn again$"):
        assert run(tmp_path, files=files).drawn == 4
    assert before.items() <= times(tmp_path).items()
    assert facts(tmp_path) == facts(reference[files])


FOREIGN = {
    "of another program": '{"name": "app", "icons": []}', "cut off": '{"format_version": 1,', "a list": "[]",
    "edited": None, "without an entry": None,
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_manifest_that_is_not_ours_is_not_touched(kind: str, out: Path) -> None:
    path, held = out / "manifest.json", read(out / "manifest.json")
    changed = held | {"seed": 1} if kind == "edited" else {k: v for k, v in held.items() if k != "seed"}
    path.write_text(FOREIGN[kind] or json.dumps(changed))
    if kind == "of another program":
        shutil.rmtree(out / "shards")
    before = everything(out)
    for overwrite in (False, True):
        with pytest.raises(
            SampleFolderError, match=r"not a manifest of samples .*; restore it, or move the folder away"
        ):
            run(out, overwrite=overwrite)
        assert everything(out) == before
        assert not (out / ".lock").exists()


@pytest.mark.parametrize("name", ["shards", "images", "strategy.json"])
def test_samples_without_a_manifest_are_not_touched(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "00000.npz").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(SampleFolderError, match=rf": has {name} but no manifest\.json; give another folder, or"):
            run(tmp_path, overwrite=overwrite)
        assert everything(tmp_path) == {f"{name}/00000.npz": b"mine"}
        assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("files, name", [("npz", "shards/00003.npz"), ("png", "images/1/00000010.png")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_under_names_of_ours_are_not_overwritten(
    files: str, name: str, overwrite: bool, reference: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(reference[files], tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(SampleFolderError, match=f"{name}: was not written by this run; move it away, or give another"):
        run(tmp_path, 17, files=files, overwrite=overwrite)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("make", [Path.mkdir, pytest.param(os.mkfifo, marks=UNIX)])
@pytest.mark.parametrize("name", ["shards/00001.npz", "shards/00001.json", "strategy.json"])
def test_what_is_no_file_is_neither_read_nor_replaced(name: str, make: Any, tmp_path: Path) -> None:
    """A folder or a pipe in the place of a file of the run."""
    run(tmp_path, plan=lambda: WINDOW)
    (tmp_path / name).unlink()
    make(tmp_path / name)
    before = everything(tmp_path)
    with ends_within(20):
        for overwrite in (False, True):
            with pytest.raises(SampleFolderError, match=f"{name}: was not written by this run; move it away, or give"):
                run(tmp_path, plan=lambda: WINDOW, overwrite=overwrite)
        folder = jf.SampleFolder.open(tmp_path)
        assert [folder.verify(index) for index in range(3)] == [True, name == "strategy.json", True]
        assert any(name in line for line in problems(tmp_path))
        if name == "shards/00001.npz":
            with pytest.raises(OSError):
                folder.images(1)
    assert everything(tmp_path) == before


def test_a_folder_that_appears_in_the_place_of_a_shard_is_named(tmp_path: Path) -> None:
    def draw(*given: Any) -> Drawn:
        (tmp_path / "shards" / "00001.npz").mkdir(parents=True, exist_ok=True)
        return invented(*given)

    words = (
        r"shards/00001\.npz: Is a directory; the finished shards are kept: correct this, then sample into the folder"
    )
    with pytest.raises(OSError, match=words):
        run(tmp_path, drawing=lambda _: draw)


def test_a_shard_of_other_samples_is_drawn_again(reference: dict[str, Path], out: Path, tmp_path: Path) -> None:
    """Though it is whole in itself."""
    run(tmp_path / "other", seed=1)
    for kind in ("npz", "json"):
        shutil.copyfile(tmp_path / "other" / "shards" / f"00001.{kind}", out / "shards" / f"00001.{kind}")
    with pytest.warns(UserWarning, match="00001 for one; drawn again"):
        assert run(out).drawn == 4
    assert facts(out) == facts(reference["npz"])


def test_what_is_no_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / ".lock").write_text("of another program")
    before = everything(tmp_path)
    for name, words in {
        "file": "cannot be used as a folder (File exists)", "file/in": "cannot be used as a folder (Not a directory)",
        "loop": "cannot be used as a folder (File exists)", "locked": "/.lock: is not a lock of jacobiflow; move",
    }.items():  # fmt: skip
        with pytest.raises((ValueError, OSError), match=re.escape(words)):
            run(tmp_path / name)
    assert everything(tmp_path) == before
    assert (tmp_path / "locked" / ".lock").read_text() == "of another program"


def test_other_settings_are_refused_before_anything_is_changed(out: Path) -> None:
    before = everything(out)
    changes: dict[str, dict[str, Any]] = {
        "holds a run of 10 samples, more than 9; give num=10; or ": {"num": 9},
        "holds samples of other labels; ": {"labels": False},
        "holds samples of another strategy of this name; ": {"plan": lambda: WINDOW},
    }
    for words, changed in changes.items():
        with pytest.raises(SampleFolderError, match=f"^{re.escape(str(out))}: {words}{REPLACE}$"):
            run(out, **changed)
        assert everything(out) == before
    assert run(out).drawn == 0


def test_the_strategy_is_kept_and_compared(tmp_path: Path) -> None:
    run(tmp_path, plan=lambda: WINDOW)
    assert run(tmp_path, plan=lambda: WINDOW).drawn == 0
    for plan in (lambda: OTHER, None):
        with pytest.raises(SampleFolderError, match=f"another strategy of this name; {REPLACE}"):
            run(tmp_path, plan=plan)
    for harm in (OTHER.save, Path.unlink):
        harm(tmp_path / "strategy.json")
        before = everything(tmp_path)
        for keep_plan in (False, True):
            with pytest.raises(SampleFolderError, match=r"strategy\.json: has changed since its run wrote it; restore"):
                run(tmp_path, plan=lambda: WINDOW, keep_plan=keep_plan)
        assert everything(tmp_path) == before


def test_a_run_that_was_stopped_before_its_first_shard_has_settled_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "new" / "deep", plan=interrupt)
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, plan=lambda: WINDOW, drawing=interrupt)
    assert run(tmp_path, seed=3, plan=lambda: OTHER).strategy() == OTHER


@pytest.mark.parametrize("files", ["npz", "png"])
def test_a_run_may_grow(files: str, reference: dict[str, Path], tmp_path: Path) -> None:
    out, want = tmp_path / "out", tmp_path / "want"
    shutil.copytree(reference[files], out)
    before = {name: when for name, when in times(out).items() if "00002" not in name}
    with pytest.raises(KeyboardInterrupt):
        run(out, 17, files=files, on_shard=interrupt)
    assert run(out, 17, files=files).drawn == 17 - 8 - 4  # two shards were whole, one was drawn before
    run(want, 17, files=files)
    assert facts(out) == facts(want)
    assert before.items() <= times(out).items()


@pytest.mark.parametrize("num, shard", [(10, 0), (8, 0), (8, 1)])
def test_a_damaged_shard_is_named_where_the_run_grows(num: int, shard: int, tmp_path: Path) -> None:
    """But the last one only where it was full."""
    run(tmp_path, num)
    flip(tmp_path / "shards" / f"{shard:05}.npz")
    with pytest.warns(UserWarning, match=f"1 of 5 shards .*, {shard:05} for one; drawn"):
        assert run(tmp_path, 17).drawn == 17 - 4


def test_another_machine_is_said_and_the_first_one_stays_in_the_manifest(out: Path) -> None:
    machine = {"device": "cuda", "threads": 2}
    assert run(out, machine=machine).drawn == 0  # nothing to say
    (out / "shards" / "00001.json").unlink()
    words = "begun on cpu with 1 threads, resumed on cuda with 2 threads: equal to rounding, not to the bit"
    with pytest.warns(UserWarning, match=words):
        assert run(out, machine=machine).drawn == 4
    assert read(out / "manifest.json")["machine"] == {"device": "cpu", "threads": 1}


def test_overwriting_draws_anew(reference: dict[str, Path], tmp_path: Path) -> None:
    run(tmp_path, 12, files="png", seed=3, plan=lambda: WINDOW)
    before = everything(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, plan=interrupt, overwrite=True)
    assert everything(tmp_path) == before, "lost before the new run began"
    assert run(tmp_path, overwrite=True).drawn == 10
    assert facts(tmp_path) == facts(reference["npz"])


def test_room_is_needed_for_what_is_missing_less_what_is_overwritten(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, size, before = [0], jf.SampleFolder.open(out).size(), everything(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    assert run(out).drawn == 0
    for num, overwrite in ((11, False), (size // 16 + 1, True)):
        with pytest.raises(SampleFolderError, match="are free; make room"):
            run(out, num, overwrite=overwrite)
        assert everything(out) == before
    assert run(out, size // 16, overwrite=True).drawn == size // 16
    free[0] = 3_000_000
    words = r": the samples to draw take 3\.2 MB, 3\.0 MB are free; make room, or give another folder$"
    with pytest.raises(SampleFolderError, match=words):
        run(out.parent / "new" / "deep", 200_000, shard_size=200_000)
    assert os.listdir(out.parent) == ["out"]


def test_a_second_run_into_the_folder_is_refused(reference: dict[str, Path], tmp_path: Path) -> None:
    def another(*_: Any) -> None:
        with pytest.raises(FolderInUseError, match=r": another run is writing to it; wait for it, stop it, or give"):
            run(tmp_path, overwrite=True)

    run(tmp_path, on_shard=another)
    assert facts(tmp_path) == facts(reference["npz"])


def test_the_first_process_waits_for_the_shards_of_the_others(
    reference: dict[str, Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Processes, "once", lambda self, work: work())
    theirs, seen = out / "shards" / "00001.json", []
    record = theirs.read_bytes()
    for path in (theirs, out / "shards" / "00000.json"):
        path.unlink()

    def on_shard(start: int, *_: Any) -> None:
        seen.append(start)
        threading.Timer(0.3, theirs.write_bytes, [record]).start()

    assert run(out, among=Processes(0, 2), on_shard=on_shard).drawn == 8
    assert seen == [0]
    assert facts(out) == facts(reference["npz"])


def test_a_folder_that_a_process_does_not_see_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "once", lambda self, work: [work(), (out / "manifest.json").unlink()][0])
    with pytest.raises(SampleFolderError, match=r": process 1 does not see it; give a folder on a shared disk$"):
        run(out, among=Processes(1, 2))


def test_a_line_every_half_minute_counts_the_samples_of_all_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, folder = [100.0], jf.SampleFolder(tmp_path, manifest_of(1400, shard_size=500))
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    steps = (
        (20, 1, None),
        (30, 1, None),
        (30.5, 250.7, None),
        (60.5, 1, 2),
        (61, 399, None),
        (92, 400, 0),
        (125, 0, 1),
    )
    with run_progress(folder, [0, 2], processes=2) as update:
        for seconds, samples, done in steps:
            if done is not None:  # as any process finishes a shard
                start, stop = folder.manifest.span(done)
                record = record_of(start, stop - start, labels=None, resolved=tuple(range(0, stop - start, 4)))
                folder.write(done, torch.zeros(record.num, 1, 4, 4, dtype=torch.uint8), record)
            now[0] = 100 + seconds
            update(samples)
    assert capsys.readouterr().err.splitlines() == [
        "250 of 900 samples, 8.2 a second, none finished yet",
        "799 of 900 samples, 13.1 a second, 25.00% re-solved",
        "900 of 900 samples, 9.8 a second, 25.00% re-solved",  # never more than there are
        "900 of 900 samples, 7.2 a second, 25.00% re-solved",
    ]
    monkeypatch.setenv("FORCE_COLOR", "1")
    with run_progress(jf.SampleFolder(tmp_path / "new", folder.manifest), [0], every=0) as update:
        update(125)  # a bar on a terminal
    assert re.search(r"\x1b\[.*125 of 500 samples", capsys.readouterr().err, re.DOTALL)
    for shown, todo in ((False, [0]), (True, [])):
        with run_progress(folder, todo, shown, every=0) as update:
            update(5)
    assert capsys.readouterr() == ("", "")


def test_a_shard_is_looked_for_a_few_times_however_many_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    for name, real in (("has", jf.SampleFolder.has), ("record", jf.SampleFolder.record)):

        def look(folder: jf.SampleFolder, index: int, real: Any = real) -> Any:
            looks.append(index)
            return real(folder, index)

        monkeypatch.setattr(jf.SampleFolder, name, look)
    run(tmp_path, 200, shard_size=2, progress=True)
    assert len(looks) <= 6 * 100
