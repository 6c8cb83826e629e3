"""`jacobiflow evaluate`: every score once more from the images on disk."""

from __future__ import annotations

import math
import shutil
import sys
import warnings
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import jacobiflow as jf
from jacobiflow.data import Noise, load_images
from jacobiflow.evaluation import (
    FeatureStatistics,
    bayes_accuracy,
    bits_per_dim,
    job,
    kernel_distance,
    precision_recall,
)
from jacobiflow.sampling.folder import sample_to_folder
from tests.helpers.fake_device import FakeDevice
from tests.helpers.problems import make_flow, to_float32
from tests.helpers.running import figures
from tests.helpers.scoring import difference, frechet, levels, moments, on_disk, pixel_figures

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* samples: "),
    pytest.mark.skipif(find_spec("torchmetrics") is None, reason="needs jacobiflow[eval]"),
]

NUM = 12
GUIDANCE = jf.Guidance(0.6, annealed=False, on="shift", attn_temperature=0.9)
SAMPLES: dict[str, dict[str, Any]] = {
    "samples": {"tolerance": 1e-7},
    "guided": {
        "settings": jf.SamplingSettings(GUIDANCE, 0.8),
        "files": "png",
        "strategy": "jacobi-2",
        "certify": False,
    },
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, real images, samples."""
    folder = tmp_path_factory.mktemp("work")
    big = partial(make_flow, image_size=28, patch_size=7)
    to_float32(big(num_classes=3, noise_std=0.1)).save_pretrained(folder / "model")
    to_float32(big()).save_pretrained(folder / "plain")
    data = load_images("fashion-512", 28, 1)
    for name, start, count in (("[red]x", 0, 60), ("test", 60, 24), ("few", 90, 2), ("one", 90, 1)):
        for i in range(start, start + count):
            place = folder / name / f"class{i % 3}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data.images[i, 0].numpy()).save(place / f"{i:03}.png")
    rows = "def rows(images):\n    return images.double().mean(dim=(1, 3))\n"
    (folder / "mine.py").write_text(rows + "def broken(images):\n    raise KeyError('gray')\n")
    for name, settings in SAMPLES.items():
        settings = {"strategy": "window:4", **settings}
        flow, labels = jf.load(folder / "model"), torch.arange(NUM) % 3
        sample_to_folder(flow, NUM, folder / name, labels, batch_size=4, shard_size=8, **settings)
    shutil.copytree(folder / "samples", folder / "missing")
    (folder / "missing" / "units" / "shard-00001-of-4.json").unlink()
    return folder


def features(pixels: Any) -> Any:
    """Means of the rows of grey images (n, 28, 28, 1), as float32."""
    return pixels.astype(float).mean(axis=(2, 3)).astype(np.float32).astype(float)


def real_features(source: str) -> Any:
    return features(load_images(source, 28, 1).images[:].permute(0, 2, 3, 1).numpy())


def evaluated(run: Any, out: Path, words: str) -> tuple[dict[str, Any], str]:
    """The scores in evaluation.json, and what was printed, in one line."""
    result = run(f"evaluate --model {words} --overwrite --out {out}/new/out")
    assert result.code == 0, result.err
    return scores_in(out / "new" / "out"), " ".join(result.out.split())


def scores_in(out: Path) -> dict[str, Any]:
    """The scores of a folder, its outcome of the samples, and other entries; those without a value are left out."""
    table = figures(out / "evaluation.json")
    entries = {**(table["samples"] or {}), **table, **table["scores"]}
    return {name: value for name, value in entries.items() if value is not None}


def test_distances_to_images(run: Any, tmp_path: Path) -> None:
    base, stats = "model --samples samples --features mine.py:rows --paired 0 --test-images 0", tmp_path / "new" / "s"
    scores, out = evaluated(run, tmp_path, f"{base} --images [red]x --save-stats {stats}")
    real, fake = real_features("[red]x"), features(on_disk("samples"))
    assert scores["frechet_distance"] == pytest.approx(frechet(moments(real), moments(fake)), rel=1e-6)
    tensors = torch.from_numpy(real), torch.from_numpy(fake)
    assert scores["kernel_distance"] == pytest.approx(kernel_distance(*tensors)[0], rel=1e-6)
    assert (scores["precision"], scores["recall"]) == pytest.approx(precision_recall(*tensors))
    line = f"{scores['frechet_distance']:.4f} 12 samples against images of [red]x"
    assert f"FID of mine.py:rows {line} kernel distance {scores['kernel_distance']:.5f} +-" in out
    again, _ = evaluated(run, tmp_path, f"{base} --stats {stats}")
    assert (again["frechet_distance"], again["against"]) == (scores["frechet_distance"], str(stats))
    assert "kernel_distance" not in evaluated(run, tmp_path, f"{base} --images few")[0]


def test_certificates_are_those_of_the_shards(run: Any, tmp_path: Path) -> None:
    scores, out = evaluated(run, tmp_path, "model --samples samples --features none --paired 0")
    shards = [np.load(path) for path in sorted(Path("samples/shards").glob("*.npz"))]
    values = np.concatenate([shard["residual"] for shard in shards])
    resolved = sum(int(shard["used_fallback"].sum()) for shard in shards)
    assert (scores["median_residual"], scores["residual"]) == (sorted(values)[5], values.max())
    assert (scores["num_fallback"], scores["num_nonfinite"]) == (resolved, 0)
    assert resolved > 0
    assert f"residual {values.max():.1e} largest; median" in out
    assert 0 < int((values > 1e-7).sum()) == scores["num_above"]
    scores, out = evaluated(run, tmp_path, "model --samples guided --features none --paired 0")
    assert "median_residual" not in scores and "largest; median" not in out  # drawn with --no-certify


def test_paired_errors_are_to_the_sequential_loop(run: Any, tmp_path: Path) -> None:
    num = 9
    scores, out = evaluated(run, tmp_path, f"model --samples guided --features none --paired {num}")
    draw = partial(
        jf.sample, jf.load("./model"), num, torch.arange(num) % 3, settings=jf.SamplingSettings(GUIDANCE, 0.8),
        certify=False, batch_size=4,
    )  # fmt: skip
    images, exact = draw(strategy="jacobi-2").images, draw(strategy="sequential").images
    largest, rms = difference(images, exact)
    found = scores["paired"]
    assert (found["max"], found["rms"]) == pytest.approx((largest, rms), rel=1e-6)
    assert (found["num"], found["psnr"]) == (num, pytest.approx(20 * math.log10(2 / rms)))
    assert found["pixels"] == pixel_figures(on_disk("guided")[:num], levels(exact))
    assert f"largest error {largest:.1e} {num} samples, against the exact loop" in out
    assert scores["sensitivity"] == draw(strategy="sequential", sensitivity=True).outcome.sensitivity
    assert f"sensitivity {scores['sensitivity']:.1e} largest change" in out


def test_exact_samples_are_called_identical(run: Any, tmp_path: Path) -> None:
    sample_to_folder(jf.load("./plain"), 4, tmp_path / "exact", strategy="sequential", batch_size=4, shard_size=4)
    scores, out = evaluated(run, tmp_path, f"plain --samples {tmp_path}/exact --paired 4")
    assert (scores["paired"]["max"], scores["paired"]["psnr"]) == (0, math.inf)
    assert "largest error 0 4 samples, identical to those of the exact loop sensitivity" in out


@pytest.mark.parametrize(
    ("model", "options", "num", "noise", "seed"),
    [("model", "", 24, Noise(0.1), 0), ("plain", "--test-images 5 --seed 4", 5, Noise(), 4)],
)
def test_likelihood_is_of_evenly_spaced_test_images(
    model: str, options: str, num: int, noise: Noise, seed: int, run: Any, tmp_path: Path
) -> None:
    scores, _ = evaluated(run, tmp_path, f"{model} --images test {options}")
    flow, data = jf.load(f"./{model}"), load_images("test", 28, 1)
    assert data.labels is not None
    places = [i * len(data) // num for i in range(num)]
    data = replace(data, images=data.images[places], labels=data.labels[places])
    name = "bits_per_dim" if noise.std == 0 else "bits_per_dim_noisy"
    assert scores[name] == pytest.approx(bits_per_dim(flow, data, noise, seed), rel=1e-6)
    if model == "model":
        assert scores["bayes_accuracy"] == bayes_accuracy(flow, data, noise, seed)
    assert (scores["test_images"], scores["likelihood_images"]) == (num, "images of test")


def test_the_same_command_computes_only_missing_units(
    run: Any, refuse: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, out = tmp_path_factory.mktemp("log") / "log", tmp_path / "o"
    (tmp_path / "mine.py").write_text(
        f"def rows(images):\n    print(len(images), file=open('{log}', 'a'))\n"
        "    return images.double().mean(dim=(1, 3))"
    )
    shutil.copytree("test", tmp_path / "images")
    line = f"evaluate --model model --samples samples --images {tmp_path}/images --features {tmp_path}/mine.py:rows"
    line += f" --out {out}"
    with monkeypatch.context() as patch:
        patch.setattr(job, "kernel_distance", Mock(side_effect=KeyboardInterrupt))
        stopped = run(line)
    assert (stopped.code, (out / "evaluation.json").exists()) == (130, False)
    assert log.read_text().split() == ["1", "24", "8", "4"]  # The function is tried on one image.
    monkeypatch.setattr("jacobiflow.jobs.JobStore.write", Mock(side_effect=AssertionError))
    first = run(line)
    assert (first.code, run(line).out) == (0, first.out.replace("wrote ", "was there already: "))
    assert log.read_text().split()[4:] == ["1", "1"]
    one, other, *_ = sorted((tmp_path / "images").rglob("*.png"))
    shutil.copyfile(one, other)
    remedy = "give another folder, or overwrite this one (--overwrite)"
    refuse(line, f"o: holds evaluation of different images; {remedy}\n")


REFUSED = {
    "model": "nothing to evaluate: give --images or --samples (a folder that jacobiflow sample wrote)",
    "model --features mine.py:rows --images test": "--features mine.py:rows: give --samples, too",
    "model --samples samples --features mine.py:broken --images test": "mine.py:broken: the function raised KeyError",
    "model --samples samples --features mine.py:rows --images one": "1 images against 12: give at least 2 of each",
    "model --samples samples --features inception": "--features inception: give --images or --stats",
    "model --samples samples --images fashion-512": "label 9: this flow has classes 0 to 2",
    "model --samples samples --dtype bfloat16": "--paired 64: drawn in float32, not bfloat16; give --dtype float32, ",
    "model --samples missing": "missing",
    "model --samples nowhere": '"nowhere" does not exist.',
    "plain --samples samples": "--samples samples: drawn from another flow (fingerprint ",
    "model --images test --features none --save-stats s": "--save-stats s: give --images and --features",
}


@pytest.mark.parametrize("line", REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_work_is_refused_before_anything_is_computed(
    line: str, refuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jacobiflow.jobs.JobStore.write", Mock(side_effect=AssertionError))
    refuse(f"evaluate --model {line} --out out-x", REFUSED[line])


def test_a_missing_package_is_named(refuse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    line = "evaluate --model model --samples samples --images test --features mine.py:rows --out out-x"
    refuse(line, ": pip install torchmetrics torch-fidelity, or give features ")


def test_features_are_computed_on_the_device_of_the_model(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if those of real images come from a file of statistics."""

    class Rows(torch.nn.Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            devices.add((str(images.device), str(self.weight.device)))
            return images.double().mean(dim=(1, 3)) + 0 * self.weight

    devices, network = set[tuple[str, str]](), Rows(1, 1)
    monkeypatch.setattr(job, "load_features", lambda *_: network)
    FeatureStatistics.from_features(torch.rand(40, 28)).save(tmp_path / "stats.pth")
    line = f"evaluate --model model --samples samples --stats {tmp_path}/stats.pth --paired 0 --device cuda"
    with FakeDevice(), warnings.catch_warnings():
        warnings.simplefilter("always")
        assert "has never run on a GPU; compare a few samples" in run(f"{line} --out {tmp_path}/out").err
    assert devices == {("cuda:0", "cuda:0")}


def test_tokens_have_the_scores_that_need_no_images(run: Any, refuse: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    flow = jf.TarFlow(jf.TokenConfig(12, 3, 16, 2, 1, 3, head_dim=16)).eval()
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.1)
    flow.save_pretrained(tmp_path / "tokens")
    sample_to_folder(flow, 10, tmp_path / "out", [0] * 10, strategy="jacobi-2", batch_size=2, shard_size=4)
    words = f"{tmp_path}/tokens --samples {tmp_path}/out --paired 7 --batch-size 3"
    scores, out = evaluated(run, tmp_path, words)
    draw = partial(jf.sample, flow, 10, [0] * 10)
    largest, rms = difference(draw(strategy="jacobi-2").tokens[:7], draw(strategy="sequential").tokens[:7])
    assert (scores["paired"]["max"], scores["paired"]["rms"]) == pytest.approx((largest, rms), rel=1e-4)
    assert (scores["paired"]["num"], scores["paired"]["psnr"], scores["paired"]["pixels"]) == (7, None, None)
    assert scores["sensitivity"] > 0 and "PSNR" not in out
    refuse(f"evaluate --model {words} --images test --out out-x", "over 12 tokens, and images are asked for")
