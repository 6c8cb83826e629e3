"""A TarFlow as a folder of ONNX graphs, which solve it block by block in any runtime: a browser's, for instance."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor

from jacobiflow.checks import check_kind, check_path
from jacobiflow.errors import InputValueError
from jacobiflow.export.block import block_graph
from jacobiflow.export.denoising import denoising_graph
from jacobiflow.export.weights import SharedWeights, file_name
from jacobiflow.files import check_ours, files_sha256, remove_partials, write_atomically, write_json
from jacobiflow.flows.folder import locked_folder
from jacobiflow.flows.tarflow import TarFlow
from jacobiflow.flows.weights import check_values
from jacobiflow.guidance import Guidance, check_guidance, in_force

MANIFEST = "model.json"
FORMAT_VERSION = 1
_KEYS = ("export_version", "blocks", "orders")
_NAME = re.compile(r"(?:block-\d+|denoise|weights)-([0-9a-f]{16})\.(?:onnx|bin)")


def export(flow: TarFlow, out: str | Path, guidance: Guidance | None = None) -> dict[str, Any]:
    """Write `flow` to the folder `out` as ONNX graphs over one file of weights, and return what model.json says.

    The folder has a graph for each block (see `jacobiflow.export.block_graph`) with a row, or two under `guidance`,
    and, where the flow records the noise of its training, one for the denoising step (`denoising_graph`).
    model.json names these files and says all that a solver needs: the sizes, the order in which each block reads the
    tokens, the prior's standard deviation of each number, the number of classes, and what guidance adds. It is written
    last, and the other files have the hash of their content in their names, so that a stop at any moment leaves the
    export that was there, or the new one. Files of an earlier export that are not in the new one are removed.

    **Raises** `TypeError` if `flow` is no `TarFlow`; `ValueError` if a weight is not finite, or if `out` is neither
    new, nor empty, nor of an export; `FolderInUseError`, a `ValueError`, if another process writes to it.
    """
    check_kind("flow", flow, TarFlow, "a TarFlow, such as jacobiflow.load('fashion-p2') returns")
    check_path("out", out)
    check_guidance(guidance)
    folder = Path(out)
    check_values(flow.state_dict(), f"{folder}: not written")
    with locked_folder(folder):
        earlier = _own_files(folder)
        manifest, files = _contents(flow, in_force(guidance))
        for name, content in files.items():
            if name not in earlier:
                write_atomically(folder / name, content)
        write_json(folder / MANIFEST, manifest, indent=None)
        for name in earlier - files.keys():
            (folder / name).unlink()
        remove_partials(folder)
    return manifest


def _own_files(folder: Path) -> set[str]:
    """The files that exports have written to a folder, whole, finished or not, but for its model.json.

    **Raises** `InputValueError` if the folder is neither new, nor empty but for hidden files, nor of an export.
    """
    check_ours(folder / MANIFEST, _KEYS)
    names = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    own = {name for name in names if _is_own(folder / name)}
    if MANIFEST not in names and names != own:
        raise InputValueError(f"{folder / min(names - own)}: is not of an export; give a new or empty folder")
    return own


def _is_own(file: Path) -> bool:
    """True if a file has the hash of its content in its name."""
    match = _NAME.fullmatch(file.name)
    return match is not None and file.is_file() and files_sha256([file]).startswith(match[1])


def _contents(flow: TarFlow, guidance: Guidance | None) -> tuple[dict[str, Any], dict[str, bytes | bytearray]]:
    """The content of model.json, and the other files by their names."""
    config, weights, rows = flow.config, SharedWeights(_tensors(flow)), 1 if guidance is None else 2
    files: dict[str, bytes | bytearray] = {weights.location: weights.data}

    def add(stem: str, graph: onnx.ModelProto) -> str:
        content = graph.SerializeToString()
        name = file_name(stem, content, ".onnx")
        files[name] = content
        return name

    manifest: dict[str, Any] = {
        "export_version": FORMAT_VERSION,
        "weights": weights.location,
        "blocks": [add(f"block-{i}", block_graph(config, i, rows, weights)) for i in range(config.num_blocks)],
        "orders": [block.permutation.kind for block in flow.blocks],
        **{name: getattr(config, name) for name in ("num_tokens", "token_channels", "image_size", "in_channels")},
        "patch_size": config.patch_size,
        "num_classes": config.num_classes,
        "keys_per_token": 2 * config.layers_per_block * rows * config.channels,
        "prior_scale": flow.var.detach().float().sqrt().flatten().tolist(),
        "logit_scale": [1.0] if guidance is None else [1.0, 1 / guidance.attn_temperature],
        "guidance": None,
        "denoise": add("denoise", denoising_graph(flow, weights)) if config.noise_std else None,
    }
    if guidance is not None:
        found = guidance.extrapolation(flow.var.new_zeros(1, config.num_tokens, 1))
        manifest["guidance"] = {"log_scale": found.log_scale.tolist(), "shift": found.shift.tolist()}
    return manifest, files


def _tensors(flow: TarFlow) -> dict[str, Tensor]:
    """The weights, with the position embeddings in the causal order of their block."""
    tensors = dict(flow.named_parameters()) | {"var": flow.var}
    for i, block in enumerate(flow.blocks):
        tensors[f"blocks.{i}.pos_embed"] = block.permutation(block.pos_embed, dim=0)
    return tensors
