"""`jacobiflow train`: a model folder that sample takes."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

import jacobiflow as jf
from jacobiflow.data import image_grid
from jacobiflow.models.contexts import class_names
from jacobiflow.models.registry import FLOWS
from tests.helpers.fake_device import FakeDevice
from tests.helpers.running import figures
from tests.helpers.scoring import levels

TINY = "--width 32 --head-dim 16 --blocks 2 --layers 1 --no-bf16"


def test_it_writes_a_model_that_sample_takes(run: Any, tmp_path: Path) -> None:
    line = f"train --images fashion-512 --patch-size 7 {TINY} --batch-size 8 --steps 3 --sample-every 3 --warmup 2"
    result = run(f"{line} --out {tmp_path}/run --json {tmp_path}/f")
    assert result.code == 0
    assert re.fullmatch(
        rf"3 steps: loss [+-][\d.]+, [\d.]+ bits per dimension\nthe model folder is {tmp_path}/run\n", result.out
    )
    assert sorted(os.listdir(tmp_path / "run")) == [
        ".lock", "README.md", "checkpoint.safetensors", "config.json", "manifest.json", "metrics.jsonl",
        "model.safetensors", "samples-000003.png", "tensorboard",
    ]  # fmt: skip
    assert figures(tmp_path / "f")["last_step"]["step"] == 3
    flow = jf.load(tmp_path / "run")
    assert (flow.config.num_classes, flow.config.noise_std) == (10, 0.1)
    again = run(f"{line} --out {tmp_path}/run")  # is done already
    assert (again.code, again.out) == (0, result.out)
    assert "found the checkpoint of step 3; the run is complete; to go on, give more --steps\n" in again.err


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
    expected = image_grid(want, 10, names=class_names(labels, flow.classes))
    with Image.open(tmp_path / "run" / "samples-000002.png") as sheet:
        assert sheet.tobytes() == expected.tobytes()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Colour images of two classes and two sizes."""
    for i, (name, sides) in enumerate([("cat", (12, 12)), ("dog", (18, 12)), ("dog", (12, 12)), ("cat", (14, 20))]):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (*sides, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_size_colour_and_classes_are_those_of_the_images(
    run: Any, refuse: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"train --images {photos} {TINY} --batch-size 4 --out {tmp_path}/run"
    result = run(f"{line} --steps 1")
    assert result.code == 0
    flow = jf.load(tmp_path / "run")
    assert (flow.image_shape, flow.classes, flow.config.num_classes) == ((3, 12, 12), ("cat", "dog"), 2)
    assert "4 of 12x12 pixels, colour; other sizes are scaled down, and cropped to the centre\n" in result.err
    for text in ("classes: 2 (cat, dog)", "held out: none", "training: 1 step of 4 images, on cpu"):
        assert f"{text}\n" in result.err
    assert (tmp_path / "run" / "samples-000001.png").exists()
    monkeypatch.setenv("SLURM_NTASKS", "4")
    err = run(f"{line} --steps 2").err
    assert "on cpu; srun would start all 4 tasks of this SLURM job\nfound the checkpoint of step 1 of 2\n" in err

    sample = f"sample --model {tmp_path}/run --strategy sequential --num 3 --files png --out {tmp_path}/out --labels"
    assert run(f"{sample} dog,cat").code == 0
    names = sorted(str(path.relative_to(tmp_path / "out/images")) for path in tmp_path.glob("out/images/*/*"))
    assert names == ["0-cat/00000001.png", "1-dog/00000000.png", "1-dog/00000002.png"]
    assert "all 3 were there already" in run(f"{sample} 1,0").out
    refuse(f"{sample} dgo", "--labels dgo: no such class (did you mean dog?); the classes are cat, dog")


def test_sizes_that_do_not_fit_name_one_that_does(refuse: Any, photos: Path, tmp_path: Path) -> None:
    line = f"train --images {photos} --steps 1 --batch-size 4 --out {tmp_path}/run"
    refuse(f"{line} --width 96", "--width 96: is not a multiple of head_dim, 64; give 64, or a head_dim that divides")
    refuse(f"{line} --image-size 32", "0.png: 12x12 pixels, smaller than 32x32; remove it, or enlarge it first\n")
    refuse("train --images digits --image-size 9 --steps 1 --out run", "8 pixels on a side; give --image-size 8 or ")
    refuse(f"{line} --image-size 9", "does not divide the side of the images, 9; give 3, or images of 8\n")


def test_held_out_images_have_the_classes_of_the_training_images(refuse: Any, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos / "dog", tmp_path / "held-out" / "dog")
    line = (
        f"train --images {photos} --held-out {tmp_path}/held-out {TINY} --batch-size 4 --steps 1 --out {tmp_path}/run"
    )
    refuse(line, f"its classes are dog, and those of {photos} are cat, dog; give a folder with the same subfolders\n")


def test_bad_settings_leave_no_folder(refuse: Any, tmp_path: Path) -> None:
    line = f"train --images fashion-512 --head-dim 16 --out {tmp_path}/a/b"
    refuse(f"{line} --steps 0", "--steps 0: give a positive whole number")
    refuse(f"{line} --steps 3 --image-size 60", "--image-size 60: the images have 28 pixels")


def test_a_flow_that_the_command_cannot_train_is_refused_and_not_offered(
    refuse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FLOWS.keys() - {"maf", "prose", "starflow", "tarflow"}:  # of other tests
        monkeypatch.delitem(FLOWS, name)
    for name in ("prose", "glow"):
        message = f"--flow {name}: give one of maf, tarflow\n"
        refuse(f"train --images digits --image-size 8 --flow {name} --steps 1 --out {tmp_path}/out", message)


def test_options_become_the_settings_of_the_run(run: Any, tmp_path: Path) -> None:
    line = f"train --images pets --patch-size 4 {TINY} --batch-size 3 --steps 1 --noise-std 0"
    line += " --horizontal-flip --translate 1 --volume-preserving --unconditional --learning-rate 0.01"
    line += " --ema-decay 0.9 --max-grad-norm 2 --seed 4"
    assert run(f"{line} --out {tmp_path}").code == 0
    other = run(line.replace(" --translate 1", "") + f" --out {tmp_path}")
    assert (other.code, "holds training of different data or transform; use its" in other.err) == (2, True)
    want = jf.TarFlowConfig(1, 8, 4, 32, num_blocks=2, layers_per_block=1, nvp=False, head_dim=16, noise_std=0.0)
    flow = jf.load(tmp_path)
    assert (flow.config, flow.recommended) == (want, jf.SamplingSettings())
    settings = {
        "batch_size": 3, "learning_rate": 0.01, "warmup": 200, "ema_decay": 0.9, "max_grad_norm": 2.0,
        "label_dropout": 0.1, "bf16": False, "seed": 4,
    }  # fmt: skip
    assert settings.items() <= json.loads((tmp_path / "manifest.json").read_bytes())["spec"].items()


def test_a_gpu_gives_the_warning_of_the_other_commands(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jacobiflow.training.train", Mock())
    line = f"train --images pets --patch-size 4 {TINY} --steps 1 --device cuda --out {tmp_path}"
    with FakeDevice(), warnings.catch_warnings():
        warnings.simplefilter("always")
        result = run(line)
    assert result.code == 0
    assert "warning: --device cuda: jacobiflow has never run on a GPU; compare the losses of a few steps" in result.err
