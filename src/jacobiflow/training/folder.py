"""What is in a folder that a run trains in: whether it is of this run, and what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jacobiflow.errors import InputError, InputValueError
from jacobiflow.files import partials
from jacobiflow.flows.folder import CONFIG, WEIGHTS, holding, reports_in
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.flows.registry import find_flow
from jacobiflow.training.checkpoint import CHECKPOINT, Checkpoint
from jacobiflow.training.config import TrainConfig
from jacobiflow.training.metrics import METRICS, foreign_lines, read_metrics


def check_folder(out: Path, flow: ImageFlow, config: TrainConfig, data: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint in `out`, of a run with this flow, settings and images; `None` where there is none.

    **Raises** `ValueError` where it is of another run or broken, or the folder has metrics or a model that are not of
    this run.
    """
    path, remedy = out / CHECKPOINT, "move it away, or give another folder"
    state = Checkpoint.read(path) if os.path.lexists(path) else None
    if state is not None:
        state.check_run(path, flow, config, data)
    log = out / METRICS
    if os.path.lexists(log):
        lines = foreign_lines(log)
        if lines:
            raise InputValueError(f"{log}: line {lines[0]} is not of this trainer; {remedy}")
        last = max((figures["step"] for figures in read_metrics(out)), default=0)
        if state is None and last > config.checkpoint_every:
            raise InputValueError(f"{log}: of {last} steps, without their {CHECKPOINT}; bring it back, or {remedy}")
    if state is None:
        for file in (out / CONFIG, out / WEIGHTS, *reports_in(out)):
            if os.path.lexists(file):
                raise InputValueError(f"{file}: of a model, without the {CHECKPOINT} of its training; {remedy}")
    model = holding(out)
    if model is not None and (model.model_type != flow.model_type or model.config(type(flow.config)) != flow.config):
        raise InputValueError(f"{out / CONFIG}: of another flow than this run's; {remedy}")
    return state


def problems(path: Path) -> Iterator[str]:
    """What is wrong with the training in a folder, and what to do: a line each; of its model only whether it fits.

    `jacobiflow.flows.problems` has what is wrong with the model itself.
    """
    state = None
    if not os.path.lexists(path / CHECKPOINT):
        yield f"{path / CHECKPOINT}: missing; bring it back, or train in another folder"
    else:
        try:
            state = Checkpoint.read(path / CHECKPOINT)
        except InputError as error:
            yield str(error)
    yield from _problems_of_metrics(path / METRICS, state)
    if state is not None and os.path.lexists(path / CONFIG):
        try:
            model = holding(path)
            flow = None if model is None else find_flow(model.model_type)
            if model is not None and flow is not None and asdict(model.config(flow.config_type)) != state.flow_config:
                yield f"{path / CONFIG}: of another flow than {CHECKPOINT}; move one of them away"
        except InputError:
            pass  # for the model's own problems
    for name in (CHECKPOINT, METRICS):
        for left in partials(path, name):
            yield f"{left}: left by a run that was killed; train on, or remove it"


def _problems_of_metrics(path: Path, state: Checkpoint | None) -> Iterator[str]:
    try:
        lines = foreign_lines(path)
        steps = {figures["step"] for figures in read_metrics(path.parent)}
    except OSError as error:
        yield f"{path}: cannot be read ({error.strerror}); training goes on without the figures of earlier steps"
        return
    if lines:
        yield f"{path}: {len(lines):,} lines are not of this trainer, the first is line {lines[0]:,}; remove them"
    if state is not None and len({step for step in steps if step <= state.step}) < state.step:
        yield f"{path}: lacks some of the {state.step:,} steps of {CHECKPOINT}; bring them back where you have a copy"
