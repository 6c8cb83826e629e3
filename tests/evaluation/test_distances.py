"""Distances between sets of images, against NumPy and SciPy; the features they are taken between, and their files."""

from __future__ import annotations

import io
import json
import math
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from torch import Tensor, nn

from jacobiflow.data import DataError, ImageDataset, bundled_fashion, fashion_mnist
from jacobiflow.data.dataset import FASHION_MNIST_FOLDER
from jacobiflow.evaluation import (
    FashionFeatures,
    InceptionFeatures,
    Statistics,
    extract,
    frechet_distance,
    kernel_distance,
    load_features,
    precision_recall,
)
from jacobiflow.evaluation.fashion import WEIGHTS

pytest.importorskip("torch_fidelity")
from torch_fidelity import feature_extractor_inceptionv3 as inception_module
from torchmetrics.image.fid import FrechetInceptionDistance

pytestmark = pytest.mark.usefixtures("one_thread")

needs_data_set = pytest.mark.skipif(not FASHION_MNIST_FOLDER.is_dir(), reason="needs Debian's dataset-fashion-mnist")

Array = NDArray[np.float64]

ROOT = Path(__file__).resolve().parents[2]


class FID(FrechetInceptionDistance):
    """States as buffers, as the original TarFlow code has them."""

    def add_state(self, name: str, default: Any, *args: Any, **kwargs: Any) -> None:
        self.register_buffer(name, default)


class RunsCode:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def normal(num: int, dim: int, seed: int = 0) -> Tensor:
    """Correlated features whose mean is not 0."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    return torch.randn(num, dim, generator=generator, dtype=torch.float64) @ mixing + mixing[0]


def noisy(images: Tensor, std: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + std * noise).round().clamp(0, 255).to(torch.uint8)


def blurred(images: Tensor, width: int) -> Tensor:
    return F.avg_pool2d(images.float(), width, 1, width // 2).round().to(torch.uint8)


def moments(features: Tensor) -> tuple[Array, Array]:
    x = features.double().numpy()
    return x.mean(axis=0), np.atleast_2d(np.cov(x, rowvar=False))


def frechet_by_sqrtm(real: Tensor, fake: Tensor) -> float:
    (mean_r, cov_r), (mean_f, cov_f) = moments(real), moments(fake)
    live = np.diag(cov_r) * np.diag(cov_f) > 0  # the others add nothing, and SciPy warns of a singular matrix
    root = np.trace(sqrtm(cov_r[live][:, live] @ cov_f[live][:, live]).real)
    return float(((mean_r - mean_f) ** 2).sum() + np.trace(cov_r) + np.trace(cov_f) - 2 * root)


def frechet_by_singular_values(real: Tensor, fake: Tensor) -> float:
    """tr((S S')^(1/2)) is the sum of the singular values of A B^T, where S = A^T A and S' = B^T B, of any rank."""
    (mean_r, cov_r), (mean_f, cov_f) = moments(real), moments(fake)
    a, b = ((x.double().numpy() - m) / np.sqrt(len(x) - 1) for x, m in ((real, mean_r), (fake, mean_f)))
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((mean_r - mean_f) ** 2).sum() + np.trace(cov_r) + np.trace(cov_f) - 2 * root)


def between(real: Tensor, fake: Tensor) -> float:
    return frechet_distance(Statistics.of(real), Statistics.of(fake))


def same(one: Statistics, two: Statistics) -> bool:
    return one.num == two.num and torch.equal(one.sum, two.sum) and torch.equal(one.outer, two.outer)


@pytest.fixture(scope="module")
def network() -> FashionFeatures:
    return FashionFeatures.bundled()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return bundled_fashion().images


@pytest.fixture(scope="module")
def features(network: FashionFeatures, images: Tensor) -> Tensor:
    return extract(network, [images])


@pytest.fixture(scope="module")
def weights() -> Iterator[Path]:
    """A file of 95 MB: an Inception network's weights, drawn so that activations keep their size."""

    class Random(inception_module.FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        patch.setattr(inception_module, "load_state_dict_from_url", lambda *_, **__: {})
        torch.manual_seed(0)
        drawn = Random("inception-v3-compat", ["2048"])
        for module in drawn.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        path = Path(folder) / "inception.pth"
        torch.save(drawn.state_dict(), path)
        yield path


@pytest.fixture(scope="module")
def inception(weights: Path) -> InceptionFeatures:
    return InceptionFeatures(weights)


# The Fréchet distance.


@pytest.mark.parametrize(
    ("num", "other", "dim"), [(9, 12, 1), (40, 25, 3), (300, 200, 17), (2000, 900, 64), (600, 900, 200)]
)
def test_frechet_distance_is_scipys(num: int, other: int, dim: int) -> None:
    real, fake = normal(num, dim), normal(other, dim, seed=1)
    found = between(real, fake)
    assert found == pytest.approx(frechet_by_sqrtm(real, fake), rel=1e-8)
    assert found == pytest.approx(frechet_by_singular_values(real, fake), rel=1e-8)


@pytest.mark.parametrize(
    ("num", "other", "dim"), [(2, 2, 3), (20, 15, 64), (5, 200, 32), (200, 5, 32), (40, 50, 300), (2, 400, 100)]
)
def test_frechet_distance_of_fewer_samples_than_features(num: int, other: int, dim: int) -> None:
    real, fake = normal(num, dim), normal(other, dim, seed=1)
    # Eigenvalues that are 0 but for rounding have square roots near 1e-8 of the largest's.
    assert between(real, fake) == pytest.approx(frechet_by_singular_values(real, fake), rel=1e-6)


@pytest.mark.parametrize(
    "change", [lambda x: noisy(x, 30), lambda x: blurred(x, 3), lambda x: x.flip(-2)], ids=["noise", "blur", "flip"]
)
def test_fashion_fid_of_images_is_scipys(
    change: Callable[[Tensor], Tensor], network: FashionFeatures, images: Tensor, features: Tensor
) -> None:
    fake = extract(network, [change(images[:400])])
    found = between(features, fake)
    assert found > 0.5
    assert found == pytest.approx(frechet_by_sqrtm(features, fake), rel=1e-6)
    assert found == pytest.approx(frechet_by_singular_values(features, fake), rel=1e-6)


def test_fashion_features_are_a_feature_module_of_torchmetrics(network: FashionFeatures, images: Tensor) -> None:
    fake = noisy(images[:300], 40)
    metric = FrechetInceptionDistance(feature=network)
    for part in images.split(100):
        metric.update(part, real=True)
    metric.update(fake, real=False)
    found = between(extract(network, [images]), extract(network, [fake]))
    assert found == pytest.approx(float(metric.compute()), rel=1e-5)  # which is float32


def test_a_set_is_at_no_distance_of_itself(features: Tensor) -> None:
    for one in (features, normal(300, 20), normal(20, 64)):
        assert between(one, one) == pytest.approx(0, abs=1e-5)
        assert between(one, one.flip(0)) == pytest.approx(0, abs=1e-5)


def test_distance_is_symmetric(features: Tensor) -> None:
    real, fake = features[:300], 1.5 * features[300:] + 1
    assert between(real, fake) == pytest.approx(between(fake, real), rel=1e-7)


def test_distance_of_a_translation_is_its_square(features: Tensor) -> None:
    for real in (features.double(), normal(500, 7)):
        v = torch.linspace(-2, 3, real.shape[1], dtype=torch.float64)
        assert between(real, real + v) == pytest.approx(float(v.square().sum()), rel=1e-6)


def test_distance_grows_with_noise_and_with_blur(network: FashionFeatures, images: Tensor, features: Tensor) -> None:
    for worse in ([noisy(images, std) for std in (0, 10, 30, 60)], [blurred(images, width) for width in (1, 3, 5, 7)]):
        assert torch.equal(worse[0], images)
        found = [between(features, extract(network, [fake])) for fake in worse]
        assert all(before + 1 < after for before, after in pairwise(found))


def test_sets_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(DataError, match=r"^statistics of 3 features against 4: give statistics of the same features$"):
        between(normal(9, 3), normal(9, 4))
    for real, fake in ((1, 9), (9, 1)):
        with pytest.raises(DataError, match=f"between {real} and {fake} images: give at least 2 of each$"):
            between(normal(real, 3), normal(fake, 3))


# Files of statistics.


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_and_does_not_crash(value: float) -> None:
    good, bad = normal(5, 4), normal(5, 4).fill_(value)
    huge = Statistics(5, 1e200 * torch.ones(4).double(), torch.eye(4).double())
    for pair in ((Statistics.of(good), Statistics.of(bad)), (huge, huge)):
        with pytest.raises(DataError, match="not finite"):
            frechet_distance(*pair)
    for measure in (kernel_distance, precision_recall):
        with pytest.raises(DataError, match="not finite"):
            measure(good, bad)


def test_sets_that_are_too_small_or_of_other_features_are_refused(tmp_path: Path) -> None:
    for measure, least in ((kernel_distance, 2), (precision_recall, 4)):
        measure(normal(least, 3), normal(least, 3, seed=1))
        with pytest.raises(DataError, match=f"{least} images against {least - 1}: give at least {least} of each$"):
            measure(normal(least, 3), normal(least - 1, 3))
        with pytest.raises(DataError, match="3 features against 2"):
            measure(normal(9, 3), normal(9, 2))
    with pytest.raises(DataError, match="statistics of 1 images: give at least 2"):
        Statistics.of(normal(1, 3)).save(tmp_path / "one.pth")
    with pytest.raises(DataError, match="of no images"):
        extract(FashionFeatures(), [])
    assert not list(tmp_path.iterdir())


def test_statistics_are_sums() -> None:
    x = normal(50, 5)
    found = Statistics.of(x)
    assert found.num == 50
    assert found.sum.dtype == found.outer.dtype == torch.float64
    torch.testing.assert_close(found.sum, x.sum(dim=0))
    torch.testing.assert_close(found.outer, x.T @ x)


def test_statistics_round_trip(tmp_path: Path) -> None:
    one, two = tmp_path / "one_fid_stats.pth", tmp_path / "two_fid_stats.pth"
    two.write_bytes(b"is replaced")
    statistics = Statistics.of(normal(50, 5))
    statistics.save(one)
    Statistics.load(str(one)).save(str(two))
    assert same(Statistics.load(two), statistics)
    assert one.read_bytes() == two.read_bytes()
    assert sorted(tmp_path.iterdir()) == [one, two]


@pytest.mark.parametrize("kind", [FrechetInceptionDistance, FID])
def test_a_file_that_torchmetrics_wrote_is_read(
    kind: type[FrechetInceptionDistance], network: FashionFeatures, images: Tensor, tmp_path: Path
) -> None:
    metric = kind(feature=network)
    metric.update(images[:60], real=True)
    metric.update(images[60:90], real=False)
    metric.persistent(True)
    state = metric.state_dict()
    assert {"fake_features_cov_sum", "inception.output.bias"} < set(state)
    torch.save(state, tmp_path / "fid_stats.pth")
    found = Statistics.load(tmp_path / "fid_stats.pth")
    assert found.num == 60
    assert torch.equal(found.sum, metric.real_features_sum)
    assert torch.equal(found.outer, metric.real_features_cov_sum)


def test_the_original_code_loads_a_file_with_inception(
    weights: Path, inception: InceptionFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = {name: torch.zeros_like(value) for name, value in inception.network.state_dict().items()}
    monkeypatch.setattr(inception_module, "load_state_dict_from_url", lambda *_, **__: zeros)
    metric = FID(feature=2048, normalize=True)
    statistics = Statistics.of(normal(3, 2048))
    path = weights.with_name("fid_stats.pth")
    statistics.save(path, inception)
    state = torch.load(path, map_location="cpu", weights_only=True)
    metric.load_state_dict(dict(state), strict=True)
    assert same(
        Statistics(int(metric.real_features_num_samples), metric.real_features_sum, metric.real_features_cov_sum),
        statistics,
    )
    assert int(metric.fake_features_num_samples) == 0
    assert not metric.fake_features_sum.any()
    assert not metric.fake_features_cov_sum.any()
    for name, value in torch.load(weights, weights_only=True).items():
        assert torch.equal(metric.inception.state_dict()[name], value)
    assert same(Statistics.load(path), statistics)

    bare = {name: value for name, value in state.items() if not name.startswith("inception.")}
    with pytest.raises(RuntimeError, match=r"Missing key.*inception"):
        metric.load_state_dict(bare, strict=True)


def state(**changes: Any) -> dict[str, Any]:
    entries = {"num_samples": torch.tensor(9), "sum": torch.ones(3).double(), "cov_sum": torch.eye(3).double()}
    return {f"real_features_{name}": value for name, value in (entries | changes).items() if value is not None}


def saved(value: Any) -> bytes:
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


NAN, INFINITY = torch.tensor(torch.nan), torch.tensor(torch.inf)
MEND = "give a file by jacobiflow evaluate --save-stats, or of the original's *_fid_stats.pth"
BROKEN = {
    "empty": b"",
    "text": b"no statistics\n",
    "truncated": saved(state())[:-300],
    "list": saved([torch.zeros(3)]),
    "number": saved(3),
    "other keys": saved({"mu": torch.zeros(3), "sigma": torch.eye(3)}),
    "fake only": saved({name.replace("real", "fake"): value for name, value in state().items()}),
    "no sum": saved(state(sum=None)),
    "no tensor": saved(state(sum=[1.0, 1.0, 1.0])),
    "NaN sum": saved(state(sum=NAN.expand(3).clone())),
    "infinite outer": saved(state(cov_sum=INFINITY.expand(3, 3).clone())),
    "NaN count": saved(state(num_samples=NAN)),
    "one image": saved(state(num_samples=torch.tensor(1))),
    "counts": saved(state(num_samples=torch.tensor([9, 9]))),
    "scalars": saved(state(sum=torch.tensor(1.0), cov_sum=torch.tensor(1.0))),
    "matrix sum": saved(state(sum=torch.ones(3, 3))),
    "other size": saved(state(cov_sum=torch.eye(4))),
    "no square": saved(state(cov_sum=torch.ones(3, 4))),
    "flat outer": saved(state(cov_sum=torch.ones(9))),
}


def test_the_whole_state_is_statistics(tmp_path: Path) -> None:
    (tmp_path / "stats.pth").write_bytes(saved(state()))
    assert same(Statistics.load(tmp_path / "stats.pth"), Statistics(9, torch.ones(3).double(), torch.eye(3).double()))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_of_statistics_is_named_with_the_mend(name: str, tmp_path: Path) -> None:
    path = tmp_path / "stats.pth"
    path.write_bytes(BROKEN[name])
    with pytest.raises(DataError) as caught:
        Statistics.load(path)
    assert str(caught.value).startswith((f"{path}: no statistics of FrechetInceptionDistance", f"{path}: no file of"))
    assert str(caught.value).endswith(MEND)
    assert "\n" not in str(caught.value)


def test_a_file_of_statistics_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(DataError) as caught:
            Statistics.load(path)
        assert str(caught.value).startswith(f"{path}: cannot be read (")
        assert str(caught.value).endswith(MEND)


@pytest.mark.parametrize("write", [saved, lambda value: pickle.dumps(value, protocol=2)])
@pytest.mark.parametrize("read", [Statistics.load, InceptionFeatures])
def test_code_in_a_file_is_not_run(read: Callable[[Path], Any], write: Callable[[Any], bytes], tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "stats.pth"
    path.write_bytes(write(state(sum=RunsCode(mark))))
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert not mark.exists()


def test_bundled_statistics_are_of_a_covariance() -> None:
    statistics = Statistics.bundled()
    assert statistics.num == 60_000
    assert statistics.sum.shape == (FashionFeatures.num_features,)
    mean = statistics.sum / statistics.num
    covariance = statistics.outer / statistics.num - mean.outer(mean)
    assert torch.equal(statistics.outer, statistics.outer.T)
    levels = torch.linalg.eigvalsh(covariance)
    assert levels.min() > -1e-9 * levels.max()


@needs_data_set
def test_bundled_statistics_are_of_the_training_images(network: FashionFeatures) -> None:
    statistics = Statistics.bundled()
    found = extract(network, [fashion_mnist("train").images[:2000]]).double()
    mean = statistics.sum / statistics.num
    deviation = (statistics.outer.diagonal() / statistics.num - mean**2).sqrt()
    assert ((found.mean(dim=0) - mean).abs() <= 5 * deviation / 2000**0.5 + 1e-6).all()
    torch.testing.assert_close(found.std(dim=0), deviation, rtol=0.15, atol=1e-3)
    assert 0 < frechet_distance(statistics, Statistics.of(found)) < 0.5


# Fashion features.


def accuracy(network: FashionFeatures, data: ImageDataset, num: int) -> float:
    assert data.labels is not None
    with torch.inference_mode():
        found = torch.cat([network.classify(part).argmax(dim=1) for part in data.images[:num].split(250)])
    return float((found == data.labels[:num]).double().mean())


def test_bundled_images_are_classified(network: FashionFeatures) -> None:
    assert accuracy(network, bundled_fashion(), 512) >= 0.92


@needs_data_set
def test_test_images_are_classified(network: FashionFeatures) -> None:
    assert accuracy(network, fashion_mnist("test"), 2000) >= 0.92


def test_bundled_weights_are_those_of_the_figures(network: FashionFeatures) -> None:
    path = ROOT / "src" / "jacobiflow" / "evaluation" / WEIGHTS
    figures = json.loads((ROOT / "docs" / "results" / "fashion-features.json").read_text())
    assert figures["bytes"] == path.stat().st_size < 2_000_000
    assert figures["parameters"] == sum(p.numel() for p in network.parameters())
    assert figures["features"] == network.num_features
    assert figures["test_accuracy"] >= 0.92


def test_a_metric_in_training_mode_does_not_change_its_measure(network: FashionFeatures, images: Tensor) -> None:
    before = network(images[:9])
    metric = FrechetInceptionDistance(network).train()
    metric.update(images, real=True)
    assert not any(module.training for module in network.modules())
    assert torch.equal(network(images[:9]), before)


def test_fashion_features_are_the_same_each_time(network: FashionFeatures, images: Tensor) -> None:
    found = network(images[:60])
    assert found.shape == (60, 64)
    assert found.dtype == torch.float32
    assert (found >= 0).all()
    assert found.any(dim=1).all()
    assert not found.requires_grad
    assert not any(p.requires_grad for p in network.parameters())
    assert not any(module.training for module in network.modules())
    assert torch.equal(network(images[:60]), found)
    assert torch.equal(FashionFeatures.bundled()(images[:60]), found)
    torch.testing.assert_close(torch.cat([network(part) for part in images[:60].split(7)]), found)
    assert network.classify(images[:60]).shape == (60, 10)
    assert network(images[:0]).shape == (0, 64)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 1, 28, 28),
        torch.zeros(2, 1, 28, 28, dtype=torch.int64),
        torch.zeros(2, 3, 28, 28, dtype=torch.uint8),
        torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 28, 28, dtype=torch.uint8),
    ],
)
def test_fashion_features_refuse_other_images(wrong: Tensor, network: FashionFeatures) -> None:
    with pytest.raises(ValueError, match=r"fashion features take torch\.uint8 of shape") as caught:
        network(wrong)
    assert f"{wrong.dtype} of shape {tuple(wrong.shape)}" in str(caught.value)


# Inception's features.


def test_inception_features_are_torchmetrics(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state_dict = torch.load(weights, weights_only=True)
    monkeypatch.setattr(inception_module, "load_state_dict_from_url", lambda *_, **__: state_dict)
    theirs = FrechetInceptionDistance(feature=2048).inception
    ours = load_features("inception", weights)
    ours.train()  # it is not trained for all that
    colour = torch.randint(0, 256, (2, 3, 40, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = ours(colour)
    assert found.shape == (2, 2048)
    assert not found.requires_grad
    assert (found[0] - found[1]).abs().mean() > 1e-3
    assert torch.equal(found, theirs(colour))


def test_inception_takes_grey_as_three_equal_channels(inception: InceptionFeatures, images: Tensor) -> None:
    found = inception(images[:2])
    torch.testing.assert_close(inception(images[:2].repeat(1, 3, 1, 1)), found)
    torch.testing.assert_close(extract(inception, [images[:2]]), found)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 2, 28, 28, dtype=torch.uint8),
        torch.zeros(2, 4, 28, 28, dtype=torch.uint8),
        torch.zeros(2, 3, 28, 28),
        torch.zeros(3, 28, 28, dtype=torch.uint8),
    ],
)
def test_inception_refuses_other_images(wrong: Tensor, inception: InceptionFeatures) -> None:
    with pytest.raises(ValueError, match=r"Inception takes torch\.uint8 of shape") as caught:
        inception(wrong)
    assert f"{wrong.dtype} of shape {tuple(wrong.shape)}" in str(caught.value)


INCEPTION = "weights-inception-2015-12-05-6726825d.pth"


def test_without_weights_and_network_the_mends_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(inception_module, "load_state_dict_from_url", no_network)
    with pytest.raises(DataError) as caught:
        load_features("inception")
    for text in ("no network", INCEPTION, "--inception", "--features fashion"):
        assert text in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"<html>no weights</html>", saved({"conv": torch.zeros(2)})], ids=len)
def test_a_broken_file_in_the_hub_folder_is_named(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / INCEPTION
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_features("inception")
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "cannot be read"),
        (b"", "no file of tensors"),
        (b"no weights\n", "no file of tensors"),
        (saved(state())[:-300], "no file of tensors"),
        (saved(FashionFeatures().state_dict()), "weights of another network"),
        (saved(state()), "weights of another network"),
        (saved([1]), "weights of another network"),
        (saved({1: torch.zeros(2)}), "weights of another network"),
    ],
)
def test_a_file_that_is_not_inceptions_is_named(data: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        InceptionFeatures(path)
    assert str(caught.value).startswith(f"{path}: {reason}")
    assert f"give {INCEPTION}" in str(caught.value)


@pytest.mark.parametrize("missing", ["torchmetrics", "torch_fidelity"])
def test_without_torchmetrics_the_extra_is_named(
    missing: str, weights: Path, monkeypatch: pytest.MonkeyPatch, network: FashionFeatures, images: Tensor
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    found = extract(load_features("fashion"), [images[:9]])  # needs neither
    bundled = Statistics.bundled()
    calls: list[Callable[[], Any]] = [
        lambda: InceptionFeatures(weights), lambda: Statistics.of(found), lambda: frechet_distance(bundled, bundled),
        lambda: kernel_distance(found, found), lambda: precision_recall(found, found),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(DataError, match=r"needs torchmetrics and torch-fidelity; pip install 'jacobiflow\[eval\]'"):
            call()


# The kernel distance.


def unbiased_mmd(real: Tensor, fake: Tensor) -> float:
    """That of the kernel (x . y / d + 1)^3, a mean over pairs of different elements."""
    x, y = real.double().numpy(), fake.double().numpy()

    def kernel(a: Array, b: Array) -> Array:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Array) -> float:
        return float(kernel(a, a)[~np.eye(len(a), dtype=bool)].mean())

    return within(x) + within(y) - 2 * float(kernel(x, y).mean())


@pytest.mark.parametrize(("num", "dim"), [(2, 3), (30, 1), (200, 64)])
def test_kernel_distance_of_whole_sets_is_numpys(num: int, dim: int) -> None:
    real, fake = normal(num, dim), normal(num, dim, seed=1)
    mean, std = kernel_distance(real, fake)
    assert mean == pytest.approx(unbiased_mmd(real, fake), rel=1e-9)
    assert std == pytest.approx(0, abs=1e-9 * abs(mean))


@pytest.mark.parametrize(("num", "other", "dim"), [(90, 50, 4), (50, 90, 4), (1100, 1300, 4)])
def test_kernel_distance_of_subsets_is_that_of_the_sets_in_the_mean(num: int, other: int, dim: int) -> None:
    real, fake = normal(num, dim), normal(other, dim, seed=1)
    mean, std = kernel_distance(real, fake)
    assert std > 0
    assert mean == pytest.approx(unbiased_mmd(real, fake), abs=5 * std / 100**0.5)
    assert kernel_distance(real, fake, seed=1) != (mean, std)


def test_kernel_distance_tells_sets_apart(network: FashionFeatures, images: Tensor, features: Tensor) -> None:
    one, two = features[::2], features[1::2]
    worse = [kernel_distance(one, extract(network, [noisy(images[1::2], std)]))[0] for std in (20, 40)]
    assert abs(kernel_distance(one, two)[0]) < 0.1 * worse[0]
    assert 0 < worse[0] < worse[1]


def test_kernel_distance_follows_its_seed_and_no_other(features: Tensor) -> None:
    one, two = features[:300], features[300:]
    before = torch.get_rng_state()
    found = kernel_distance(one, two, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert kernel_distance(one, two, seed=3) == found


# Precision and recall.


def covered(centres: Tensor, points: Tensor) -> float:
    """Share of points that are no farther from some centre than its third nearest other centre is."""
    c, p = centres.double().numpy(), points.double().numpy()
    hit = np.zeros(len(p), dtype=bool)
    for i, centre in enumerate(c):
        others = np.sort(np.linalg.norm(np.delete(c, i, axis=0) - centre, axis=1))
        hit |= np.linalg.norm(p - centre, axis=1) <= others[2]
    return float(hit.mean())


@pytest.mark.parametrize(("num", "other", "dim"), [(4, 4, 2), (60, 90, 2), (300, 120, 5), (50, 300, 64)])
def test_precision_and_recall_are_numpys(num: int, other: int, dim: int) -> None:
    real, fake = normal(num, dim), normal(other, dim, seed=1)
    assert precision_recall(real, fake) == pytest.approx((covered(real, fake), covered(fake, real)), abs=1e-6)


def test_precision_and_recall_of_images_are_numpys(network: FashionFeatures, images: Tensor, features: Tensor) -> None:
    fake = extract(network, [noisy(images[:200], 20)])
    found = precision_recall(features, fake)
    assert found == pytest.approx((covered(features, fake), covered(fake, features)), abs=1e-6)
    assert all(0.05 < share < 0.95 for share in found)


def test_precision_and_recall_of_a_set_with_itself_are_one(features: Tensor) -> None:
    assert precision_recall(features, features) == (1, 1)
    assert precision_recall(features, features + 1000) == (0, 0)


def test_precision_is_of_the_fake_and_recall_of_the_real() -> None:
    whole = normal(400, 3)
    part = whole[whole[:, 0] > whole[:, 0].quantile(0.8)]
    precision, recall = precision_recall(real=whole, fake=part)
    assert precision == 1
    assert recall < 0.4
    assert precision_recall(real=part, fake=whole) == (recall, precision)


# Extraction.


class Recorder(nn.Module):
    """Gives three pixels of an image, and notes how many images it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        return self.scale * images.flatten(1)[:, :3]


def test_extract_keeps_the_order_and_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (21, 1, 2, 2), generator=generator, dtype=torch.uint8)
    recorder, heard = Recorder(), list[int]()
    found = extract(recorder, iter(images.split([7, 10, 1, 3])), heard.append, batch_size=4)
    assert torch.equal(found, images.flatten(1)[:, :3].float())
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert heard == recorder.seen == [4, 3, 4, 4, 2, 1, 3]
    assert torch.equal(extract(Recorder(), [images]), found)


def test_extract_does_not_depend_on_the_batches(network: FashionFeatures, images: Tensor, features: Tensor) -> None:
    heard: list[int] = []
    found = extract(network, images.split(100), heard.append, batch_size=64)
    torch.testing.assert_close(found, features)
    assert sum(heard) == len(images)
    assert max(heard) == 64
