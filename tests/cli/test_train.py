"""`jacobiflow train`: a model folder that sample takes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from PIL import Image
from running import figures

import jacobiflow as jf

TINY = "--channels 32 --head-dim 16 --blocks 2 --layers 1 --no-bf16"


def test_it_writes_a_model_that_sample_takes(run: Any, tmp_path: Path) -> None:
    line = f"train --images fashion-512 --patch-size 7 {TINY} --batch-size 8 --steps 3 --sample-every 2 --warmup 2"
    line += f" --out {tmp_path}/run --json {tmp_path}/f"
    result = run(line)
    assert (result.code, result.out, result.err) == (0, f"wrote the model folder {tmp_path}/run\n", "")
    written = {"README.md", "checkpoint.pt", "config.json", "metrics.jsonl", "model.safetensors", "samples-000002.png"}
    assert set(os.listdir(tmp_path / "run")) == written
    with Image.open(tmp_path / "run" / "samples-000002.png") as sheet:
        assert sheet.size == (10 * (28 * 2 + 2) + 2, 2 * (28 * 2 + 2) + 2)
    shown = figures(tmp_path / "f")
    assert shown["last_step"]["step"] == shown["training"]["steps"] == 3
    assert (shown["num_classes"], shown["noise_std"], shown["training"]["noise"]["kind"]) == (10, 0.1, "gaussian")

    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert run(line).code == 0  # is done already
    assert figures(tmp_path / "f")["last_step"] == shown["last_step"]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    assert run(f"sample --model {tmp_path}/run --strategy jacobi --num 2 --out {tmp_path}/out").code == 0


def test_options_become_the_model_s_config(run: Any, tmp_path: Path) -> None:
    line = f"train --images pets --image-size 8 --patch-size 4 {TINY} --batch-size 3 --steps 1 --noise uniform"
    assert run(f"{line} --volume-preserving --unconditional --out {tmp_path}").code == 0
    want = jf.TarFlowConfig(1, 8, 4, 32, num_blocks=2, layers_per_block=1, nvp=False, head_dim=16, noise_std=0.0)
    assert jf.load(tmp_path).config == want
