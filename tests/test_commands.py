"""Every command in README, the docs, the model cards and `--help` runs, on small files under the names that it gives.

What takes long is made short: few samples, images and repeats. The Makefile's commands do not run here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import jacobiflow as jf
from jacobiflow.cli.app import app
from jacobiflow.data import load_images
from jacobiflow.evaluation import FeatureStatistics, InceptionFeatures, load_features
from tests.helpers.running import run_line
from tests.helpers.stand_ins import write_inception, write_t5

ROOT = Path(__file__).resolve().parent.parent
CARDS = sorted((ROOT / "src/jacobiflow/bundled").glob("*/README.md"))
PAGES = {page.stem if page not in CARDS else page.parent.name: page.read_text()
         for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *CARDS)}  # fmt: skip
# A command is a line, with what comes before its name: a launcher, variables.
COMMAND = re.compile(
    r"^ *(?:Example: )?(?:\w+=\w+ )*(?:torchrun .* -- +|srun (?:-\S+ )*)?jacobiflow (\w.*[^.\n])$", re.MULTILINE
)
SHORT = {
    "sample": "--num 2", "calibrate": "--num 2 --convergence-samples 1 --segments 2", "plan": "",
    "bench": "--repeats 1",
    "evaluate": "--paired 2 --test-images 4", "train": "--steps 2 --batch-size 8", "convert": "", "info": "",
}  # fmt: skip
HELP = {f"--help of {name}": app[name].help for name in SHORT}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what the commands read: weights, images, samples, and the repository's own folders."""
    folder = tmp_path_factory.mktemp("commands")
    for name in ("benchmarks", "examples"):
        (folder / name).symlink_to(ROOT / name)
    torch.manual_seed(0)
    config = jf.TarFlowConfig(1, 32, 8, width=64, num_blocks=2, layers_per_block=1, num_classes=2, noise_std=0.07)
    flow = jf.TarFlow(config)
    flow.to_original(folder / "afhq_model_8_64_2_1_0.07.pth")
    for name in ("mine", "runs/mine", "me/photos"):  # the last one as from the hub
        flow.save_pretrained(folder / name)
    for i in range(8):
        for name in ("photos", "held-out"):
            path = folder / name / ("cat", "dog")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((32, 32), 50).save(path)
    fashion = load_images("fashion-512", 28, 1)
    images, labels = fashion.images[:9, 0].numpy(), fashion.labels[:9].numpy().astype(np.uint8)
    np.savez(folder / "few.npz", images=images, labels=labels)
    (folder / "fashion-mnist").mkdir()
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        for stem in ("train", "t10k"):
            (folder / f"fashion-mnist/{stem}-{name}-ubyte").write_bytes(head + array.tobytes())
    star = jf.STARFlow(jf.STARFlowConfig(3, 4, 2, 128, (1, 1), text_tokens=4, text_dim=16))
    torch.save(star.state_dict(), folder / "starflow_3B_t2i_256x256.pth")
    for name, model in (("demo", jf.load("fashion-p2")), ("many", jf.load("fashion-p2")), ("mine", flow)):
        jf.sample_to_folder(model, 2, folder / "out" / name)
    return folder


@pytest.fixture(scope="module")
def _inception(files: Path) -> Any:
    """Weights where PyTorch's hub keeps what it has downloaded, and statistics of their features."""
    weights = files.parent / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    weights.parent.mkdir(parents=True)
    write_inception(weights)
    inception = load_features("inception", weights)
    assert isinstance(inception, InceptionFeatures)
    FeatureStatistics.from_features(torch.randn(3, 2048)).save(files / "afhq256_fid_stats.pth", inception)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(files.parent))
        yield


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, text in (PAGES | HELP).items() if COMMAND.search(text)])
def test_commands_run(
    page: str, files: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    lines = [match[1] for match in COMMAND.finditer(re.sub(r" *\\\n +", " ", (PAGES | HELP)[page]))]
    if any("features inception" in line or ("evaluate" in line and "--features" not in line) for line in lines):
        request.getfixturevalue("_inception")
    folder = shutil.copytree(files, tmp_path / "work", symlinks=True)
    if any("flan-t5" in line for line in lines):
        write_t5(folder / "google/flan-t5-xl")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("jacobiflow.data.sources._FASHION_MNIST", folder / "fashion-mnist")
    for line in lines:
        small = line.replace("fashion-512", "few.npz").replace("8_768_8_8", "8_64_2_1").split("  #")[0]
        small = re.sub(r"\$(steps|every)", "2", small).replace("$out", "runs/script")
        small = small.replace("--device cuda", "--device cpu")
        small = small.replace("--image-size 64", "--image-size 32").replace("--width 768", "--width 64")
        if small.startswith("sample") and (out := re.search(r"--out (\S+)", small)):
            shutil.rmtree(out[1], ignore_errors=True)  # has samples of other settings
        options = "" if "--prompts" in small else SHORT[small.split()[0]]  # A sample for each prompt is quick.
        result = run_line(f"{small} {options}", capsys)
        assert result.code == 0, f"{line}: {result.err}"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make is installed")
def test_every_variable_of_the_makefile_has_a_value() -> None:
    targets = re.findall(r"^(\w[\w-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    done = subprocess.run(
        ["make", "-n", "--warn-undefined-variables", *targets], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "undefined variable" not in done.stderr
