"""A command writes into a folder that is new, empty or its own; with --overwrite, into that of any job."""

from __future__ import annotations

from pathlib import Path

import pytest

from jacobiflow.errors import InputValueError
from jacobiflow.utils import files
from jacobiflow.utils.layout import check_own


def test_a_command_writes_into_a_folder_that_is_new_empty_or_its_own(tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_own(out, "benchmark")
    with files.locked(out):
        check_own(out, "benchmark")
        files.write_json(out / files.MANIFEST, {"kind": "benchmark"})
    check_own(out, "benchmark")
    for theirs, kind in ((out, "evaluation"), (tmp_path, "benchmark")):
        with pytest.raises(ValueError, match="holds files that this command did not write; give a new or empty folder"):
            check_own(theirs, kind)


@pytest.mark.parametrize("cut", [None, 0, 1, 5, 20])
def test_overwrite_takes_the_folder_of_any_job_unless_it_has_another_file(cut: int | None, tmp_path: Path) -> None:
    content = files.json_bytes({"kind": "evaluation", "format_version": 1, "spec_sha256": "0"})
    for name in ("manifest.json", "units/real-0-9.json", "features/real-0-9.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content[:cut])
    check_own(tmp_path, "samples", overwrite=True)
    (tmp_path / "features/mine.txt").touch()
    with pytest.raises(InputValueError, match=r"features/mine\.txt: not written by a job of jacobiflow"):
        check_own(tmp_path, "samples", overwrite=True)


def test_overwrite_leaves_the_folder_of_another_program(tmp_path: Path) -> None:
    files.write_json(tmp_path / files.MANIFEST, {"name": "an app"})
    with pytest.raises(InputValueError, match=r"manifest\.json: not written by a job of jacobiflow"):
        check_own(tmp_path, "samples", overwrite=True)
