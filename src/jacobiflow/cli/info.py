"""`jacobiflow info`: a model and this machine, or the problems of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from jacobiflow.cli import options
from jacobiflow.cli.screen import one_line, show_table

_LIBRARIES = ("zuko", "nflows", "normflows", "pyro-ppl", "sbi")  # whose flows `accelerate` takes
_ROUND_TRIP = 1e-3  # largest change of a latent that is decoded and encoded
_CHECK = "Instead, check a model folder, a sample folder or a training folder completely."


def info(
    model: options.Model = "fashion-p2",
    check: Annotated[str | None, Option(help=_CHECK)] = None,
) -> dict[str, Any]:
    """Show a model and this machine, or check a folder.

    Prints the model's shape, size and recommended settings, how its exact loops run here, and the versions: please add
    what --json writes to a report of a problem. With --check, each line is a problem with its remedy, and the exit code
    is 2 if there is one.

    Example: jacobiflow info --model digits-p1
    """
    if check is not None:
        return _check(check)
    from dataclasses import asdict
    from importlib.metadata import distributions

    from jacobiflow import native
    from jacobiflow.flows.guidance import SamplingSettings
    from jacobiflow.measuring import machine

    flow = options.load_model(model)
    config = flow.config
    model_values = {
        "model": model, "flow": flow.model_type, **asdict(config), "num_tokens": config.num_tokens,
        "token_channels": config.token_channels,
        "recommended": "none" if flow.recommended == SamplingSettings() else options.settings_text(flow.recommended),
        "parameters": sum(p.numel() for p in flow.parameters()),
    }  # fmt: skip
    libraries = {each.name: each.version for each in distributions() if each.name in _LIBRARIES}
    machine_values = {"native_loops": native.describe(), **machine(), **libraries}
    for title, values in (("Model", model_values), ("This machine", machine_values)):
        print(title)
        show_table(("", ""), [(name, str(value)) for name, value in values.items()], text=(0, 1))
    return model_values | machine_values


def _check(path: str) -> dict[str, Any]:
    """Prints the problems of a folder."""
    from jacobiflow import training
    from jacobiflow.errors import InputValueError
    from jacobiflow.files import MANIFEST
    from jacobiflow.flows.folder import CONFIG, WEIGHTS, bundled
    from jacobiflow.storage import SampleFolder

    folder = bundled().get(path, Path(path))
    kinds = {
        "a model": ((CONFIG, WEIGHTS), _model_problems),
        "samples": ((MANIFEST,), lambda path: SampleFolder.open(path).problems()),
        "a training run": (("checkpoint.pt",), training.problems),
    }
    content = [name for name, (files, _) in kinds.items() if any((folder / file).exists() for file in files)]
    if not content:
        raise InputValueError(f"{path}: no model, samples or training run; give the folder of one, or a model's name")
    problems = [one_line(problem) for name in content for problem in kinds[name][1](folder)]
    print("\n".join(problems) if problems else f"{path}: no problem; checked {' and '.join(content)}")
    return {"path": path, "checked": content, "problems": problems}


def _model_problems(folder: Path) -> Iterator[str]:
    """Problems of the files, then of the reports, then of a round trip through the flow."""
    import warnings

    import torch

    from jacobiflow.calibration import Report
    from jacobiflow.errors import CheckpointError, InputError
    from jacobiflow.flows.image_flow import load
    from jacobiflow.latents import draw_latents
    from jacobiflow.sampling import decode
    from jacobiflow.strategy import Tuning

    try:
        flow = load(folder)
    except CheckpointError as error:
        yield str(error)
        return
    for file in flow.report_files:
        kind: type[Report | Tuning] = Tuning if file.name.startswith("tuning") else Report
        try:
            kind.load(file).check(flow)
        except InputError as error:
            yield str(error)
    z = draw_latents(1, flow.config.num_tokens, flow.config.token_channels, seed=0)
    labels = torch.zeros(1, dtype=torch.int64) if flow.config.num_classes else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an overflow, which the line below reports
        images = decode(flow, z, labels, strategy="sequential", certify=False).images
    change = float((flow.encode(images, labels)[0] - z).abs().max())
    if not change <= _ROUND_TRIP:  # or NaN
        yield (
            f"{folder}: a latent that is decoded and encoded again is off by {change:.1e}, more than {_ROUND_TRIP:g}; "
            "the weights are damaged or badly conditioned: copy the folder again, or train it on"
        )
