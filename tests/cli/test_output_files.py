"""Output files replace nothing that the command uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import jacobiflow as jf
from jacobiflow.cli.output_files import check_output
from jacobiflow.models.checkpoints.folder import list_bundled


def test_an_output_is_no_file_of_a_bundled_model() -> None:
    """As the commands take it: by its name."""
    for name, folder in list_bundled().items():
        for option, inputs in (("--out", ()), ("--json", (name,))):
            with pytest.raises(jf.InputError, match=rf"^{option} .*model\.safetensors: .*reads.*; give another file$"):
                check_output(option, folder / "model.safetensors", name, *inputs)
        with pytest.raises(jf.InputError, match="this command reads or writes that file itself"):
            check_output("--out", folder / "report.json", name)


OUTPUTS = {
    "train --images digits --steps 1 --out D --json D/samples-000500.png": "--json D/samples-000500.png",
    "sample --num 2 --out D --json D/shards/00000.json": "--json D/shards/00000.json",
    "sample --num 2 --out D/inner --json D": "--json D",
    "evaluate --images pets --save-stats E/evaluation.json --out E --model model": "--save-stats E/evaluation.json",
    "bench --out D --json D/bench.png": "--json D/bench.png",
    "plan --out model/new/../report-new.json --model model": "--out model/new/../report-new.json",
    "plan --tune --out model/tuning.json --model model": "--out model/tuning.json",
    "plan --tune --out P/tuning.json --model digits-p1": "--out P/tuning.json",
    "plan --tune --out P/p.json --json P/tuning-guided.json --model digits-p1": "--json P/tuning-guided.json",
}


@pytest.mark.parametrize("line", OUTPUTS)
def test_no_output_replaces_what_the_command_reads_or_writes(line: str, refuse: Any) -> None:
    refuse(line, f"{OUTPUTS[line]}: this command reads or writes that file itself; give another file")


def test_an_output_is_no_code_that_the_command_runs(refuse: Any, tmp_path: Path) -> None:
    code = tmp_path / "f.py"
    code.touch()
    line = f"evaluate --images pets --features {code}:f --model model"
    refuse(f"{line} --json {code}", f"is in {code}:f, which this command reads")
    refuse(f"{line} --save-stats {code}", f"is in {code}:f, which this command reads")
