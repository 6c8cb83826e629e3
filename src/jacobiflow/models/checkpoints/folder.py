"""Model folders: `config.json`, `model.safetensors`, a card, reports and tunings."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial, reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from jacobiflow.blocks.guidance import SamplingSettings
from jacobiflow.errors import CheckpointError, InputError, InputValueError, first_line
from jacobiflow.models.checkpoints.card import format_model_card
from jacobiflow.models.checkpoints.fingerprint import fingerprint
from jacobiflow.models.checkpoints.hub import import_hub
from jacobiflow.models.config import FlowConfig
from jacobiflow.utils import serialization
from jacobiflow.utils.checks import FLOATS, check_kind, format_value
from jacobiflow.utils.files import (
    atomic_path,
    json_bytes,
    read_object,
    regular_file,
    remove_partials,
    write_atomically,
)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
REPORTS = ("report.json", "report-*.json", "tuning.json", "tuning-*.json")  # Each guidance has files of its own.
README = "README.md"
FORMAT_VERSION = 1
MODELS = Path(__file__).parents[2] / "bundled"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)

AnyConfig = TypeVar("AnyConfig", bound=FlowConfig)
AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True)
class ModelFolder:
    """A model folder and its config.json.

    Attributes:
        fields: The entries of the flow's config.
    """

    path: Path
    model_type: str
    fields: Mapping[str, Any]
    recommended: SamplingSettings

    @classmethod
    def open(cls, name: str | Path, **hub: Any) -> ModelFolder:
        """Reads the config of a bundled model, a local folder, or a hub id; `hub` is for `snapshot_download`."""
        path = list_bundled().get(name, Path(name)) if isinstance(name, str) else name
        if not os.path.isdir(path):
            path = _download(str(name), hub)
        file = path / CONFIG
        try:
            entries = serialization.load(file, "model", partial(serialization.decode, dict[str, Any]))
            recommended = serialization.decode(
                SamplingSettings, entries.pop("recommended", {}), f"model {file}: recommended"
            )
        except InputError as error:
            raise CheckpointError(str(error)) from error
        model_type, version = entries.pop("model_type", None), entries.pop("format_version", None)
        if not isinstance(model_type, str) or version != FORMAT_VERSION:
            raise CheckpointError(
                f"model {file}: model_type {model_type!r} in format {version!r}; this release reads format "
                f"{FORMAT_VERSION}"
            )
        return cls(path, model_type, entries, recommended)

    def config(self, config_types: Sequence[type[AnyConfig]]) -> AnyConfig:
        """Returns the flow's config, of the first type that has all entries as fields."""
        entries = self.fields.keys()
        fitting = (kind for kind in config_types if entries <= {entry.name for entry in fields(kind)})
        config_type = next(fitting, config_types[0])
        try:
            config: AnyConfig = serialization.decode(config_type, self.fields)
        except InputError as error:
            raise CheckpointError(f"{self.path / CONFIG}: {error}") from error
        return config

    def state(self) -> dict[str, Tensor]:
        """Reads the tensors."""
        file = self.path / WEIGHTS
        try:
            return load_file(regular_file(file))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: missing or damaged ({first_line(error)}); copy it again") from error


def _download(name: str, hub: dict[str, Any]) -> Path:
    names = ", ".join(list_bundled()) or "none here"
    if name.endswith((".pth", ".pt")) and os.path.exists(name):
        raise CheckpointError(
            f"{format_value(name)}: weights of another code; make a model folder of them first: jacobiflow convert "
            f"{name} --out FOLDER, or from_original in Python"
        )
    if os.path.exists(name) or not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{format_value(name)}: no such model; give a bundled name ({names}), a folder with {CONFIG} and "
            f"{WEIGHTS}, or a hub id 'owner/name'"
        )
    client = import_hub()
    try:
        return Path(client.snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, *REPORTS], **hub))
    except Exception as error:  # The exceptions of its HTTP client differ by version.
        raise CheckpointError(
            f"{format_value(name)} is neither a bundled name ({names}) nor a folder here, and the hub did not provide "
            f"it ({type(error).__name__}: {first_line(error)}); check the id and the connection"
        ) from error


def list_reports(path: Path) -> tuple[Path, ...]:
    """Lists the reports and tunings in a model folder: report.json first."""
    return tuple(file for pattern in REPORTS for file in sorted(path.glob(pattern)) if file.is_file())


def list_bundled() -> dict[str, Path]:
    """Returns the models that come with the package: name to folder."""
    return {file.parent.name: file.parent for file in sorted(MODELS.glob(f"*/{CONFIG}"))}


def check_own_model(path: Path) -> None:
    """Raises CheckpointError if a folder has files under a model's names, but no config.json of this library."""
    if "format_version" not in (read_object(path / CONFIG) or {}):
        for file in (path / CONFIG, path / WEIGHTS, *list_reports(path)):
            if file.exists():
                raise CheckpointError(
                    f"{file}: not of a model that jacobiflow wrote; move it away, or give another folder"
                )


def write_model(flow: Any, path: Path, dtype: torch.dtype | None = None, title: str = "") -> None:
    """Writes a model folder, as `Flow.save_pretrained` documents it.

    If there is no README.md, it writes a model card with `title`, by default the folder's name.
    """
    check_kind("recommended", flow.recommended, SamplingSettings, "SamplingSettings")
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in flow.state_dict().items()}
    check_values(state, f"{path}: not written")
    check_own_model(path)
    weights = fingerprint(state)
    reports = {
        file.name: file.read_bytes()
        for file in flow.report_files
        if (read_object(file) or {}).get("fingerprint") == weights
    }
    document = {"model_type": flow.model_type, "format_version": FORMAT_VERSION, **asdict(flow.config)}
    if flow.recommended != SamplingSettings():
        document["recommended"] = serialization.encode(flow.recommended)
    try:
        path.mkdir(parents=True, exist_ok=True)
        remove_partials(path)
        with atomic_path(path / WEIGHTS) as new_weights, atomic_path(path / CONFIG) as new_config:
            new_weights.write_bytes(save(state, metadata={"format": "pt"}))
            new_config.write_bytes(json_bytes(document, indent=2))
            # A stop between the two renames must not leave old weights with a new config.
            (path / WEIGHTS).unlink(missing_ok=True)
        for name, content in reports.items():
            write_atomically(path / name, content)
        if not os.path.lexists(path / README):
            write_atomically(path / README, format_model_card(flow, title or path.name).encode())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({first_line(error)})") from error


def build(make: Callable[[Any], AnyModule], config: Any, state: dict[str, Tensor], source: str) -> AnyModule:
    """Builds a module with the values of a state dict, which must fit it, in eval mode.

    The module is made on the meta device, so that initial values cost nothing and draw no random numbers. Half
    precision becomes float32. `state` is emptied. A CheckpointError begins with `source`.
    """
    check_values(state, source)
    with torch.device("meta"):
        module = make(config)
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in state.values()), torch.float32)
    # Copies, so that no tensor stays mapped to its file.
    copies = {name: state.pop(name).to(dtype, copy=True, memory_format=torch.contiguous_format) for name in list(state)}
    try:
        module.load_state_dict(copies, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{source}: does not fit the config: {' '.join(str(error).split())}") from None
    return module.eval()


def check_values(
    state: Mapping[str, Tensor], source: str, dtypes: Sequence[torch.dtype] = FLOATS, checks_values: bool = True
) -> None:
    """Raises CheckpointError if an entry is not a dense tensor of these dtypes, or its values cannot be weights.

    If `checks_values` is False, the values are not read from the file.
    """

    def flaw(name: str, tensor: Tensor) -> str:
        if tensor.is_nested or tensor.layout != torch.strided or tensor.is_meta:
            return "is not a dense tensor with values"
        if tensor.dtype not in dtypes:
            return f"is of {tensor.dtype}"
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            return "has more values than the file stores"
        if checks_values and not tensor.isfinite().all():
            return "has non-finite values"
        return "has values that are not positive" if checks_values and name == "var" and not (tensor > 0).all() else ""

    flaws = [f"{name} {text}" for name, tensor in state.items() if (text := flaw(name, tensor))]
    if flaws:
        raise CheckpointError(f"{source}: {'; '.join(flaws)}")


def check_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Returns the floating-point dtype of that name, or `None`."""
    check_kind("dtype", dtype, str | torch.dtype | None, "a dtype, such as torch.float64, its name, or None")
    number = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if number is None or number in FLOATS:
        return number
    names = ", ".join(str(name).removeprefix("torch.") for name in FLOATS)
    raise InputValueError(f"dtype={dtype!r}: give one of {names}")
