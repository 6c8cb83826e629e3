"""Where a training run stands, in a file that is checked before anything of it is used."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacobiflow.checks import check_count, check_kind, check_number, short
from jacobiflow.data import ImageDataset
from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.files import write_atomically
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.flows.weights import first_line, load_torch
from jacobiflow.training.config import MOST_STEPS, TrainConfig

CHECKPOINT = "checkpoint.pt"
_REMEDY = "move it away, or give another folder"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What resuming needs: weights, their average, AdamW's state, and what they were made from.

    `settings` are those of `TrainConfig.fixed`, `data` is of `describe`; `None` where an earlier version kept none.
    """

    step: int
    seconds: float
    flow_config: dict[str, Any]
    flow: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict[str, Any]
    settings: dict[str, Any] | None = None
    data: dict[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """The checkpoint in a file. **Raises** `ValueError` where it is none."""
        try:
            state = load_torch(path)
            check_kind("checkpoint", state, dict, "a dict")
            found = cls(**{
                field.name: state[field.name] if field.default is MISSING else state.get(field.name)
                for field in fields(cls)
            })  # fmt: skip
            found._check()
        except Exception as error:  # torch.load documents none, and damage can raise nearly any
            reason = f"no entry {error}" if isinstance(error, KeyError) else first_line(error)
            raise InputValueError(f"{path}: not a checkpoint of this trainer ({reason}); {_REMEDY}") from error
        return found

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        data = io.BytesIO()
        torch.save({field.name: getattr(self, field.name) for field in fields(self)}, data)
        write_atomically(path, data.getvalue())

    def check_run(self, path: Path, flow: ImageFlow, config: TrainConfig, data: dict[str, Any]) -> None:
        """**Raises** `ValueError` where the checkpoint in `path` is of another flow, other settings or other images."""
        others = _differing(self.flow_config, asdict(flow.config))
        if others:
            raise InputValueError(f"{path}: of another flow ({others}); give its settings, or another folder")
        parameters = [tuple(parameter.shape) for parameter in flow.parameters()]
        moments = {i: tuple(entry["exp_avg"].shape) for i, entry in self.optimizer["state"].items()}
        if _shapes(self.flow) != _shapes(flow.state_dict()) or any(
            i >= len(parameters) or shape != parameters[i] for i, shape in moments.items()
        ):
            raise InputValueError(
                f"{path}: not a checkpoint of this trainer (other weights than the flow's); {_REMEDY}"
            )
        # A setting that did not exist yet when the run began was what its default is now.
        kept = {} if self.settings is None else TrainConfig(steps=1).fixed() | self.settings
        others = _differing(kept, config.fixed())
        if others:
            raise InputValueError(
                f"{path}: of a run with other settings ({others}); give its settings, or another folder"
            )
        if self.data not in (None, data):
            raise InputValueError(f"{path}: of a run on other images or labels; give these, or another folder")

    def _check(self) -> None:
        """**Raises** `TypeError` or `ValueError` where a part is of another kind, or cannot be."""
        check_count("step", self.step, least=0, most=MOST_STEPS)
        check_number("seconds", self.seconds)
        check_kind("flow_config", self.flow_config, dict, "a dict")
        for name in ("settings", "data"):
            check_kind(name, getattr(self, name), (dict, type(None)), "a dict")
        json.dumps([self.flow_config, self.settings, self.data])  # nothing but numbers and words
        for name in ("flow", "average"):
            _check_tensors(name, getattr(self, name))
        if _shapes(self.flow) != _shapes(self.average):
            raise InputValueError("weights and their average differ in names or shapes")
        check_kind("optimizer", self.optimizer, dict, "a dict")
        check_kind("optimizer's state", self.optimizer["state"], dict, "a dict")
        for number, entry in self.optimizer["state"].items():
            check_count("parameter", number, least=0)
            _check_tensors(f"parameter {number}", entry)
            count, mean, square = (entry[name] for name in ("step", "exp_avg", "exp_avg_sq"))
            if count.numel() != 1 or not 0 <= float(count) <= self.step or mean.shape != square.shape or len(entry) > 3:
                raise InputValueError(f"parameter {number}: no state of AdamW at step {self.step}")
            if (square < 0).any():
                raise InputValueError(f"parameter {number}: a mean square below 0")
        if bool(self.step) != bool(self.optimizer["state"]) or not self.flow_config:
            raise InputValueError(f"no state of AdamW at step {self.step}, or no config")


def describe(data: ImageDataset, flow: ImageFlow) -> dict[str, Any]:
    """The number and shape of images, and a checksum of them, and of their labels where the flow takes any."""
    digest = hashlib.sha256(data.images.contiguous().numpy().data)
    if flow.config.num_classes and data.labels is not None:
        digest.update(data.labels.contiguous().numpy().data)
    return {"num": len(data), "shape": list(data.images.shape[1:]), "sha256": digest.hexdigest()}


def _check_tensors(name: str, state: Any) -> None:
    check_kind(name, state, dict, "a dict of tensors")
    for key, value in state.items():
        check_kind(f"{name}, {short(key)}", value, Tensor, "a tensor")
        if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
            raise InputTypeError(f"{name}, {short(key)}: {short(value)}; expected dense floating-point values")
        if not value.isfinite().all():
            raise InputValueError(f"{name}, {short(key)}: values that are not finite")


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (value.dtype, *value.shape) for name, value in state.items()}


def _differing(have: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Where `have` says otherwise than `wanted`, in words."""
    names = [name for name in wanted if name in have and have[name] != wanted[name]]
    words = [f"{name}={short(have[name])}, not {short(wanted[name])}" for name in names]
    return "; ".join(words + [f"no {name}" for name in wanted if have and name not in have])
