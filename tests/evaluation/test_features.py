"""Features of images: Inception's, and those of functions from a file."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.error import URLError

import pytest
import torch

from jacobiflow.data import DataError
from jacobiflow.evaluation import FeatureStatistics, InceptionFeatures, extract_features, load_features
from tests.helpers.stand_ins import write_inception

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(find_spec("torchmetrics") is None, reason="needs jacobiflow[eval]"),
]

WEIGHTS, DOWNLOAD = "weights-inception-2015-12-05-6726825d.pth", "load_state_dict_from_url"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    write_inception(path)
    return path


def test_the_original_code_reads_statistics_with_inception(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class FID(FrechetInceptionDistance):  # type: ignore[misc]
        """Keeps states as buffers, like the original TarFlow code."""

        def add_state(self, name: str, default: Any, *args: Any, **kwargs: Any) -> None:
            self.register_buffer(name, default)

    inception = load_features("inception", weights)
    assert isinstance(inception, InceptionFeatures)
    zeros = {name: torch.zeros_like(value) for name, value in inception.network.state_dict().items()}
    monkeypatch.setattr(f"torch_fidelity.feature_extractor_inceptionv3.{DOWNLOAD}", lambda *_, **__: zeros)
    metric = FID(feature=2048, normalize=True)
    x = torch.randn(3, 2048, generator=torch.Generator().manual_seed(0)).double()
    path = weights.with_name("fid_stats.pth")
    FeatureStatistics.from_features(x).save(path, inception)
    metric.load_state_dict(torch.load(path, weights_only=True), strict=True)
    torch.testing.assert_close(metric.real_features_cov_sum, x.T @ x)
    torch.save(metric.state_dict(), path)
    torch.testing.assert_close(FeatureStatistics.load(path).covariance(), torch.cov(x.T))

    grey = torch.randint(0, 256, (1, 1, 40, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = inception.train()(grey)  # it stays in evaluation mode
    assert features.shape == (1, 2048)
    assert features.std() > 1e-3
    assert torch.equal(features, metric.inception(grey.repeat(1, 3, 1, 1)))


def test_missing_and_broken_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail = Mock(side_effect=URLError("no network"))
    monkeypatch.setattr(f"torch_fidelity.feature_extractor_inceptionv3.{DOWNLOAD}", fail)
    with pytest.raises(DataError, match=r"the download failed \(no network\); give a file, features of your own, or"):
        load_features("inception")
    path = tmp_path / "weights.pth"
    with pytest.raises(DataError, match=f"^{path}: no file of tensors .*No such file.*; give {WEIGHTS}"):
        InceptionFeatures(path)
    torch.save({"conv": torch.zeros(2)}, path)
    with pytest.raises(DataError, match=f"^{path}: weights of another network.*give {WEIGHTS}"):
        InceptionFeatures(path)


@pytest.mark.parametrize("read", [FeatureStatistics.load, InceptionFeatures])
def test_code_in_a_file_is_not_run(read: Callable[[Path], Any], tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "stats.pth"

    class RunsCode:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (mark,)

    torch.save({"real_features_sum": RunsCode()}, path)
    with pytest.raises(DataError, match=str(path)):
        read(path)
    assert not mark.exists()


def test_a_function_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import torch\nN = 3\ndef few(images):\n    return images.flatten(1)[:, :N].double()\n")
    (tmp_path / "broken.py").write_text("def few(")
    images = torch.arange(84, dtype=torch.uint8).view(21, 1, 2, 2)
    features = extract_features(load_features(f"{file}:few"), images, batch_size=4)
    assert features.dtype == torch.float32 and torch.equal(features, images.flatten(1)[:, :3].float())
    for name, message in (
        (f"{file}:many", "mine.py:many: no function of this name in the file"),
        (f"{file}:N", "no function of this name"),
        (f"{tmp_path}/no.py:few", "give inception, or FILE.py:FUNCTION"),
        ("clip", "^clip: no such file; give inception, or FILE.py:FUNCTION"),
        (f"{tmp_path}/broken.py:few", r"broken\.py:few: the file cannot be run \(SyntaxError: .*line 1\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_features(name)


@pytest.mark.parametrize(
    "result",
    [None, "text", torch.ones(3), torch.ones(4, 2), torch.ones(3, 2, dtype=torch.int64), torch.ones(3, 2).to_sparse()],
)
def test_a_function_that_does_not_return_features_is_refused(result: Any) -> None:
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises((ValueError, TypeError), match=r"^result of the feature function=.*: give a "):
        extract_features(lambda images: result, images)
    with pytest.raises(ValueError, match=r"give a torch\.Tensor of floating-point numbers \(1, 3\)"):
        extract_features(lambda images: torch.ones(len(images), len(images) + 1), images, batch_size=2)
