"""Training: a run that was interrupted, killed or resumed ends bit for bit as one that was not."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as read_file
from safetensors.torch import save
from torch import Tensor

import jacobiflow as jf
from jacobiflow.data import ImageDataset
from jacobiflow.training import TrainingConfig, TrainMetrics, read_metrics, train, trainer
from jacobiflow.training.checkpoint import CHECKPOINT, last_step
from jacobiflow.training.folder import problems
from tests.helpers.checkpoints import assert_same
from tests.helpers.running import run_line
from tests.helpers.training_runs import (
    CONFIG,
    SETTINGS,
    assert_same_run,
    checkpoint,
    contents,
    error_of,
    fit,
    fresh,
    interrupt_at,
    some_digits,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = "--images digits --image-size 8 --width 16 --head-dim 8 --blocks 1 --layers 1"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A run to the end, of a flow that learns its prior."""
    out = tmp_path_factory.mktemp("undisturbed")
    fit(out)
    return out


def test_a_resumed_run_ends_as_an_undisturbed_one(undisturbed: Path, tmp_path: Path) -> None:
    for step in (1, 8):
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path, on_step=interrupt_at(step))
        assert last_step(tmp_path) == step + 1
        assert jf.load(tmp_path).recommended == jf.SamplingSettings(denoise=1.0), "it can be sampled meanwhile"
    (tmp_path / ".tmpRkSHiv").write_bytes(b"of safetensors, whose process was killed")
    fit(tmp_path)
    fit(tmp_path, on_step=interrupt_at(*range(14)))  # no step is left to do
    assert_same_run(tmp_path, undisturbed)
    assert {*os.listdir(tmp_path)} == {*os.listdir(undisturbed)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_terminated_command_leaves_a_checkpoint(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, write = signal.getsignal(number), trainer.write_checkpoint
    monkeypatch.setattr(trainer, "write_checkpoint", lambda *state: (write(*state), signal.raise_signal(number)))
    shown = run_line(f"train {SIZE} --no-bf16 --steps 100000 --checkpoint-every 5 --out {tmp_path}", capsys)
    line = f"interrupted: checkpoint at step {last_step(tmp_path):,} of 100,000 in {tmp_path}; "
    line += "run the same command to resume"
    assert (shown.code, shown.err.splitlines()[-1]) == (130, line)
    assert signal.getsignal(number) is handler
    assert [report.step for report in read_metrics(tmp_path)] == list(range(1, last_step(tmp_path) + 1))


def test_the_loss_falls_and_the_averaged_flow_is_the_model_folder(tmp_path: Path) -> None:
    reports: list[TrainMetrics] = []
    sheets: list[tuple[int, Tensor]] = []
    settings = replace(SETTINGS, steps=40, learning_rate=8e-3, ema_decay=0.9, sample_every=20, checkpoint_every=30)
    config = replace(CONFIG, nvp=True, noise_std=1e-4)

    def on_sample(flow: jf.TarFlow, step: int) -> None:
        sheets.append((step, flow.blocks[0].proj_in.weight.clone()))

    average = fit(tmp_path, settings, config, on_step=reports.append, on_sample=on_sample, held_out=some_digits())
    losses = [report.loss for report in reports]
    assert sum(losses[-8:]) / 8 < sum(losses[:8]) / 8 - 0.5
    for report in reports:  # the loss leaves out the constant of the normal density
        nats = report.loss + 0.5 * math.log(2 * math.pi)
        assert report.bits_per_dim == pytest.approx(nats / math.log(2) + math.log2(128))
        assert math.isfinite(report.grad_norm) and report.grad_norm > 0
    assert read_metrics(tmp_path) == reports
    assert [step for step, _ in sheets] == [20, 40]
    assert torch.equal(sheets[-1][1], average.blocks[0].proj_in.weight)
    assert_same(dict(jf.load(tmp_path).state_dict()), dict(average.state_dict()))
    images, labels = some_digits().batch(slice(None))
    with torch.no_grad():
        z, log_det = average.encode(images, labels, is_scaled=False)
    held_out = {report.step: report.held_out_loss for report in reports if report.held_out_loss is not None}
    assert list(held_out) == [30, 40]
    assert held_out[40] == pytest.approx(float(0.5 * z.square().mean() - log_det.mean() / 64), abs=1e-3)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, nvp=True)])
def test_every_parameter_is_trained_and_the_average_follows(config: jf.TarFlowConfig, tmp_path: Path) -> None:
    flow = fresh(config)
    before = {name: parameter.detach().clone() for name, parameter in flow.named_parameters()}
    want = dict(before)

    def on_step(report: TrainMetrics) -> None:
        decay = min(0.5, report.step / (9 + report.step))
        for name, parameter in flow.named_parameters():
            want[name] = decay * want[name] + (1 - decay) * parameter.detach()

    average = train(flow, some_digits(), replace(SETTINGS, ema_decay=0.5, weight_decay=0.0), tmp_path, on_step=on_step)
    for name, parameter in average.named_parameters():
        assert torch.allclose(parameter, want[name], atol=1e-6), name
        assert not torch.equal(parameter, before[name]), name
        assert not parameter.requires_grad
    for block in flow.blocks:
        assert block.proj_out.weight.ne(0).all(), "an output that starts at 0 stays there"


def test_steps_are_of_new_orders_changes_and_dropped_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch has every image once; without scales, the prior's variance is the moving average of z^2."""
    batches: list[tuple[Tensor, Tensor]] = []
    noises, marks = set[float](), set[int]()
    want = torch.ones(16, 4)
    encode = jf.TarFlow.encode

    def recorded(self: jf.TarFlow, images: Tensor, labels: Tensor, is_scaled: bool) -> tuple[Tensor, Tensor]:
        levels = ((images + 1) * 127.5).round().long()
        batches.append((levels[:, 0, 0, 0], labels))
        noises.add(float(images[0, 0, 0, 0] - images[0, 0, 0, 1]))
        marks.update(levels[:, 0, 7, 7].tolist())
        z, log_det = encode(self, images, labels, is_scaled=is_scaled)
        want.mul_(0.9).add_(0.1 * z.detach().square().mean(dim=0))
        return z, log_det

    def marked(image: Tensor) -> Tensor:
        image[0, 7, 7] = torch.randint(256, ())
        return image

    monkeypatch.setattr(jf.TarFlow, "encode", recorded)
    grey = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).expand(40, 1, 8, 8).contiguous()
    config, settings = replace(CONFIG, noise_std=1e-4), replace(SETTINGS, steps=60, label_dropout=0.25)
    average = train(fresh(config), ImageDataset(grey, torch.arange(40) % 10), settings, tmp_path, transform=marked)
    seen, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    orders = seen.view(12, 40)
    assert (orders.sort().values == torch.arange(40)).all()
    assert len(orders.unique(dim=0)) == 12, "epochs share their order"
    assert len(noises) > 50 and len(marks) > 150, "steps share their noise or changes"
    dropped = labels < 0
    assert torch.equal(labels[~dropped], seen[~dropped] % 10)
    assert dropped.double().mean() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / len(labels)))
    assert torch.allclose(average.var, want, rtol=1e-5)
    assert not torch.allclose(average.var, torch.ones(()), atol=0.2)


def test_a_text_is_trained_by_its_states_and_a_dropped_one_by_the_empty_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[tuple[Tensor, Tensor]] = []
    encode = jf.STARFlow.encode

    def recorded(self: jf.STARFlow, images: Tensor, states: Tensor, is_scaled: bool) -> tuple[Tensor, Tensor]:
        batches.append((((images.mean(dim=(1, 2, 3)) + 1) * 127.5).round().long(), states))
        return encode(self, images, states, is_scaled=is_scaled)

    monkeypatch.setattr(jf.STARFlow, "encode", recorded)
    shape = {"text_tokens": 2, "text_dim": 3, "head_dim": 20, "noise_std": 1e-3}
    flow = jf.STARFlow(jf.STARFlowConfig(1, 8, 4, 20, (1,), **shape))  # type: ignore[arg-type]
    states = torch.randn(5, 2, 3)
    flow.blocks[-1].null_text.copy_(states[4])
    grey = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).expand(40, 1, 8, 8).contiguous()
    data = [(image, states[i % 4]) for i, image in enumerate(grey)]
    train(flow, data, replace(SETTINGS, steps=20, label_dropout=0.25), tmp_path)
    seen, given = (torch.cat(column) for column in zip(*batches, strict=True))
    dropped = (given == states[4]).all(dim=(1, 2))
    assert torch.equal(given[~dropped], states[seen[~dropped] % 4])
    assert dropped.double().mean() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / len(given)))


def test_tokens_with_numbers_are_trained_without_noise(tmp_path: Path) -> None:
    """The flow learns that its data are their context, moved and scaled."""
    numbers = torch.randn(200, 2)
    tokens = numbers[:, :1, None] + 0.1 * torch.randn(200, 3, 1, generator=torch.Generator().manual_seed(0))
    config = jf.TokenConfig(3, 1, 16, num_blocks=2, layers_per_block=1, head_dim=8, context_dim=2)
    settings = replace(SETTINGS, steps=60, batch_size=50, learning_rate=3e-2, bf16=True)
    torch.manual_seed(0)
    flow = train(jf.TarFlow(config), list(zip(tokens, numbers, strict=True)), settings, tmp_path)
    entropy = 3 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.1))
    with torch.no_grad():
        assert -flow.log_prob(tokens, numbers).mean() < entropy + 2
    last = read_metrics(tmp_path)[-1]
    assert last.bits_per_dim is None and flow.recommended == jf.SamplingSettings()


@pytest.mark.parametrize("change", [{"accumulation": 3, "recompute": True}, {"workers": 2}])
def test_what_saves_memory_or_time_changes_no_result(change: Any, undisturbed: Path, tmp_path: Path) -> None:
    flow, calls = fresh(), list[int]()
    flow.blocks[0].attn_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    train(flow, some_digits(), replace(SETTINGS, **change), tmp_path)
    assert len(calls) == SETTINGS.steps * (6 if "recompute" in change else 1)
    have, want = (read_file(folder / "model.safetensors") for folder in (tmp_path, undisturbed))
    assert max(float((have[name] - want[name]).abs().max()) for name in want if "qkv.bias" not in name) < 1e-5
    for have_step, want_step in zip(read_metrics(tmp_path), read_metrics(undisturbed), strict=True):
        assert have_step.loss == pytest.approx(want_step.loss, abs=2e-6)


def test_the_learning_rate_warms_up_and_falls_by_a_cosine(undisturbed: Path) -> None:
    settings = TrainingConfig(steps=110, learning_rate=0.02, warmup=10)
    assert settings.rate(0) == pytest.approx(0.002)
    assert settings.rate(9) == settings.rate(10) == pytest.approx(0.02)
    assert settings.rate(35) == pytest.approx(1e-6 + (0.02 - 1e-6) * (2 + math.sqrt(2)) / 4)
    assert settings.rate(110) == settings.rate(1000) == pytest.approx(1e-6)
    assert replace(settings, warmup=0).rate(0) == pytest.approx(0.02)
    rates = [report.rate for report in read_metrics(undisturbed)]
    assert rates == pytest.approx([SETTINGS.rate(step) for step in range(12)], rel=1e-12)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    out, data = tmp_path / "out", some_digits()
    colour = ImageDataset(data.images.expand(-1, 3, -1, -1).contiguous(), data.labels)
    parts = "batch_size=8: less than a sample for each of 1 processes and 9 parts; give at least 9"
    assert error_of(lambda: train(fresh(), [], SETTINGS, out)) == "data: has no samples; give at least one"
    assert error_of(partial(fit, out, replace(SETTINGS, accumulation=9))) == parts
    label = "label 9: this flow has classes 0 to 2 (below 0: no class)"
    assert error_of(partial(fit, out, config=replace(CONFIG, num_classes=3))) == label
    message = "a tensor (1, 3, 8, 8) of torch.float32: give a torch.Tensor of floating-point numbers (N, 1, 8, 8)"
    assert error_of(lambda: train(fresh(), colour, SETTINGS, out)) == f"data={message}"
    assert error_of(partial(fit, out, held_out=colour)) == f"held_out={message}"
    assert "label 10: this flow has" in error_of(partial(fit, out, held_out=replace(data, labels=data.labels + 1)))
    with pytest.raises(TypeError, match="config='x' of type str: give "):
        train(fresh(), data, "x", out)  # type: ignore[arg-type]
    assert not out.exists()
    for name, words in (("notes.txt", "holds files that"), ("config.json", "config.json: not of a model")):
        (tmp_path / name).write_text("mine")
        before = contents(tmp_path)
        assert words in error_of(lambda: fit(tmp_path))
        assert contents(tmp_path) == before


def test_a_batch_has_at_most_all_samples(tmp_path: Path) -> None:
    for size in (43, 44):
        fit(tmp_path / str(size), replace(SETTINGS, steps=2, batch_size=size))
    assert_same(checkpoint(tmp_path / "43"), checkpoint(tmp_path / "44"))


def test_a_loss_that_is_not_finite_ends_training_and_keeps_the_last_step(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=50, learning_rate=1e6, max_grad_norm=1e6, warmup=0, checkpoint_every=1)
    message = error_of(lambda: fit(tmp_path, settings))
    assert "smaller learning rate" in message
    assert message.startswith(f"step {last_step(tmp_path) + 1}: loss ")
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint(tmp_path).values())


def test_a_step_is_kept_if_its_samples_or_the_next_checkpoint_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise SafetensorError("no space")

    settings = replace(SETTINGS, steps=2, sample_every=1, checkpoint_every=1)
    with pytest.raises(SafetensorError):
        train(fresh(), some_digits(), settings, tmp_path, on_sample=fail)
    assert last_step(tmp_path) == 1
    monkeypatch.setattr("jacobiflow.models.checkpoints.tensors.save_file", fail)
    with pytest.raises(jf.InputError, match=r"cannot be written \(.*no space: '.*/model\.safetensors'\)$"):
        fit(tmp_path, settings)
    assert last_step(tmp_path) == 1


def test_a_run_without_a_checkpoint_may_begin_again_with_other_settings(undisturbed: Path, tmp_path: Path) -> None:
    run, settings = Path(shutil.copytree(undisturbed, tmp_path / "run")), replace(SETTINGS, steps=3, seed=1)
    (run / "checkpoint.safetensors").unlink()
    fit(run, settings)
    fit(tmp_path / "new", settings)
    assert_same_run(run, tmp_path / "new")


def test_other_data_and_problems_are_named(undisturbed: Path, tmp_path: Path) -> None:
    run, data = Path(shutil.copytree(undisturbed, tmp_path / "run")), some_digits()
    assert list(problems(run)) == []
    message = f"{run}: holds training of batch size 8, not 3; seed 0, not 1; use its settings, data and random changes"
    assert error_of(partial(fit, run, replace(SETTINGS, seed=1, batch_size=3))).startswith(message)
    other = ImageDataset(data.images, data.labels.flip(0), tuple("abcdefghij"))
    message = error_of(partial(train, fresh(), other, SETTINGS, run))
    assert "holds training of classes [], not ['a', " in message and "; different data or transform; use" in message
    assert "of different data or transform; use" in error_of(partial(fit, run, transform=lambda image: image.flip(1)))
    log = run / "metrics.jsonl"
    log.write_text("mine\n")
    (run / "manifest.json").write_bytes(b"mine")
    manifest, metrics = problems(run)
    assert (
        manifest == f"{run}/manifest.json: damaged; restore it, or give another folder, or overwrite or remove this one"
    )
    assert metrics.startswith(f"{log}: not of this trainer")


def test_a_damaged_checkpoint_is_refused_and_runs_no_code(undisturbed: Path, tmp_path: Path) -> None:
    """As `info --check` says. A pickle would create a file."""
    planted = pickle.dumps(type("Planted", (), {"__reduce__": lambda self: (Path.touch, (tmp_path / "ran",))})())
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    file = run / CHECKPOINT
    content, tensors = file.read_bytes(), read_file(file)

    def changed(**change: Tensor) -> bytes:
        return save({name: change.get(name[5:], x) for name, x in tensors.items()}, {"step": "12"})

    var = tensors["flow.var"]
    damages = {content[:-9]: "damaged", planted: "damaged", changed(var=var / 0): "non-finite"}
    for damage, words in damages.items():
        file.write_bytes(damage)
        assert words in error_of(lambda: fit(run)) and words in next(problems(run))
    for damage in (changed(var=torch.ones(16, 1)), changed(var=var.double()), save({"more": var}, {"step": "12"})):
        file.write_bytes(damage)
        assert "damaged, or of another flow (" in error_of(lambda: fit(run))
    assert not (tmp_path / "ran").exists()
