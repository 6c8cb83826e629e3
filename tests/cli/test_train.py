"""`jacobiflow train`: a model folder that sample takes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from PIL import Image

import jacobiflow as jf
from tests.helpers.running import figures

TINY = "--channels 32 --head-dim 16 --blocks 2 --layers 1 --no-bf16"


def test_it_writes_a_model_that_sample_takes(run: Any, tmp_path: Path) -> None:
    line = f"train --images fashion-512 --patch-size 7 {TINY} --batch-size 8 --steps 3 --sample-every 2 --warmup 2"
    line += f" --out {tmp_path}/run --json {tmp_path}/f"
    result = run(line)
    assert (result.code, result.err) == (0, "")
    assert re.fullmatch(
        rf"3 steps: loss [+-][\d.]+, [\d.]+ bits per dimension\nwrote the model folder {tmp_path}/run\n", result.out
    )
    assert sorted(os.listdir(tmp_path / "run")) == [
        ".lock", "README.md", "checkpoint.pt", "config.json", "metrics.jsonl", "model.safetensors", "samples-000002.png"
    ]  # fmt: skip
    with Image.open(tmp_path / "run" / "samples-000002.png") as sheet:
        assert sheet.size == (10 * (28 * 4 + 4) + 4, 2 * (28 * 4 + 4) + 4)
    shown = figures(tmp_path / "f")
    assert shown["last_step"]["step"] == shown["training"]["steps"] == 3
    assert (shown["num_classes"], shown["noise_std"], shown["training"]["noise"]["kind"]) == (10, 0.1, "gaussian")

    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert run(line).code == 0  # is done already
    assert figures(tmp_path / "f")["last_step"] == shown["last_step"]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    assert run(f"sample --model {tmp_path}/run --strategy jacobi --num 2 --out {tmp_path}/out").code == 0


def test_bad_settings_leave_no_folder(refuse: Any, tmp_path: Path) -> None:
    line = f"train --images fashion-512 --head-dim 16 --out {tmp_path}/a/b"
    refuse(f"{line} --steps 0", "steps=0: give a positive whole number")
    refuse(f"{line} --steps 3 --image-size 60", "images are 1x28x28, the flow takes 1x60x60")


def test_nothing_of_somebody_else_is_replaced(run: Any, refuse: Any, tmp_path: Path) -> None:
    line = f"train --images pets --image-size 8 --patch-size 4 {TINY} --batch-size 3 --sample-every 1 --out {tmp_path}"
    (tmp_path / "samples-mine.png").write_bytes(b"mine")
    refuse(f"{line} --steps 1", "holds samples-mine.png, and no checkpoint.pt; give a new or empty folder")
    (tmp_path / "samples-mine.png").unlink()
    assert run(f"{line} --steps 1").code == 0
    (tmp_path / "samples-mine.png").write_bytes(b"mine")
    refuse(f"{line} --steps 1 --seed 1", "(seed=0, not 1); give its settings")
    assert run(f"{line} --steps 3").code == 0
    assert (tmp_path / "samples-mine.png").read_bytes() == b"mine"


def test_options_become_the_model_s_config(run: Any, tmp_path: Path) -> None:
    line = f"train --images pets --image-size 8 --patch-size 4 {TINY} --batch-size 3 --steps 1 --noise uniform"
    line += " --mirror --shift 1 --volume-preserving --unconditional --json figures.json"
    assert run(f"{line} --out {tmp_path}").code == 0
    assert json.loads(Path("figures.json").read_text())["training"]["augmentation"] == {
        "mirror": True, "shift": 1, "hue": 0.0
    }  # fmt: skip
    want = jf.TarFlowConfig(1, 8, 4, 32, num_blocks=2, layers_per_block=1, nvp=False, head_dim=16, noise_std=0.0)
    assert jf.load(tmp_path).config == want
