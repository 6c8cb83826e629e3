"""Files of today's formats, and of earlier ones, are read as they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import jacobiflow as jf
from jacobiflow.training.checkpoint import CHECKPOINT, last_step
from tools import formats

EXPECTED = json.loads(formats.EXPECTED.read_text())
REMEDY = (
    "Read a file of an earlier version as before, or refuse it in one line that says what to do, and put that line "
    'under "refused" in expected.json. After a change of a format, raise its version and run `make formats`.'
)


@pytest.mark.parametrize("path", sorted(formats.FOLDER.glob("*-v*")), ids=lambda path: path.name)
def test_a_sample_is_read_as_before(path: Path) -> None:
    assert formats.read(path) == EXPECTED[path.name], REMEDY


def test_each_kind_has_a_sample_of_its_version() -> None:
    assert [name for name in formats.current() if not (formats.FOLDER / name).exists()] == [], REMEDY
    assert {path.name for path in formats.FOLDER.glob("*-v*")} == EXPECTED.keys()
    assert sum(path.stat().st_size for path in formats.FOLDER.rglob("*")) < 350_000


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = shutil.copyfile(formats.FOLDER / "checkpoint-v1" / CHECKPOINT, tmp_path / CHECKPOINT)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    save_file(tensors, path, {"step": "2"})  # as the first checkpoints
    assert last_step(tmp_path) == 2
    save_file(tensors, path, {"step": "2", "format_version": "9"})
    with pytest.raises(jf.InputError, match=r"format 9 is of a newer version of jacobiflow; install it$"):
        last_step(tmp_path)
