"""`jacobiflow export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def test_export_writes_the_graphs_twice_and_no_other_models(run: Any, refuse: Any, tmp_path: Path) -> None:
    line = f"export --model model --guidance 2 --out {tmp_path}/onnx --json {tmp_path}/f"
    assert run(line).code == run(line).code == 0
    assert json.loads((tmp_path / "f").read_text()) == json.loads((tmp_path / "onnx" / "model.json").read_text())
    (tmp_path / "onnx" / "model.json").write_text("{}")
    refuse(line, "is not a file that jacobiflow wrote")
    refuse(f"export --model digits-maf --out {tmp_path}/new", "is no TarFlow")
