"""`jf.accelerate` beside the libraries' own inverses, on trained flows: `python benchmarks/drop_in.py`.

Writes docs/results/drop-in.json. It first trains the flows, in out/drop-in, on Fashion-MNIST, digits, and the leading 8
principal components of digits, which takes a quarter of an hour on two cores and goes on where it stopped; then it
needs an otherwise idle machine and about ten minutes.
"""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows
import torch
import zuko
from torch import Tensor, nn

import jacobiflow as jf
from jacobiflow.data import ImageDataset, Noise, digits, fashion_mnist
from jacobiflow.data.noise import add_noise, keyed_generator
from jacobiflow.files import write_atomically, write_json
from jacobiflow.measuring import Timing, interleave, machine
from jacobiflow.memory import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs" / "results" / "drop-in.json"
TOLERANCE = 1e-3
ALPHA = 1e-6  # of the logit
RATE, BATCH, KEEP = 1e-3, 128, 250


def to_logits(images: Tensor) -> Tensor:
    """Images in [-1, 1) as logits of their pixels (B, D), as the MAF paper has them."""
    return torch.logit(ALPHA + (1 - 2 * ALPHA) * (images.flatten(1) + 1) / 2)


def from_logits(logits: Tensor) -> Tensor:
    """The inverse of `to_logits`: images (B, D)."""
    return (torch.sigmoid(logits) - ALPHA) / (1 - 2 * ALPHA) * 2 - 1


def logits(data: ImageDataset, index: Tensor, step: int) -> Tensor:
    """Dequantised images as logits."""
    images, _ = data.batch(index)
    return to_logits(add_noise(images, Noise("uniform"), keyed_generator(0, 0, step)))


@cache
def moments(data: ImageDataset) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each pixel's logit over the first 10,000 images."""
    first = logits(data, torch.arange(min(len(data), 10000)), 0)
    return first.mean(dim=0), first.std(dim=0)


def pixels(data: ImageDataset, index: Tensor, step: int) -> Tensor:
    """`logits`, each pixel with mean 0 and variance 1 over the images."""
    mean, std = moments(data)
    return (logits(data, index, step) - mean) / std


@cache
def _components(data: ImageDataset) -> Tensor:
    every = pixels(data, torch.arange(len(data)), 0)
    _, scale, directions = torch.linalg.svd(every, full_matrices=False)
    return every @ directions[:8].T * len(data) ** 0.5 / scale[:8]


def components(data: ImageDataset, index: Tensor, step: int) -> Tensor:
    """The leading 8 principal components of `pixels` (B, 8), each of variance 1."""
    return _components(data)[index]


def zuko_maf(features: int, hidden: int) -> nn.Module:
    """Five affine transforms."""
    return zuko.flows.MAF(features, transforms=5, hidden_features=(hidden, hidden))


def zuko_nsf(features: int, hidden: int) -> nn.Module:
    """Three spline transforms."""
    return zuko.flows.NSF(features, transforms=3, hidden_features=(hidden, hidden))


def nflows_of(transform: Callable[..., nn.Module], count: int, features: int, hidden: int) -> nn.Module:
    """A flow of the nflows library as sbi builds it, with its order reversed between transforms."""
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [transform(features, hidden), nflows.transforms.ReversePermutation(features)]
    base = nflows.distributions.StandardNormal([features])
    return nflows.flows.Flow(nflows.transforms.CompositeTransform(layers), base)


def nflows_maf(features: int, hidden: int) -> nn.Module:
    """Five affine transforms, by feed-forward networks as in sbi."""
    made = partial(nflows.transforms.MaskedAffineAutoregressiveTransform, use_residual_blocks=False)
    return nflows_of(made, 5, features, hidden)


def nflows_nsf(features: int, hidden: int) -> nn.Module:
    """Three spline transforms."""
    spline = nflows.transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
    return nflows_of(partial(spline, tails="linear", tail_bound=3.0), 3, features, hidden)


def normflows_maf(features: int, hidden: int) -> nn.Module:
    """Five masked affine transforms, whose slow side is the density."""
    flows: list[nn.Module] = []
    for _ in range(5):
        flows += [normflows.flows.MaskedAffineAutoregressive(features, hidden), normflows.flows.Permute(features)]
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(features, trainable=False), flows)


@dataclass(frozen=True)
class Case:
    """A flow, what it is trained on, and the batches that are timed."""

    name: str
    build: Callable[[int, int], nn.Module]
    data: Callable[[], ImageDataset]
    rows: Callable[[ImageDataset, Tensor, int], Tensor]
    features: int
    hidden: int
    steps: int
    batches: Sequence[int]
    repeats: int


CASES = (
    Case("zuko MAF", zuko_maf, fashion_mnist, pixels, 784, 512, 3000, (1, 64), 3),
    Case("nflows MAF", nflows_maf, fashion_mnist, pixels, 784, 512, 3000, (1, 64), 3),
    Case("zuko MAF", zuko_maf, digits, pixels, 64, 128, 1000, (1, 64, 1000), 15),
    Case("zuko NSF", zuko_nsf, digits, pixels, 64, 128, 1000, (1, 64, 1000), 15),
    Case("nflows MAF", nflows_maf, digits, pixels, 64, 128, 1000, (1, 64, 1000), 15),
    Case("nflows NSF", nflows_nsf, digits, pixels, 64, 128, 1000, (1, 64, 1000), 15),
    Case("normflows MAF (density)", normflows_maf, digits, pixels, 64, 128, 1000, (1, 64, 1000), 15),
    Case("zuko MAF", zuko_maf, digits, components, 8, 50, 1000, (1, 64, 1000), 60),
    Case("zuko NSF", zuko_nsf, digits, components, 8, 50, 1000, (1, 64, 1000), 60),
    Case("nflows MAF", nflows_maf, digits, components, 8, 50, 1000, (1, 64, 1000), 60),
    Case("nflows NSF", nflows_nsf, digits, components, 8, 50, 1000, (1, 64, 1000), 60),
)


def loss(flow: nn.Module, x: Tensor) -> Tensor:
    """The mean negative log-density of rows, in nats."""
    if isinstance(flow, zuko.flows.Flow):
        return -flow().log_prob(x).mean()
    return -flow.log_prob(x).mean()  # type: ignore[operator]


def trained(case: Case, folder: Path) -> nn.Module:
    """The flow, trained by Adam at a rate that falls by a cosine; goes on from what `folder` holds."""
    torch.manual_seed(0)
    flow, data = case.build(case.features, case.hidden), case.data()
    optimizer = torch.optim.Adam(flow.parameters(), RATE)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, case.steps)
    path = folder / f"{case.name.split(' (')[0].replace(' ', '-').lower()}-{case.features}.pt"
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        flow.load_state_dict(state["flow"])
        optimizer.load_state_dict(state["optimizer"])
        falling.load_state_dict(state["falling"])
        start = state["step"]
    if start < case.steps and "normflows" in case.name:
        jf.accelerate(flow)  # its density is the slow side, so training is too
    for step in range(start, case.steps):
        index = torch.randint(len(data), (BATCH,), generator=keyed_generator(0, 1, step))
        optimizer.zero_grad(set_to_none=True)
        value = loss(flow, case.rows(data, index, step))
        value.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        falling.step()
        if (step + 1) % KEEP == 0 or step + 1 == case.steps:
            state = {"flow": flow.state_dict(), "optimizer": optimizer.state_dict(), "falling": falling.state_dict()}
            file = io.BytesIO()
            torch.save(state | {"step": step + 1}, file)
            write_atomically(path, file.getvalue())
            print(f"{path.name}: step {step + 1}/{case.steps}, {value.item():.2f} nats", file=sys.stderr)
    fresh = case.build(case.features, case.hidden)
    fresh.load_state_dict(flow.state_dict())
    return fresh.eval().requires_grad_(False)


def to_latents(flow: Any, x: Tensor) -> Tensor:
    """The parallel side of a zuko or nflows flow."""
    if isinstance(flow, zuko.flows.Flow):
        return flow().transform(x)
    return flow.transform_to_noise(x)


def from_latents(flow: Any, z: Tensor) -> Tensor:
    """The inverse of `to_latents`: the slow side."""
    if isinstance(flow, zuko.flows.Flow):
        return flow().transform.inv(z)
    return flow._transform.inverse(z)[0]


def slow_side(flow: nn.Module, case: Case, batch: int) -> Callable[[], Tensor]:
    """The inverse of all transforms: of standard normal latents, or of images where that is the slow side."""
    if isinstance(flow, normflows.NormalizingFlow):
        data = case.data()
        return partial(flow.inverse, case.rows(data, torch.arange(batch) % len(data), 0))
    return partial(from_latents, flow, torch.randn(batch, case.features, generator=keyed_generator(0, 2, batch)))


def measured(case: Case, flow: nn.Module, batch: int) -> dict[str, Any]:
    """Seconds of the library, and of copies accelerated to identical bits and to the tolerance, in turn in one run."""
    copies = {name: copy.deepcopy(flow) for name in ("identical bits", "tolerance")}
    done = {
        name: jf.accelerate(copies[name], tolerance) for name, tolerance in zip(copies, (0.0, TOLERANCE), strict=True)
    }
    runs = {name: slow_side(each, case, batch) for name, each in {"library": flow, **copies}.items()}
    with torch.no_grad():
        seconds, answers = interleave(runs, case.repeats)
    exact = answers["library"]
    error = (answers["tolerance"] - exact).abs()
    return {
        "flow": case.name, "features": case.features, "batch": batch,
        "seconds": {name: vars(timing) for name, timing in seconds.items()},
        "ratio": {name: _ratio(seconds, name) for name in ("identical bits", "tolerance")},
        "passes": {name: list(found.passes.values()) for name, found in done.items()},
        "library_passes": case.features * len(done["tolerance"].transforms),
        "identical": torch.equal(answers["identical bits"].view(torch.int32), exact.view(torch.int32)),
        "max_error": float(error.max()), "mean_error": float(error.mean()),
    }  # fmt: skip


def _ratio(seconds: dict[str, Timing], name: str) -> float:
    return seconds["library"].median / seconds[name].median


def main() -> None:
    """Train, measure, write."""
    folder = ROOT / "out" / "drop-in"
    folder.mkdir(parents=True, exist_ok=True)
    flows = [(case, trained(case, folder)) for case in CASES]
    rows = []
    for case, flow in flows:
        for batch in case.batches:
            rows.append(measured(case, flow, batch))
            print(f"{case.name} {case.features} {batch}: {rows[-1]['ratio']}", file=sys.stderr)
    versions = {library: version(library) for library in ("zuko", "nflows", "normflows")}
    write_json(RESULT, {"command": "python benchmarks/drop_in.py", "machine": machine(), "versions": versions,
                        "tolerance": TOLERANCE, "rows": rows})  # fmt: skip


if __name__ == "__main__":
    keep_freed_memory()  # for all that is compared
    main()
