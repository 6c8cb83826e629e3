"""MAF: masks, cache, solvers, training and files, against an oracle that shares no code with the library.

The oracle has masks written entry by entry from the definition of the degrees, no cache, and float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Guide
from problems import REACHED, Ledger
from running import figures, put, run_line
from safetensors.torch import load_file, save_file
from torch import Tensor

import jacobiflow as jf
from jacobiflow.baselines import FULL_PASSES
from jacobiflow.baselines.full_passes import full_passes_sample
from jacobiflow.calibration.error_matrix import gamma_norm
from jacobiflow.data import ImageDataset, Noise, add_noise, digits, noisy_images
from jacobiflow.evaluation import bayes_accuracy, bits_per_dim
from jacobiflow.experiments.speed import compare
from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.solvers.partition import Partition
from jacobiflow.training import StepReport, TrainConfig, read_metrics, train

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = jf.MAFConfig(in_channels=1, image_size=4, hidden_features=20, num_blocks=2, num_classes=3)
# Fewer units than tokens, a number that tokens do not divide, three channels, one token, one hidden layer.
SHAPES = [
    TINY,
    replace(TINY, hidden_features=7, num_classes=0),
    replace(TINY, in_channels=3, image_size=2, hidden_features=33, hidden_layers=3),
    replace(TINY, hidden_features=16, hidden_layers=1, num_blocks=3),
    replace(TINY, image_size=1),
]
IDS = ["plain", "few-units", "colour", "one-layer", "one-token"]


# -------------------------------------------------------------------------------------------------------------- oracle


class MAFOracle:
    """A MAF from its state dict and sizes alone."""

    def __init__(self, flow: jf.MAF) -> None:
        self.state = {name: value.detach().double() for name, value in flow.state_dict().items()}
        config = flow.config
        self.shape = (config.in_channels, config.image_size, config.image_size)
        self.length = math.prod(self.shape)
        self.layers, self.num_blocks, self.alpha = config.hidden_layers, config.num_blocks, config.logit_alpha
        self.var = self.state["var"]

    def mask(self, layer: int, rows: int, columns: int) -> Tensor:
        """1 where an output may see an input: units see degrees up to their own, entry t sees degrees below t."""

        def sees(row: int, column: int) -> bool:
            seen = column if layer == 0 else column * (self.length - 1) // columns
            if layer == self.layers:
                return seen < row // 2
            return seen <= row * (self.length - 1) // rows

        return torch.tensor([[float(sees(row, column)) for column in range(columns)] for row in range(rows)]).double()

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """All masked weights."""
        found = {}
        for name, weight in self.state.items():
            if name.endswith(".weight"):
                found[name] = weight * self.mask(int(name.split(".")[3]), *weight.shape)
        return found

    def parameters(self, i: int, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-scale and shift of all entries of block i; `x` is in its causal order."""
        h = x.double().flatten(1)
        for layer in range(self.layers + 1):
            name = f"blocks.{i}.layers.{layer}."
            h = h @ self.weights[name + "weight"].T + self.state[name + "bias"]
            if name + "class_embed" in self.state:
                table = self.state[name + "class_embed"]
                chosen = [-1] * len(x) if labels is None else labels.tolist()
                h = h + torch.stack([table.mean(dim=0) if y < 0 else table[y] for y in chosen])
            if layer < self.layers:
                h = h.clamp(min=0)
        return h[:, 0::2].unsqueeze(-1), h[:, 1::2].unsqueeze(-1)

    def g(self, i: int, x: Tensor, z: Tensor, labels: Tensor | None = None, guide: Guide | None = None) -> Tensor:
        log_scale, shift = self.parameters(i, x, labels)
        if guide is not None:
            oracle.guide_away(guide, log_scale, shift, *self.parameters(i, x, None))
        return log_scale.exp() * z + shift

    def flip(self, i: int, x: Tensor) -> Tensor:
        return x[:, torch.arange(x.shape[1] - 1, -1, -1)] if i % 2 else x

    def encode(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        s = self.alpha + (1 - 2 * self.alpha) * (images.double().flatten(1) + 1) / 2
        x = (s.log() - (1 - s).log()).unsqueeze(-1)
        for i in range(self.num_blocks):
            x = self.flip(i, x)
            log_scale, shift = self.parameters(i, x, labels)
            x = self.flip(i, (x - shift) / log_scale.exp())
        return x / self.var.sqrt()

    def decode(self, latents: Tensor, labels: Tensor | None = None, guide: Guide | None = None) -> Tensor:
        x = latents.double() * self.var.sqrt()
        for i in reversed(range(self.num_blocks)):
            z = self.flip(i, x)
            x = self.flip(i, oracle.sequential(lambda x, i=i, z=z: self.g(i, x, z, labels, guide), z))  # type: ignore[misc]
        p = (1 / (1 + (-x).exp()) - self.alpha) / (1 - 2 * self.alpha)
        return (2 * p - 1).reshape(-1, *self.shape)


# --------------------------------------------------------------------------------------------------------------- flows


@cache
def make_maf(config: jf.MAFConfig = TINY, seed: int = 0) -> jf.MAF:
    """A float64 MAF, not to be changed, whose every weight matters; a fresh one is the identity."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        flow = jf.MAF(config).double().eval()
        for block in flow.blocks:
            *hidden, last = block.layers
            for layer in hidden:
                layer.weight.mul_(2)
            last.weight.normal_(std=0.5)
            last.weight[0::2].mul_(0.3)
            last.bias.normal_(std=0.2)
            for layer in block.layers if config.num_classes else ():
                layer.class_embed.normal_(std=0.3)
        flow.var.uniform_(0.5, 2)
    return flow


def some_images(config: jf.MAFConfig, num: int = 4, seed: int = 0) -> Tensor:
    shape = (num, config.in_channels, config.image_size, config.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def some_latents(config: jf.MAFConfig, num: int = 4, seed: int = 0) -> Tensor:
    shape = (num, config.num_tokens, 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(config: jf.MAFConfig, num: int = 4) -> Tensor | None:
    """Every class, and a row without one."""
    return torch.arange(-1, num - 1) % (config.num_classes + 1) - 1 if config.num_classes else None


@pytest.fixture(params=SHAPES, ids=IDS)
def config(request: pytest.FixtureRequest) -> jf.MAFConfig:
    return request.param


# ---------------------------------------------------------------------------------------------------------------- maps


def test_parameters_are_those_of_the_oracle(config: jf.MAFConfig) -> None:
    flow, labels = make_maf(config), labels_of(config)
    x = some_latents(config)
    kept = x.clone()
    for i, block in enumerate(flow.blocks):
        for have, want in zip(block(x, labels), MAFOracle(flow).parameters(i, x, labels), strict=True):
            torch.testing.assert_close(have, want, rtol=0, atol=1e-12)
    assert torch.equal(x, kept)


def test_the_jacobian_is_strictly_triangular_in_every_order(config: jf.MAFConfig) -> None:
    flow, labels = make_maf(config), labels_of(config, 1)
    x = some_latents(config, 1)
    for i, block in enumerate(flow.blocks):
        for k in range(2):

            def parameter(raster: Tensor, block: Any = block, k: int = k) -> Tensor:
                return block.permutation(block(block.permutation(raster), labels)[k]).flatten()

            jacobian = torch.autograd.functional.jacobian(parameter, x).flatten(1)
            forbidden = jacobian.tril() if i % 2 else jacobian.triu()
            assert (forbidden == 0).all()
            if config.hidden_features >= config.num_tokens > 1:  # each entry hears the token before it
                assert (jacobian.diagonal(1 if i % 2 else -1) != 0).any()


def test_the_log_determinant_is_that_of_the_dense_jacobian(config: jf.MAFConfig) -> None:
    flow, images, labels = make_maf(config), some_images(config, 3), labels_of(config, 3)
    _, log_det = flow.encode(images, labels)
    for n in range(3):
        row = None if labels is None else labels[n : n + 1]
        dense = torch.autograd.functional.jacobian(
            lambda image, row=row: flow.encode(image.unsqueeze(0), row)[0].flatten(),  # type: ignore[misc]
            images[n],
        )
        _, want = torch.linalg.slogdet(dense.reshape(config.num_tokens, -1))
        assert float(log_det[n].detach()) == pytest.approx(float(want), abs=1e-10)


def test_encoding_and_decoding_are_the_oracle_s_and_inverse(config: jf.MAFConfig) -> None:
    flow, images, labels = make_maf(config), some_images(config), labels_of(config)
    kept = images.clone()
    z, _ = flow.encode(images, labels)
    torch.testing.assert_close(z, MAFOracle(flow).encode(images, labels), rtol=0, atol=1e-10)
    out = jf.decode(flow, z, labels, strategy="sequential")
    torch.testing.assert_close(out.images, images, rtol=0, atol=1e-9)
    torch.testing.assert_close(MAFOracle(flow).decode(z, labels), images, rtol=0, atol=1e-9)
    assert torch.equal(images, kept)


def test_the_ends_of_the_range_have_logits_in_float32() -> None:
    flow = jf.MAF(TINY)
    ends = torch.tensor([-1.0, 1.0, 1 - 2**-23, 0.0]).repeat(4).view(1, 1, 4, 4)
    tokens, log_det = flow.to_tokens(ends)
    exact = torch.tensor([1e-6, 1 - 1e-6], dtype=torch.float64).logit()
    torch.testing.assert_close(tokens[0, :2, 0].double(), exact, rtol=1e-6, atol=0)
    assert torch.isfinite(log_det).all()
    torch.testing.assert_close(flow.to_images(tokens), ends, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [1.01, -1.5, math.nan, math.inf])
def test_a_pixel_out_of_range_is_named(value: float) -> None:
    images = torch.zeros(2, 1, 4, 4)
    images[1, 0, 2, 3] = value
    for call in (jf.MAF(TINY).encode, jf.MAF(TINY).log_prob):
        with pytest.raises(ValueError, match=rf"image value {value:.7g}: a MAF takes images in \[-1, 1\]"):
            call(images)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_features": 0}, "hidden_features=0: give a positive whole number"),
        ({"image_size": 2.0}, "image_size=2.0: give a positive whole number"),
        ({"num_classes": -1}, "num_classes=-1: give 0"),
        ({"logit_alpha": 0.0}, "logit_alpha=0.0: give a small positive number"),
        ({"logit_alpha": 0.5}, "logit_alpha=0.5: give a small positive number"),
        ({"logit_alpha": math.nan}, "logit_alpha=nan"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(TINY, **change)


def test_a_fresh_flow_leaves_the_tokens_as_they_are() -> None:
    flow, images = jf.MAF(TINY).double(), some_images(TINY)
    z, _ = flow.encode(images, labels_of(TINY))
    assert torch.equal(z, flow.to_tokens(images)[0])


# --------------------------------------------------------------------------------------------------------------- cache


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_run_after_its_prefix_is_the_full_pass(data: st.DataObject) -> None:
    config = data.draw(st.sampled_from(SHAPES))
    flow, labels, length = make_maf(config), labels_of(config), config.num_tokens
    block = flow.blocks[data.draw(st.integers(0, config.num_blocks - 1))]
    x, wrong = some_latents(config), some_latents(config, seed=1)
    kept = x.clone()
    full = block(x, labels)
    stops = sorted({*data.draw(st.lists(st.integers(1, length), max_size=6)), length})
    cache = block.init_cache(x, labels)
    for start, stop in zip([0, *stops[:-1]], stops, strict=True):
        if data.draw(st.booleans()):  # what a run was swept with before is written over
            block.affine(torch.cat((x[:, : max(start - 1, 0)], wrong[:, max(start - 1, 0) :]), 1), start, stop, cache)
        for have, want in zip(block.affine(x, start, stop, cache), full, strict=True):
            torch.testing.assert_close(have, want[:, start:stop], rtol=0, atol=1e-12)
    assert torch.equal(x, kept)


def test_a_run_computes_only_its_own_units() -> None:
    """All others keep what stands in them, and are not read above the run."""
    config = replace(TINY, hidden_features=40)
    flow, x = make_maf(config), some_latents(config)
    block = flow.blocks[0]
    cache = block.init_cache(x)
    for hidden in cache.hidden:
        hidden.fill_(torch.nan)
    for start, stop in ((0, 4), (4, 9)):
        log_scale, _ = block.affine(x, start, stop, cache)
        assert torch.isfinite(log_scale).all()
        done = sum(k * (config.num_tokens - 1) // 40 < stop - 1 for k in range(40))
        for hidden in cache.hidden:
            assert torch.isfinite(hidden[:, :done]).all()
            assert hidden[:, done:].isnan().all()


def test_output_weights_are_the_masked_rows(config: jf.MAFConfig) -> None:
    flow = make_maf(config)
    layer = f"blocks.1.layers.{config.hidden_layers}.weight"
    weight = flow.state_dict()[layer]
    masked = weight * MAFOracle(flow).mask(config.hidden_layers, *weight.shape)
    w_s, w_u = flow.blocks[1].output_weights()
    assert torch.equal(w_s, masked[0::2])
    assert torch.equal(w_u, masked[1::2])


def test_attention_temperature_is_refused() -> None:
    flow, z = make_maf(), some_latents(TINY)
    guidance = jf.Guidance(1.0, attn_temperature=0.8)
    calls: list[Callable[[], Any]] = [
        lambda: flow.blocks[0].init_cache(z, None, torch.ones(4)),
        lambda: jf.sample(flow, 2, torch.zeros(2, dtype=torch.long), guidance=guidance, strategy="jacobi"),
        lambda: full_passes_sample(flow, z, guidance=guidance),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="a MAF has no attention; leave it at 1"):
            call()


def test_denoising_is_refused() -> None:
    with pytest.raises(ValueError, match=r"denoise=1.0: this flow's noise_std is 0"):
        jf.sample(make_maf(), 2, denoise=1.0)


# ------------------------------------------------------------------------------------------------------------- solvers


def problem(config: jf.MAFConfig, i: int, guide: Guide | None = None) -> tuple[Any, Any, Tensor, Tensor | None, Tensor]:
    """Block i, the oracle's map, z, labels, and the oracle's answer."""
    flow, labels, z = make_maf(config), labels_of(config), some_latents(config, seed=3)
    reference = MAFOracle(flow)

    def g(x: Tensor) -> Tensor:
        return reference.g(i, x, z, labels, guide)

    return flow.blocks[i], g, z, labels, oracle.sequential(g, z)


@pytest.mark.parametrize(
    "partition", [jf.Sequential(), jf.Whole(), jf.Segments(3), jf.Window(5), jf.Window(1)], ids=str
)
@pytest.mark.parametrize("shape", [0, 1, 2, 3])
def test_every_partition_solves_to_the_oracle_s_answer(partition: Partition, shape: int) -> None:
    for i in range(2):
        block, _, z, labels, answer = problem(SHAPES[shape], i)
        kept = z.clone()
        ledger = Ledger(block, slack=1e-10)
        solution = jf.solve(ledger, z, jf.Solver(partition, stopping=jf.Tolerance(1e-12)), labels)
        torch.testing.assert_close(solution.x, answer, rtol=0, atol=1e-9)
        assert jf.certify(block, z, solution.x, labels).max() < 1e-9
        assert torch.equal(z, kept)


def test_the_problem_is_hard_enough() -> None:
    for i in range(2):
        _, g, z, _, answer = problem(TINY, i)
        assert oracle.sweeps_needed(g, z, answer, REACHED) > TINY.num_tokens / 4


def test_k_sweeps_are_exact_on_the_first_k_tokens() -> None:
    block, g, z, labels, answer = problem(TINY, 0)
    for k in range(1, TINY.num_tokens + 1):
        x = jf.solve(block, z, jf.Solver(jf.Whole(), stopping=jf.MaxSweeps(k)), labels).x
        torch.testing.assert_close(x[:, :k], answer[:, :k], rtol=0, atol=1e-10)
        torch.testing.assert_close(x, oracle.jacobi(g, z, k), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "guidance", [jf.Guidance(0.8), jf.Guidance(0.5, annealed=False, on="shift"), jf.Guidance(0.5, on="scale")], ids=str
)
def test_guided_samples_are_the_oracle_s(guidance: jf.Guidance) -> None:
    flow, labels, z = make_maf(), labels_of(TINY), some_latents(TINY)
    want = MAFOracle(flow).decode(z, labels, Guide(guidance.weight, guidance.annealed, guidance.on, 1.0))
    for strategy in ("sequential", "jacobi", "window:6"):
        out = jf.sample(flow, latents=z, labels=labels, guidance=guidance, strategy=strategy,
                        tolerance=None if strategy == "sequential" else 1e-11, progress=False)  # fmt: skip
        torch.testing.assert_close(out.images, want, rtol=0, atol=1e-8)
    torch.testing.assert_close(full_passes_sample(flow, z, labels, guidance), want, rtol=0, atol=1e-10)


def test_a_row_without_a_class_takes_the_mean_of_the_tables() -> None:
    flow, x = make_maf(), some_latents(TINY)
    for block in flow.blocks:
        none, below = block(x), block(x, torch.full((4,), -1))
        mixed = block(x, torch.tensor([-1, 0, -1, 2]))
        other = block(x, torch.full((4,), 1))
        for k in range(2):
            torch.testing.assert_close(none[k], below[k], rtol=0, atol=1e-13)
            torch.testing.assert_close(none[k][0::2], mixed[k][0::2], rtol=0, atol=1e-13)
            assert (none[k] - other[k]).abs().min(dim=1).values.max() > 0
        cached = block.affine(x, 0, TINY.num_tokens, block.init_cache(x))
        torch.testing.assert_close(cached, none, rtol=0, atol=1e-13)


def test_the_error_matrix_is_that_of_the_oracle() -> None:
    block, g, z, labels, answer = problem(TINY, 1)
    norms = gamma_norm(block, answer, z, labels, rtol=1e-8, max_iterations=500)
    for n in range(len(z)):
        dense = torch.autograd.functional.jacobian(lambda x: g(x)[n].flatten(), answer)[:, n].flatten(1)  # noqa: B023
        assert float(norms[n]) == pytest.approx(float(torch.linalg.matrix_norm(dense, 2)), rel=1e-3)


def test_the_trace_is_of_images() -> None:
    flow, labels = make_maf(), labels_of(TINY)
    out = jf.sample(flow, 4, labels, strategy="sequential", return_trace=True, progress=False)
    assert out.trace is not None
    assert len(out.trace) == 1 + TINY.num_blocks
    assert torch.equal(out.trace[-1], out.images)
    assert all((step.abs() <= 1 + 3 * TINY.logit_alpha).all() for step in out.trace)
    torch.testing.assert_close(flow.encode(out.images, labels)[0], out.latents.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_network_in_lower_precision_keeps_the_state_in_float32(dtype: torch.dtype) -> None:
    flow = jf.MAF(TINY).eval()
    flow.load_state_dict(make_maf().state_dict())
    out = jf.sample(flow.to(dtype), 4, labels_of(TINY), strategy="jacobi-16", progress=False)
    assert out.images.dtype == torch.float32
    want = jf.sample(make_maf(), 4, labels_of(TINY), strategy="sequential", progress=False).images
    assert (out.images - want).abs().mean() < (1e-5 if dtype == torch.float32 else 0.1)


# ----------------------------------------------------------------------------------------------------------- baselines


def test_full_passes_are_the_oracle_s_and_the_baseline(config: jf.MAFConfig) -> None:
    flow, labels, z = make_maf(config), labels_of(config), some_latents(config)
    kept = z.clone()
    torch.testing.assert_close(
        full_passes_sample(flow, z, labels), MAFOracle(flow).decode(z, labels), rtol=0, atol=1e-10
    )
    assert torch.equal(z, kept)
    found = compare(flow, z, labels, {}, repeats=1)
    assert found.original == FULL_PASSES
    assert [row.strategy for row in found.rows] == ["full passes", "sequential"]
    assert found.rows[0].error.max < 1e-9
    assert set(found.to_json()["rows"][0]["speed_up"]) == {"full passes", "sequential"}
    with pytest.raises(ValueError, match="run 'full passes': timed in any case"):
        compare(flow, z, labels, {"full passes": lambda: None}, repeats=1)  # type: ignore[dict-item,return-value]


def test_each_full_pass_evaluates_the_whole_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import jacobiflow.baselines.full_passes

    flow, rows = make_maf(), []
    real = jacobiflow.baselines.full_passes.full_pass

    def counted(x: Tensor, layers: Any) -> Any:
        rows.append(x.shape)
        assert not torch.is_grad_enabled()
        return real(x, layers)

    monkeypatch.setattr(jacobiflow.baselines.full_passes, "full_pass", counted)
    full_passes_sample(flow, some_latents(TINY))
    assert rows == [(4, 16, 1)] * (16 * TINY.num_blocks)


# ------------------------------------------------------------------------------------------------------------ training

DIGITS = jf.MAFConfig(in_channels=1, image_size=8, hidden_features=24, num_blocks=2, num_classes=10)
SETTINGS = TrainConfig(steps=12, noise=Noise("uniform"), batch_size=8, warmup=4, bf16=False, checkpoint_every=5)


def some_digits(num: int = 43) -> ImageDataset:
    data = digits()
    assert data.labels is not None
    return ImageDataset(data.images[:num], data.labels[:num])


def fresh() -> jf.MAF:
    torch.manual_seed(3)
    return jf.MAF(DIGITS)


def fit(out: Path, settings: TrainConfig = SETTINGS, **calls: Any) -> ImageFlow:
    return train(fresh(), some_digits(), settings, out, **calls)


def test_the_first_batch_normalises_every_block() -> None:
    flow, data = make_maf(), some_images(TINY, 32)
    flow = jf.MAF(TINY).double()
    flow.load_state_dict(make_maf().state_dict())  # scales that depend on the image too
    labels = torch.arange(32) % 4 - 1
    flow.initialize(data, labels)
    x, _ = flow.to_tokens(data)
    for block in flow.blocks:
        x = block.permutation(x)
        log_scale, shift = block(x, labels)
        x = (x - shift) * torch.exp(-log_scale)
        torch.testing.assert_close(x.mean(dim=0), torch.zeros(16, 1).double(), rtol=0, atol=1e-10)
        torch.testing.assert_close(x.std(dim=0, correction=0), torch.ones(16, 1).double(), rtol=0, atol=1e-10)
        x = block.permutation(x)


def test_a_constant_pixel_keeps_its_scale() -> None:
    flow, images = jf.MAF(TINY), some_images(TINY, 8).float()
    images[:, :, 0, 1] = 0.3
    for batch in (images, images[:1]):  # of one image all are constant
        flow.initialize(batch)
        log_scale, _ = flow.blocks[0](flow.to_tokens(batch)[0])
        assert torch.isfinite(flow.log_prob(batch)).all()
        assert torch.equal(log_scale[:, 1], torch.zeros_like(log_scale[:, 1]))


def test_training_starts_from_the_first_batch_and_lowers_the_loss(tmp_path: Path) -> None:
    reports: list[StepReport] = []
    long = replace(SETTINGS, steps=150, checkpoint_every=1000)
    average = fit(tmp_path, long, on_step=reports.append)
    # A batch whose every entry has mean 0 and variance 1 is far likelier than the logits as they are.
    first = fresh()
    data = some_digits()
    batch = noisy_images(data, torch.arange(8), Noise("uniform"))
    _, log_det = first.to_tokens(batch)
    without = 0.5 * first.encode(batch)[0].square().mean() - log_det.mean() / 64
    assert reports[0].loss < float(without.detach()) - 1
    first_losses, last_losses = ([r.loss for r in part] for part in (reports[1:11], reports[-10:]))
    assert sum(last_losses) / 10 < sum(first_losses) / 10 - 0.2
    assert isinstance(average, jf.MAF)
    assert bits_per_dim(average, data, Noise("uniform")) < sum(r.bits_per_dim for r in reports[1:11]) / 10 - 0.2


def test_resumed_runs_end_bit_for_bit_as_undisturbed_ones(tmp_path: Path) -> None:
    def interrupt_at(step: int) -> Callable[[StepReport], None]:
        def on_step(report: StepReport) -> None:
            if report.step == step:
                raise KeyboardInterrupt

        return on_step

    fit(tmp_path / "whole")
    for step in (1, 7, 12):
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "cut", on_step=interrupt_at(step))
    fit(tmp_path / "cut")
    have, want = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("cut", "whole"))
    for kind in ("flow", "average"):
        assert all(torch.equal(have[kind][name], value) for name, value in want[kind].items())
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert [r["loss"] for r in read_metrics(tmp_path / "cut")] == [r["loss"] for r in read_metrics(tmp_path / "whole")]


def test_an_interruption_while_the_first_batch_is_taken_in_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: jf.MAF, *_: Any) -> None:
        self.blocks[0].layers[-1].bias.data.fill_(1.0)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jf.MAF, "initialize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "cut")
    assert not (tmp_path / "cut/checkpoint.pt").exists()
    fit(tmp_path / "cut")
    fit(tmp_path / "whole")
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_gaussian_noise_is_refused_in_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"noise of std 0.1, but the flow's config has noise_std=0.0"):
        fit(tmp_path, replace(SETTINGS, noise=Noise("gaussian", 0.1)))


# --------------------------------------------------------------------------------------------------------------- files


def test_a_saved_flow_comes_back(tmp_path: Path) -> None:
    flow = make_maf()
    flow.save_pretrained(tmp_path)
    document = figures(tmp_path / "config.json")
    assert document == {"model_type": "maf", "format_version": 1, **asdict(TINY)}
    assert set(load_file(tmp_path / "model.safetensors")) == set(flow.state_dict())
    loaded = jf.load(tmp_path, dtype="float64")
    for read in (loaded, jf.MAF.from_pretrained(tmp_path), ImageFlow.from_pretrained(tmp_path)):
        assert type(read) is jf.MAF
        assert read.config == TINY
        assert not read.training
        assert fingerprint(read) == fingerprint(flow)
        assert all(torch.equal(read.state_dict()[name], value) for name, value in flow.state_dict().items())
    assert "# MAF" in (tmp_path / "README.md").read_text()
    assert not any("mask" in name for name in flow.state_dict())


def test_each_kind_refuses_the_folder_of_the_other(tmp_path: Path) -> None:
    make_maf().save_pretrained(tmp_path / "maf")
    with pytest.raises(jf.CheckpointError, match=r"json: model_type 'maf', which is no TarFlow; read it with MAF"):
        jf.TarFlow.from_pretrained(tmp_path / "maf")
    with pytest.raises(jf.CheckpointError, match=r"model_type 'tarflow', which is no MAF; read it with TarFlow"):
        jf.MAF.from_pretrained("digits-p1")
    assert type(jf.load("digits-p1")) is jf.TarFlow


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["model_type"], "nice", "model_type 'nice' in format 1; this release reads 'tarflow', 'maf' in 1"),
        (["model_type"], ["maf"], "model_type ['maf']"),
        (["model_type"], "tarflow", "unknown field 'hidden_features'"),
        (["hidden_features"], "many", "hidden_features='many' is no int"),
        (["logit_alpha"], 0.7, "logit_alpha=0.7: give a small positive number"),
        (["patch_size"], 2, "unknown field 'patch_size'"),
        (["hidden_features"], 24, "the shapes say hidden_features=20 rather than 24"),
        (["image_size"], 5, "the shapes say image_size=4 rather than 5"),
        (["num_classes"], 0, "the shapes say num_classes=3 rather than 0"),
        (["hidden_layers"], 1, "the shapes say hidden_layers=2 rather than 1"),
        (["num_blocks"], 10**6, "1000000 blocks of 2 layers in the config, but only"),
    ],
)
def test_a_damaged_config_is_named(path: list[str], value: Any, words: str, tmp_path: Path) -> None:
    make_maf().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(put(figures(file), path, value)))
    with pytest.raises(jf.CheckpointError) as error:
        jf.load(tmp_path)
    assert words in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_damaged_weight_is_named(tmp_path: Path) -> None:
    make_maf().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    for change, words in (
        ({"blocks.0.layers.1.bias": torch.full((20,), math.inf)}, "blocks.0.layers.1.bias has non-finite values"),
        ({"var": torch.zeros(16, 1)}, "var has values that are not positive"),
        ({"extra": torch.zeros(2)}, "extra (2,): unknown"),
        ({"blocks.0.layers.1.bias": torch.zeros(3)}, "blocks.0.layers.1.bias (3,): (20,) wanted"),
    ):
        save_file({**state, **change}, file)
        with pytest.raises(jf.CheckpointError) as error:
            jf.load(tmp_path)
        assert words in str(error.value)


# -------------------------------------------------------------------------------------------------------- command line

TRAIN = "train --flow maf --images digits --image-size 8 --channels 24 --blocks 3 --batch-size 16"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MAF of a few steps, by the command line."""
    out = tmp_path_factory.mktemp("maf")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        from jacobiflow.cli.app import main

        main([*TRAIN.split(), "--steps", "60", "--sample-every", "60", "--out", "model", "--json", "train.json"])
    return out


def test_train_writes_a_maf(trained: Path) -> None:
    flow = jf.load(trained / "model")
    assert type(flow) is jf.MAF
    assert flow.config == jf.MAFConfig(1, 8, 24, 3, 2, num_classes=10)
    found = figures(trained / "train.json")
    assert (found["flow"], found["training"]["noise"]) == ("maf", {"kind": "uniform", "std": 0.0})
    assert (trained / "model/samples-000060.png").exists()
    losses = [row["loss"] for row in read_metrics(trained / "model")]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_every_command_takes_a_maf(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)

    def ran(line: str) -> str:
        out = run_line(line, capsys)
        assert out.code == 0, out.err
        return out.out

    assert "hidden_features" in ran("info --model ./model --json info.json")
    assert figures("info.json")["num_tokens"] == 64
    ran("sample --model ./model --num 4 --strategy jacobi --compare --out s --json s.json")
    assert figures("s.json")["error"]["max"] < 1e-2
    calibrate = "calibrate --model ./model --images digits --num 32 --traced 6 --chord --out r.json --json c.json"
    assert "CRM" in ran(calibrate)
    assert all(math.isfinite(x) for x in figures("c.json")["crm"])
    assert "predicted" in ran("plan --model ./model --report r.json --batch-size 2 --out p.json")
    ran("sample --model ./model --num 2 --strategy p.json --overwrite --out s")
    ran("trace --model ./model --report r.json --num 3 --out t")
    assert (trained / "t/sampling.png").exists()
    said = ran("bench --model ./model --strategy jacobi --batch-size 2 --repeats 1 --out b")
    assert "over orig.: times as fast as the loop of the original code, full passes" in said
    rows = figures("b/bench.json")["comparisons"][0]["rows"]
    assert [row["strategy"] for row in rows] == ["full passes", "sequential", "jacobi"]
    assert rows[0]["error"]["max"] < 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--patch-size 2", "--patch-size 2: of a TarFlow; leave it out with --flow maf"),
        ("--head-dim 64", "--head-dim 64: of a TarFlow"),
        ("--volume-preserving", "--volume-preserving: of a TarFlow"),
        ("--noise gaussian", "--noise gaussian: of a TarFlow"),
        ("--noise-std 0.1", "--noise-std 0.1: of a TarFlow"),
        ("--flow glow", "--flow glow: give tarflow or maf"),
        ("--channels 0", "hidden_features=0: give a positive whole number"),
    ],
)
def test_options_of_a_tarflow_are_refused(
    options: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run_line(f"{TRAIN} {options} --steps 1 --out {tmp_path}/run", capsys)
    assert out.code == 2
    assert words in out.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--guidance 1 --attn-temperature 0.8", "a MAF has no attention; leave it at 1"),
        ("--denoise 1", "there is no Gaussian noise to remove; give 0"),
    ],
)
def test_sample_refuses_what_a_maf_has_not(
    options: str, words: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run_line(f"sample --model {trained}/model --num 2 --strategy jacobi {options} --out {trained}/no", capsys)
    assert out.code == 2
    assert words in out.err
    assert not (trained / "no").exists()


# -------------------------------------------------------------------------------------------------- the bundled weights


@pytest.fixture(scope="module")
def model() -> tuple[jf.MAF, Tensor, Tensor]:
    """digits-maf in float32, dequantised digits, their labels."""
    flow = jf.MAF.from_pretrained("digits-maf").requires_grad_(False)
    images, labels = digits().batch(slice(0, 16))
    assert labels is not None
    return flow, add_noise(images, Noise("uniform"), torch.Generator().manual_seed(0)), labels


@pytest.mark.parametrize("strategy", ["sequential", "jacobi", "window:16", "auto"])
def test_real_digits_come_back_certified(model: tuple[jf.MAF, Tensor, Tensor], strategy: str) -> None:
    flow, images, labels = model
    z, _ = flow.encode(images, labels)
    reference = MAFOracle(flow)
    torch.testing.assert_close(z.double(), reference.encode(images, labels), rtol=0, atol=2e-3)
    out = jf.decode(flow, z, labels, strategy=strategy, tolerance=None if strategy == "sequential" else 1e-4)
    assert out.certificate is not None
    assert (out.certificate <= 1e-4).all()
    assert (out.images - images).abs().max() <= 1e-2
    assert (out.images - reference.decode(z, labels)).abs().max() <= 1e-2


def test_real_samples_are_near_the_oracle_s(model: tuple[jf.MAF, Tensor, Tensor]) -> None:
    flow, _, labels = model
    exact = jf.sample(flow, 16, labels, strategy="sequential", progress=False)
    assert (exact.images - MAFOracle(flow).decode(exact.latents, labels)).abs().max() <= 1e-3
    for strategy in ("jacobi", "window:16"):
        out = jf.sample(flow, 16, labels, strategy=strategy, tolerance=1e-3, progress=False)
        assert out.certificate is not None
        assert (out.certificate <= 1e-3).all()
        assert (out.images - exact.images).abs().max() <= 5e-2
        assert out.network_calls < exact.network_calls / 2


def test_real_metrics_rank_the_blocks(model: tuple[jf.MAF, Tensor, Tensor]) -> None:
    flow, images, labels = model
    report = jf.calibrate(flow, images, labels, traced=8, progress=False)
    assert all(math.isfinite(value) for row in report.igm for value in row.values())
    assert all(math.isfinite(value) and value > 0 for value in report.crm)
    assert sum(report.crm_percent) == pytest.approx(100)
    for i, row in enumerate(report.igm):  # the calibrated guess is as good a start as the worse of the fixed ones
        assert row["mean_affine"] <= max(row["latent"], row["zeros"]), f"block {i}"
    bundled = jf.Report.load(flow.report_file)  # type: ignore[arg-type]
    bundled.check(flow)
    assert bundled.tuning is not None


def test_the_real_model_knows_more_than_its_pixels_one_by_one(model: tuple[jf.MAF, Tensor, Tensor]) -> None:
    """Against a normal distribution of each pixel's logit by itself, fitted to the same images class by class."""
    flow, _, _ = model
    data, noise = digits(), Noise("uniform")
    assert data.labels is not None
    images = noisy_images(data, torch.arange(len(data)), noise).double()
    s = 1e-6 + (1 - 2e-6) * (images.flatten(1) + 1) / 2
    y = s.logit()
    nats = torch.zeros(len(data), dtype=torch.float64)
    for k in range(10):
        rows = y[data.labels == k]
        z = (rows - rows.mean(dim=0)) / rows.std(dim=0)
        nats[data.labels == k] = -(0.5 * z.square() + 0.5 * math.log(2 * math.pi) + rows.std(dim=0).log()).sum(dim=1)
    nats += (math.log(0.5 - 1e-6) - s.log() - (1 - s).log()).sum(dim=1)
    alone = float(-nats.mean() / 64 / math.log(2) + 7)
    found = bits_per_dim(flow, data, noise)
    card = figures(Path(__file__).parents[2] / "docs/results/digits-maf.json")
    assert found == pytest.approx(card["bits_per_dim"], abs=1e-3)
    assert found < alone - 0.3
    assert bayes_accuracy(flow, data, noise) > 0.9
