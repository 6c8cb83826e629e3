"""`jacobiflow train`: a model folder that sample takes."""

from __future__ import annotations

import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import jacobiflow as jf
from jacobiflow.cli.plan import plan
from jacobiflow.data import image_grid
from jacobiflow.models.registry import FLOWS
from tests.helpers.running import figures
from tests.helpers.scoring import levels

TINY = "--channels 32 --head-dim 16 --blocks 2 --layers 1 --no-bf16"


def test_it_writes_a_model_that_sample_takes(run: Any, tmp_path: Path) -> None:
    line = f"train --images fashion-512 --patch-size 7 {TINY} --batch-size 8 --steps 3 --sample-every 3 --warmup 2"
    result = run(f"{line} --out {tmp_path}/run --json {tmp_path}/f")
    assert result.code == 0
    assert re.fullmatch(
        rf"3 steps: loss [+-][\d.]+, [\d.]+ bits per dimension\nwrote the model folder {tmp_path}/run\n", result.out
    )
    assert sorted(os.listdir(tmp_path / "run")) == [
        ".lock", "README.md", "checkpoint-00000003", "config.json", "metrics.jsonl", "model.safetensors", "run.json",
        "samples-000003.png", "tensorboard",
    ]  # fmt: skip
    assert figures(tmp_path / "f")["last_step"]["step"] == 3
    flow = jf.load(tmp_path / "run")
    assert (flow.config.num_classes, flow.config.noise_std) == (10, 0.1)
    again = run(f"{line} --out {tmp_path}/run")  # is done already
    assert (again.code, again.out) == (0, result.out)


def test_samples_of_a_trained_model_are_denoised_as_its_sheets_are(run: Any, tmp_path: Path) -> None:
    line = f"train --images digits --image-size 8 {TINY} --batch-size 8 --steps 2 --sample-every 2 --out {tmp_path}/run"
    assert run(line).code == 0
    flow, labels = jf.load(tmp_path / "run"), torch.arange(20) % 10
    assert re.search("^recommended +--denoise 1 *$", run(f"info --model {tmp_path}/run").out, re.MULTILINE)
    result = run(f"sample --model {tmp_path}/run --strategy sequential --num 20 --out {tmp_path}/out")
    assert "settings: --denoise 1 (recommended by the model; --plain turns it off)\n" in result.out
    noisy = jf.sample(flow, 20, labels, strategy="sequential", settings=None).images
    want = jf.denoise(flow, noisy, labels)
    assert torch.equal(jf.SampleFolder.open(tmp_path / "out").images(0), torch.from_numpy(levels(want)).movedim(3, 1))
    with Image.open(tmp_path / "run" / "samples-000002.png") as sheet, image_grid(want, 10) as expected:
        assert sheet.tobytes() == expected.tobytes()


def test_bad_settings_leave_no_folder(refuse: Any, tmp_path: Path) -> None:
    line = f"train --images fashion-512 --head-dim 16 --out {tmp_path}/a/b"
    refuse(f"{line} --steps 0", "--steps 0: give a positive whole number")
    refuse(f"{line} --steps 3 --image-size 60", "images are 1x28x28, the flow takes 1x60x60")


def test_a_flow_that_the_command_cannot_train_is_refused_and_not_offered(refuse: Any, tmp_path: Path) -> None:
    trainable = "maf, recurrent, tarflow" if "recurrent" in FLOWS else "maf, tarflow"
    for name in ("starflow", "prose", "glow"):
        message = f"--flow {name}: give one of {trainable}\n"
        refuse(f"train --images digits --image-size 8 --flow {name} --steps 1 --out {tmp_path}/out", message)


def test_what_is_not_given_is_as_in_python() -> None:
    batch_size = inspect.signature(plan).parameters["batch_size"].default
    assert int(batch_size) == inspect.signature(jf.plan).parameters["batch_size"].default


def test_options_become_the_settings_of_the_run(run: Any, tmp_path: Path) -> None:
    line = f"train --images pets --image-size 8 --patch-size 4 {TINY} --batch-size 3 --steps 1 --noise-std 0"
    line += " --horizontal-flip --translate 1 --volume-preserving --unconditional --learning-rate 0.01"
    line += " --ema-decay 0.9 --max-grad-norm 2 --seed 4"
    assert run(f"{line} --out {tmp_path}").code == 0
    want = jf.TarFlowConfig(1, 8, 4, 32, num_blocks=2, layers_per_block=1, nvp=False, head_dim=16, noise_std=0.0)
    flow = jf.load(tmp_path)
    assert (flow.config, flow.recommended) == (want, jf.SamplingSettings())
    settings = {
        "batch_size": 3, "learning_rate": 0.01, "warmup": 200, "ema_decay": 0.9, "max_grad_norm": 2.0,
        "label_dropout": 0.1, "bf16": False, "seed": 4,
    }  # fmt: skip
    stored = json.loads((tmp_path / "run.json").read_bytes())
    assert settings.items() <= stored.items()
    assert "RandomHorizontalFlip" in stored["transform"] and "RandomCrop" in stored["transform"]
