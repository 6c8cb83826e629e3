"""Model folders: `config.json`, `model.safetensors`, a card and reports."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from jacobiflow.blocks.guidance import SamplingSettings
from jacobiflow.errors import CheckpointError, InputError, first_line
from jacobiflow.models.checkpoints.card import format_model_card
from jacobiflow.models.checkpoints.fingerprint import fingerprint
from jacobiflow.models.checkpoints.original import read_name
from jacobiflow.models.checkpoints.tensors import check_values, map_tensors, write_tensors
from jacobiflow.models.config import FlowConfig
from jacobiflow.utils import serialization
from jacobiflow.utils.checks import check_kind, format_value
from jacobiflow.utils.files import atomic_path, json_bytes, read_object, remove_partials, write_atomically

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
REPORTS = ("report.json", "report-*.json")  # Each guidance has files of its own.
README = "README.md"
FORMAT_VERSION = 2
_NAMES_OF_VERSION_1 = {"channels": "width", **{f"{x}_channels": f"{x}_dim" for x in ("token", "context", "text")}}
MODELS = Path(__file__).parents[2] / "bundled"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)

AnyConfig = TypeVar("AnyConfig", bound=FlowConfig)
AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True)
class ModelFolder:
    """A model folder and its config.json.

    Attributes:
        fields: The entries of the flow's config.
        classes: The names of the classes; empty without names.
    """

    path: Path
    model_type: str
    fields: Mapping[str, Any]
    recommended: SamplingSettings
    classes: tuple[str, ...] = ()

    @classmethod
    def open(cls, name: str | Path, **hub: Any) -> ModelFolder:
        """Reads the config of a bundled model, a local folder, or a hub id; `hub` is for `snapshot_download`."""
        path = list_bundled().get(name, Path(name)) if isinstance(name, str) else name
        if not os.path.isdir(path):
            path = _download(str(name), hub)
        file = path / CONFIG
        with checkpoint_errors():
            entries = serialization.load(file, "model", partial(serialization.decode, dict[str, Any]))
            recommended = serialization.decode(
                SamplingSettings, entries.pop("recommended", {}), f"model {file}: recommended"
            )
            classes = serialization.decode(tuple[str, ...], entries.pop("classes", []), f"model {file}: classes")
        model_type, version = entries.pop("model_type", None), entries.pop("format_version", None)
        if version == 1:
            entries, version = {_NAMES_OF_VERSION_1.get(name, name): entries[name] for name in entries}, FORMAT_VERSION
        if not isinstance(model_type, str) or version != FORMAT_VERSION:
            raise CheckpointError(
                f"model {file}: model_type {model_type!r} in format {version!r}; this release reads format "
                f"{FORMAT_VERSION}"
            )
        return cls(path, model_type, entries, recommended, classes)

    def config(self, config_types: Sequence[type[AnyConfig]]) -> AnyConfig:
        """Returns the flow's config, of the first type that has all entries as fields."""
        entries = self.fields.keys()
        fitting = (kind for kind in config_types if entries <= {entry.name for entry in fields(kind)})
        config_type = next(fitting, config_types[0])
        with checkpoint_errors(f"{self.path / CONFIG}: "):
            config: AnyConfig = serialization.decode(config_type, self.fields)
        return config

    def state(self) -> dict[str, Tensor]:
        """Returns the tensors, which are read from the files when they are used."""
        return map_tensors(self.path / WEIGHTS)


@contextmanager
def checkpoint_errors(place: str = "") -> Iterator[None]:
    """Raises a CheckpointError that begins with `place` for an InputError."""
    try:
        yield
    except InputError as error:
        raise CheckpointError(f"{place}{error}") from error


def import_hub() -> Any:
    """Imports `huggingface_hub`."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError("the hub needs huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub


def _download(name: str, hub: dict[str, Any]) -> Path:
    names = ", ".join(list_bundled()) or "none here"
    if name.endswith((".pth", ".pt")) and os.path.exists(name):
        options = "" if read_name(name) else " --patch-size P --noise-std S"
        note = " (the first two for a flow of images only)" if options else ""
        raise CheckpointError(
            f"{format_value(name)}: weights of another code; make a model folder of them first: jacobiflow convert "
            f"{name}{options} --out FOLDER{note}"
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
    """Lists the reports in a model folder: report.json first."""
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
    flow = flow.stored
    check_kind("recommended", flow.recommended, SamplingSettings, "SamplingSettings")
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in flow.state_dict().items()}
    check_values(state, f"{path}: not written")
    check_own_model(path)
    written = fingerprint(flow, state)
    reports = {
        file.name: file.read_bytes()
        for file in flow.report_files
        if (read_object(file) or {}).get("fingerprint") == written
    }
    document = {"model_type": flow.model_type, "format_version": FORMAT_VERSION, **asdict(flow.config)}
    if flow.recommended != SamplingSettings():
        document["recommended"] = serialization.encode(flow.recommended)
    if flow.classes:
        document["classes"] = list(flow.classes)
    try:
        path.mkdir(parents=True, exist_ok=True)
        remove_partials(path)
        with atomic_path(path / WEIGHTS) as weights, atomic_path(path / CONFIG) as config:
            write_tensors(weights, state, {"format": "pt"})
            config.write_bytes(json_bytes(document))
            # The config is renamed first. If the process stops then, no old weights must lie beside it.
            (path / WEIGHTS).unlink(missing_ok=True)
        for name, content in reports.items():
            write_atomically(path / name, content)
        if not os.path.lexists(path / README):
            write_atomically(path / README, format_model_card(flow, title or path.name).encode())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({first_line(error)})") from error
