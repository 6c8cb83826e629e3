"""Model folders: `config.json`, `model.safetensors`, a card, reports and tunings."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import partial, reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
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
INDEX = "model.safetensors.index.json"  # Says which of several files has a tensor.
SHARDS = "model-*-of-*.safetensors"  # The files of an index.
MAX_SHARD_SIZE = 5 * 10**9  # The bytes of weights in a file from which there are several.
REPORTS = ("report.json", "report-*.json", "tuning.json", "tuning-*.json")  # Each guidance has files of its own.
README = "README.md"
FORMAT_VERSION = 1
MODELS = Path(__file__).parents[2] / "bundled"
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)  # It is in the folder of the index.
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

    def state(self) -> TensorFiles:
        """Returns the tensors, which are read from the files when they are used."""
        index = self.path / INDEX
        if (self.path / WEIGHTS).exists() or not index.exists():
            return TensorFiles(dict.fromkeys(_names_in(self.path / WEIGHTS), self.path / WEIGHTS))
        try:
            entries = serialization.load(index, "model", partial(serialization.decode, dict[str, Any]))
            places = serialization.decode(dict[str, str], entries.get("weight_map"), f"model {index}: weight_map")
        except InputError as error:
            raise CheckpointError(str(error)) from error
        for name in places.values():
            if not _SHARD.fullmatch(name):
                raise CheckpointError(
                    f"{index}: names the file {format_value(name)}; name files of this folder, *.safetensors"
                )
        contents = {name: _names_in(self.path / name) for name in sorted(set(places.values()))}
        for name, tensors in contents.items():
            if differing := set(tensors) ^ {tensor for tensor, place in places.items() if place == name}:
                raise CheckpointError(
                    f"{self.path / name}: has other tensors than {INDEX} names ({min(differing)!r}); copy both again"
                )
        return TensorFiles({tensor: self.path / name for tensor, name in places.items()})


def _names_in(file: Path) -> list[str]:
    """Returns the names of the tensors in a file."""
    try:
        with safe_open(regular_file(file), "pt") as content:
            return sorted(content.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: missing or damaged ({first_line(error)}); copy it again") from error


class TensorFiles(MutableMapping[str, Tensor]):
    """The tensors of files by their names. Each has a mapping of its file while it is in use.

    Attributes:
        places: The file of each tensor.
    """

    def __init__(self, places: dict[str, Path]) -> None:
        self.places = places

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.places[name], "pt") as content:
            tensor: Tensor = content.get_tensor(name)
            return tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        raise NotImplementedError("these tensors are only read")

    def __delitem__(self, name: str) -> None:
        del self.places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def map_all(self) -> dict[str, Tensor]:
        """Returns all tensors, with one mapping for each file."""
        return {name: tensor for file in set(self.places.values()) for name, tensor in load_file(file).items()}


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
        return Path(client.snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, INDEX, SHARDS, *REPORTS], **hub))
    except Exception as error:  # The exceptions of its HTTP client differ by version.
        raise CheckpointError(
            f"{format_value(name)} is neither a bundled name ({names}) nor a folder here, and the hub did not provide "
            f"it ({type(error).__name__}: {first_line(error)}); check the id and the connection"
        ) from error


def list_reports(path: Path) -> tuple[Path, ...]:
    """Lists the reports and tunings in a model folder: report.json first."""
    return tuple(file for pattern in REPORTS for file in sorted(path.glob(pattern)) if file.is_file())


def list_weights(path: Path) -> list[Path]:
    """Lists the files of weights in a model folder, and their index."""
    return [file for pattern in (WEIGHTS, INDEX, SHARDS) for file in sorted(path.glob(pattern))]


def list_bundled() -> dict[str, Path]:
    """Returns the models that come with the package: name to folder."""
    return {file.parent.name: file.parent for file in sorted(MODELS.glob(f"*/{CONFIG}"))}


def check_own_model(path: Path) -> None:
    """Raises CheckpointError if a folder has files under a model's names, but no config.json of this library."""
    if "format_version" not in (read_object(path / CONFIG) or {}):
        for file in (path / CONFIG, *list_weights(path), *list_reports(path)):
            if file.exists():
                raise CheckpointError(
                    f"{file}: not of a model that jacobiflow wrote; move it away, or give another folder"
                )


def split_tensors(state: Mapping[str, Tensor], max_size: int) -> list[dict[str, Tensor]]:
    """Splits a state dict, in its order, into parts of at most `max_size` bytes, or of one tensor."""
    parts, size = [dict[str, Tensor]()], 0
    for name, tensor in state.items():
        if parts[-1] and size + tensor.nbytes > max_size:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    return parts


def _weight_files(state: Mapping[str, Tensor], max_shard_size: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yields the names of the files of weights, and functions that make their contents; the index is the last."""
    parts = split_tensors(state, max_shard_size)
    if len(parts) == 1:
        yield WEIGHTS, partial(save, parts[0], {"format": "pt"})
        return
    places = dict[str, str]()
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-{len(parts):05}.safetensors"
        places |= dict.fromkeys(part, file)
        yield file, partial(save, part, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in state.values())
    yield INDEX, partial(json_bytes, {"metadata": {"total_size": size}, "weight_map": places}, 2)


def write_model(
    flow: Any, path: Path, dtype: torch.dtype | None = None, title: str = "", max_shard_size: int = MAX_SHARD_SIZE
) -> None:
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
    make_config: Callable[[], bytes] = partial(json_bytes, document, 2)
    files = [(CONFIG, make_config), *_weight_files(state, max_shard_size)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        remove_partials(path)
        with ExitStack() as renames:  # It renames the config first, and what completes the weights last.
            for name, make_content in reversed(files):
                renames.enter_context(atomic_path(path / name)).write_bytes(make_content())
            # A stop between the renames must not leave old weights with a new config.
            for file in list_weights(path):
                file.unlink()
        for name, content in reports.items():
            write_atomically(path / name, content)
        if not os.path.lexists(path / README):
            write_atomically(path / README, format_model_card(flow, title or path.name).encode())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({first_line(error)})") from error


def build(
    make: Callable[[Any], AnyModule], config: Any, state: MutableMapping[str, Tensor], source: str,
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None, maps: bool = False,
) -> AnyModule:  # fmt: skip
    """Builds a module with the values of a state dict, which must fit it, in eval mode.

    The module is made on the meta device, so that initial values cost nothing and draw no random numbers. Tensors are
    then copied one by one, and removed from `state`: the memory is that of the module and of one tensor.

    Args:
        source: The beginning of a CheckpointError.
        dtype: The dtype of the copies; by default that of the state dict, with half precision widened to float32.
        maps: Takes the tensors as they are, so that they stay mapped to their files.
    """
    with torch.device("meta"):
        module = make(config)
    dtype = dtype or widened_dtype(state.values())
    copies, flaws = dict[str, Tensor](), list[str]()
    for name in list(state):
        tensor = state.pop(name)
        if flaw := _flaw(name, tensor):
            flaws.append(flaw)
            continue
        copies[name] = tensor if maps else tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    _raise_flaws(flaws, source)
    try:
        module.load_state_dict(copies, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{source}: does not fit the config: {' '.join(str(error).split())}") from None
    return module.eval()


def widened_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Returns the dtype of tensors, with half precision widened to float32."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def check_values(
    state: Mapping[str, Tensor], source: str, dtypes: Sequence[torch.dtype] = FLOATS, checks_values: bool = True
) -> None:
    """Raises CheckpointError if an entry is not a dense tensor of these dtypes, or its values cannot be weights.

    If `checks_values` is False, the values are not read from the file.
    """
    flaws = (_flaw(name, tensor, dtypes, checks_values) for name, tensor in state.items())
    _raise_flaws([flaw for flaw in flaws if flaw], source)


def _flaw(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = FLOATS, checks_values: bool = True) -> str:
    """Returns what is wrong with an entry, or nothing."""
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_meta:
        return f"{name} is not a dense tensor with values"
    if tensor.dtype not in dtypes:
        return f"{name} is of {tensor.dtype}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"{name} has more values than the file stores"
    if not checks_values or not tensor.numel():
        return ""
    least, largest = (float(value) for value in tensor.aminmax())  # This makes no copy, and NaN is both.
    if not math.isfinite(least) or not math.isfinite(largest):
        return f"{name} has non-finite values"
    return f"{name} has values that are not positive" if name == "var" and least <= 0 else ""


def _raise_flaws(flaws: Sequence[str], source: str) -> None:
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
