"""Training: a run that was interrupted, killed or resumed ends bit for bit as one that was not."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.cli import main
from jacobiflow.data import ImageDataset, Noise, add_noise, digits
from jacobiflow.training import StepReport, TrainConfig, read_metrics, train

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = jf.TarFlowConfig(
    in_channels=1, image_size=8, patch_size=2, channels=32, num_blocks=2, layers_per_block=1, num_classes=10,
    head_dim=16, expansion=2, noise_std=0.1,
)  # fmt: skip
# 5 batches an epoch, so that 12 steps see three orders.
SETTINGS = TrainConfig(steps=12, batch_size=8, warmup=4, bf16=False, checkpoint_every=5, sample_every=6)


def some_digits(num: int = 43) -> ImageDataset:
    data = digits()
    assert data.labels is not None
    return ImageDataset(data.images[:num], data.labels[:num])


def levels(num: int = 40) -> ImageDataset:
    """Image i is of the grey level i throughout; its label is i mod 10."""
    grey = torch.arange(num, dtype=torch.uint8).view(-1, 1, 1, 1).expand(num, 1, 8, 8)
    return ImageDataset(grey.contiguous(), torch.arange(num) % 10)


def fresh(config: jf.TarFlowConfig = CONFIG) -> jf.TarFlow:
    torch.manual_seed(3)
    return jf.TarFlow(config)


def fit(out: Path, settings: TrainConfig = SETTINGS, config: jf.TarFlowConfig = CONFIG, **calls: Any) -> jf.TarFlow:
    return train(fresh(config), some_digits(), settings, out, **calls)


def interrupt_at(*steps: int) -> Callable[[StepReport], None]:
    def on_step(report: StepReport) -> None:
        if report.step in steps:
            raise KeyboardInterrupt

    return on_step


def checkpoint(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same(have: Any, want: Any, where: str = "") -> None:
    """Equal bit for bit, but for the seconds that it took."""
    assert type(have) is type(want), where
    if isinstance(want, Tensor):
        assert torch.equal(have, want), where
    elif isinstance(want, dict):
        assert have.keys() == want.keys(), where
        for key in want:
            if key != "seconds":
                assert_same(have[key], want[key], f"{where}.{key}")
    elif isinstance(want, list):
        assert len(have) == len(want), where
        for i, (one, other) in enumerate(zip(have, want, strict=True)):
            assert_same(one, other, f"{where}.{i}")
    else:
        assert have == want, where


def assert_same_run(have: Path, want: Path) -> None:
    """Parameters, averaged weights, optimiser state and metrics."""
    assert_same(checkpoint(have), checkpoint(want))
    assert_same([json.loads(line) for line in (have / "metrics.jsonl").read_text().splitlines()], read_metrics(want))
    assert (have / "model.safetensors").read_bytes() == (want / "model.safetensors").read_bytes()
    assert sorted(os.listdir(have)) == sorted(os.listdir(want))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("undisturbed")
    fit(out)
    torch.set_num_threads(threads)
    return out


# -------------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("steps", [(1,), (5,), (7,), (3, 8), (11,), (12,)])
def test_a_resumed_run_ends_as_an_undisturbed_one(steps: tuple[int, ...], undisturbed: Path, tmp_path: Path) -> None:
    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path, on_step=interrupt_at(step))
        assert checkpoint(tmp_path)["step"] == step, "the interruption lost steps"
        assert not (tmp_path / "model.safetensors").exists()
    fit(tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_resuming_keeps_the_learned_prior(tmp_path: Path) -> None:
    config = replace(CONFIG, nvp=False)
    fit(tmp_path / "one go", config=config)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "two", config=config, on_step=interrupt_at(7))
    fit(tmp_path / "two", config=config)
    assert_same_run(tmp_path / "two", tmp_path / "one go")


def test_more_steps_go_on_from_a_finished_run(tmp_path: Path) -> None:
    seen: list[int] = []
    fit(tmp_path, replace(SETTINGS, steps=4))
    fit(tmp_path, replace(SETTINGS, steps=6), on_step=lambda report: seen.append(report.step))
    assert seen == [5, 6]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    fit(tmp_path, replace(SETTINGS, steps=6), on_step=interrupt_at(1, 7))  # nothing is left to do


@pytest.mark.parametrize("within", ["forward pass", "update", "callback"])
def test_an_interruption_within_a_step_saves_no_half_step(
    within: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def interrupted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            result = call(*args, **kwargs)
            if calls == 8:
                raise KeyboardInterrupt
            return result

        return wrapper

    kind, name = {
        "forward pass": (jf.TarFlow, "normalize"),
        "update": (torch.optim.AdamW, "step"),
        "callback": (json, "dumps"),  # of the metrics: after the update, before the step is whole
    }[within]
    monkeypatch.setattr(kind, name, interrupted(getattr(kind, name)))
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path)
    monkeypatch.undo()
    assert checkpoint(tmp_path)["step"] == (7 if within == "forward pass" else 5)
    fit(tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_a_kill_between_metrics_and_checkpoint_leaves_no_trace(undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, on_step=interrupt_at(6))
    log = tmp_path / "metrics.jsonl"
    lines = log.read_text()
    log.write_text(lines + (undisturbed / "metrics.jsonl").read_text()[len(lines) :][:200])
    assert not log.read_text().endswith("\n")
    (tmp_path / ".checkpoint.pt.4321.partial").write_bytes(b"half")
    fit(tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_signals_lose_at_most_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    terminated, killed, undisturbed = (tmp_path / name for name in ("terminated", "killed", "undisturbed"))

    def command(out: Path) -> list[str]:
        options = (
            "--images fashion-512 --patch-size 7 --channels 32 --head-dim 16 --blocks 2 --layers 1 --batch-size 16 "
            "--warmup 10 --no-bf16 --checkpoint-every 15 --sample-every 1000 --steps 200"
        )
        return ["train", *options.split(), "--out", str(out)]

    def start(out: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "jacobiflow", *command(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    with start(terminated) as first, start(killed) as second:
        pending = {terminated: (first, signal.SIGTERM), killed: (second, signal.SIGKILL)}
        deadline = time.monotonic() + 600
        while pending:
            for out, (process, by) in list(pending.items()):
                if (out / "checkpoint.pt").exists() or process.poll() is not None:
                    process.send_signal(by)
                    del pending[out]
            assert time.monotonic() < deadline, "no checkpoint within ten minutes"
            time.sleep(0.005)
        stderr = first.communicate(timeout=600)[1]
        second.communicate(timeout=600)
    assert first.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr
    assert second.returncode == -signal.SIGKILL
    assert 15 <= checkpoint(terminated)["step"] < 200
    assert 15 <= checkpoint(killed)["step"] < 200
    assert checkpoint(killed)["step"] % 15 == 0
    assert [line["step"] for line in read_metrics(terminated)] == list(range(1, checkpoint(terminated)["step"] + 1))

    for out in (undisturbed, terminated, killed):
        main(command(out))
    assert_same_run(terminated, undisturbed)
    assert_same_run(killed, undisturbed)


# ------------------------------------------------------------------------------------------------------- what it learns


def test_the_loss_falls_and_the_averaged_flow_is_the_model_folder(tmp_path: Path) -> None:
    reports: list[StepReport] = []
    settings = replace(SETTINGS, steps=80, learning_rate=5e-3, ema=0.9, bf16=True)
    average = fit(tmp_path, settings, on_step=reports.append)
    losses = [report.loss for report in reports]
    assert sum(losses[-8:]) / 8 < sum(losses[:8]) / 8 - 0.5
    for report in reports:  # the loss leaves out the constant of the normal density
        nats = report.loss + 0.5 * math.log(2 * math.pi)
        assert report.bits_per_dim == pytest.approx(nats / math.log(2) + math.log2(128))
        assert math.isfinite(report.grad_norm) and report.grad_norm > 0
    assert [line["loss"] for line in read_metrics(tmp_path)] == pytest.approx(losses, abs=1e-6)

    assert_same(dict(jf.load(tmp_path).state_dict()), dict(average.state_dict()))
    images, labels = some_digits().batch(slice(None))
    with torch.no_grad():
        before, after = (flow.bits_per_dim(images, labels).mean() for flow in (fresh(), average))
    assert after < before - 0.5


@pytest.mark.parametrize("nvp", [True, False])
def test_every_parameter_is_trained(nvp: bool, tmp_path: Path) -> None:
    flow = fresh(replace(CONFIG, nvp=nvp))
    before = {name: parameter.detach().clone() for name, parameter in flow.named_parameters()}
    train(flow, some_digits(), replace(SETTINGS, steps=3, weight_decay=0.0), tmp_path)
    stuck = [name for name, parameter in flow.named_parameters() if torch.equal(parameter, before[name])]
    assert not stuck
    for block in flow.blocks:
        assert block.proj_out.weight.ne(0).all(), "an output that starts at 0 stays there"


def test_the_average_follows_the_weights(tmp_path: Path) -> None:
    flow, settings = fresh(), replace(SETTINGS, ema=0.5)
    want = {name: parameter.detach().clone() for name, parameter in flow.named_parameters()}

    def on_step(report: StepReport) -> None:
        decay = min(0.5, report.step / (9 + report.step))  # rises to `ema`, so that the first weights do not linger
        for name, parameter in flow.named_parameters():
            want[name] = decay * want[name] + (1 - decay) * parameter.detach()

    average = train(flow, some_digits(), settings, tmp_path, on_step)
    for name, parameter in average.named_parameters():
        assert torch.allclose(parameter, want[name], atol=1e-6), name
        assert not parameter.requires_grad


def test_without_scales_the_prior_variance_is_a_moving_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments: list[Tensor] = []
    normalize = jf.TarFlow.normalize

    def recorded(self: jf.TarFlow, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = normalize(self, images, labels)
        moments.append(z.detach().square().mean(dim=0))
        return z, log_det

    monkeypatch.setattr(jf.TarFlow, "normalize", recorded)
    average = fit(tmp_path, config=replace(CONFIG, nvp=False))
    want = torch.ones(16, 4)
    for moment in moments:
        want = 0.9 * want + 0.1 * moment
    assert torch.allclose(average.var, want, rtol=1e-5)
    assert not torch.allclose(average.var, torch.ones(()), atol=0.2)
    assert torch.equal(checkpoint(tmp_path)["flow"]["var"], average.var)
    assert torch.equal(fit(tmp_path / "nvp").var, torch.ones(16, 4))


def test_each_epoch_has_every_image_once_with_its_label_or_none_and_new_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[tuple[Tensor, Tensor]] = []
    noises: set[float] = set()
    normalize = jf.TarFlow.normalize

    def recorded(self: jf.TarFlow, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert labels is not None
        levels = ((images.mean(dim=(1, 2, 3)) + 1) * 127.5).round()
        batches.append((levels.long(), labels))
        noises.add(float(images[0, 0, 0, 0] - images[0, 0, 0, 1]))
        return normalize(self, images, labels)

    monkeypatch.setattr(jf.TarFlow, "normalize", recorded)
    config = replace(CONFIG, noise_std=1e-3)
    settings = replace(SETTINGS, steps=60, drop_label=0.25, noise=Noise("gaussian", 1e-3))
    train(fresh(config), levels(40), settings, tmp_path)
    orders = [torch.cat([level for level, _ in batches[start : start + 5]]) for start in range(0, 60, 5)]
    for order in orders:
        assert order.sort().values.tolist() == list(range(40))
    assert len({tuple(order.tolist()) for order in orders}) == len(orders), "every epoch has its own order"
    assert len(noises) > 50, "steps share their noise"
    seen, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    dropped = labels < 0
    assert torch.equal(labels[~dropped], seen[~dropped] % 10)
    deviation = math.sqrt(0.25 * 0.75 / len(labels))
    assert dropped.double().mean() == pytest.approx(0.25, abs=4 * deviation)


def test_the_sheet_gets_the_averaged_flow(tmp_path: Path) -> None:
    sheets: list[tuple[int, Tensor]] = []
    out = fit(tmp_path, on_sample=lambda flow, step: sheets.append((step, flow.blocks[0].proj_in.weight.clone())))
    assert [step for step, _ in sheets] == [6, 12]
    assert torch.equal(sheets[-1][1], out.blocks[0].proj_in.weight)


# ------------------------------------------------------------------------------------------------------------ settings


def test_the_learning_rate_warms_up_and_falls_by_a_cosine(tmp_path: Path) -> None:
    settings = TrainConfig(steps=110, learning_rate=0.02, warmup=10)
    assert settings.rate(0) == pytest.approx(0.002)
    assert settings.rate(4) == pytest.approx(0.01)
    assert settings.rate(9) == settings.rate(10) == pytest.approx(0.02)
    assert settings.rate(35) == pytest.approx(1e-6 + (0.02 - 1e-6) * (2 + math.sqrt(2)) / 4)
    assert settings.rate(60) == pytest.approx((0.02 + 1e-6) / 2)
    assert settings.rate(110) == settings.rate(1000) == pytest.approx(1e-6)
    assert replace(settings, warmup=0).rate(0) == pytest.approx(0.02)
    assert replace(settings, warmup=200).rate(109) == pytest.approx(0.02 * 110 / 200)

    reports: list[StepReport] = []
    fit(tmp_path, on_step=reports.append)
    assert [report.rate for report in reports] == [SETTINGS.rate(step) for step in range(12)]
    assert checkpoint(tmp_path)["optimizer"]["param_groups"][0]["lr"] == SETTINGS.rate(11)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps", 0), ("batch_size", 0), ("checkpoint_every", 0), ("sample_every", -1),
        ("drop_label", -0.1), ("drop_label", 1.0), ("drop_label", math.nan), ("ema", 1.0), ("ema", -0.1),
        ("learning_rate", 0.0), ("learning_rate", math.inf), ("clip", 0.0), ("clip", math.nan),
        ("weight_decay", -1.0), ("warmup", -1),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{setting}={value}: give "):
        replace(SETTINGS, **{setting: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "std"), [("gaussian", 0.0), ("gaussian", -1.0), ("gaussian", math.nan), ("uniform", 0.1), ("laplace", 0.1)]
)
def test_noise_out_of_range_is_refused(kind: Any, std: float) -> None:
    with pytest.raises(ValueError, match=f"^noise '{kind}'"):
        Noise(kind, std)


def test_uniform_noise_spreads_each_level_over_its_share() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 1, 200, 200)
    images, _ = ImageDataset(pixels.contiguous(), None).batch(slice(None))
    noisy = add_noise(images, Noise("uniform"), torch.Generator().manual_seed(0)).double()
    assert noisy.min() >= -1
    assert noisy.max() < 1
    share = (noisy + 1) * 128 - pixels
    assert share.min() >= 0 and share.max() < 1, "a pixel left the share of its level"
    # The mean and variance of 40,000 uniform draws, each within five standard deviations.
    assert (share.mean(dim=(1, 2, 3)) - 1 / 2).abs().max() < 5 * math.sqrt(1 / 12 / 40_000)
    assert (share.var(dim=(1, 2, 3)) - 1 / 12).abs().max() < 5 * math.sqrt(1 / 180 / 40_000)


def test_gaussian_noise_has_its_deviation() -> None:
    images = torch.linspace(-1, 1, 400 * 100).view(400, 1, 10, 10)
    noise = add_noise(images, Noise("gaussian", 0.3), torch.Generator().manual_seed(0)) - images
    assert noise.mean() == pytest.approx(0, abs=5 * 0.3 / 200)
    assert noise.std() == pytest.approx(0.3, rel=5 / math.sqrt(2 * 40_000))


@pytest.mark.parametrize("noise", [Noise("gaussian", 0.1), Noise("uniform")])
def test_noise_comes_from_its_generator_alone(noise: Noise) -> None:
    images, _ = some_digits().batch(slice(4))
    kept = images.clone()
    one, again, other = (add_noise(images, noise, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(images, kept)


# -------------------------------------------------------------------------------------------------------------- errors


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_of_another_flow_is_refused_and_kept(undisturbed: Path) -> None:
    before = (undisturbed / "checkpoint.pt").read_bytes()
    message = error_of(lambda: fit(undisturbed, config=replace(CONFIG, channels=64, num_classes=11)))
    assert "another flow (channels=32, not 64; num_classes=10, not 11)" in message
    assert (undisturbed / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("damage", ["cut short", "text", "empty", "other keys", "other shapes", "no optimiser"])
def test_a_broken_checkpoint_is_one_error_and_kept(damage: str, undisturbed: Path, tmp_path: Path) -> None:
    state, path = checkpoint(undisturbed), tmp_path / "checkpoint.pt"
    data = (undisturbed / "checkpoint.pt").read_bytes()
    if damage in ("cut short", "text", "empty"):
        path.write_bytes({"cut short": data[: len(data) // 2], "text": b"hello", "empty": b""}[damage])
    else:
        if damage == "other keys":
            state["flow"] = {"weight": torch.zeros(3)}
        elif damage == "other shapes":
            state["average"]["var"] = torch.zeros(3)
        else:
            del state["optimizer"]
        torch.save(state, path)
    before = path.read_bytes()
    message = error_of(lambda: fit(tmp_path))
    assert message == f"{path}: not a checkpoint of this trainer; remove it or give another folder"
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_data_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    out, data = tmp_path / "out", some_digits()
    colour = ImageDataset(data.images.expand(-1, 3, -1, -1).contiguous(), data.labels)
    for message, call in {
        "images are (3, 8, 8), the flow takes (1, 8, 8)": lambda: train(fresh(), colour, SETTINGS, out),
        "batch_size=44: there are only 43 images": lambda: fit(out, replace(SETTINGS, batch_size=44)),
        "noise of std 0.2, but the flow's config has noise_std=0.1": lambda: fit(
            out, replace(SETTINGS, noise=Noise("gaussian", 0.2))
        ),
        "label 9: the flow has classes 0 to 2": lambda: fit(out, config=replace(CONFIG, num_classes=3)),
    }.items():
        assert error_of(call) == message
    assert not out.exists()


def test_a_loss_that_is_not_finite_ends_training_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=50, learning_rate=1e6, clip=1e6, warmup=0, checkpoint_every=1)
    message = error_of(lambda: fit(tmp_path, settings))
    assert "smaller learning rate" in message
    state = checkpoint(tmp_path)
    assert message.startswith(f"step {state['step'] + 1}: loss ")
    assert all(torch.isfinite(tensor).all() for tensor in state["flow"].values())


@pytest.mark.parametrize("gradients", [True, False])
def test_sums_stay_in_float32_where_products_are_in_bfloat16(gradients: bool) -> None:
    """What a layer adds to its input is rounded under autocast; the sum is not."""
    layer = jf.load("fashion-p2").blocks[0].attn_blocks[0]
    x = torch.randn((2, 16, 128), generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.float32
    assert (out - layer(x)).abs().max() < 5e-2
