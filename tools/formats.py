"""Writes a small sample of each kind of saved file to tests/data/formats: `make formats`.

The name of a sample ends in the version of its format. Samples of earlier versions stay as they are, and so does what
expected.json says of them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks import ROOT
from jacobiflow.calibration.measure import CalibrationJob
from jacobiflow.data import ImageDataset
from jacobiflow.evaluation.job import EvaluationJob, EvaluationResult
from jacobiflow.jobs import run
from jacobiflow.models.checkpoints.folder import FORMAT_VERSION
from jacobiflow.sampling.folder.job import SampleJob
from jacobiflow.training import TrainingConfig, checkpoint, folder, read_metrics, train
from jacobiflow.training.state import TrainState
from jacobiflow.utils import files, serialization

FOLDER = ROOT / "tests/data/formats"
EXPECTED = FOLDER / "expected.json"
_CONFIG = jf.TarFlowConfig(1, 4, 2, 16, 2, 1, num_classes=2, head_dim=16, expansion=1, noise_std=0.1)
_TRAINING = TrainingConfig(2, batch_size=4, warmup=1, bf16=False)
_MACHINE = {"processor": "a processor", "device": "cpu"}


def _make_flow() -> jf.TarFlow:
    """A flow whose blocks are no identities."""
    torch.manual_seed(0)
    flow = jf.TarFlow(_CONFIG).eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    flow.classes = ("cat", "dog")
    return flow


def _images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (8, 1, 4, 4), dtype=torch.uint8, generator=generator), torch.arange(8) % 2


def _write_samples(path: Path) -> None:
    jf.sample_to_folder(
        _make_flow(), 4, path, [0, 1, 0, 1], strategy="window:2", sensitivity=True, batch_size=2, shard_size=2
    )


def _write_evaluation(path: Path) -> None:
    samples = path.with_name(f"samples-v{SampleJob.version}")
    job = EvaluationJob(
        _make_flow(), "a model", samples=samples, images=None, features="none", inception=None, statistics=None,
        paired=2, test_images=1, batch_size=4, seed=0,
    )  # fmt: skip
    run(job, path)


def _write_calibration(path: Path) -> None:
    images, labels = _images()
    jf.calibrate(_make_flow(), images / 127.5 - 1, labels, segments=2, num_convergence_samples=2, out=path)


def _write_model(path: Path) -> None:
    flow = _make_flow()
    flow.recommended = jf.SamplingSettings(jf.Guidance(2, attn_temperature=1.2), denoise=0.5)
    flow.save_pretrained(path)


def _write_checkpoint(path: Path) -> None:
    images, labels = _images()
    train(_make_flow(), ImageDataset(images, labels, ("cat", "dog")), _TRAINING, path)
    shutil.rmtree(path / "tensorboard", ignore_errors=True)


def _write_report(path: Path) -> None:
    report = path.with_name(f"calibration-v{CalibrationJob.version}") / CalibrationJob.result_name
    jf.CalibrationReport.load(report).save(path)


def _write_strategy(path: Path) -> None:
    solvers = (jf.Solver(jf.Segments(2), jf.Bf16Sweeps(1), jf.Stopping(3)), jf.Solver(jf.Sequential()))
    jf.Strategy(solvers, tolerance=0.01).save(path)


def _sum(tensors: dict[str, Tensor]) -> dict[str, float]:
    return {name: round(float(tensor.double().sum()), 4) for name, tensor in sorted(tensors.items())}


def _read_samples(path: Path) -> dict[str, Any]:
    samples = jf.SampleFolder.open(path)
    outcome, strategy = samples.outcome(), samples.strategy()
    return {
        "problems": samples.problems(), "num": samples.spec.num, "shape": samples.spec.shape,
        "classes": samples.spec.classes, "seed": samples.spec.seed, "solvers": len(strategy.solvers),
        "images": [int(samples.images(i).sum()) for i in range(samples.spec.num_shards)],
        "labels": [_list(samples.labels(i)) for i in range(samples.spec.num_shards)],
        "residual": _list(samples.residual()), "log_prob": _list(samples.log_prob()),
        "sensitivity": _list(samples.sensitivity()), "fallback": _list(samples.used_fallback()),
        "network_calls": outcome.network_calls, "sweeps": outcome.sweeps,
    }  # fmt: skip


def _list(values: Tensor | None) -> list[Any] | None:
    return None if values is None else values.tolist()


def _read_evaluation(path: Path) -> dict[str, Any]:
    store = EvaluationJob.store(path)
    result = serialization.decode(EvaluationResult, store.read_result())
    assert result.scores.paired is not None and result.samples is not None
    spec = store.read_spec() or {}
    return {"model": spec["model"], "num": result.samples.num, "paired": asdict(result.scores.paired)}


def _read_calibration(path: Path) -> dict[str, Any]:
    store = CalibrationJob.store(path)
    spec = store.read_spec() or {}
    return {"segments": spec["segments"], "crm": jf.CalibrationReport.load(path / CalibrationJob.result_name).crm}


def _read_model(path: Path) -> dict[str, Any]:
    flow = jf.load(path)
    settings = {"classes": flow.classes, "recommended": asdict(flow.recommended)}
    return {"kind": type(flow).__name__, "config": asdict(flow.config), **settings, "weights": _sum(flow.state_dict())}


def _read_checkpoint(path: Path) -> dict[str, Any]:
    spec, state = folder._job_store(path).read_spec() or {}, TrainState(jf.load(path), _TRAINING).tensors()
    checkpoint.read_checkpoint(path, state)
    losses = [metrics.loss for metrics in read_metrics(path)]
    return {"step": checkpoint.last_step(path), "spec": sorted(spec), "losses": losses, "tensors": _sum(state)}


def _read_report(path: Path) -> dict[str, Any]:
    report = jf.CalibrationReport.load(path)
    guesses = [report.best_guess(i) for i in range(report.num_blocks)]
    return {"crm": report.crm, "igm": report.igm, "guesses": guesses, "settings": asdict(report.settings)}


def _read_strategy(path: Path) -> dict[str, Any]:
    strategy = jf.Strategy.load(path)
    return {"tolerance": strategy.tolerance, "solvers": [repr(solver) for solver in strategy.solvers]}


KINDS: dict[str, tuple[str, Callable[[Path], None], Callable[[Path], dict[str, Any]]]] = {
    "samples": (f"v{SampleJob.version}", _write_samples, _read_samples),
    "evaluation": (f"v{EvaluationJob.version}", _write_evaluation, _read_evaluation),
    "calibration": (f"v{CalibrationJob.version}", _write_calibration, _read_calibration),
    "model": (f"v{FORMAT_VERSION}", _write_model, _read_model),
    "checkpoint": (f"v{checkpoint.FORMAT_VERSION}", _write_checkpoint, _read_checkpoint),
    "report": (f"v{jf.CalibrationReport._version}.json", _write_report, _read_report),
    "strategy": (f"v{jf.Strategy._version}.json", _write_strategy, _read_strategy),
}
"""Each kind with the version of its format, a function that writes a sample, and one that reads it."""


def read(path: Path) -> dict[str, Any]:
    """What the library reads from a sample, as JSON; the message if it refuses the sample."""
    try:
        values = KINDS[path.name.partition("-")[0]][2](path)
    except jf.InputError as error:
        values = {"refused": str(error).replace(str(path), path.name)}
    return json.loads(json.dumps(values))


def current() -> list[str]:
    """The names of the samples of today's versions."""
    return [f"{kind}-{suffix}" for kind, (suffix, _, _) in KINDS.items()]


def write() -> None:
    """Writes the samples of today's versions, and what is read from them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    for name, (_, write_sample, _) in zip(current(), KINDS.values(), strict=True):
        path = FOLDER / name
        shutil.rmtree(path, ignore_errors=True)
        write_sample(path)
        for file in path.glob("*"):
            if file.name.startswith("."):
                file.unlink()  # of a lock
            elif "machine" in (content := files.read_object(file) or {}):
                files.write_json(file, content | {"machine": _MACHINE})
    for path in FOLDER.iterdir():
        if path != EXPECTED and (path.name in current() or path.name not in expected):
            expected[path.name] = read(path)
    text = json.dumps(dict(sorted(expected.items())), indent=1)
    EXPECTED.write_text(re.sub(r"\[[^][{}]*\]", lambda match: " ".join(match[0].split()), text) + "\n")


if __name__ == "__main__":
    write()
