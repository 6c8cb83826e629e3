"""The features that distances are taken between: Fashion-MNIST's and Inception's."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

from jacobiflow.data import DataError, bundled_emoji, bundled_fashion
from jacobiflow.evaluation import (
    ConvolutionalFeatures,
    InceptionFeatures,
    Statistics,
    extract,
    frechet_distance,
    kernel_distance,
    load_features,
    precision_recall,
)

pytest.importorskip("torch_fidelity")
from torch_fidelity import feature_extractor_inceptionv3 as inception_module
from torchmetrics.image.fid import FrechetInceptionDistance

pytestmark = pytest.mark.usefixtures("one_thread")

RESULT = Path(__file__).resolve().parents[2] / "docs" / "results" / "fashion-features.json"
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"


class FID(FrechetInceptionDistance):
    """States as buffers, as the original TarFlow code has them."""

    def add_state(self, name: str, default: Any, *args: Any, **kwargs: Any) -> None:
        self.register_buffer(name, default)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 95 MB: an Inception network's weights, drawn so that activations keep their size."""

    class Random(inception_module.FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *args: Any, **kwargs: Any) -> None: ...

    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr(inception_module, "load_state_dict_from_url", lambda *_, **__: {})
        drawn = Random("inception-v3-compat", ["2048"])
        for module in drawn.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(drawn.state_dict(), path)
    return path


def test_features_are_fixed_and_the_original_code_s_statistics_of_them_are_read(tmp_path: Path) -> None:
    network, data = ConvolutionalFeatures.bundled("fashion"), bundled_fashion()
    images = data.images[:60]
    found = network(images)
    assert (found.shape, found.dtype) == ((60, 64), torch.float32)
    assert (found >= 0).all() and found.any(dim=1).all()
    assert not any(p.requires_grad for p in network.parameters())
    metric = FID(network).train()  # in training mode, a batch would change the network
    metric.update(images, real=True)
    metric.update(data.images[60:90], real=False)
    assert torch.equal(network(images), found)
    torch.testing.assert_close(torch.cat([network(part) for part in images.split(7)]), found)
    with torch.inference_mode():
        assert (network.output(network(data.images)).argmax(dim=1) == data.labels).double().mean() >= 0.92
    for wrong in (torch.zeros(2, 1, 28, 28), torch.zeros(2, 3, 28, 28, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"of shape .*; fashion features take torch\.uint8 of shape \(N, 1, 28"):
            network(wrong)
    figures = json.loads(RESULT.read_text())
    assert figures["parameters"] == sum(p.numel() for p in network.parameters())
    assert figures["features"] == network.num_features
    torch.save(metric.state_dict(), tmp_path / "fid_stats.pth")  # as the original code does
    statistics = Statistics.load(tmp_path / "fid_stats.pth")
    assert statistics.num == 60
    assert torch.equal(statistics.sum, metric.real_features_sum)
    assert torch.equal(statistics.outer, metric.real_features_cov_sum)


def test_an_emoji_is_recognised_in_its_mirror_image() -> None:
    network, images = ConvolutionalFeatures.bundled("emoji"), bundled_emoji().images[::2]
    found, mirrored = extract(network, [images]), extract(network, [images.flip(-1)])
    assert (torch.cdist(mirrored, found).argmin(dim=1) == torch.arange(len(images))).double().mean() > 0.9
    with pytest.raises(ValueError, match=r"emoji features take torch\.uint8 of shape \(N, 3, 32, 32\)"):
        network(images[:, :1])
    with pytest.raises(ValueError, match="kind='cats': give"):
        ConvolutionalFeatures("cats")


def test_extract_keeps_the_order_and_counts() -> None:
    class Pixels(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :3] + 0 * self.weight

    network, counts = Pixels(1, 1, bias=False), list[int]()
    images = torch.arange(84, dtype=torch.uint8).view(21, 1, 2, 2)
    found = extract(network, iter(images.split([7, 10, 1, 3])), counts.append, batch_size=4)
    assert torch.equal(found, images.flatten(1)[:, :3].float())
    assert not found.requires_grad
    assert counts == [4, 3, 4, 4, 2, 1, 3]
    with pytest.raises(DataError, match="features of no images"):
        extract(network, [])


def test_the_original_code_reads_statistics_with_inception(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inception = load_features("inception", weights)
    assert isinstance(inception, InceptionFeatures)
    zeros = {name: torch.zeros_like(value) for name, value in inception.network.state_dict().items()}
    monkeypatch.setattr(inception_module, "load_state_dict_from_url", lambda *_, **__: zeros)
    metric = FID(feature=2048, normalize=True)
    x = torch.randn(3, 2048, generator=torch.Generator().manual_seed(0)).double()
    path = weights.with_name("fid_stats.pth")
    Statistics.of(x).save(path, inception)
    metric.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert (int(metric.real_features_num_samples), int(metric.fake_features_num_samples)) == (3, 0)
    torch.testing.assert_close(metric.real_features_sum, x.sum(dim=0))
    torch.testing.assert_close(metric.real_features_cov_sum, x.T @ x)
    assert not metric.fake_features_sum.any() and not metric.fake_features_cov_sum.any()
    assert Statistics.load(path).num == 3

    colour = torch.randint(0, 256, (2, 3, 40, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = inception.train()(colour)  # it is not trained for all that
    assert found.shape == (2, 2048)
    assert (found[0] - found[1]).abs().mean() > 1e-3
    assert torch.equal(found, metric.inception(colour))
    grey = colour[:1, :1]
    torch.testing.assert_close(inception(grey), inception(grey.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match=r"uint8 of shape \(1, 2, 40, 32\); Inception takes torch\.uint8 of shape"):
        inception(colour[:1, :2])


def test_without_weights_and_network_the_remedies_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="kind='clip': give 'fashion', 'emoji' or 'inception'"):
        load_features("clip")  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(inception_module, "load_state_dict_from_url", Mock(side_effect=URLError("no network")))
        with pytest.raises(DataError, match=f"failed .no network.; give the file {INCEPTION}.*, or use features whose"):
            load_features("inception")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / INCEPTION
    path.parent.mkdir(parents=True)
    path.write_bytes(b"<html>no weights</html>")
    with pytest.raises(DataError, match=f"^{path}: not Inception's weights .*; remove it"):
        load_features("inception")
    with pytest.raises(DataError, match=f"^{tmp_path}/gone: cannot be read.*give {INCEPTION}"):
        InceptionFeatures(tmp_path / "gone")
    torch.save({"conv": torch.zeros(2)}, path)
    with pytest.raises(DataError, match=f"^{path}: weights of another network.*give {INCEPTION}"):
        InceptionFeatures(path)


def test_weights_that_are_not_finite_are_refused(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights)
    state["Conv2d_1a_3x3.conv.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(DataError, match=r"nan\.pth: Conv2d_1a_3x3\.conv\.weight has non-finite values; give"):
        InceptionFeatures(tmp_path / "nan.pth")


@pytest.mark.parametrize("save", [torch.save, lambda code, path: path.write_bytes(pickle.dumps(code, protocol=2))])
@pytest.mark.parametrize("read", [Statistics.load, InceptionFeatures])
def test_code_in_a_file_is_not_run(read: Callable[[Path], Any], save: Any, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "stats.pth"

    class RunsCode:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (mark,)

    save({"real_features_sum": RunsCode()}, path)
    with pytest.raises(DataError, match=str(path)):
        read(path)
    assert not mark.exists()


def test_without_torchmetrics_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    found = extract(load_features("fashion"), [bundled_fashion().images[:9]])  # needs neither
    bundled = Statistics.bundled("fashion")
    for call in (
        InceptionFeatures, partial(Statistics.of, found), partial(frechet_distance, bundled, bundled),
        partial(kernel_distance, found, found), partial(precision_recall, found, found),
    ):  # fmt: skip
        with pytest.raises(DataError, match=r"needs torchmetrics and torch-fidelity; pip install 'jacobiflow\[eval\]'"):
            call()
