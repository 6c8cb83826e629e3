"""Runs: the same bytes however often one is stopped, and nothing lost or drawn twice.

They need no flow: latents are taken for images.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from sample_folders import (
    everything,
    facts,
    flip,
    invented,
    partials,
    pixels_of,
    read,
    run,
    signed,
    times,
)
from torch import Tensor

import jacobiflow as jf
from jacobiflow.latents import draw_latents
from jacobiflow.storage import Drawn, Processes, SampleFolderError

WINDOW = jf.Strategy.uniform(jf.Solver(jf.Window(4)), 2)
REPLACE = "give another folder, or overwrite=True to replace them"


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def damaged(few: str, shard: str) -> str:
    return rf": {few} shards lack their images or do not match their checksums, {shard} for one; drawn again$"


@pytest.mark.parametrize("files", ["npz", "png"])
def test_every_shard_is_kept_with_what_was_said_of_it(files: str, tmp_path: Path) -> None:
    seen: dict[int, tuple[Tensor, Tensor | None, Drawn]] = {}
    out = tmp_path / "new" / "out"
    folder = run(out, files=files, on_shard=lambda start, *rest: seen.setdefault(start, rest))
    assert folder.drawn == 10
    assert sorted(os.listdir(out)) == [".lock", *(["images"] if files == "png" else []), "manifest.json", "shards"]
    assert np.array_equal(torch.cat(list(folder.batches())).permute(0, 2, 3, 1).numpy(), pixels_of())
    assert folder.lost().nonzero().flatten().tolist() == [5]
    assert folder.resolved().nonzero().flatten().tolist() == [6]
    spans = [(0, 4), (4, 8), (8, 10)]
    assert list(seen) == [start for start, _ in spans]
    for i, (start, stop) in enumerate(spans):
        latents, labels, drawn = seen[start]
        assert labels is not None
        assert torch.equal(latents, draw_latents(10, 4, 4)[start:stop])
        assert labels.tolist() == [j % 3 for j in range(start, stop)]
        assert len(drawn.images) == stop - start
        found = read(out / "shards" / f"{i:05}.json")
        certificate = [None if j == 5 else pytest.approx(1e-4 * j) for j in range(start, stop)]
        assert found == signed(found)
        assert found == {
            "start": start, "num": stop - start, "labels": labels.tolist(), "certificate": certificate,
            "resolved": [2] if i == 1 else [], "lost": [1] if i == 1 else [], "figures": {"first": start},
            "sha256": read(out / "manifest.json")["checksums"][i], "record_sha256": found["record_sha256"],
        }  # fmt: skip
    jf.SampleFolder.open(out).check()


def test_a_run_without_labels_or_certificates(tmp_path: Path) -> None:
    def drawing(_: jf.SampleFolder) -> Any:
        return lambda start, latents, *_: Drawn(latents.view(-1, 1, 4, 4), None, torch.zeros(len(latents)) > 0, {})

    folder = run(tmp_path, labels=False, drawing=drawing)
    assert (folder.certificate(), folder.labels(0)) == (None, None)
    assert run(tmp_path, labels=False, drawing=drawing).drawn == 0


# ------------------------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("files", ["npz", "png"])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_stopped_after_a_shard_and_resumed(
    files: str, after: int, reference: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []

    def stop(start: int, *_: Any) -> None:
        seen.append(start)
        if len(seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, files=files, on_shard=stop)
    before, unfinished = times(tmp_path), jf.SampleFolder.open(tmp_path)
    assert unfinished.manifest.checksums is None
    assert [unfinished.has(i) for i in range(3)] == [i < after for i in range(3)]
    folder = run(tmp_path, files=files, on_shard=lambda start, *_: seen.append(start), progress=True)
    assert seen == [0, 4, 8]
    assert folder.drawn == 10 - min(4 * after, 10)
    said = f"{tmp_path}: resumed, {3 - after} of 3 shards to draw\n" if after < 3 else ""
    assert capsys.readouterr() == ("", said)
    assert before.items() <= times(tmp_path).items(), "a finished shard was drawn again"
    assert facts(tmp_path) == facts(reference[files])


@pytest.mark.parametrize("fault", ["before", "after", "full"])
@pytest.mark.parametrize("files, writes", [("npz", 9), ("png", 11)])
def test_stopped_at_any_write_and_resumed(
    files: str, writes: int, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before or after a file gets its name, or with half of it on a full disk."""
    run(tmp_path / "want", 5, files=files, shard_size=2, plan=lambda: WINDOW)
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
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return write_bytes(path, data)

        with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, OSError)) as stopped:
            patch.setattr(*((Path, "write_bytes", writing) if fault == "full" else (os, "replace", replacing)))
            run(out, 5, files=files, shard_size=2, plan=lambda: WINDOW)
        if fault == "full" and 2 <= place < writes - 1:  # not the manifest or the strategy
            words = r"shards.*|images.*: No space left on device; the finished shards are kept: make room, then sample"
            assert re.search(words, str(stopped.value))
        assert not partials(out)
        before = times(out)
        run(out, 5, files=files, shard_size=2, plan=lambda: WINDOW)
        assert before.items() <= times(out).items()
        assert facts(out) == facts(tmp_path / "want")


def test_partial_files_of_killed_processes_are_removed(reference: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(reference["npz"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "shards" / ".00001.npz.77.partial").write_bytes(b"half")
    run(tmp_path)
    assert not partials(tmp_path)


# ---------------------------------------------------------------------------------------------------- what is damaged


@pytest.mark.parametrize("files, place", [("npz", "shards/00001.npz"), ("png", "images/2/00000005.png")])
def test_a_damaged_shard_is_drawn_again_and_named(
    files: str, place: str, reference: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(reference[files], tmp_path, dirs_exist_ok=True)
    flip(tmp_path / place)
    before = {name: when for name, when in times(tmp_path).items() if "00001" not in name}
    with pytest.warns(UserWarning, match=damaged("1 of 3", "00001")):
        assert run(tmp_path, files=files).drawn == 4
    assert before.items() <= times(tmp_path).items()
    assert facts(tmp_path) == facts(reference[files])


def test_a_missing_record_is_no_damage(reference: dict[str, Path], tmp_path: Path) -> None:
    """It is what an interruption leaves."""
    shutil.copytree(reference["npz"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "shards" / "00000.json").unlink()
    assert run(tmp_path).drawn == 4
    assert facts(tmp_path) == facts(reference["npz"])


def test_checksums_of_the_manifest_are_taken_again(reference: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(reference["npz"], tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace(read(tmp_path / "manifest.json")["checksums"][1], "0" * 64))
    assert run(tmp_path).drawn == 0
    assert facts(tmp_path) == facts(reference["npz"])


@pytest.mark.parametrize("name", ["shards", "images", "strategy.json"])
def test_samples_without_a_manifest_are_not_touched(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "00000.npz").write_text("mine")
    before = everything(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(
            SampleFolderError, match=rf": has {name} but no manifest\.json; give another folder, or rem"
        ):
            run(tmp_path, overwrite=overwrite)
        assert everything(tmp_path) == before
        assert sorted(os.listdir(tmp_path)) == [name]


def test_a_broken_manifest_is_refused_until_it_is_overwritten(reference: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(reference["npz"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "manifest.json").write_text('{"format_version": 1,')
    before = everything(tmp_path)
    with pytest.raises(SampleFolderError, match="not a manifest of samples"):
        run(tmp_path)
    assert everything(tmp_path) == before
    run(tmp_path, overwrite=True)
    assert facts(tmp_path) == facts(reference["npz"])


# ------------------------------------------------------------------------------------------------------ other settings


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"seed": 5}, "holds samples of seed 0, not 5"),
        ({"num": 9}, "holds a run of 10 samples, more than 9; give num=10"),
        ({"labels": False}, "holds samples of other labels"),
        ({"plan": lambda: WINDOW}, "holds samples of another strategy of this name"),
    ],
)
def test_other_settings_are_refused_before_anything_is_changed(
    changed: dict[str, Any], words: str, reference: dict[str, Path]
) -> None:
    out = reference["npz"]
    before = everything(out)
    with pytest.raises(SampleFolderError, match=f"^{re.escape(str(out))}: {words}.*{REPLACE}$"):
        run(out, **changed)
    assert everything(out) == before
    assert run(out).drawn == 0


def test_the_strategy_is_kept_and_compared(tmp_path: Path) -> None:
    run(tmp_path, plan=lambda: WINDOW)
    path, file = tmp_path / "strategy.json", tmp_path / "other.json"
    good, others = path.read_bytes(), jf.Strategy.uniform(jf.Solver(jf.Window(5)), 2)
    WINDOW.save(file)
    assert file.read_bytes() == good
    assert run(tmp_path, plan=lambda: WINDOW).drawn == 0
    for plan in (lambda: others, None):
        with pytest.raises(SampleFolderError, match=f"another strategy of this name; {REPLACE}"):
            run(tmp_path, plan=plan)
    for harm in (others.save, flip, Path.unlink):
        path.write_bytes(good)
        harm(path)
        before = everything(tmp_path)
        for keep_plan in (False, True):
            with pytest.raises(
                SampleFolderError, match=r"strategy\.json: has changed since its run wrote it; restore i"
            ):
                run(tmp_path, plan=lambda: WINDOW, keep_plan=keep_plan)
        assert everything(tmp_path) == before


def test_a_plan_that_is_kept_is_made_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, plan=lambda: WINDOW, keep_plan=True, on_shard=interrupt)
    seen: list[jf.Strategy] = []

    def drawing(folder: jf.SampleFolder) -> Any:
        seen.append(folder.strategy())
        return invented

    folder = run(tmp_path, plan=lambda: pytest.fail("planned again"), keep_plan=True, drawing=drawing)
    assert (folder.drawn, seen) == (6, [WINDOW])
    with pytest.raises(SampleFolderError, match="strategy invented, not auto"):  # planning takes long
        run(tmp_path, strategy="auto", plan=lambda: pytest.fail("planned"), keep_plan=True)


def test_a_run_that_was_stopped_before_its_first_shard_has_settled_nothing(tmp_path: Path) -> None:
    def drawing(_: jf.SampleFolder) -> Any:
        return interrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, plan=lambda: WINDOW, drawing=drawing)
    other = jf.Strategy.uniform(jf.Solver(jf.Window(5)), 2)
    assert run(tmp_path, seed=3, plan=lambda: other).strategy() == other


@pytest.mark.parametrize("files", ["npz", "png"])
def test_a_run_may_grow(files: str, reference: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(reference[files], tmp_path / "out")
    before = {name: when for name, when in times(tmp_path / "out").items() if "00002" not in name}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", 17, files=files, on_shard=interrupt)
    with pytest.raises(SampleFolderError, match="holds a run of 17 samples, more than 10; give num=17"):
        run(tmp_path / "out", files=files)
    assert run(tmp_path / "out", 17, files=files).drawn == 17 - 8 - 4  # two shards were whole, one was drawn before
    run(tmp_path / "at once", 17, files=files)
    assert facts(tmp_path / "out") == facts(tmp_path / "at once")
    assert before.items() <= times(tmp_path / "out").items()


@pytest.mark.parametrize("num, shard", [(10, 0), (8, 0), (8, 1)])
def test_a_damaged_shard_is_named_where_the_run_grows(num: int, shard: int, tmp_path: Path) -> None:
    """But the last one only where it was full."""
    run(tmp_path, num)
    flip(tmp_path / "shards" / f"{shard:05}.npz")
    with pytest.warns(UserWarning, match=damaged("1 of 5", f"{shard:05}")):
        assert run(tmp_path, 17).drawn == 17 - 4


def test_another_machine_is_said_and_the_first_one_stays_in_the_manifest(
    reference: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(reference["npz"], tmp_path, dirs_exist_ok=True)
    machine = {"device": "cuda", "threads": 2}
    assert run(tmp_path, machine=machine).drawn == 0  # nothing to say
    (tmp_path / "shards" / "00001.json").unlink()
    words = "begun on cpu with 1 threads, resumed on cuda with 2 threads: equal to rounding, not to the bit"
    with pytest.warns(UserWarning, match=words):
        assert run(tmp_path, machine=machine).drawn == 4
    assert read(tmp_path / "manifest.json")["machine"] == {"device": "cpu", "threads": 1}


# ----------------------------------------------------------------------------------------------------------- overwrite


def test_overwriting_draws_anew(reference: dict[str, Path], tmp_path: Path) -> None:
    run(tmp_path, 12, files="png", seed=3, plan=lambda: WINDOW)
    (tmp_path / "mine.txt").write_text("not of the run")
    assert run(tmp_path, overwrite=True).drawn == 10
    assert facts(tmp_path) == facts(reference["npz"])
    assert sorted(os.listdir(tmp_path)) == [".lock", "manifest.json", "mine.txt", "shards"]


def test_overwriting_that_is_interrupted_in_planning_loses_nothing(reference: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(reference["npz"], tmp_path, dirs_exist_ok=True)
    before = everything(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, plan=interrupt, overwrite=True)
    assert everything(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------------- room


def disk(patch: pytest.MonkeyPatch, free: int) -> None:
    patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


@pytest.mark.parametrize("place", ["new", "new/and/deep", "there", "there/and/deep"])
def test_more_than_the_disk_holds_is_refused_and_leaves_no_new_folder(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    out, need = tmp_path / place, 62_500 * 16
    disk(monkeypatch, need - 1)
    words = r": the samples to draw take 1\.0 MB, 1\.0 MB are free; make room, or give another folder$"
    with pytest.raises(SampleFolderError, match=words):
        run(out, 62_500, shard_size=62_500, on_shard=lambda *_: pytest.fail("drawn"))
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["there"]
    disk(monkeypatch, 10 * 16)
    assert run(out).drawn == 10


def test_room_is_needed_for_what_is_missing_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    (tmp_path / "shards" / "00001.json").unlink()
    disk(monkeypatch, 4 * 16 - 1)
    before = everything(tmp_path)
    with pytest.raises(SampleFolderError, match="are free; make room"):
        run(tmp_path)
    assert everything(tmp_path) == before
    disk(monkeypatch, 4 * 16)
    assert run(tmp_path).drawn == 4
    disk(monkeypatch, 0)
    assert run(tmp_path).drawn == 0


def test_room_that_overwriting_makes_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = run(tmp_path).size()
    before, num = everything(tmp_path), size // 16
    disk(monkeypatch, 0)
    with pytest.raises(SampleFolderError, match="are free; make room"):
        run(tmp_path, num + 1, overwrite=True)
    assert everything(tmp_path) == before
    assert run(tmp_path, num, overwrite=True).drawn == num


# ------------------------------------------------------------------------------------------------------------- locking


def test_a_second_run_into_the_folder_is_refused(reference: dict[str, Path], tmp_path: Path) -> None:
    refused: list[int] = []

    def another(start: int, *_: Any) -> None:
        before = everything(tmp_path)
        for overwrite in (False, True):
            with pytest.raises(
                SampleFolderError, match=": another run is writing to it; wait for it, stop it, or give a"
            ):
                run(tmp_path, overwrite=overwrite)
        assert everything(tmp_path) == before
        refused.append(start)

    run(tmp_path, on_shard=another)
    assert refused == [0, 4, 8]
    assert facts(tmp_path) == facts(reference["npz"])


def test_the_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, on_shard=interrupt)
    with FileLock(tmp_path / ".lock", timeout=0):
        pass
    assert run(tmp_path).drawn == 6


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_new_folder_in_which_nothing_began_is_removed(error: type[BaseException], tmp_path: Path) -> None:
    def plan() -> jf.Strategy:
        raise error

    with pytest.raises(error):
        run(tmp_path / "new" / "deep", plan=plan)
    assert os.listdir(tmp_path) == []


# -------------------------------------------------------------------------------------------------- several processes


class Rank(Processes):
    """A process of a run whose first process has begun already."""

    def once(self, work: Callable[[], Any]) -> Any:
        return FIRST[0]


FIRST: list[Any] = []


class First(Processes):
    def once(self, work: Callable[[], Any]) -> Any:
        FIRST[:] = [work()]
        return FIRST[0]


def test_processes_share_the_shards_and_the_first_waits_for_all(
    reference: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By threads; test_processes.py has real ones."""
    seen: dict[int, list[int]] = {0: [], 1: []}
    begun, results = threading.Event(), {}

    def first() -> None:
        def drawing(_: jf.SampleFolder) -> Any:
            begun.set()
            return invented

        results[0] = run(tmp_path, among=First(0, 2), drawing=drawing, on_shard=lambda s, *_: seen[0].append(s))

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(60)
    results[1] = run(tmp_path, among=Rank(1, 2), progress=True, on_shard=lambda s, *_: seen[1].append(s))
    thread.join(60)
    assert seen == {0: [0, 8], 1: [4]}
    assert results[0].drawn == 10
    assert facts(tmp_path) == facts(reference["npz"])
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SampleFolderError, match=": process 1 does not see it; give a folder on a shared disk$"):
        (tmp_path / "manifest.json").unlink()
        run(tmp_path, among=Rank(1, 2))
