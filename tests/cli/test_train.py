"""`jacobiflow train`: a model folder that sample takes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from PIL import Image

import jacobiflow as jf
from jacobiflow.data import Augmentation, Noise
from tests.helpers.running import figures
from tests.helpers.training_runs import checkpoint

TINY = "--channels 32 --head-dim 16 --blocks 2 --layers 1 --no-bf16"


def test_it_writes_a_model_that_sample_takes(run: Any, tmp_path: Path) -> None:
    line = f"train --images fashion-512 --patch-size 7 {TINY} --batch-size 8 --steps 3 --sample-every 2 --warmup 2"
    result = run(f"{line} --out {tmp_path}/run --json {tmp_path}/f")
    assert (result.code, result.err) == (0, "")
    assert re.fullmatch(
        rf"3 steps: loss [+-][\d.]+, [\d.]+ bits per dimension\nwrote the model folder {tmp_path}/run\n", result.out
    )
    assert sorted(os.listdir(tmp_path / "run")) == [
        ".lock", "README.md", "checkpoint.pt", "config.json", "metrics.jsonl", "model.safetensors", "samples-000002.png"
    ]  # fmt: skip
    with Image.open(tmp_path / "run" / "samples-000002.png") as sheet:
        assert sheet.size == (10 * (28 * 4 + 4) + 4, 2 * (28 * 4 + 4) + 4)
    assert figures(tmp_path / "f")["last_step"]["step"] == 3
    flow = jf.load(tmp_path / "run")
    assert (flow.config.num_classes, flow.config.noise_std) == (10, 0.1)
    again = run(f"{line} --out {tmp_path}/run")  # is done already
    assert (again.code, again.out) == (0, result.out)
    assert run(f"sample --model {tmp_path}/run --strategy jacobi --num 2 --out {tmp_path}/out").code == 0


def test_bad_settings_leave_no_folder(refuse: Any, tmp_path: Path) -> None:
    line = f"train --images fashion-512 --head-dim 16 --out {tmp_path}/a/b"
    refuse(f"{line} --steps 0", "--steps 0: give a positive whole number")
    refuse(f"{line} --steps 3 --image-size 60", "images are 1x28x28, the flow takes 1x60x60")


def test_options_become_the_settings_of_the_run(run: Any, tmp_path: Path) -> None:
    line = f"train --images pets --image-size 8 --patch-size 4 {TINY} --batch-size 3 --steps 1 --noise-std 0"
    line += " --mirror --shift 1 --volume-preserving --unconditional --learning-rate 0.01 --ema 0.9 --clip 2 --seed 4"
    assert run(f"{line} --out {tmp_path}").code == 0
    want = jf.TarFlowConfig(1, 8, 4, 32, num_blocks=2, layers_per_block=1, nvp=False, head_dim=16, noise_std=0.0)
    assert jf.load(tmp_path).config == want
    settings = {
        "noise": vars(Noise("uniform")), "augmentation": vars(Augmentation(mirror=True, shift=1)), "batch_size": 3,
        "learning_rate": 0.01, "warmup": 200, "ema": 0.9, "clip": 2.0, "drop_label": 0.1, "bf16": False, "seed": 4,
    }  # fmt: skip
    assert settings.items() <= checkpoint(tmp_path)["run"].items()
