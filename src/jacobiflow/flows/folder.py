"""Model folders: `config.json`, `model.safetensors`, and reports (`report.json`, `report-*.json`) of calibrations."""

from __future__ import annotations

import importlib.resources
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from jacobiflow.checks import short
from jacobiflow.errors import InputError, InputValueError
from jacobiflow.files import partials, read_object, remove_partials, write_beside
from jacobiflow.flows.config import FlowConfig
from jacobiflow.flows.fingerprint import fingerprint_of
from jacobiflow.flows.settings import SamplingSettings
from jacobiflow.flows.weights import CheckpointError, check_values, first_line
from jacobiflow.locking import LOCK, locked

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
REPORT = "report.json"
REPORTS = (REPORT, "report-*.json")  # under other guidance, each has a name of its own
README = "README.md"
FORMAT_VERSION = 1
RECOMMENDED = "recommended"  # in config.json, the settings to sample with

MODELS = importlib.resources.files("jacobiflow") / "models"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)

AnyConfig = TypeVar("AnyConfig", bound=FlowConfig)


@dataclass(frozen=True)
class ModelFolder:
    """A model folder whose config.json was read: the name of its flow, the fields of its config, and how it is best
    sampled.
    """

    path: Path
    model_type: str
    fields: Mapping[str, Any]
    recommended: SamplingSettings = SamplingSettings()  # noqa: RUF009  frozen

    @classmethod
    def open(cls, name: str | Path, **hub: Any) -> ModelFolder:
        """The folder of `name`: a bundled model's name, else a local folder, else a hub id "owner/name".

        A bundled name comes before a folder of that name. `hub` is for `snapshot_download`.

        **Raises** `CheckpointError` where there is no such folder, or its config.json is broken.
        """
        path = bundled().get(name, Path(name)) if isinstance(name, str) else name
        if not os.path.isdir(path):  # unlike Path.is_dir, it has an answer for a name that is too long
            path = _download(str(name), hub)
        return cls(path, *_read_config(path / CONFIG))

    def config(self, config_type: type[AnyConfig]) -> AnyConfig:
        """The config; fields that are missing take their defaults.

        **Raises** `CheckpointError` for a field that is unknown, missing, or of another type or value, and where the
        recommended settings do not fit it.
        """
        types = get_type_hints(config_type)
        problems = [f"unknown field {name!r}" for name in self.fields if name not in types]
        for field in fields(config_type):
            value, expected = self.fields.get(field.name), types[field.name]
            if field.name not in self.fields:
                problems += [f"{field.name} missing"] if field.default is MISSING else []
            elif type(value) is not expected and (expected, type(value)) != (float, int):
                problems.append(f"{field.name}={value!r} is no {expected.__name__}")
        try:
            if problems:
                raise InputValueError("; ".join(problems))
            config = config_type(**self.fields)
            if self.recommended.denoise and not config.noise_std:
                raise InputValueError(
                    f"recommended settings: a denoise rate of {self.recommended.denoise}, but noise_std is 0: there is "
                    "no Gaussian noise to remove; leave the rate out"
                )
            return config
        except InputError as error:
            raise CheckpointError(f"{self.path / CONFIG}: {error}") from None

    def state(self) -> dict[str, Tensor]:
        """The tensors. **Raises** `CheckpointError` where they cannot be read."""
        file = self.path / WEIGHTS
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; a model folder holds {CONFIG} and {WEIGHTS}")
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cut short or damaged ({first_line(error)}); copy it again") from error

    @property
    def report_files(self) -> tuple[Path, ...]:
        """The reports: report.json first, and then the others by name."""
        return reports_in(self.path)


def reports_in(path: Path) -> tuple[Path, ...]:
    """The reports in a model folder: report.json first, and then the others by name."""
    return tuple(file for pattern in REPORTS for file in sorted(path.glob(pattern)) if file.is_file())


def is_report(name: str) -> bool:
    """Whether a file of this name in a model folder is taken for a report."""
    return any(fnmatchcase(name, pattern) for pattern in REPORTS)


def holding(path: Path) -> ModelFolder | None:
    """The model in the folder `path`; `None` where there is none, or a half that a killed `write_model` left.

    **Raises** `CheckpointError` where there are files with the names of a model's that are not one of this library.
    """
    remedy = "move it away, or give another folder"
    if os.path.lexists(path / CONFIG):
        try:
            return ModelFolder.open(path)
        except CheckpointError as error:
            raise CheckpointError(f"{path / CONFIG}: not of a model that jacobiflow wrote; {remedy}") from error
    if os.path.lexists(path / WEIGHTS) and not any(map(_is_config, partials(path, CONFIG))):
        raise CheckpointError(f"{path / WEIGHTS}: weights without a {CONFIG} that jacobiflow wrote; {remedy}")
    return None


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """`locked`, for a folder that is to be copied and uploaded: the lock's file is removed at the end."""
    with locked(path):
        yield
        with suppress(OSError):  # some systems remove no open file
            (path / LOCK).unlink()


def remove_half_written(path: Path) -> None:
    """Remove what a killed write of a model has left in a folder that `holding` has checked."""
    if not (path / CONFIG).exists():
        (path / WEIGHTS).unlink(missing_ok=True)
    remove_partials(path)


class Model(Protocol):
    """What is written of a flow."""

    model_type: ClassVar[str]
    config: Any
    recommended: SamplingSettings
    report_files: tuple[Path, ...]

    def state_dict(self) -> Mapping[str, Tensor]: ...
    def generate_model_card(self, **values: Any) -> Any: ...


def save_model(
    flow: Model, path: Path, dtype: torch.dtype | None = None, card: Mapping[str, Any] | None = None
) -> None:
    """`write_model`, in a folder that is locked meanwhile.

    **Raises** `FolderInUseError` where another process writes to it.
    """
    try:
        with locked_folder(path):
            write_model(flow, path, dtype, card)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({first_line(error)})") from None


def write_model(
    flow: Model, path: Path, dtype: torch.dtype | None = None, card: Mapping[str, Any] | None = None
) -> None:
    """Write a model folder, which the caller has locked; what `path` held stays until then.

    The flow's reports that are of the weights that are written are copied, and a model card with the values of `card`
    is made where there is no README.md.

    **Raises** `CheckpointError` where a weight is not finite, `path` holds what is no model of this library, or it
    cannot be written.
    """
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in flow.state_dict().items()}
    check_values(state, f"{path}: not written")
    reports = {path / file.name: _report_of(file, fingerprint_of(state)) for file in flow.report_files}
    holding(path)
    for place, report in reports.items():
        if report is not None and os.path.lexists(place) and "fingerprint" not in (read_object(place) or {}):
            raise CheckpointError(f"{place}: not a report of jacobiflow; move it away, or give another folder")
    remove_half_written(path)
    document = {"model_type": flow.model_type, "format_version": FORMAT_VERSION, **asdict(flow.config)}
    if flow.recommended != SamplingSettings():
        document[RECOMMENDED] = flow.recommended.to_json()
    with writing(path / CONFIG) as new_config, writing(path / WEIGHTS) as new_weights:
        new_config.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        new_weights.write_bytes(save(state, metadata={"format": "pt"}))
        # A stop between the two renames must not leave new weights beside an old config.
        (path / CONFIG).unlink(missing_ok=True)
    for place, report in reports.items():
        if report is not None:
            with writing(place) as new_report:
                new_report.write_bytes(report)
    if not os.path.lexists(path / README):
        with writing(path / README) as new_card:
            flow.generate_model_card(**{"name": path.name, **(card or {})}).save(new_card)


def bundled() -> dict[str, Path]:
    """The models that come with the package: name to folder."""
    if not MODELS.is_dir():
        return {}
    folders = {entry.name: Path(str(entry)) for entry in MODELS.iterdir()}
    return {name: folders[name] for name in sorted(folders) if (folders[name] / CONFIG).is_file()}


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """`files.write_beside` in a folder that is made if need be. **Raises** `CheckpointError` where it fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_beside(path) as partial:
            yield partial
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written ({first_line(error)})") from None


def _read_config(file: Path) -> tuple[str, dict[str, Any], SamplingSettings]:
    """The model type, the fields of the flow's config, and the recommended settings of a config.json."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; a model folder holds {CONFIG} and {WEIGHTS}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON ({first_line(error)}); copy it again") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{file}: holds a {type(document).__name__}; expected an object with config fields")
    model_type, version = document.pop("model_type", None), document.pop("format_version", None)
    if not isinstance(model_type, str) or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: model_type {model_type!r} in format {version!r}; this release reads format {FORMAT_VERSION}"
        )
    try:
        recommended = SamplingSettings.from_json(document.pop(RECOMMENDED, {}))
    except InputError as error:
        raise CheckpointError(f"{file}: recommended settings: {error}") from None
    return model_type, document, recommended


def _is_config(file: Path) -> bool:
    try:
        return bool(_read_config(file))
    except CheckpointError:
        return False


def _download(name: str, hub: dict[str, Any]) -> Path:
    here = ", ".join(bundled()) or "none here"
    if os.path.exists(name) or not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{short(name)}: no such model; give a bundled name ({here}), a folder with {CONFIG} and {WEIGHTS}, or a "
            "hub id 'owner/name'; an original .pth is for TarFlow.from_original"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, *REPORTS], **hub))
    except Exception as error:  # the errors of its HTTP client change with its version
        raise CheckpointError(
            f"{short(name)} is neither a bundled name ({here}) nor a folder here, and the hub gave none "
            f"({type(error).__name__}: {first_line(error)}); check the id and the connection"
        ) from error


def _report_of(file: Path, fingerprint: str) -> bytes | None:
    """The bytes of the report in `file`, where it is of weights with that `fingerprint`."""
    try:
        content = file.read_bytes()
        return content if json.loads(content)["fingerprint"] == fingerprint else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
