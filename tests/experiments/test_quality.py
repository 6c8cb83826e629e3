"""`jacobiflow evaluate` and `jacobiflow compare`: every figure once more from the images on disk, and what goes wrong.

No test here asserts how long anything takes.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import oracle
import pytest
import torch
from matplotlib.colors import to_hex
from numpy.typing import NDArray
from PIL import Image
from problems import make_flow, to_float32
from running import figures, run_line
from torch import Tensor

import jacobiflow as jf
from jacobiflow.baselines.peers import GRIDS, PEERS
from jacobiflow.calibration import Report
from jacobiflow.cli.app import main
from jacobiflow.data import Noise, bundled_fashion, load_images, noisy_images
from jacobiflow.denoising import denoise
from jacobiflow.evaluation import FashionFeatures, PixelDifference, Statistics, kernel_distance
from jacobiflow.experiments import speed as benchmarking
from jacobiflow.experiments.quality import ORIGINAL, WITHIN, Comparing, Row, finalists
from jacobiflow.experiments.speed import SEQUENTIAL
from jacobiflow.latents import draw_latents
from jacobiflow.measuring import Timing
from jacobiflow.plots import COLORS, certificate_figure, comparison_figure, save_png
from jacobiflow.storage import sample_to_folder
from jacobiflow.strategy import Prediction

pytest.importorskip("torch_fidelity")

pytestmark = pytest.mark.usefixtures("one_thread")

Array = NDArray[np.float64]
Pixels = NDArray[np.uint8]

GENERATE: Any = importlib.import_module("jacobiflow.storage.sample")
COMPARISON: Any = importlib.import_module("jacobiflow.experiments.quality")
EVALUATION: Any = importlib.import_module("jacobiflow.cli.evaluate")
COMPARE: Any = importlib.import_module("jacobiflow.cli.compare")

GUIDANCE = jf.Guidance(0.6, annealed=False, on="shift", attn_temperature=0.9)
GUIDED = "--guidance 0.6 --guidance-on shift --constant-guidance --attn-temperature 0.9"
NUM, BATCH, SHARD = 12, 4, 8  # of the sample folders
SAMPLES: dict[str, dict[str, Any]] = {
    "samples": {},
    "pngs": {"files": "png"},
    "guided": {"guidance": GUIDANCE, "denoise": 0.8},
    "unlabelled": {"model": "plain", "labels": None, "seed": 3},
    "resolved": {"tolerance": 1e-7},
    "sweeps": {"strategy": "jacobi-2", "certify": False},
    "tiny": {"model": "small", "labels": None},
    "lost": {"model": "overflowing"},
}

ROWS = ("jacobi-2", "jacobi-8", "auto:1e-2", "auto", "STARFlow", "Selective Jacobi Decoding", "[1-4-2-3]")
SLUGS = {
    ORIGINAL: "sequential", "auto:1e-2": "auto-1e-2", "STARFlow": "starflow", "[1-4-2-3]": "1-4-2-3",
    "Selective Jacobi Decoding": "selective-jacobi-decoding",
}  # fmt: skip
SIZES = "--num 20 --batch-size 4 --shard-size 8"
FEW = "compare --model model --num 8 --batch-size 4 --repeats 1"


def sweeps(count: int) -> jf.Solver:
    return jf.Solver(jf.Whole(), stopping=jf.MaxSweeps(count))


def compare_line(out: str | Path, rows: Sequence[str] = ROWS, sizes: str = SIZES, model: str = "model") -> str:
    words = [word for row in rows for word in ("--strategy", row)]
    return f"compare --model {model} {sizes} --repeats 1 {shlex.join(words)} --out {out}"


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    """One thread for what all tests of this module share, as for themselves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to work in: models, real images, samples; shared by all tests, which add no more than `out-*`."""
    folder = tmp_path_factory.mktemp("work")
    big = partial(make_flow, image_size=28, patch_size=7)
    to_float32(big(num_classes=3, noise_std=0.1)).save_pretrained(folder / "model")
    to_float32(big()).save_pretrained(folder / "plain")
    to_float32(make_flow()).save_pretrained(folder / "small")
    overflowing = to_float32(big(num_classes=3))
    with torch.no_grad():
        overflowing.blocks[0].proj_out.bias[:49] = 200  # exp(200) overflows float32: so does the exact inverse
    overflowing.save_pretrained(folder / "overflowing")
    make_maf().save_pretrained(folder / "maf")
    data = bundled_fashion()
    for name, start, count in (("real", 0, 60), ("test", 60, 24), ("few", 90, 2), ("one", 95, 1), ("[red]x", 100, 9)):
        for i in range(start, start + count):
            place = folder / name / f"class{i % 3}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data.images[i, 0].numpy()).save(place / f"{i:03}.png")
    for name, settings in SAMPLES.items():
        draw_folder(folder, name, **settings)
    (folder / "text").write_text("no statistics")
    (folder / "three.txt").write_text("2 1 0")
    Statistics.of(torch.randn(50, 7, generator=torch.Generator().manual_seed(0))).save(folder / "seven.pth")
    planned = Prediction("an abacus", BATCH, None, 1.0, 2.0, 0.0, 0.0)
    replace(jf.Strategy.uniform(sweeps(4), 2), prediction=planned).save(folder / "planned.json")
    for name in ("missing", "corrupt", "no-manifest", "no-strategy"):
        shutil.copytree(folder / "samples", folder / name)
    (folder / "missing" / "shards" / "00001.json").unlink()
    (folder / "corrupt" / "shards" / "00001.npz").write_bytes(b"corrupt")
    (folder / "no-manifest" / "manifest.json").unlink()
    (folder / "no-strategy" / "strategy.json").write_text("{")
    return folder


def make_maf() -> jf.MAF:
    flow = jf.MAF(jf.MAFConfig(in_channels=1, image_size=28, hidden_features=24, num_blocks=2, num_classes=3)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in flow.parameters():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return flow


def draw_folder(folder: Path, name: str, model: str = "model", strategy: str = "window:4", **settings: Any) -> None:
    settings = {"labels": torch.arange(NUM) % 3, "progress": False, **settings}
    with pytest.warns(UserWarning) if name == "lost" else contextlib.nullcontext():
        sample_to_folder(
            jf.load(folder / model), NUM, folder / name, strategy=strategy, batch_size=BATCH, shard_size=SHARD,
            model=model, **settings,
        )  # fmt: skip


def call(folder: Path, line: str) -> SimpleNamespace:
    """Exit code, stdout and stderr of a command line, for fixtures of the module."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.setenv("COLUMNS", "80")
        try:
            main(shlex.split(line))
        except SystemExit as stop:
            code = int(stop.code or 0)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(autouse=True)
def _work_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line in this process; gives its exit code, stdout and stderr."""
    return partial(run_line, capsys=capsys)


@contextlib.contextmanager
def said_always() -> Iterator[None]:
    """No warning is an error here, as the tests' settings have it, or left out because it was said before."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in Path().rglob("*")}


# --------------------------------------------------------------------------------------------- the figures once more


def levels(images: Tensor) -> Pixels:
    """8-bit pixels (N, H, W, C); what is NaN is black."""
    x = np.nan_to_num(images.numpy().astype(np.float32), nan=-1.0).transpose(0, 2, 3, 1)
    return np.round((np.clip(x, -1, 1) + 1) * np.float32(127.5)).astype(np.uint8)


def on_disk(path: str | Path) -> Pixels:
    """8-bit pixels (N, H, W, C) of a folder of samples, in their order."""
    pngs = sorted(Path(path, "images").rglob("*.png"), key=lambda png: png.name)
    if pngs:
        return np.stack([np.asarray(Image.open(png))[..., None] for png in pngs])
    return np.concatenate([np.load(shard)["arr_0"] for shard in sorted(Path(path, "shards").glob("*.npz"))])


def records(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(shard.read_text()) for shard in sorted(Path(path, "shards").glob("*.json"))]


@cache
def network() -> FashionFeatures:
    return FashionFeatures.bundled()


@torch.no_grad()
def features(pixels: Pixels) -> Array:
    return network()(torch.from_numpy(pixels).permute(0, 3, 1, 2)).double().numpy()


def real_features(source: str = "real") -> Array:
    return features(load_images(source, 28, 1).images.permute(0, 2, 3, 1).numpy())


def moments(x: Array) -> tuple[Array, Array]:
    return x.mean(axis=0), np.cov(x, rowvar=False)


@cache
def bundled_moments() -> tuple[Array, Array]:
    found = Statistics.bundled()
    mean = found.sum.numpy() / found.num
    return mean, (found.outer.numpy() - found.num * np.outer(mean, mean)) / (found.num - 1)


def frechet(real: tuple[Array, Array], fake: tuple[Array, Array]) -> float:
    (mean_r, cov_r), (mean_f, cov_f) = real, fake
    value, vector = np.linalg.eigh(cov_r)
    half = (vector * np.sqrt(np.clip(value, 0, None))) @ vector.T
    root = np.sqrt(np.clip(np.linalg.eigvalsh(half @ cov_f @ half), 0, None)).sum()
    return float(((mean_r - mean_f) ** 2).sum() + np.trace(cov_r) + np.trace(cov_f) - 2 * root)


def within_third_neighbours(these: Array, of: Array) -> float:
    """Share of `these` that lie within the distance of one `of` to its third neighbour."""
    radius = np.sort(np.linalg.norm(of[:, None] - of[None], axis=2), axis=1)[:, 3]
    return float((np.linalg.norm(these[:, None] - of[None], axis=2) <= radius).any(axis=1).mean())


def apart(images: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and RMS difference."""
    difference = images.double().numpy() - exact.double().numpy()
    return float(np.abs(difference).max()), float(np.sqrt((difference**2).mean()))


def differ(pixels: Pixels, exact: Pixels) -> dict[str, Any]:
    difference = np.abs(pixels.astype(int) - exact.astype(int))
    return {"share": pytest.approx((difference > 0).mean()), "levels": difference.max()}


# ----------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_help_has_an_example_whose_options_exist(command: str, run: Any) -> None:
    result = run(f"{command} --help")
    assert (result.code, result.err) == (0, "")
    text = " ".join(result.out.split())
    example = re.search(rf"Example: (jacobiflow {command} .*?) (Arguments|Options):", text)
    assert example is not None
    for option in re.findall(r"--[\w-]+", example[1]):
        assert f"{option} " in text.split("Options:")[1], option
    assert "--json" in text
    assert re.search(rf"^  {command} +\w", run("--help").out, re.MULTILINE)


# ------------------------------------------------------------------------------------------------------------ evaluate


def evaluated(run: Any, tmp_path: Path, words: str) -> tuple[dict[str, Any], str]:
    """The figures of `--json`, which evaluation.json repeats, and what was printed, in one line."""
    result = run(f"evaluate {words} --out {tmp_path}/new/out --json {tmp_path}/f.json")
    assert result.code == 0, result.err
    assert max(map(len, result.out.splitlines()[:-1])) <= 80
    shown = figures(tmp_path / "f.json")
    assert figures(tmp_path / "new" / "out" / "evaluation.json") == shown
    return shown, " ".join(result.out.split())


@pytest.mark.parametrize("samples", ["samples", "pngs", "guided", "unlabelled"])
def test_fashion_fid_against_the_bundled_statistics(samples: str, run: Any, tmp_path: Path) -> None:
    model = SAMPLES[samples].get("model", "model")
    shown, out = evaluated(run, tmp_path, f"--model {model} --samples {samples} --paired 0")
    want = frechet(bundled_moments(), moments(features(on_disk(samples))))
    assert shown["frechet_distance"] == pytest.approx(want, rel=1e-6)
    assert (shown["features"], shown["num"], shown["samples"], shown["model"]) == ("fashion", NUM, samples, model)
    assert f"fashion-FID {want:.4f} 12 samples, against the 60,000 training images of Fashion-MNIST" in out
    assert set(shown) == {
        "model", "samples", "features", "against", "num", "frechet_distance", "resolved_sequentially", "lost",
        "certificates",
    }  # fmt: skip
    assert sorted(os.listdir(tmp_path / "new" / "out")) == ["certificates.png", "evaluation.json"]
    assert out.endswith(f"wrote {tmp_path}/new/out/evaluation.json and {tmp_path}/new/out/certificates.png")


def test_distances_to_images(run: Any, tmp_path: Path) -> None:
    shown, out = evaluated(run, tmp_path, "--model model --samples samples --images real --paired 0 --test-images 0")
    real, fake = real_features(), features(on_disk("samples"))
    assert shown["frechet_distance"] == pytest.approx(frechet(moments(real), moments(fake)), rel=1e-6)
    mean, std = kernel_distance(torch.from_numpy(real), torch.from_numpy(fake))
    assert shown["kernel_distance"] == pytest.approx(mean, rel=1e-6)
    assert shown["kernel_distance_std"] == pytest.approx(std, rel=1e-6)
    assert shown["precision"] == pytest.approx(within_third_neighbours(fake, real))
    assert shown["recall"] == pytest.approx(within_third_neighbours(real, fake))
    assert "bits_per_dim_noisy" not in shown
    assert f"fashion-KID {mean:.5f} +-{std:.5f} over subsets; 12 samples, 60 images" in out
    assert f"precision {shown['precision']:.3f} 12 samples, 60 images" in out
    assert "12 samples, against the training split of real" in out


def test_few_images_have_no_precision(run: Any, tmp_path: Path) -> None:
    shown, _ = evaluated(run, tmp_path, "--model model --samples samples --images few --paired 0 --test-images 0")
    want = frechet(moments(real_features("few")), moments(features(on_disk("samples"))))
    assert shown["frechet_distance"] == pytest.approx(want, rel=1e-6)
    assert not {"kernel_distance", "precision", "recall"} & set(shown)


def test_saved_statistics_give_the_same_distance(run: Any, tmp_path: Path) -> None:
    base, stats = "--model model --paired 0 --test-images 0", tmp_path / "deep" / "s.pth"
    first, out = evaluated(run, tmp_path, f"{base} --samples samples --images real --save-stats {stats}")
    assert f"statistics 60 images written to {stats}".replace(" ", "") in out.replace(" ", "")
    again, _ = evaluated(run, tmp_path, f"{base} --samples samples --stats {stats}")
    assert again["frechet_distance"] == first["frechet_distance"]
    assert again["against"] == str(stats)
    assert "kernel_distance" not in again
    other, _ = evaluated(run, tmp_path, f"{base} --samples samples --images few --stats {stats}")
    assert other["frechet_distance"] == first["frechet_distance"]

    before = stats.read_bytes()
    alone, _ = evaluated(run, tmp_path, f"{base} --images real --save-stats {stats}")
    assert set(alone) == {"model", "samples"}
    assert stats.read_bytes() == before
    mean, cov = moments(real_features())
    found = Statistics.load(stats)
    assert found.num == 60
    np.testing.assert_allclose(found.sum.numpy() / 60, mean, rtol=1e-6)
    np.testing.assert_allclose((found.outer.numpy() - 60 * np.outer(mean, mean)) / 59, cov, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("samples", ["samples", "pngs", "resolved"])
def test_certificates_are_those_of_the_shards(samples: str, run: Any, tmp_path: Path) -> None:
    shown, out = evaluated(run, tmp_path, f"--model model --samples {samples} --features none --paired 0")
    values = np.array([value for record in records(samples) for value in record["certificate"]])
    resolved = sum(len(record["resolved"]) for record in records(samples))
    found = shown["certificates"]
    assert len(values) == NUM
    assert (found["zero"], found["infinite"]) == ((values == 0).sum(), 0)
    assert (
        found["counts"]
        == np.histogram(values[values > 0], found["edges"] or [1, 2])[0].tolist()[: len(found["counts"])]
    )
    assert sum(found["counts"]) + found["zero"] == NUM
    assert found["max"] == values.max()
    assert (shown["resolved_sequentially"], shown["lost"]) == (resolved, 0)
    assert (resolved > 0) == (samples == "resolved")
    assert f"certificate {values.max():.1e} largest of 12 samples" in out
    assert f"re-solved {resolved / NUM:.2%} {resolved} of 12 samples, token by token" in out
    assert "lost" not in out
    with Image.open(tmp_path / "new" / "out" / "certificates.png") as picture:
        assert picture.width > 300


@pytest.mark.parametrize(
    ("samples", "asked"), [("samples", None), ("resolved", 1e-7), ("planned", 2e-2), ("planned --paired 0", None)]
)
def test_the_picture_of_certificates_names_the_tolerance(
    samples: str, asked: float | None, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[float | None] = []

    def drawn(histogram: dict[str, Any], tolerance: float | None) -> Any:
        shown.append(tolerance)
        return certificate_figure(histogram, tolerance)

    monkeypatch.setattr(EVALUATION, "certificate_figure", drawn)
    if samples.startswith("planned"):
        window = jf.Solver(jf.Window(4), stopping=jf.Tolerance(1e-2))
        made = replace(jf.Strategy.uniform(window, 2), tolerance=2e-2)
        labels = torch.arange(4) % 3
        jf.sample_to_folder(jf.load("./model"), 4, tmp_path / "planned", labels, strategy=made, progress=False)
        samples = f"{tmp_path}/{samples}"
    assert run(f"evaluate --model model --features none --samples {samples} --out {tmp_path}/out").code == 0
    assert shown == [asked]


def test_lost_samples_are_said(run: Any, tmp_path: Path) -> None:
    with said_always():
        shown, out = evaluated(run, tmp_path, "--model overflowing --samples lost --images test --test-images 0")
    assert (shown["lost"], shown["certificates"]["infinite"], shown["certificates"]["counts"]) == (NUM, NUM, [])
    assert shown["certificates"]["max"] is None
    assert "lost 100.00% the exact inverse overflows; black images, which count above" in out
    assert not on_disk("lost").any()
    assert shown["paired"] == {
        "num": NUM, "max": 0, "rms": 0, "psnr": None, "pixels": {"share": 0, "levels": 0}
    }  # fmt: skip
    assert shown["stored"] == {"share": 0, "levels": 0}


@pytest.mark.parametrize(
    ("samples", "options", "num"),
    [
        ("samples", "", NUM), ("samples", "--paired 5 --batch-size 3", 5), ("pngs", "--paired 9", 9),
        ("guided", "", NUM), ("unlabelled", "--paired 1", 1), ("sweeps", "", NUM), ("tiny", "", NUM),
    ],
)  # fmt: skip
def test_paired_errors_are_to_the_sequential_loop(
    samples: str, options: str, num: int, run: Any, tmp_path: Path
) -> None:
    settings = {"seed": 0, "strategy": "window:4", "guidance": None, "denoise": 0.0, **SAMPLES[samples]}
    model = settings.get("model", "model")
    shown, out = evaluated(run, tmp_path, f"--model {model} --samples {samples} --features none {options}")
    flow = jf.load(f"./{model}")
    size = 3 if "--batch-size" in options else 64
    images, exact = (
        jf.sample(
            flow, num, settings.get("labels", torch.arange(NUM) % 3)[:num] if model == "model" else None,
            settings["seed"], strategy=strategy, guidance=settings["guidance"], denoise=settings["denoise"],
            certify=settings.get("certify", True), batch_size=size, progress=False,
        ).images
        for strategy in (settings["strategy"], "sequential")
    )  # fmt: skip
    largest, rms = apart(images, exact)
    found = shown["paired"]
    assert (found["num"], found["max"]) == (num, pytest.approx(largest, rel=1e-6))
    assert found["rms"] == pytest.approx(rms, rel=1e-6)
    assert found["psnr"] == pytest.approx(20 * math.log10(2 / rms))
    assert found["pixels"] == differ(levels(images), levels(exact))
    assert shown["stored"] == differ(on_disk(samples)[:num], levels(exact))
    assert (largest > 1e-2) == (samples == "sweeps")
    assert f"largest error {largest:.1e} {num} samples, against the sequential loop at the same latents" in out
    assert f"PSNR {found['psnr']:.1f} dB" in out
    assert f"8-bit pixels {shown['stored']['share']:.3%} differ, by {shown['stored']['levels']} at most" in out


def test_the_sequential_loop_is_the_exact_inverse(run: Any, tmp_path: Path) -> None:
    shown, _ = evaluated(run, tmp_path, "--model model --samples samples --features none")
    flow = make_flow(image_size=28, patch_size=7, num_classes=3, noise_std=0.1)
    exact = oracle.Oracle(flow).decode(draw_latents(NUM, 16, 49), torch.arange(NUM) % 3)
    difference = np.abs(on_disk("samples").astype(int) - levels(exact).astype(int))
    assert shown["stored"]["levels"] == difference.max()
    assert shown["stored"]["share"] == pytest.approx((difference > 0).mean(), abs=5e-4)  # rounding, at half a level


def by_oracle(flow: Any, images: Tensor, labels: Tensor | None) -> Tensor:
    """log p of images (N,)."""
    z, log_det = oracle.Oracle(flow).encode(images, labels)
    return (-0.5 * z.square() - 0.5 * math.log(2 * math.pi)).sum(dim=(1, 2)) + log_det


@pytest.mark.parametrize(
    ("model", "options", "num", "kind", "seed"),
    [
        ("model", "", 24, "gaussian", 0), ("model", "--noise uniform --seed 4 --batch-size 7", 24, "uniform", 4),
        ("plain", "--test-images 5", 5, "uniform", 0), ("model", "--noise gaussian --test-images 1", 1, "gaussian", 0),
    ],
)  # fmt: skip
def test_likelihood_is_the_oracles(
    model: str, options: str, num: int, kind: str, seed: int, run: Any, tmp_path: Path
) -> None:
    shown, out = evaluated(run, tmp_path, f"--model {model} --images test {options}")
    flow, data = jf.load(f"./{model}"), load_images("test", 28, 1)
    noise = Noise("gaussian", 0.1) if kind == "gaussian" else Noise("uniform")
    images = noisy_images(data, torch.arange(num), noise, seed)
    assert data.labels is not None
    labels = data.labels[:num] if model == "model" else None
    name = "bits_per_dim_noisy" if kind == "gaussian" else "bits_per_dim"
    want = -float(by_oracle(flow, images, labels).mean()) / 784 / math.log(2) + 7
    assert shown[name] == pytest.approx(want, rel=1e-5)
    words = "noisy images, noise 0.1" if kind == "gaussian" else "uniformly dequantised images"
    assert f"bits per dimension {shown[name]:.3f} {num} {words}, of test" in out
    keys = {"model", "samples", name, "test_images"}
    if model == "model":
        scores = torch.stack([by_oracle(flow, images, torch.full((num,), y)) for y in range(3)])
        assert shown["bayes_accuracy"] == pytest.approx(float((scores.argmax(dim=0) == labels).double().mean()))
        assert f"class accuracy {shown['bayes_accuracy']:.1%} by Bayes' rule; {num} {words}, of test" in out
        keys.add("bayes_accuracy")
    assert set(shown) == keys
    assert (shown["samples"], shown["test_images"]) == (None, num)
    assert os.listdir(tmp_path / "new" / "out") == ["evaluation.json"]
    assert out.endswith(f"wrote {tmp_path}/new/out/evaluation.json")


def test_a_maf_is_evaluated(run: Any, tmp_path: Path) -> None:
    assert run(f"sample --model maf --num 4 --strategy jacobi-5 --out {tmp_path}/s").code == 0
    shown, _ = evaluated(run, tmp_path, f"--model maf --samples {tmp_path}/s --images test --test-images 4")
    want = frechet(moments(real_features("test")), moments(features(on_disk(tmp_path / "s"))))
    assert shown["frechet_distance"] == pytest.approx(want, rel=1e-6)
    assert {"bits_per_dim", "bayes_accuracy", "paired", "stored"} < set(shown)


def test_samples_without_certificate_have_no_picture(run: Any, tmp_path: Path) -> None:
    shown, out = evaluated(run, tmp_path, "--model model --samples sweeps --features none --paired 0")
    assert shown["certificates"] is None
    assert "certificate none drawn with --no-certify" in out
    assert os.listdir(tmp_path / "new" / "out") == ["evaluation.json"]
    assert "certificates.png" not in out


def test_names_in_square_brackets_are_no_markup_in_evaluate(run: Any, tmp_path: Path) -> None:
    _, out = evaluated(run, tmp_path, "--model model --samples samples --images [red]x --paired 0 --test-images 3")
    assert "12 samples, against the training split of [red]x" in out
    assert "3 noisy images, noise 0.1, of [red]x" in out


def test_only_test_images_need_the_models_classes(run: Any, tmp_path: Path) -> None:
    words = "--samples samples --features none --paired 0 --images fashion-512 --test-images 0"
    shown, _ = evaluated(run, tmp_path, f"--model model {words}")
    assert shown["certificates"]["max"] > 0
    assert "bits_per_dim_noisy" not in shown


def test_samples_of_no_strategy(compared: SimpleNamespace, run: Any, tmp_path: Path) -> None:
    """Pairs need one; all else is had without."""
    line = f"evaluate --model model --samples {row_folder(compared.path, 'STARFlow')} --images real --test-images 0"
    assert_refused(f"{line} --out out-x --save-stats out-x/s", "starflow was drawn by STARFlow, not a strategy", run)
    shown, _ = evaluated(run, tmp_path, f"{line.removeprefix('evaluate ')} --paired 0")
    want = frechet(moments(real_features()), moments(features(on_disk(row_folder(compared.path, "STARFlow")))))
    assert shown["frechet_distance"] == pytest.approx(want, rel=1e-6)
    assert (shown["num"], shown["certificates"], shown["resolved_sequentially"]) == (20, None, 0)
    assert "paired" not in shown


def test_samples_whose_strategy_is_broken(run: Any, tmp_path: Path) -> None:
    shown, _ = evaluated(run, tmp_path, "--model model --samples no-strategy --features none --paired 0")
    assert shown["certificates"]["max"] > 0


def test_statistics_and_figures_are_not_one_file(run: Any, tmp_path: Path) -> None:
    line = f"evaluate --model model --images real --test-images 0 --out {tmp_path}/out"
    assert run(f"{line} --save-stats {tmp_path}/same --json {tmp_path}/same").code == 2


# -------------------------------------------------------------------------------------------------------- its errors

EVALUATE = "evaluate --model model --out out-x"
COMPARED = "compare --model model --num 8 --batch-size 4 --repeats 1 --out out-x --strategy jacobi-2"
ERRORS = {
    EVALUATE: "nothing to evaluate: give --samples, a folder that jacobiflow sample wrote, or --images",
    "evaluate --model plain --samples samples --out out-x": "--samples samples: drawn from another flow (weights ",
    f"{EVALUATE} --samples no-manifest": "no-manifest: no manifest.json in it; give a folder of samples",
    f"{EVALUATE} --samples nowhere": "nowhere: no manifest.json in it; give a folder of samples",
    f"{EVALUATE} --samples text": "text/manifest.json: cannot be read (Not a directory)",
    f"{EVALUATE} --samples missing": "missing: 1 of 2 shards are missing, 00001.json for one; sample into it again",
    f"{EVALUATE} --samples corrupt": "corrupt/shards/00001.npz: does not match its checksum; sample into",
    f"{EVALUATE} --samples samples --features nonsense": "--features nonsense: give fashion or inception, or none",
    f"{EVALUATE} --images real --features none --save-stats s": "--features none: give fashion or inception",
    "evaluate --model small --samples tiny --out out-x": (
        "--features fashion: is of 1x28x28 images, this model's are 1x8x8; give inception"
    ),
    f"{EVALUATE} --samples samples --features inception": "--features inception: give --images or --stats",
    f"{EVALUATE} --samples samples --stats text": "text: no file of tensors",
    f"{EVALUATE} --samples samples --stats nowhere": "nowhere: cannot be read (No such file or directory); give",
    f"{EVALUATE} --samples samples --save-stats s": "--save-stats s: give --images, whose statistics they are",
    f"{EVALUATE} --samples samples --images nowhere": "--images nowhere: neither a folder nor one of fashion-512",
    f"{EVALUATE} --samples samples --images digits": "--images digits: images are 1x8x8, the flow takes 1x28x28",
    f"{EVALUATE} --samples samples --paired -1": "--paired -1: give 0 or a positive number",
    f"{EVALUATE} --images test --test-images -1": "--test-images -1: give 0 or a positive number",
    f"{EVALUATE} --samples samples --batch-size 0": "--batch-size 0: give a positive number",
    f"{EVALUATE} --samples samples --noise pink": "--noise pink: give gaussian or uniform",
    "evaluate --model plain --images test --noise gaussian --out out-x": "--noise gaussian: this flow's noise_std is 0",
    f"{EVALUATE} --samples samples --json nowhere/f": "--json nowhere/f: give a file in a folder that exists",
    "evaluate --model model --samples samples --out text": "--out text: cannot write there (Not a directory)",
    f"{EVALUATE} --samples samples --device abacus": "--device abacus: not available here; give cpu",
    f"{COMPARED} --strategy Jacobi-2": "given twice; give each row once",
    f"{COMPARED} --strategy original": "row 'Original': given twice; give each row once",
    f"{COMPARED} --strategy quickest": "strategy 'quickest': unknown; give auto, sequential",
    f"{COMPARED} --strategy starflow": "strategy 'starflow': unknown",
    f"{COMPARED} --strategy nowhere.json": "strategy nowhere.json: cannot be read",
    f"{COMPARED} --strategy [9-1-1-1]": "strategy '[9-1-1-1]': Stack names block 9, the flow has 0 to 1",
    f"{COMPARED} --num 0": "--num 0: give a positive number",
    f"{COMPARED} --repeats 0": "--repeats 0: give a positive number",
    f"{COMPARED} --shard-size 6": "--shard-size 6: give a multiple of --batch-size, 4",
    f"{COMPARED} --shard-size 0": "--shard-size 0: give a positive number",
    f"{COMPARED} --final 7": "--final 7: give at least --num, 8",
    f"{COMPARED} --final -1": "--final -1: give a positive number",
    f"{COMPARED} --features none": "--features none: give fashion or inception",
    f"{COMPARED} --features inception": "--features inception: give --images or --stats, to compare with",
    f"{COMPARED} --stats text": "text: no file of tensors",
    f"{COMPARED} --images nowhere": "--images nowhere: neither a folder",
    f"{COMPARED} --labels abc": "--labels abc: give balanced",
    f"{COMPARED} --guidance -1": "guidance weight -1.0: give 0",
    f"{COMPARED} --report nowhere": "report nowhere: cannot be read (No such file or directory)",
    f"{COMPARED} --json nowhere/f": "--json nowhere/f: give a file in a folder that exists",
    "compare --model small --num 8 --strategy jacobi-2 --out out-x": "this model's are 1x8x8; give inception",
    f"{EVALUATE} --images real --save-stats real": "--save-stats real: is a folder; give a file, such as ",
    f"{EVALUATE} --samples no-strategy --images real --test-images 0 --save-stats out-x/s": (
        "strategy no-strategy/strategy.json: "
    ),
    "evaluate --model plain --samples unlabelled --images test --noise gaussian --out out-x": (
        "--noise gaussian: this flow's noise_std is 0; give uniform"
    ),
    f"{EVALUATE} --samples samples --features none --images nowhere": "--images nowhere: neither a folder",
    f"{EVALUATE} --samples samples --images fashion-512": (
        "--images fashion-512: has classes up to 9, the model 3 classes; give others, or --test-images 0"
    ),
    f"{COMPARED} --strategy auto:x": "row 'auto:x': give auto, or auto:TOLERANCE such as auto:1e-2",
    f"{COMPARED} --strategy auto:nan": "tolerance nan: give 0",
    f"{COMPARED} --labels 99": "label 99: this flow has classes 0 to 2",
    f"{COMPARED} --denoise -1": "--denoise -1.0: give 0 (off) or a positive rate",
    COMPARED.replace("model model", "model plain") + " --denoise 1": "this flow's noise_std is 0",
    f"{COMPARED} --num 1 --batch-size 1": "give at least 2",
    f"{COMPARED} --strategy auto:-1": "tolerance -1.0: give 0",
    f"{COMPARED} --strategy AUTO": "strategy 'auto' is planned for a flow, a device and a batch",
    "compare --model plain --num 8 --strategy jacobi-2 --labels 0 --out out-x": "this flow is unconditional",
    f"{EVALUATE} --images real --save-stats text/s": "--save-stats text/s: cannot write there (Not a directory)",
    f"{EVALUATE} --images one --test-images 0 --save-stats out-x/deep/s": "statistics of 1 images: give at least 2",
    f"{EVALUATE} --samples samples --images real --test-images 0 --stats seven.pth --save-stats out-x/s": (
        "statistics of 7 features against 64"
    ),
    f"{COMPARED} --stats seven.pth": "statistics of 7 features against 64: give statistics of the same features",
    f"{COMPARED} --images one": "give at least 2",
    f"{COMPARED} --strategy planned.json": "the strategy was planned for device an abacus, not ",
}


def assert_refused(line: str, message: str, run: Any) -> None:
    before = files()
    try:
        result = run(line)
        assert result.code == 2
        assert result.out == ""
        assert re.fullmatch(r"error: [^\n]+\n", result.err)
        assert message in result.err
        assert files() == before
    finally:
        shutil.rmtree("out-x", ignore_errors=True)


@pytest.mark.parametrize("line", ERRORS)
def test_bad_input_is_one_line_and_leaves_nothing(line: str, run: Any) -> None:
    assert_refused(line, ERRORS[line], run)


def test_samples_of_another_model_have_a_mend(run: Any) -> None:
    err = run("evaluate --model plain --samples samples --out out-x").err
    assert re.search(r"\(weights \w{12}, this one's \w{12}\): give that one as --model\n$", err)


@pytest.mark.parametrize("line", [f"{EVALUATE} --samples samples", COMPARED])
def test_inceptions_weights_that_are_not_to_be_had(line: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(module, "load_state_dict_from_url", unreachable)
    message = "and cannot be fetched (no route to host); give the file weights-inception-2015-12-05-6726825d.pth, of "
    assert_refused(f"{line} --features inception --images real", message, run)


LINES = [f"{EVALUATE} --samples samples", f"{EVALUATE} --images real --save-stats s.pth"]


@pytest.mark.parametrize("line", [*LINES, COMPARED])
def test_torchmetrics_that_is_not_installed(line: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert_refused(line, "needs torchmetrics and torch-fidelity; pip install 'jacobiflow[eval]'", run)


# ------------------------------------------------------------------------------------------------------------- compare


@pytest.fixture(scope="module")
def compared(folder: Path) -> SimpleNamespace:
    """What `compare` printed for ROWS; its folder is `compared`, its figures are `shown`."""
    result = call(folder, f"{compare_line('compared')} --json compared.json")
    assert (result.code, result.err) == (0, "")
    return SimpleNamespace(**vars(result), shown=figures(folder / "compared.json"), path=folder / "compared")


@pytest.fixture
def copied(compared: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the folder `compared`, to go on with."""
    return Path(shutil.copytree(compared.path, tmp_path / "copied", ignore=shutil.ignore_patterns("comparison.*")))


def row_folder(out: str | Path, name: str) -> Path:
    return Path(out) / "rows" / SLUGS.get(name, name.lower())


@cache
def draw_row(
    flow: Any, name: str, num: int = 20, guidance: jf.Guidance | None = None, rate: float = 0.0
) -> tuple[Tensor, float]:
    """The images of a row, drawn by the library's samplers, and the share that was solved again."""
    config, images, resolved = flow.config, [], 0
    for start in range(0, num, 8):
        count = min(8, num - start)
        z = draw_latents(count, config.num_tokens, config.token_channels, 0, start)
        labels = torch.arange(start, start + count) % config.num_classes if config.num_classes else None
        if name in PEERS:
            halves = [(z[i : i + 4], None if labels is None else labels[i : i + 4]) for i in range(0, count, 4)]
            found = torch.cat([PEERS[name](flow, *half, guidance, **GRIDS[name][0]).images for half in halves])
            images.append(denoise(flow, found, labels, rate) if rate else found)
            continue
        plain, auto = ("sequential" if name == ORIGINAL else name), name.startswith("auto")
        drawn = jf.sample(
            flow, latents=z, labels=labels, strategy="window:32" if auto else plain, guidance=guidance, denoise=rate,
            tolerance=float(name.partition(":")[2] or 1e-3) if auto else None, certify=auto, batch_size=4,
            progress=False,
        )  # fmt: skip
        images.append(drawn.images)
        resolved += drawn.resolved_sequentially
    return torch.cat(images), resolved / num


def assert_row(row: dict[str, Any], flow: Any, out: Path, timings: dict[str, Any], **settings: Any) -> None:
    """Every figure of a row, from its samples drawn once more and those on disk."""
    name, num = row["name"], row["num"]
    real = settings.pop("real", None) or bundled_moments()
    exact, _ = draw_row(flow, ORIGINAL, num, **settings)
    images, resolved = draw_row(flow, name, num, **settings)
    pixels, original = on_disk(row_folder(out, name))[:num], on_disk(row_folder(out, ORIGINAL))[:num]
    assert np.array_equal(pixels, levels(images))
    distance, base = (frechet(real, moments(features(p))) for p in (pixels, original))
    assert row["distance"] == pytest.approx(distance, rel=1e-6)
    assert row["relative"] == pytest.approx(distance / base - 1, abs=1e-6)
    largest, rms = apart(images, exact)
    assert row["max"] == pytest.approx(largest, rel=1e-6)
    assert row["rms"] == pytest.approx(rms, rel=1e-6)
    assert row["pixels"] == differ(levels(images), levels(exact))
    assert row["resolved"] == resolved
    seconds = timings["rows"][name]
    assert row["seconds"] == {key: seconds[key] for key in ("median", "min", "max")}
    assert row["rate"] == pytest.approx(timings["rows"][ORIGINAL]["median"] / seconds["median"])


def test_rows_are_what_their_samples_say(compared: SimpleNamespace) -> None:
    shown, flow = compared.shown, jf.load("./model")
    assert [row["name"] for row in shown["rows"]] == [ORIGINAL, SEQUENTIAL, *ROWS]
    for row in shown["rows"]:
        assert row["num"] == 20
        assert_row(row, flow, compared.path, shown["timings"])
    original, sequential, few, *_ = shown["rows"]
    for row in (original, sequential):
        exact = {"relative": 0, "max": 0, "rms": 0, "pixels": {"share": 0, "levels": 0}, "resolved": 0}
        assert {key: row[key] for key in exact} == exact
    assert original["rate"] == 1
    assert few["max"] > 0.1
    assert (shown["model"], shown["distance"], shown["seed"], shown["denoise"]) == ("model", "fashion-FID", 0, 0)
    assert (shown["guidance"], shown["final"]) == (None, None)
    assert shown["against"] == "the 60,000 training images of Fashion-MNIST"
    assert shown == figures(compared.path / "comparison.json")
    with Image.open(compared.path / "comparison.png") as picture:
        assert picture.width > picture.height > 300


def test_timings_are_of_the_first_batch(compared: SimpleNamespace) -> None:
    timings, flow = compared.shown["timings"], jf.load("./model")
    assert set(timings["rows"]) == {ORIGINAL, SEQUENTIAL, *ROWS}
    assert (timings["batch_size"], timings["repeats"]) == (4, 1)
    exact, _ = draw_row(flow, ORIGINAL, 4)
    for name, found in timings["rows"].items():
        assert found["min"] == found["median"] == found["max"] > 0
        if name == ORIGINAL:  # the loop of the original code, which differs by rounding
            assert 0 < found["error"] < 1e-4
        else:
            assert found["error"] == pytest.approx(apart(draw_row(flow, name, 4)[0], exact)[0], rel=1e-6)


def test_exact_images_are_kept_unrounded(compared: SimpleNamespace) -> None:
    exact, _ = draw_row(jf.load("./model"), ORIGINAL)
    kept = [np.load(path) for path in sorted((compared.path / "exact").iterdir())]
    assert [len(part) for part in kept] == [8, 8, 4]
    assert np.array_equal(np.concatenate(kept), exact.numpy())


def test_the_table_fits_and_shows_every_row(compared: SimpleNamespace) -> None:
    lines = compared.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "20 samples of each of 9 rows: about 0 minutes by one process"
    assert "20 samples a row; * within 1% of Original" in lines
    for row in compared.shown["rows"]:
        (line,) = [line for line in lines if line.startswith(f"{row['name']} "[:17])]
        for cell in (
            f" {row['distance']:.4f} ", f" {100 * row['relative']:+.2f}%" + ("*" if row["relative"] <= 0.01 else " "),
            f" {row['max']:.1e} ", f" {row['rms']:.1e} ", f" {row['pixels']['share']:.2%} ", f" {row['resolved']:.1%} ",
            f" {row['seconds']['median']:.3f} ",
        ):  # fmt: skip
            assert cell in line
        assert line.rstrip().endswith(f" {row['rate']:.2f}x")
    assert any(line.startswith("[1-4-2-3] ") for line in lines)
    assert lines[-1] == "wrote compared/comparison.json and compared/comparison.png"


def test_names_in_square_brackets_are_no_markup_in_compare(run: Any, tmp_path: Path) -> None:
    path = Path("out-[b].json")
    jf.Strategy.uniform(jf.Solver(jf.Window(4), stopping=jf.Tolerance(1e-2)), 2).save(path)
    result = run(f"{FEW} --strategy '{path}' --out {tmp_path}/out")
    assert (result.code, result.err) == (0, "")
    assert any(line.startswith("out-[b].json  ") for line in result.out.splitlines())


def stamps(out: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for kind in ("npz", "npy") for p in out.rglob(f"*.{kind}")}


def shards(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.npz"))}


def without_time(rows: Any) -> Any:
    return [{key: value for key, value in row.items() if key not in ("seconds", "rate")} for row in rows]


def test_again_draws_nothing(compared: SimpleNamespace, copied: Path, run: Any, tmp_path: Path) -> None:
    before = stamps(copied)
    result = run(f"{compare_line(copied)} --json {tmp_path}/f")
    assert (result.code, result.err) == (0, "")
    assert stamps(copied) == before
    assert figures(tmp_path / "f") == compared.shown  # timings are kept too
    fewer = run(f"{compare_line(copied, ROWS[:1])} --json {tmp_path}/f")
    assert fewer.code == 0
    assert stamps(copied) == before
    assert figures(tmp_path / "f")["rows"] == compared.shown["rows"][:3]


def test_another_row_is_added(compared: SimpleNamespace, copied: Path, run: Any, tmp_path: Path) -> None:
    before = stamps(copied)
    assert run(f"{compare_line(copied, [*ROWS, 'window:3'])} --json {tmp_path}/f").code == 0
    after = stamps(copied)
    assert {path: after[path] for path in before} == before
    assert {Path(path).parent.parent.name for path in set(after) - set(before)} == {"window-3"}
    rows = figures(tmp_path / "f")["rows"]
    assert without_time(rows[:-1]) == without_time(compared.shown["rows"])
    assert rows[-1]["name"] == "window:3"


@pytest.mark.parametrize("calls", [0, 1, 4, 8, 10])
def test_a_stopped_run_goes_on(
    calls: int, compared: SimpleNamespace, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, draw, left = tmp_path / "out", GENERATE.sample, [calls]

    def stopped(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GENERATE, "sample", stopped)
        result = run(compare_line(out))
    assert (result.code, result.err) == (130, "interrupted\n")
    assert "about 0 minutes" in result.out  # the estimate comes first
    done = stamps(out / "rows")
    assert len([path for path in done if "starflow" not in path and "selective" not in path]) == calls
    assert not (out / "comparison.json").exists()
    timings = (out / "timings.json").read_bytes()
    assert run(f"{compare_line(out)} --json {tmp_path}/f").code == 0
    assert {path: stamp for path, stamp in stamps(out).items() if path in done} == done
    assert (out / "timings.json").read_bytes() == timings
    assert shards(out) == shards(compared.path)
    assert without_time(figures(tmp_path / "f")["rows"]) == without_time(compared.shown["rows"])


def test_a_stop_within_a_peers_row_goes_on(
    compared: SimpleNamespace, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third batch of it, which is the second shard's."""
    out, calls = tmp_path / "out", [0]

    def stopped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2 + 3:  # two are for the timing
            raise KeyboardInterrupt
        return PEERS["STARFlow"](*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(COMPARISON, "PEERS", {**PEERS, "STARFlow": stopped})
        assert run(compare_line(out, ["STARFlow"])).code == 130
    assert len(stamps(out / "rows" / "starflow")) == 1
    assert run(compare_line(out, ["STARFlow"])).code == 0
    assert shards(out) == {name: data for name, data in shards(compared.path).items() if re.search("seq|star", name)}


def test_a_corrupt_shard_is_drawn_again(compared: SimpleNamespace, copied: Path, run: Any, tmp_path: Path) -> None:
    spoilt = [row_folder(copied, name) / "shards" / "00001.npz" for name in ("jacobi-2", "STARFlow", ORIGINAL)]
    for path in spoilt:
        path.write_bytes(path.read_bytes()[:-9])
    before = stamps(copied)
    with said_always():
        result = run(f"{compare_line(copied)} --json {tmp_path}/f")
    assert result.code == 0
    lines = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 3
    for line in lines:
        assert line.endswith(
            "1 of 3 shards lack their images or do not match their checksums, 00001 for one; drawn again"
        )
    after = stamps(copied)
    fresh = {path for path in before if before[path] != after[path]}
    assert fresh == {*map(str, spoilt), str(copied / "exact" / "00000008.npy")}
    assert shards(copied) == shards(compared.path)
    assert figures(tmp_path / "f") == compared.shown


@pytest.mark.parametrize("short", [False, True])
def test_missing_exact_images_are_drawn_again(
    short: bool, compared: SimpleNamespace, copied: Path, run: Any, tmp_path: Path
) -> None:
    missing = copied / "exact" / "00000008.npy"
    want = missing.read_bytes()
    if short:
        np.save(missing, np.load(missing)[:5])
    else:
        missing.unlink()
    for name in ("jacobi-8", "STARFlow"):
        (row_folder(copied, name) / "shards" / "00001.json").unlink()
    assert run(f"{compare_line(copied)} --json {tmp_path}/f").code == 0
    assert missing.read_bytes() == want
    assert shards(copied) == shards(compared.path)
    assert figures(tmp_path / "f") == compared.shown


@pytest.mark.parametrize("size", [0, 3, 500])
def test_broken_exact_images_are_drawn_again(size: int, copied: Path, run: Any) -> None:
    broken = copied / "exact" / "00000008.npy"
    want = broken.read_bytes()
    broken.write_bytes(want[:size])
    (row_folder(copied, "jacobi-8") / "shards" / "00001.json").unlink()
    assert run(compare_line(copied)).code == 0
    assert broken.read_bytes() == want


def stopped(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def untimed(*_: Any, **__: Any) -> None:
    raise AssertionError("timed")


SETTINGS = {
    "--seed 5": "seed 0, not 5", "--guidance 1": "guidance None, not {'weight': 1.0, ",
    "--denoise 1": "denoise 0.0, not 1.0", "--shard-size 4": "shard_size 8, not 4",
    "--batch-size 2": "batch_size 4, not 2",
    "--dtype float64": "dtype torch.float32, not torch.float64", "--model overflowing": r"fingerprint \w{64}, not ",
}  # fmt: skip


def test_another_runs_folder_is_refused(copied: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(COMPARISON, "interleave", untimed)
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    for option, words in SETTINGS.items():
        result = run(f"{compare_line(copied, [*ROWS, 'window:3'])} {option}")
        assert (result.code, result.out) == (2, "")
        want = (
            f"error: {re.escape(str(copied))}: holds a comparison of {words}[^\n]*; give another --out, or --overwrite"
        )
        assert re.fullmatch(f"{want} to lose it\n", result.err), result.err
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_other_labels_after_the_first_batch_are_refused(copied: Path, run: Any) -> None:
    before = stamps(copied)
    result = run(f"{compare_line(copied)} --labels 0,1,2,0,1")
    assert result.code == 2
    assert re.fullmatch(r"error: \S+: holds samples of other labels; give another --out, or --overwrite\n", result.err)
    assert stamps(copied) == before


def test_other_labels_after_the_first_batch_are_refused_before_timing(
    copied: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(COMPARISON, "interleave", untimed)
    assert run(f"{compare_line(copied, [*ROWS, 'window:3'])} --labels 0,1,2,0,1").code == 2


def test_overwrite_begins_anew(copied: Path, run: Any) -> None:
    (copied / "notes.txt").write_text("kept")
    before = shards(copied)
    assert run(f"{compare_line(copied, ['jacobi-2', 'auto'])} --seed 5 --overwrite").code == 0
    assert set(os.listdir(copied)) == {
        "comparison.json", "comparison.png", "exact", "notes.txt", "plans", "rows", "settings.json", "timings.json",
    }  # fmt: skip
    assert set(os.listdir(copied / "rows")) == {"sequential", "jacobi-2", "auto"}
    assert os.listdir(copied / "plans") == ["auto.json"]
    labels = torch.arange(20) % 3
    want = jf.sample(
        jf.load("./model"), 20, labels, 5, strategy="sequential", certify=False, batch_size=4, progress=False
    )
    assert np.array_equal(
        np.concatenate([np.load(p) for p in sorted((copied / "exact").iterdir())]), want.images.numpy()
    )
    assert np.array_equal(on_disk(copied / "rows" / "sequential"), levels(want.images))
    assert all(data != before[name] for name, data in shards(copied).items())
    assert set(figures(copied / "timings.json")["rows"]) == {ORIGINAL, SEQUENTIAL, "jacobi-2", "auto"}
    assert run(compare_line(copied)).code == 2  # it is of seed 5 now
    assert run(f"{compare_line(copied / 'new', ['jacobi-2'])} --overwrite").code == 0


def test_overwrite_of_a_folder_without_settings(copied: Path, run: Any) -> None:
    (copied / "settings.json").unlink()
    assert run(f"{compare_line(copied, ROWS[:1])} --seed 5 --overwrite").code == 0


@pytest.mark.parametrize("option", ["", " --seed 5"])
def test_a_folder_without_settings_is_given_none(option: str, copied: Path, run: Any) -> None:
    lost = (copied / "settings.json").rename(copied / "lost")
    before = sorted(copied.rglob("*"))
    result = run(f"{compare_line(copied, ROWS[:1])}{option}")
    assert (result.code, result.out) == (2, "")
    assert result.err.endswith(": has rows but no settings.json; restore it, or begin anew with --overwrite\n")
    assert sorted(copied.rglob("*")) == before
    lost.rename(copied / "settings.json")
    assert run(compare_line(copied, ROWS[:1])).code == 0


def test_overwrite_removes_the_former_figures(
    compared: SimpleNamespace, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(compared.path, tmp_path / "out"))
    monkeypatch.setattr(Comparing, "draw", stopped)
    assert run(f"{compare_line(out, ROWS[:1])} --seed 5 --overwrite").code == 130
    assert not any((out / name).exists() for name in ("comparison.json", "comparison.png"))


@pytest.mark.parametrize("text", ["", "{", "[]"])
@pytest.mark.parametrize("name", ["settings.json", "timings.json"])
def test_a_broken_file_is_named(name: str, text: str, copied: Path, run: Any) -> None:
    (copied / name).write_text(text)
    result = run(compare_line(copied))
    assert (result.code == 2 and name in result.err) or (result.code == 0 and name == "timings.json")


@pytest.mark.parametrize("entry", ["processor", "device", "torch", "threads", "cores", "python"])
def test_timings_are_those_of_the_machine(entry: str, copied: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made anew on another; drawing may go on with other threads."""
    before = figures(copied / "timings.json")
    before["machine"][entry] = "another"
    before["rows"]["jacobi-2"]["median"] = 1234.5
    (copied / "timings.json").write_text(json.dumps(before))
    plans = {path: path.stat().st_mtime_ns for path in (copied / "plans").iterdir()}
    monkeypatch.setattr(Comparing, "draw", stopped)
    assert run(compare_line(copied)).code == 130
    after = figures(copied / "timings.json")
    if entry in ("processor", "device", "torch"):
        assert after["machine"][entry] != "another"
        assert after["rows"]["jacobi-2"]["median"] < 1234.5
        assert set(after["rows"]) == set(before["rows"])
    else:
        assert after == before
    assert {path: path.stat().st_mtime_ns for path in (copied / "plans").iterdir()} == plans


def test_timings_of_other_repeats_are_made_anew(copied: Path, run: Any) -> None:
    before = stamps(copied)
    assert run(f"{compare_line(copied, ROWS[:1])} --repeats 2").code == 0
    found = figures(copied / "timings.json")
    assert (found["repeats"], set(found["rows"])) == (2, {ORIGINAL, SEQUENTIAL, ROWS[0]})
    assert any(row["min"] < row["max"] for row in found["rows"].values())
    assert stamps(copied) == before


def test_only_auto_keeps_its_plan(compared: SimpleNamespace) -> None:
    assert sorted(os.listdir(compared.path / "plans")) == ["auto-1e-2.json", "auto.json"]
    for slug in ("auto-1e-2", "auto"):
        plan, kept = (compared.path / part for part in (f"plans/{slug}.json", f"rows/{slug}/strategy.json"))
        assert jf.Strategy.load(plan) == jf.Strategy.load(kept)


def test_a_strategys_file_that_was_changed_is_not_overlooked(run: Any, tmp_path: Path) -> None:
    path, line = tmp_path / "s.json", f"{FEW} --strategy {tmp_path}/s.json --out {tmp_path}/out"
    jf.Strategy.uniform(sweeps(1), 2).save(path)
    assert run(line).code == 0
    before = stamps(tmp_path / "out")
    jf.Strategy.uniform(sweeps(16), 2).save(path)
    result = run(line)
    assert result.code == 2
    assert re.fullmatch(r"error: \S+: holds samples of another strategy of this name[^\n]+\n", result.err)
    assert stamps(tmp_path / "out") == before


def test_timings_of_other_labels_are_not_taken(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Comparing, "draw", stopped)
    assert run(f"{FEW} --strategy jacobi-2 --labels 0 --out {tmp_path}").code == 130
    before = figures(tmp_path / "timings.json")["rows"]["jacobi-2"]["error"]
    assert run(f"{FEW} --strategy jacobi-2 --labels 1 --out {tmp_path}").code == 130
    assert figures(tmp_path / "timings.json")["rows"]["jacobi-2"]["error"] != before


def test_timings_of_a_strategys_former_file_are_not_taken(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, line = tmp_path / "s.json", f"{FEW} --strategy {tmp_path}/s.json --out {tmp_path}/out"
    jf.Strategy.uniform(sweeps(1), 2).save(path)
    with monkeypatch.context() as patch:
        patch.setattr(Comparing, "draw", stopped)
        assert run(line).code == 130
    jf.Strategy.uniform(sweeps(16), 2).save(path)
    assert run(line).code == 0
    assert figures(tmp_path / "out" / "timings.json")["rows"][str(path)]["error"] < 1e-3


def test_final_goes_on_with_the_original_and_the_best(
    compared: SimpleNamespace, copied: Path, run: Any, tmp_path: Path
) -> None:
    before = stamps(copied)
    result = run(f"{compare_line(copied)} --final 28 --json {tmp_path}/f")
    assert result.code == 0
    assert max(map(len, result.out.splitlines()[:-1])) <= 80
    shown = figures(tmp_path / "f")
    assert shown["rows"] == compared.shown["rows"]
    close = sorted((row for row in shown["rows"][1:] if row["relative"] <= 0.01), key=lambda row: row["rate"])
    plain = [row["name"] for row in close if not row["name"].startswith("auto")]
    autos = [row["name"] for row in close if row["name"].startswith("auto")]
    assert autos  # to 1e-3 or 1e-2, with these distances
    names = [ORIGINAL, *plain[-1:], *autos[-1:]]
    assert [row["name"] for row in shown["final"]] == names
    assert f"\n8 samples of each of {len(names)} rows: about 0 minutes by one process\n" in result.out
    assert "28 samples a row; * within 1% of Original" in result.out
    flow = jf.load("./model")
    for row in shown["final"]:
        assert row["num"] == 28
        assert_row(row, flow, copied, shown["timings"])
    for name in (ORIGINAL, SEQUENTIAL, *ROWS):
        path = row_folder(copied, name)
        more = path in [row_folder(copied, final) for final in names]
        assert len(on_disk(path)) == (28 if more else 20)
        for shard in ("00000", "00001"):  # the third had to grow
            full = str(path / "shards" / f"{shard}.npz")
            assert stamps(copied)[full] == before[full]


def test_final_again_goes_on_and_then_draws_nothing(
    copied: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, draw, left = f"{compare_line(copied)} --final 28 --json {tmp_path}/f", GENERATE.sample, [3]

    def stops(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GENERATE, "sample", stops)
        assert run(line).code == 130
    begun = stamps(copied)
    for path in list(begun):
        if path.endswith("00002.npz") and "sequential" not in path:  # which may have to grow
            del begun[path]
    assert len(on_disk(row_folder(copied, ORIGINAL))) == 28
    assert run(line).code == 0
    before, final = stamps(copied), figures(tmp_path / "f")["final"]
    assert {path: before[path] for path in begun} == begun
    assert [row["num"] for row in final] == [28] * len(final)
    assert run(line).code == 0
    shown = figures(tmp_path / "f")  # its rows are of the shards that have grown
    assert shown["final"] == final
    result = run(line)
    assert (result.code, result.err) == (0, "")
    assert stamps(copied) == before
    assert figures(tmp_path / "f") == shown
    for option in ("", " --final 24"):
        result = run(f"{compare_line(copied)}{option}")
        assert result.code == 2
        assert re.fullmatch(r"error: \S+: holds a run of 28 samples; give --final 28\n", result.err)
    assert stamps(copied) == before


def test_rows_after_final_are_of_their_samples(
    compared: SimpleNamespace, copied: Path, run: Any, tmp_path: Path
) -> None:
    line = f"{compare_line(copied)} --final 28 --json {tmp_path}/f"
    assert run(line).code == run(line).code == 0
    for row, was in zip(figures(tmp_path / "f")["rows"], compared.shown["rows"], strict=True):
        # The last shard was not full: what adapts was solved again beside other samples, to the tolerance.
        near = 1e-2 if row["name"].startswith("auto") else 1e-9
        assert row["num"] == was["num"]
        for key in ("distance", "max", "rms"):
            assert row[key] == pytest.approx(was[key], rel=10 * near if key != "distance" else near)


def test_rows_without_labels_are_had_from_a_longer_run(run: Any, tmp_path: Path) -> None:
    line = compare_line(tmp_path / "out", ["jacobi-3"], "--num 8 --batch-size 4 --shard-size 4", "plain")
    assert run(f"{line} --final 12 --json {tmp_path}/f").code == 0
    before, shown = stamps(tmp_path / "out"), figures(tmp_path / "f")
    assert run(f"{line} --json {tmp_path}/f").code == 0
    assert stamps(tmp_path / "out") == before
    assert figures(tmp_path / "f") == shown | {"final": None}


def slow_timings(*_: Any) -> dict[str, Any]:
    """A batch takes a minute by the sequential loop, half of it by jacobi-2, and half a minute to denoise."""
    seconds = {ORIGINAL: 5000.0, SEQUENTIAL: 60.0, "jacobi-2": 30.0}
    rows = {name: {"median": s, "min": s, "max": s, "error": 0.0} for name, s in seconds.items()}
    return {"batch_size": 4, "denoise_seconds": 30.0, "rows": rows}


def test_the_estimate_comes_before_drawing(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Comparing, "timings", slow_timings)
    monkeypatch.setattr(Comparing, "draw", stopped)
    result = run(f"compare --model model --num 10 --batch-size 4 --strategy jacobi-2 --out {tmp_path}")
    assert result.code == 130
    first, _ = result.out.split("\n", 1)
    assert first == "10 samples of each of 3 rows: about 8 minutes by one process"  # three batches of 2.5


def test_the_estimate_of_final_counts_the_sequential_loop(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Comparing, "timings", slow_timings)
    line = f"compare --model model --num 8 --final 28 --batch-size 4 --strategy sequential --out {tmp_path}"
    found = re.search(r"20 samples of each of (\d) rows: about (\d+) minutes", run(line).out)
    assert found is not None
    assert found.groups() == ("2", "8")  # five batches of 1.5: both have their images in common


def test_guided_and_denoised_rows(run: Any, tmp_path: Path) -> None:
    rows = ("jacobi-2", "auto", "STARFlow", "Selective Jacobi Decoding")
    line = f"{compare_line(tmp_path / 'out', rows)} {GUIDED} --denoise 0.8 --images real --json {tmp_path}/f"
    result = run(line)
    assert (result.code, result.err) == (0, "")
    shown, flow = figures(tmp_path / "f"), jf.load("./model")
    assert (shown["guidance"], shown["denoise"]) == (asdict(GUIDANCE), 0.8)
    assert shown["against"] == "the training split of real"
    assert shown["timings"]["denoise_seconds"] > 0
    for row in shown["rows"]:
        assert_row(
            row, flow, tmp_path / "out", shown["timings"], guidance=GUIDANCE, rate=0.8, real=moments(real_features())
        )
    for slug in ("sequential", "auto", "starflow"):
        manifest = figures(tmp_path / "out" / "rows" / slug / "manifest.json")
        assert (manifest["guidance"], manifest["denoise"]) == (asdict(GUIDANCE), 0.8)
        assert manifest["certify"] == (slug == "auto")


def test_labels_and_seed_reach_the_samples(run: Any, tmp_path: Path) -> None:
    assert run(f"{FEW} --strategy jacobi-2 --labels 2,0 --seed 7 --out {tmp_path}").code == 0
    want = jf.sample(
        jf.load("./model"), 8, torch.tensor([2, 0] * 4), 7, strategy="jacobi-2", certify=False, batch_size=4,
        progress=False,
    )  # fmt: skip
    assert np.array_equal(on_disk(tmp_path / "rows" / "jacobi-2"), levels(want.images))


def test_an_unconditional_flow_is_compared(run: Any, tmp_path: Path) -> None:
    line = compare_line(tmp_path / "out", ["jacobi-3", "STARFlow"], "--num 8 --batch-size 4 --shard-size 8", "plain")
    assert run(f"{line} --json {tmp_path}/f").code == 0
    shown, flow = figures(tmp_path / "f"), jf.load("./plain")
    for row in shown["rows"]:
        assert_row(row, flow, tmp_path / "out", shown["timings"])


def test_a_maf_is_compared_with_its_loop_of_full_passes(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, calls = benchmarking.full_passes_sample, []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return loop(*args, **kwargs)

    monkeypatch.setattr(benchmarking, "full_passes_sample", counted)
    rows = ["jacobi-2", *PEERS, "auto:1e-2"]
    line = compare_line(tmp_path / "out", rows, "--num 8 --batch-size 4 --shard-size 8", "maf")
    result = run(f"{line} --json {tmp_path}/f")
    assert (result.code, result.err) == (0, "")
    assert len(calls) == 2  # a warm-up and a round
    shown, flow = figures(tmp_path / "f"), jf.load("./maf")
    assert shown["timings"]["rows"][ORIGINAL]["error"] < 1e-4
    assert [row["name"] for row in shown["rows"]] == [ORIGINAL, SEQUENTIAL, *rows]
    for row in shown["rows"]:
        assert_row(row, flow, tmp_path / "out", shown["timings"])


def test_fewer_samples_than_a_batch(run: Any, tmp_path: Path) -> None:
    assert run(f"compare --model model --num 3 --repeats 1 --strategy jacobi-2 --out {tmp_path}").code == 0
    assert figures(tmp_path / "timings.json")["batch_size"] == 16
    images, _ = draw_row(jf.load("./model"), "jacobi-2", 3)
    assert np.array_equal(on_disk(tmp_path / "rows" / "jacobi-2"), levels(images))


def test_fewer_samples_than_a_batch_may_become_more(run: Any, tmp_path: Path) -> None:
    line = f"compare --model model --batch-size 8 --repeats 1 --strategy jacobi-2 --out {tmp_path}"
    assert run(f"{line} --num 4").code == 0
    assert run(f"{line} --num 12").code == 0


def test_fewer_labels_in_a_file_than_a_batch(run: Any, tmp_path: Path) -> None:
    line = f"compare --model model --num 3 --batch-size 4 --repeats 1 --strategy jacobi-2 --out {tmp_path}"
    assert run(f"{line} --labels three.txt").code == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_overflows_is_infinitely_far(
    value: float, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflows(*args: Any, **kwargs: Any) -> Any:
        found = PEERS["STARFlow"](*args, **kwargs)
        images = found.images.clone()
        images[1] = value
        return replace(found, images=images)

    monkeypatch.setattr(COMPARISON, "PEERS", {**PEERS, "STARFlow": overflows})
    result = run(f"{FEW} --strategy STARFlow --out {tmp_path}")
    assert result.code == 0
    row = figures(tmp_path / "comparison.json")["rows"][2]
    assert (row["max"], row["rms"]) == (None, None)
    (line,) = [line for line in result.out.splitlines() if line.startswith("STARFlow ")]
    assert re.search(r" inf +inf ", line)
    assert run(f"{FEW} --strategy STARFlow --out {tmp_path}").code == 0  # from the records
    assert figures(tmp_path / "comparison.json")["rows"][2] == row


@pytest.mark.parametrize("name", ["a$_$b.json", "$.json", "$x^2$", "a$$b$.json"])
def test_a_name_with_dollars_is_drawn_as_it_is(name: str, tmp_path: Path) -> None:
    drawn = [comparison_figure([made_up(name, 0.0, 2.0)], "FID") for _ in range(2)]
    (text,) = drawn[1].legends[0].texts
    text.set_text(f"1  {name}")
    text.set_parse_math(False)
    for figure, file in zip(drawn, ("found.png", "want.png"), strict=True):
        save_png(figure, tmp_path / file)
    assert (tmp_path / "found.png").read_bytes() == (tmp_path / "want.png").read_bytes()


def test_two_processes_give_the_figures_of_one(compared: SimpleNamespace, tmp_path: Path) -> None:
    line = compare_line(tmp_path / "out", ROWS[:1]) + " --final 28"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "jacobiflow"]
    done = subprocess.run(
        [*launch, *shlex.split(line)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    shown, flow = figures(tmp_path / "out" / "comparison.json"), jf.load("./model")
    for found, want in zip(without_time(shown["rows"]), without_time(compared.shown["rows"][:3]), strict=True):
        assert found["distance"] == pytest.approx(want["distance"], rel=1e-6)
        assert (found["max"], found["rms"]) == pytest.approx((want["max"], want["rms"]), rel=1e-3, abs=1e-6)
    assert [row["num"] for row in shown["final"]] == [28] * len(shown["final"])
    assert shown["final"][0]["name"] == ORIGINAL
    for row in shown["final"]:
        assert_row(row, flow, tmp_path / "out", shown["timings"])
    assert done.stdout.decode().count("samples a row") == 2  # by the first process only


# ------------------------------------------------------------------------------------------- rows by default, finalists


@pytest.mark.parametrize("model", ["fashion-p2", "digits-p1", "digits-maf"])
def test_the_default_rows_fit(model: str, tmp_path: Path) -> None:
    flow = jf.load(model)
    assert flow.report_file is not None
    report = Report.load(flow.report_file)
    rows = COMPARE._rows(report)
    assert len(set(rows)) == len(rows)
    assert rows[:2] == ["Jacobi-30", "Jacobi-60"]
    assert rows[-5:] == [*PEERS, "auto:1e-1", "auto:1e-2", "auto"]
    Comparing(flow, tmp_path / "out", (ORIGINAL, SEQUENTIAL, *rows), None, report=report)
    assert not (tmp_path / "out").exists()
    length, products = report.num_tokens, set()
    for text in COMPARE.paper_grid(report):
        stack, count, sweeps, rest = text[1:-1].split("-")
        solvers = jf.Strategy.parse(text, report).solvers
        assert {int(block) for block in stack.split("/")} == set(report.tough_blocks)
        for block, solver in enumerate(solvers):
            assert solver.guess == report.guess(block)
            if block in report.tough_blocks:
                assert solver.stopping.max_sweeps == int(sweeps)
            else:
                assert solver.stopping.max_sweeps == int(rest)
        assert rest in ("6", "8", "10", "20", "30")  # as in the paper's tables
        if int(count) == length:
            assert sweeps == "1"
        else:
            total = next(t for t in (length // 8, length // 4) if t // int(count) == int(sweeps))
            products.add(total)
    assert products == {length // 8, length // 4}


def test_the_default_rows_without_a_report() -> None:
    assert COMPARE._rows(None) == ["Jacobi-30", "Jacobi-60", *PEERS, "auto:1e-1", "auto:1e-2", "auto"]


def made_up(name: str, relative: float, rate: float, seconds: float = 1.0) -> Row:
    timing = Timing(seconds, seconds, seconds)
    return Row(name, 10, 5 * (1 + relative), relative, 0.1, 0.01, PixelDifference(0.1, 3), 0.0, timing, rate)


@pytest.mark.parametrize(
    ("rows", "want"),
    [
        ([("a", 0.0, 2), ("b", 0.005, 3), ("auto", 0.0, 4), ("auto:1e-1", 0.009, 5)], ["b", "auto:1e-1"]),
        ([("a", 0.02, 9), ("b", -0.3, 3), ("auto", 0.02, 9), ("auto:1e-1", 0.0, 1)], ["b", "auto:1e-1"]),
        ([("a", WITHIN, 2), ("b", WITHIN + 1e-9, 3)], ["a"]),
        ([("a", 0.5, 2), ("auto", 0.5, 3)], []),
        ([("a", 0.5, 2), ("auto", 0.0, 0.5)], ["auto"]),
        ([(SEQUENTIAL, 0.0, 1.2), ("a", 0.5, 2)], [SEQUENTIAL]),
        ([("automatic.json", 0.0, 9), ("a", 0.0, 2)], ["automatic.json"]),
        ([("a", math.nan, 9), ("auto", math.inf, 9)], []),
        ([], []),
    ],
)
def test_finalists(rows: list[tuple[str, float, float]], want: list[str]) -> None:
    made = [made_up(ORIGINAL, 0.0, 1.0), *(made_up(*row) for row in rows)]
    assert finalists(made) == [ORIGINAL, *want]
    assert finalists(made[::-1]) == [ORIGINAL, *want]


# ------------------------------------------------------------------------------------------------------------- picture


@pytest.mark.parametrize(
    "points",
    [
        {ORIGINAL: (0.0, 1.0)},
        {ORIGINAL: (0.0, 1.0), SEQUENTIAL: (0.0, 1.0), "auto": (0.0, 1.0)},
        {ORIGINAL: (0.0, 1.0), "[7-8-32-10]": (-0.4, 2.5), "Jacobi-30": (-1e-5, 7.0)},
        {ORIGINAL: (0.0, 1.0), "STARFlow": (900.0, 400.0), "auto:1e-1": (0.01, 0.02), "auto": (0.0101, 3.0)},
        {ORIGINAL: (0.0, 1.0), "[a]_{b}^c % & a very long name of a strategy.json": (1e-9, 1.5)},
    ],
)
def test_comparisons_are_drawn(points: dict[str, tuple[float, float]], tmp_path: Path) -> None:
    rows = [made_up(name, relative, rate) for name, (relative, rate) in points.items()]
    figure = comparison_figure(rows, "fashion-FID")
    save_png(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as read:
        assert read.width > read.height > 300
    (axis,) = figure.axes
    numbers = [str(i) for i in range(1, len(points) + 1)]
    assert [text.get_text() for text in axis.texts] == numbers
    assert [text.get_text() for text in figure.legends[0].texts] == [
        f"{i}  {name}" for i, name in zip(numbers, points, strict=True)
    ]
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    for dot, (name, (relative, rate)) in zip(dots, points.items(), strict=True):
        assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (rate, pytest.approx(100 * relative))
        assert dot.get_fillstyle() == ("full" if relative <= WITHIN else "none")
        color = COLORS[0] if name.startswith("auto") else COLORS[1] if name[0] in "[J" else COLORS[6]
        assert to_hex(dot.get_color()) == color
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    for relative, rate in points.values():
        assert left <= rate <= right and low <= 100 * relative <= high
    assert axis.get_ylabel() == "fashion-FID above the original's"


# ------------------------------------------------------------------------------------------------------ the real model


@pytest.fixture(scope="module")
def fashion(folder: Path) -> SimpleNamespace:
    """A row of fashion-p2 beside its loops."""
    line = compare_line("fashion", ["[7-4-6-10]"], "--num 4 --batch-size 4 --shard-size 4", "fashion-p2")
    result = call(folder, line)
    assert (result.code, result.err) == (0, "")
    return SimpleNamespace(shown=figures(folder / "fashion" / "comparison.json"), path=folder / "fashion")


def test_a_row_of_the_bundled_model(fashion: SimpleNamespace) -> None:
    flow = jf.load("fashion-p2")
    assert flow.report_file is not None
    plan = jf.Strategy.parse("[7-4-6-10]", Report.load(flow.report_file))  # with the report's guesses
    want = jf.sample(flow, 4, torch.arange(4), strategy=plan, certify=False, batch_size=4, progress=False)
    pixels, original = (on_disk(fashion.path / "rows" / name) for name in ("7-4-6-10", "sequential"))
    assert np.array_equal(pixels, levels(want.images))
    row = fashion.shown["rows"][2]
    assert row["name"] == "[7-4-6-10]"
    distance, base = (frechet(bundled_moments(), moments(features(p))) for p in (pixels, original))
    assert row["distance"] == pytest.approx(distance, rel=1e-6)
    assert row["relative"] == pytest.approx(distance / base - 1, abs=1e-6)
    exact = torch.from_numpy(np.load(fashion.path / "exact" / "00000000.npy"))
    assert np.array_equal(original, levels(exact))
    assert (row["max"], row["rms"]) == pytest.approx(apart(want.images, exact), rel=1e-6)
    assert row["pixels"] == differ(pixels, original)
    assert fashion.shown["timings"]["rows"][ORIGINAL]["error"] < 1e-3
    assert base < 60  # images of clothes


def test_samples_of_the_bundled_model_and_real_images(fashion: SimpleNamespace, run: Any, tmp_path: Path) -> None:
    samples = fashion.path / "rows" / "7-4-6-10"
    words = f"--samples {samples} --images fashion-512 --paired 2 --test-images 4"
    shown, _ = evaluated(run, tmp_path, f"--model fashion-p2 {words}")
    data = bundled_fashion()
    real, fake = real_features("fashion-512"), features(on_disk(samples))
    assert shown["frechet_distance"] == pytest.approx(frechet(moments(real), moments(fake)), rel=1e-6)
    assert shown["precision"] == pytest.approx(within_third_neighbours(fake, real))
    assert shown["recall"] == pytest.approx(within_third_neighbours(real, fake))
    exact = torch.from_numpy(np.load(fashion.path / "exact" / "00000000.npy"))[:2]
    assert shown["stored"]["share"] == pytest.approx(differ(on_disk(samples)[:2], levels(exact))["share"], abs=2e-3)
    images = noisy_images(data, torch.arange(4), Noise("gaussian", 0.1))
    assert data.labels is not None
    flow = jf.load("fashion-p2")
    want = -float(by_oracle(flow, images, data.labels[:4]).mean()) / 784 / math.log(2) + 7
    assert shown["bits_per_dim_noisy"] == pytest.approx(want, rel=1e-4)
    assert shown["bayes_accuracy"] >= 0.5
