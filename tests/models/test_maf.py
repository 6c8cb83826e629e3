"""MAF: masks, cache, pixels and initialisation, against an oracle in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import jacobiflow as jf
from jacobiflow.data import digits
from jacobiflow.training import TrainingConfig, TrainMetrics, read_metrics, train
from jacobiflow.training.checkpoint import last_step
from tests.helpers.oracle import MAFOracle
from tests.helpers.problems import latents, make_maf
from tests.helpers.running import run_line
from tests.helpers.training_runs import interrupt_at

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = make_maf().config
SHAPES: dict[str, dict[str, int]] = {
    "plain": {},
    "colour": {"in_channels": 3, "image_size": 2, "hidden_features": 33, "hidden_layers": 3},
    "one layer, few units": {"hidden_features": 7, "hidden_layers": 1, "num_blocks": 3, "num_classes": 0},
    "one token": {"image_size": 1},
}


def images_of(num: int) -> Tensor:
    return torch.rand((num, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


@given(st.data())
def test_a_run_after_its_prefix_is_the_full_pass_of_the_oracle(data: st.DataObject) -> None:
    flow = make_maf(**SHAPES[data.draw(st.sampled_from(sorted(SHAPES)))])
    i, length = data.draw(st.integers(0, 1)), flow.config.num_tokens
    labels = torch.tensor([2, -1, 0, 1]) if flow.config.num_classes else None  # every class, and a row without one
    block, x, wrong, reference = flow.blocks[i], latents(flow, 4), latents(flow, 4, seed=1), MAFOracle(flow)
    masked = reference.weights[f"blocks.{i}.layers.{flow.config.hidden_layers}.weight"]
    assert all(map(torch.equal, block.output_weights(), (masked[0::2], masked[1::2])))
    copy, full = x.clone(), reference.parameters(i, x, labels)
    for have, want in zip(block(x, labels), full, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=1e-12)
    stops = sorted({*data.draw(st.lists(st.integers(1, length), max_size=6)), length})
    cache = block.init_cache(x, jf.Context(labels))
    for start, stop in zip([0, *stops[:-1]], stops, strict=True):
        if data.draw(st.booleans()):  # what a run was swept with before is written over
            block.affine(torch.cat((x[:, : max(start - 1, 0)], wrong[:, max(start - 1, 0) :]), 1), start, stop, cache)
        for have, want in zip(block.affine(x, start, stop, cache), full, strict=True):
            torch.testing.assert_close(have, want[:, start:stop], rtol=0, atol=1e-12)
    assert torch.equal(x, copy)


def test_the_ends_of_the_range_have_logits_in_float32() -> None:
    ends = torch.tensor([-1.0, 1.0, 1 - 2**-23, 0.0]).repeat(4).view(1, 1, 4, 4)
    flow = jf.MAF(TINY)
    tokens = flow.to_tokens(ends)
    exact = torch.tensor([1e-6, 1 - 1e-6], dtype=torch.float64).logit()
    torch.testing.assert_close(tokens[0, :2, 0].double(), exact, rtol=1e-6, atol=0)
    assert torch.isfinite(flow.tokens_log_det(tokens)).all()
    torch.testing.assert_close(flow.from_tokens(tokens), ends, rtol=0, atol=1e-6)


def test_pixels_out_of_range_are_named() -> None:
    for value in (1.01, -1.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"image value {value:.7g}: a MAF takes images in \[-1, 1\]"):
            jf.MAF(TINY).encode(torch.tensor([0.0] * 30 + [value, 0.0]).view(2, 1, 4, 4))


def test_the_first_batch_normalises_every_block() -> None:
    flow, images, labels = jf.MAF(TINY).double(), images_of(32), torch.arange(32) % 4 - 1
    assert torch.equal(flow.encode(images, labels)[0], flow.to_tokens(images))  # a fresh flow changes nothing
    flow.load_state_dict(make_maf().state_dict())  # scales that depend on the image
    flow.initialize(images, labels)
    x = flow.to_tokens(images)
    for block in flow.blocks:
        x = block.permutation(x)
        log_scale, shift = block(x, labels)
        x = (x - shift) * torch.exp(-log_scale)
        assert x.mean(dim=0).abs().max() < 1e-10
        assert (x.std(dim=0, correction=0) - 1).abs().max() < 1e-10
        x = block.permutation(x)


def test_a_constant_pixel_keeps_its_scale() -> None:
    flow, images = jf.MAF(TINY), images_of(8).float()
    images[:, :, 0, 1] = 0.3
    for batch in (images, images[:1]):  # of one image all are constant
        flow.initialize(batch)
        log_scale, _ = flow.blocks[0](flow.to_tokens(batch))
        assert torch.isfinite(flow.log_prob(batch)).all()
        assert torch.equal(log_scale[:, 1], torch.zeros_like(log_scale[:, 1]))


def test_training_takes_in_the_first_batch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that stops while it does, or after it, ends with the bytes of one that is left alone."""
    data, config = digits(), jf.MAFConfig(1, 8, hidden_features=24, num_blocks=2, num_classes=10)
    settings = TrainingConfig(steps=6, batch_size=8, warmup=4, bf16=False)

    def fit(out: str, on_step: Callable[[TrainMetrics], None] | None = None) -> bytes:
        torch.manual_seed(3)
        train(jf.MAF(config), data, settings, tmp_path / out, on_step=on_step)
        return (tmp_path / out / "model.safetensors").read_bytes()

    def interrupted(self: jf.MAF, *_: Any) -> None:
        self.blocks[0].layers[-1].bias.data.fill_(1.0)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(jf.MAF, "initialize", interrupted)
        fit("cut")
    with pytest.raises(KeyboardInterrupt):
        fit("cut", interrupt_at(1))
    assert last_step(tmp_path / "cut") == 2
    assert fit("cut") == fit("whole")


def test_train_writes_a_maf_and_refuses_options_that_it_has_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "train --flow maf --images digits --image-size 8 --width 24 --blocks 3 --batch-size 16 --steps 1"
    out = run_line(f"{line} --out {tmp_path}/model", capsys)
    assert out.code == 0, out.err
    assert jf.load(tmp_path / "model").config == jf.MAFConfig(1, 8, 24, 3, 2, num_classes=10)
    assert read_metrics(tmp_path / "model")[-1].step > 0
    for option, words in {"--patch-size 2": "not an option of --flow maf", "--flow glow": "give one of maf, "}.items():
        out = run_line(f"{line} {option} --out {tmp_path}/run", capsys)
        assert out.code == 2 and f"{option}: {words}" in out.err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("is_inverse", [False, True])
def test_gradients_are_those_of_the_oracle(is_inverse: bool) -> None:
    flow = jf.load("digits-maf").requires_grad_()
    reference, (images, labels) = MAFOracle(flow), digits().batch(torch.arange(3))
    for value in reference.state.values():
        value.requires_grad_()
    inputs = latents(flow, 3).float() if is_inverse else 0.9 * images
    answers = []
    for model, x in ((reference, inputs.double()), (flow, inputs.clone())):
        x.requires_grad_()
        if not is_inverse:
            z, log_det = model.encode(x, labels)
            loss = z.square().mean() - log_det.mean()
        else:
            out = reference.decode(x, labels) if model is reference else jf.decode(flow, x, labels)
            loss = (out - images).square().mean()
        names = [name for name, _ in flow.named_parameters()]
        weights = [reference.state[name] for name in names] if model is reference else [*flow.parameters()]
        answers.append(torch.autograd.grad(loss, [x, *weights]))
    for expected, result in zip(*answers, strict=True):
        assert (expected - result).abs().max() <= 1e-4 * expected.abs().max()


def test_weights_that_are_not_finite_leave_no_density() -> None:
    flow, x = jf.load("digits-maf"), torch.zeros(3, 64, 1)
    with torch.no_grad():
        flow.blocks[0].layers[0].weight[0, 0] = math.inf
    for result in (flow.blocks[0].encode(x), flow.blocks[0].sequential_inverse(x)):
        assert all(part.isnan().all() for part in result)


def test_second_derivatives_of_the_density(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, answers = jf.load("digits-maf").requires_grad_(), []
    images, labels = digits().batch(torch.arange(2))
    for native in ("0", "1"):
        monkeypatch.setenv("JACOBIFLOW_NATIVE", native)
        x = (0.9 * images).requires_grad_()
        (score,) = torch.autograd.grad(flow.log_prob(x, labels).sum(), x, create_graph=True)
        answers.append(torch.autograd.grad(score.square().sum(), [x, *flow.parameters()]))
    for expected, result in zip(*answers, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    log_prob = flow.log_prob(x, labels).sum()
    with torch.no_grad():
        flow.blocks[0].layers[0].weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="weights have changed since the forward pass"):
        torch.autograd.grad(log_prob, x, create_graph=True)
