"""State dicts (`.pth`) of the TarFlow, Prose and STARFlow codes, whose names are nearly those of this library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, cast
from zipfile import is_zipfile

import torch
from torch import Tensor

from jacobiflow.errors import CheckpointError
from jacobiflow.models.checkpoints.tensors import check_values
from jacobiflow.utils.checks import FLOATS

_MASK = re.compile(r"blocks\.\d+\.attn_mask")
_PREFIXES = re.compile(r"^(module|model|net)\.")  # Of DistributedDataParallel, Lightning and SBG.
# SBG has a dropout layer before the second linear layer.
_NAMES = {".mlp.main.3.": ".mlp.main.2.", ".cond_proj.": ".proj_context."}


def read_original(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors in a `.pth` file, without causal masks.

    The file holds a state dict, or a dict of which one entry is a state dict, such as "model" beside "optimizer".
    Prefixes of DistributedDataParallel, `torch.compile` and Lightning are removed.

    Raises CheckpointError if an entry is not a dense tensor of floating-point numbers, or a mask is not causal.
    """
    remedy = "give a file that torch.save(model.state_dict(), path) wrote"
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        # A file in the zip format is mapped, so that only the tensors in use are read.
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except Exception as error:  # A damaged file raises nearly any exception in torch.load.
        # PyTorch names a class or a function that is not of tensors.
        what = "damaged, or no file of torch.save"
        if isinstance(error, UnpicklingError) and "GLOBAL" in str(error):
            what = "a pickled module, or other objects of Python, and no state dict; code in it was not run"
        raise CheckpointError(f"{path}: {what}; {remedy}") from error
    state = {_convert_name(name): tensor for name, tensor in _find_state(content, path, remedy).items()}
    check_values(state, str(path), (*FLOATS, torch.bool), checks_values=False)
    masks = {name: state.pop(name) for name in list(state) if _MASK.fullmatch(name)}
    for name, mask in masks.items():
        if mask.ndim != 2 or not torch.equal(mask != 0, mask.new_ones(len(mask), len(mask), dtype=torch.bool).tril()):
            raise CheckpointError(f"{path}: {name} is not the causal mask; all attention is causal here")
    return state


class NamedSizes(NamedTuple):
    """The sizes in the name of a file of the TarFlow code. Shapes tell all but the first and the last."""

    patch_size: int
    width: int
    blocks: int
    layers: int
    noise_std: float


def read_name(path: str | Path) -> NamedSizes | None:
    """Reads the sizes in the name of a file; None if the TarFlow code did not name it.

    Example:
        >>> read_name("afhq_model_8_768_8_8_0.07.pth")
        NamedSizes(patch_size=8, width=768, blocks=8, layers=8, noise_std=0.07)
    """
    match = re.search(r"(?<![^_])(\d+)_(\d+)_(\d+)_(\d+)_(\d+\.\d+)$", Path(path).stem)
    if match is None:
        return None
    return NamedSizes(int(match[1]), int(match[2]), int(match[3]), int(match[4]), float(match[5]))


def _find_state(content: Any, path: str | Path, remedy: str) -> Mapping[str, Tensor]:
    """Returns the content of a file if it is a state dict, else its only entry that is one."""
    if _is_state(content):
        return cast(Mapping[str, Tensor], content)
    entries = content if isinstance(content, dict) else {}
    states = {name: value for name, value in entries.items() if _is_state(value) and value}
    if len(states) > 1:
        raise CheckpointError(
            f"{path}: holds several state dicts, {', '.join(map(repr, states))}; save the one that you want: "
            f"torch.save(torch.load({str(path)!r})[{str(next(iter(states)))!r}], 'weights.pth')"
        )
    if not states:
        keys = f", but a dict with {', '.join(map(repr, [*entries][:5]))}" if entries else ""
        raise CheckpointError(f"{path}: not a dict of tensors by their names{keys}; {remedy}")
    return next(iter(states.values()))


def _is_state(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    )


def _convert_name(name: str) -> str:
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return _PREFIXES.sub("", name.replace("_orig_mod.", ""))


class TransformerSizes(NamedTuple):
    """Sizes of the transformers of a flow: one width for all blocks or one for each, and the layers of each block."""

    width: int | tuple[int, ...]
    layers: tuple[int, ...]
    expansion: int


@dataclass(frozen=True)
class OriginalShapes:
    """The shapes in a state dict, from which a config is read.

    Attributes:
        source: The name of the file, for messages.
        flow: The name of the kind of flow, for messages.
    """

    state: Mapping[str, Tensor]
    source: str
    flow: str

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Returns the shape of an entry; raises CheckpointError if it is missing, of another rank or empty."""
        if name not in self.state:
            names = ", ".join(map(repr, [*self.state][:3])) or "nothing"
            raise CheckpointError(f"{self.source}: not the state dict of a {self.flow}: has {names}, but no {name!r}")
        shape = tuple(self.state[name].shape)
        if len(shape) != rank or 0 in shape:
            raise CheckpointError(
                f"{self.source}: {name} has shape {shape}; in a {self.flow} it has {rank} dimensions, none of them 0"
            )
        return shape

    def count(self, pattern: str) -> int:
        """Returns the number of different matches of the group in `pattern`."""
        return len({match[1] for name in self.state if (match := re.match(pattern, name))})

    def transformer_sizes(self) -> TransformerSizes:
        """Returns the sizes of the transformers."""
        blocks = range(self.count(r"blocks\.(\d+)\.proj_in\.weight"))
        widths = tuple(self.shape(f"blocks.{i}.proj_in.weight", 2)[0] for i in blocks)
        layers = tuple(self.count(rf"blocks\.{i}\.attn_blocks\.(\d+)\.") for i in blocks)
        hidden, _ = self.shape("blocks.0.attn_blocks.0.mlp.main.0.weight", 2)
        return TransformerSizes(one_or_all(widths), layers, hidden // widths[0])


def one_or_all(sizes: tuple[int, ...]) -> int | tuple[int, ...]:
    """Returns the size if all are the same, else the tuple."""
    return sizes[0] if len(set(sizes)) == 1 else sizes
