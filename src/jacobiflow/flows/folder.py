"""Model folders (`config.json` and `model.safetensors`), and the state dicts of the original TarFlow code."""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from jacobiflow.files import write_beside
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.flows.maf import MAF, MAFConfig
from jacobiflow.flows.tarflow import TarFlow, TarFlowConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
REPORT = "report.json"
FORMAT_VERSION = 1

_KINDS: dict[str, tuple[type[ImageFlow], type[TarFlowConfig] | type[MAFConfig]]] = {
    TarFlow.model_type: (TarFlow, TarFlowConfig),
    MAF.model_type: (MAF, MAFConfig),
}
_MODELS = importlib.resources.files("jacobiflow") / "models"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

AnyFlow = TypeVar("AnyFlow", bound=ImageFlow)
AnyTarFlow = TypeVar("AnyTarFlow", bound=TarFlow)


class CheckpointError(ValueError):
    """A model folder or file that cannot serve; the message names it, what is wrong, and the mend."""


def load(name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None) -> ImageFlow:
    """A flow ready to sample, a `TarFlow` or a `MAF` as stored: in eval mode, its parameters without gradients.

    **Arguments:**

    - `name`: a bundled model's name, else a local folder, else a hub id "owner/name". A bundled name comes before a
      folder of that name; write "./name", or give a `Path`, for the folder.
    - `device`: where the flow goes.
    - `dtype`: of the flow, as `torch.float64` or "float64". By default as stored, float16 and bfloat16 widened to
      float32.

    **Raises** `CheckpointError` for an unknown name or a folder that does not fit, `ValueError` for another dtype.
    """
    dtype = _floating(dtype)
    return read(ImageFlow, name).requires_grad_(False).to(device=device, dtype=dtype)


def save(flow: ImageFlow, folder: str | Path, dtype: torch.dtype | str | None = None) -> None:
    """Write `flow` as a model folder, in `dtype` (by default the flow's own); what `folder` held stays until then.

    **Raises** `CheckpointError` where a weight is not finite in `dtype`, or `folder` cannot be written.
    """
    dtype, folder = _floating(dtype), Path(folder)
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in flow.state_dict().items()}
    _check_values(state, f"{folder}: not written")
    document = {"model_type": flow.model_type, "format_version": FORMAT_VERSION, **asdict(flow.config)}
    with writing(folder / CONFIG) as config, writing(folder / WEIGHTS) as weights:
        config.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        weights.write_bytes(serialize(state, metadata={"format": "pt"}))
        # A stop between the two renames must not leave new weights beside an old config.
        (folder / CONFIG).unlink(missing_ok=True)


def read(kind: type[AnyFlow], name: str | Path, **hub: Any) -> AnyFlow:
    """The flow that `name` (as for `load`) holds, in eval mode; `hub` is for `snapshot_download`.

    It is of class `kind`, or for `ImageFlow` of the class that the folder names.

    **Raises** `CheckpointError`.
    """
    folder = bundled().get(name, Path(name)) if isinstance(name, str) else name
    if not folder.is_dir():
        folder = _download(str(name), hub)
    (found, config), weights = _read_config(folder / CONFIG), folder / WEIGHTS
    if issubclass(found, kind):
        kind = found
    elif not issubclass(kind, found):
        raise CheckpointError(
            f"{folder / CONFIG}: model_type {found.model_type!r}, which is no {kind.__name__}; read it with "
            f"{found.__name__}, or with jacobiflow.load"
        )
    if not weights.is_file():
        raise CheckpointError(f"{weights}: missing; a model folder holds {CONFIG} and {WEIGHTS}")
    try:
        state = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights}: cut short or damaged ({_first_line(error)}); copy it again") from error
    flow = _build(kind, config, state, str(weights), masks={})
    flow.report_file = folder / REPORT if (folder / REPORT).is_file() else None
    return flow


def bundled() -> dict[str, Path]:
    """The models that come with the package: name to folder."""
    if not _MODELS.is_dir():
        return {}
    folders = {entry.name: Path(str(entry)) for entry in _MODELS.iterdir()}
    return {name: folders[name] for name in sorted(folders) if (folders[name] / CONFIG).is_file()}


def read_original(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a `.pth` file of the original TarFlow code, less the prefix of DistributedDataParallel.

    Only tensors are read: code in the file does not run.

    **Raises** `CheckpointError` where the file is missing, damaged, or holds anything but a dict of tensors.
    """
    mend = "give a file that torch.save(model.state_dict(), path) wrote"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {mend}") from error
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path}: no PyTorch file, or one with code in it, which was not run; {mend}") from None
    except Exception as error:  # torch.load names no exceptions, and damage raises nearly any
        raise CheckpointError(f"{path}: cut short or damaged ({_first_line(error)}); copy it again") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a dict of tensors; {mend}")
    others = [repr(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise CheckpointError(f"{path}: entries other than tensors: {', '.join(others)}; {mend}")
    prefix = "module."
    if all(name.startswith(prefix) for name in state):
        return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)


def load_original(kind: type[AnyTarFlow], path: str | Path, config: TarFlowConfig) -> AnyTarFlow:
    """The flow, of class `kind` and in eval mode, whose weights `read_original` finds in `path`, key for key.

    float16 and bfloat16 become float32. The original code has heads of 64; shapes do not tell another `head_dim`.

    **Raises** `CheckpointError` where the file is not readable, or a tensor does not fit `config`; it lists all such.
    """
    masks = dict.fromkeys(_mask_names(config), (config.num_tokens, config.num_tokens))
    return _build(kind, config, read_original(path), str(path), masks)


def export_original(flow: TarFlow, path: str | Path) -> None:
    """Write `flow` as a `.pth` state dict that the original TarFlow code loads strictly, causal masks included.

    **Raises** `CheckpointError` where the original code has no such flow, a weight is not finite, or `path` cannot
    be written.
    """
    config = flow.config
    if (config.head_dim, config.expansion) != (64, 4):
        raise CheckpointError(
            f"head_dim={config.head_dim}, expansion={config.expansion}: the original code knows 64 and 4 only; "
            "save a model folder instead"
        )
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in flow.state_dict().items()}
    _check_values(state, f"{path}: not written")
    state |= dict.fromkeys(_mask_names(config), torch.ones(config.num_tokens, config.num_tokens).tril())
    with writing(Path(path)) as partial, partial.open("wb") as file:
        torch.save(state, file)


def infer_config(
    state: dict[str, Tensor], *, patch_size: int | None = None, in_channels: int | None = None, head_dim: int = 64
) -> TarFlowConfig:
    """The config that the shapes of `state` tell, for a square image; `noise_std`, which they do not, is 0.

    A token has in_channels * patch_size² values, so one of the two must be given.

    **Raises** `CheckpointError` where neither is given, they do not fit, or `state` is not of a TarFlow.
    """
    try:
        channels, token_channels = state["blocks.0.proj_in.weight"].shape
        num_tokens, _ = state["blocks.0.pos_embed"].shape
        outputs, _ = state["blocks.0.proj_out.weight"].shape
        hidden, _ = state["blocks.0.attn_blocks.0.mlp.main.0.weight"].shape
        num_classes = len(state["blocks.0.class_embed"]) if "blocks.0.class_embed" in state else 0
        counts = [_count(state, pattern) for pattern in (r"blocks\.(\d+)\.", r"blocks\.0\.attn_blocks\.(\d+)\.")]
    except KeyError as error:
        raise CheckpointError(f"not the state dict of a TarFlow: no {error}") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"not the state dict of a TarFlow: odd shapes ({_first_line(error)})") from error
    side = math.isqrt(num_tokens)
    if (
        side**2 != num_tokens
        or not channels
        or hidden % channels
        or outputs not in (token_channels, 2 * token_channels)
    ):
        raise CheckpointError(
            f"not the state dict of a TarFlow: {num_tokens} tokens of {token_channels} values, {channels} channels, "
            f"{hidden} hidden, {outputs} outputs"
        )
    for name, value in (("patch_size", patch_size), ("in_channels", in_channels)):
        if value is not None and value < 1:
            raise CheckpointError(f"{name}={value}: give a positive whole number")
    if patch_size is None:
        if in_channels is None:
            raise CheckpointError(f"give patch_size: shapes tell in_channels * patch_size² = {token_channels} only")
        patch_size = math.isqrt(token_channels // in_channels)
    if in_channels is None:
        in_channels = token_channels // patch_size**2
    if in_channels * patch_size**2 != token_channels:
        raise CheckpointError(
            f"patch_size={patch_size}, in_channels={in_channels}: in_channels * patch_size² must be {token_channels}"
        )
    return TarFlowConfig(
        in_channels=in_channels,
        image_size=side * patch_size,
        patch_size=patch_size,
        channels=channels,
        num_blocks=counts[0],
        layers_per_block=counts[1],
        num_classes=num_classes,
        nvp=outputs == 2 * token_channels,
        head_dim=head_dim,
        expansion=hidden // channels,
    )


def convert(path: str | Path, out: str | Path, config: TarFlowConfig) -> None:
    """Turn a `.pth` file of the original TarFlow code into the model folder `out`.

    **Raises** `CheckpointError` as `load_original` and `save` do.
    """
    save(load_original(TarFlow, path, config), out)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """`files.write_beside` in a folder that is made if need be. **Raises** `CheckpointError` where it fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_beside(path) as partial:
            yield partial
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written ({_first_line(error)})") from None


def _download(name: str, hub: dict[str, Any]) -> Path:
    if Path(name).exists() or not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{name!r}: no such model; give a bundled name ({', '.join(bundled()) or 'none here'}), a folder with "
            f"{CONFIG} and {WEIGHTS}, or a hub id 'owner/name'; an original .pth is for TarFlow.from_original"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS], **hub))
    except Exception as error:  # the errors of its HTTP client change with its version
        raise CheckpointError(
            f"{name!r} is neither a bundled name ({', '.join(bundled()) or 'none here'}) nor a folder here, and the "
            f"hub gave none ({type(error).__name__}: {_first_line(error)}); check the id and the connection"
        ) from error


def _read_config(path: Path) -> tuple[type[ImageFlow], TarFlowConfig | MAFConfig]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; a model folder holds {CONFIG} and {WEIGHTS}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({_first_line(error)}); copy it again") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: holds a {type(document).__name__}; an object with the config's fields wanted")
    kind, version = document.pop("model_type", None), document.pop("format_version", None)
    if not isinstance(kind, str) or kind not in _KINDS or version != FORMAT_VERSION:
        known = ", ".join(map(repr, _KINDS))
        raise CheckpointError(
            f"{path}: model_type {kind!r} in format {version!r}; this release reads {known} in {FORMAT_VERSION}"
        )
    flow, config = _KINDS[kind]
    types = get_type_hints(config)
    problems = [f"unknown field {name!r}" for name in document if name not in types]
    for name, wanted in types.items():
        if name not in document:
            problems.append(f"{name} missing")
        elif type(document[name]) is not wanted and (wanted, type(document[name])) != (float, int):
            problems.append(f"{name}={document[name]!r} is no {wanted.__name__}")
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}")
    try:
        return flow, config(**document)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _build(
    kind: type[AnyFlow],
    config: TarFlowConfig | MAFConfig,
    state: dict[str, Tensor],
    source: str,
    masks: dict[str, tuple[int, int]],
) -> AnyFlow:
    """A flow with exactly the tensors of `state`, less the causal masks (`masks`: name to shape); empties `state`."""
    layers = config.hidden_layers if isinstance(config, MAFConfig) else config.layers_per_block
    if config.num_blocks * layers > len(state):  # before a config of a million blocks is built
        raise CheckpointError(
            f"{source}: {config.num_blocks} blocks of {layers} layers in the config, but only "
            f"{len(state)} tensors{_mend(config, state)}"
        )
    try:
        with torch.device("meta"):
            flow = kind(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{source}: no flow has the sizes of {config} ({_first_line(error)})") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in flow.state_dict().items()} | masks
    problems = [f"{name} {shape}: missing" for name, shape in wanted.items() if name not in state]
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        if name not in wanted:
            problems.append(f"{name} {shape}: unknown")
        elif shape != wanted[name]:
            problems.append(f"{name} {shape}: {wanted[name]} wanted")
        elif tensor.dtype not in _FLOATS or tensor.layout != torch.strided or tensor.is_meta:
            problems.append(f"{name} {tensor.dtype}, {tensor.layout}: dense floating-point values wanted")
        elif name in masks and not torch.equal(tensor, torch.ones_like(tensor).tril()):
            problems.append(f"{name} {shape}: ones on and below the diagonal wanted, zeros above")
    if problems:
        raise CheckpointError(f"{source}: does not fit the config{_mend(config, state)}: {'; '.join(problems)}")
    _check_values(state, source)
    names = flow.state_dict().keys()
    dtype = functools.reduce(torch.promote_types, (state[name].dtype for name in names), torch.float32)
    # Copied, so that no tensor stays mapped to the file or lies at an odd address; popped, to free what is copied.
    copies = {name: state.pop(name).to(dtype, copy=True, memory_format=torch.contiguous_format) for name in names}
    flow.load_state_dict(copies, assign=True)
    return flow.eval()


def _mask_names(config: TarFlowConfig) -> list[str]:
    """The buffers that only the original code has: every block's causal mask (T, T)."""
    return [f"blocks.{i}.attn_mask" for i in range(config.num_blocks)]


def _mend(config: TarFlowConfig | MAFConfig, state: dict[str, Tensor]) -> str:
    """What the shapes of `state` say against `config`, in words; "" where they say nothing."""
    told = _maf_told(config, state) if isinstance(config, MAFConfig) else _tarflow_told(config, state)
    differing = [] if told is None else [
        f"{field.name}={getattr(told, field.name)} rather than {getattr(config, field.name)}"
        for field in fields(config)
        if getattr(told, field.name) != getattr(config, field.name)
    ]  # fmt: skip
    return f" (the shapes say {', '.join(differing)})" if differing else ""


def _tarflow_told(config: TarFlowConfig, state: dict[str, Tensor]) -> TarFlowConfig | None:
    """The config that the shapes of `state` tell, `config` telling what they do not; `None` where they are of none."""
    for known in ({"in_channels": config.in_channels}, {"patch_size": config.patch_size}):
        try:
            return replace(infer_config(state, head_dim=config.head_dim, **known), noise_std=config.noise_std)
        except ValueError:
            continue
    return None


def _maf_told(config: MAFConfig, state: dict[str, Tensor]) -> MAFConfig | None:
    """As `_tarflow_told`, of a MAF."""
    try:
        hidden, num_tokens = state["blocks.0.layers.0.weight"].shape
        return replace(
            config,
            image_size=math.isqrt(num_tokens // config.in_channels),
            hidden_features=hidden,
            num_blocks=_count(state, r"blocks\.(\d+)\."),
            hidden_layers=_count(state, r"blocks\.0\.layers\.(\d+)\.") - 1,
            num_classes=len(state["blocks.0.layers.0.class_embed"]) if "blocks.0.layers.0.class_embed" in state else 0,
        )
    except (KeyError, ValueError, TypeError):
        return None


def _count(state: dict[str, Tensor], pattern: str) -> int:
    """One more than the largest number that `pattern` finds at the start of a name."""
    return 1 + max(int(found[1]) for name in state if (found := re.match(pattern, name)))


def _check_values(state: dict[str, Tensor], source: str) -> None:
    problems = [f"{name} has non-finite values" for name, tensor in state.items() if not tensor.isfinite().all()]
    if not (state["var"] > 0).all():
        problems.append("var has values that are not positive")
    if problems:
        raise CheckpointError(f"{source}: {'; '.join(problems)}")


def _floating(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found is None or found in _FLOATS:
        return found
    names = ", ".join(str(known).removeprefix("torch.") for known in _FLOATS)
    raise ValueError(f"dtype={dtype!r}: give one of {names}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
