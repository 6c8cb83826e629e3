"""Model folders: `config.json`, `model.safetensors`, and `report.json` where the flow was calibrated."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_type_hints

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize

from jacobiflow.files import write_beside
from jacobiflow.flows.fingerprint import fingerprint_of
from jacobiflow.flows.registry import find_flow, flow_names
from jacobiflow.flows.weights import FLOATS, CheckpointError, build, check_values, first_line

if TYPE_CHECKING:
    from jacobiflow.flows.image_flow import FlowConfig, ImageFlow
    from jacobiflow.flows.weights import AnyFlow

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
REPORT = "report.json"
FORMAT_VERSION = 1

_MODELS = importlib.resources.files("jacobiflow") / "models"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def load(name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None) -> ImageFlow:
    """A flow ready to sample, of the class that its folder names: in eval mode, its parameters without gradients.

    **Arguments:**

    - `name`: a bundled model's name, else a local folder, else a hub id "owner/name". A bundled name comes before a
      folder of that name; write "./name", or give a `Path`, for the folder.
    - `device`: where the flow goes.
    - `dtype`: of the flow, as `torch.float64` or "float64". By default as stored, float16 and bfloat16 widened to
      float32.

    **Raises** `CheckpointError` for an unknown name or a folder that does not fit, `ValueError` for another dtype.
    """
    dtype = _floating(dtype)
    flow: ImageFlow = read(None, name)
    return flow.requires_grad_(False).to(device=device, dtype=dtype)


def save(flow: ImageFlow, folder: str | Path, dtype: torch.dtype | str | None = None) -> None:
    """Write `flow` as a model folder, in `dtype` (by default the flow's own); what `folder` held stays until then.

    The flow's report is copied with it where it is still a report of these weights.

    **Raises** `CheckpointError` where a weight is not finite in `dtype`, or `folder` cannot be written.
    """
    dtype, folder = _floating(dtype), Path(folder)
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in flow.state_dict().items()}
    check_values(state, f"{folder}: not written")
    report = _report_of(flow.report_file, fingerprint_of(state))
    document = {"model_type": flow.model_type, "format_version": FORMAT_VERSION, **asdict(flow.config)}
    with writing(folder / CONFIG) as config, writing(folder / WEIGHTS) as weights:
        config.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        weights.write_bytes(serialize(state, metadata={"format": "pt"}))
        # A stop between the two renames must not leave new weights beside an old config.
        (folder / CONFIG).unlink(missing_ok=True)
    if report is not None:
        with writing(folder / REPORT) as partial:
            partial.write_bytes(report)


def read(flow_class: type[AnyFlow] | None, name: str | Path, **hub: Any) -> AnyFlow:
    """The flow that `name` (as for `load`) holds, in eval mode; `hub` is for `snapshot_download`.

    It is of the class that the folder names, or of `flow_class` where that derives from it.

    **Raises** `CheckpointError`.
    """
    folder = bundled().get(name, Path(name)) if isinstance(name, str) else name
    if not folder.is_dir():
        folder = _download(str(name), hub)
    found, config = _read_config(folder / CONFIG)
    if flow_class is None or issubclass(found, flow_class):
        flow_class = cast("type[AnyFlow]", found)
    elif not issubclass(flow_class, found):
        raise CheckpointError(
            f"{folder / CONFIG}: model_type {found.model_type!r}, which is no {flow_class.__name__}; read it with "
            f"{found.__name__}, or with jacobiflow.load"
        )
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{weights}: missing; a model folder holds {CONFIG} and {WEIGHTS}")
    try:
        state = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights}: cut short or damaged ({first_line(error)}); copy it again") from error
    flow = build(flow_class, config, state, str(weights))
    flow.report_file = folder / REPORT if (folder / REPORT).is_file() else None
    return flow


def bundled() -> dict[str, Path]:
    """The models that come with the package: name to folder."""
    if not _MODELS.is_dir():
        return {}
    folders = {entry.name: Path(str(entry)) for entry in _MODELS.iterdir()}
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


def _download(name: str, hub: dict[str, Any]) -> Path:
    here = ", ".join(bundled()) or "none here"
    if Path(name).exists() or not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{name!r}: no such model; give a bundled name ({here}), a folder with {CONFIG} and {WEIGHTS}, or a hub id "
            "'owner/name'; an original .pth is for TarFlow.from_original"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, REPORT], **hub))
    except Exception as error:  # the errors of its HTTP client change with its version
        raise CheckpointError(
            f"{name!r} is neither a bundled name ({here}) nor a folder here, and the hub gave none "
            f"({type(error).__name__}: {first_line(error)}); check the id and the connection"
        ) from error


def _read_config(path: Path) -> tuple[type[ImageFlow], FlowConfig]:
    """The registered flow that a config.json names, and its config; fields that are missing take their defaults."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; a model folder holds {CONFIG} and {WEIGHTS}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({first_line(error)}); copy it again") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: holds a {type(document).__name__}; expected an object with the config's fields")
    name, version = document.pop("model_type", None), document.pop("format_version", None)
    flow = find_flow(name) if isinstance(name, str) else None
    if flow is None or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: model_type {name!r} in format {version!r}; readable are {', '.join(map(repr, flow_names()))} in "
            f"format {FORMAT_VERSION}; import the module that registers any other"
        )
    types = get_type_hints(flow.config_type)
    problems = [f"unknown field {name!r}" for name in document if name not in types]
    for field in fields(flow.config_type):
        value, expected = document.get(field.name), types[field.name]
        if field.name not in document:
            problems += [f"{field.name} missing"] if field.default is MISSING else []
        elif type(value) is not expected and (expected, type(value)) != (float, int):
            problems.append(f"{field.name}={value!r} is no {expected.__name__}")
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}")
    try:
        return flow, flow.config_type(**document)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _report_of(file: Path | None, fingerprint: str) -> bytes | None:
    """The bytes of the report in `file`, where it is of weights with that `fingerprint`."""
    try:
        content = b"" if file is None else file.read_bytes()
        return content if json.loads(content)["fingerprint"] == fingerprint else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _floating(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found is None or found in FLOATS:
        return found
    names = ", ".join(str(name).removeprefix("torch.") for name in FLOATS)
    raise ValueError(f"dtype={dtype!r}: give one of {names}")
