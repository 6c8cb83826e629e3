"""A TarFlow as a folder of ONNX graphs, which solve it block by block in any runtime: a browser's, for instance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from jacobiflow.checks import check_kind, check_path
from jacobiflow.export.block import block_graph
from jacobiflow.export.denoising import denoising_graph
from jacobiflow.export.weights import SharedWeights
from jacobiflow.files import check_ours, write_atomically, write_json
from jacobiflow.flows.tarflow import TarFlow
from jacobiflow.guidance import Guidance, check_guidance, in_force

MANIFEST, WEIGHTS = "model.json", "weights.bin"
FORMAT_VERSION = 1
_KEYS = ("export_version", "blocks", "orders")


def export(flow: TarFlow, out: str | Path, guidance: Guidance | None = None) -> dict[str, Any]:
    """Write `flow` to the folder `out` as ONNX graphs over one file of weights, and return what model.json says.

    The folder has a graph for each block (see `jacobiflow.export.block_graph`) with a row, or two under `guidance`,
    and, where the flow records the noise of its training, one for the denoising step (`denoising_graph`).
    model.json names these files and says all that a solver needs: the sizes, the order in which each block reads the
    tokens, the prior's standard deviation of each number, the number of classes, and what guidance adds.

    **Raises** `TypeError` where `flow` is no `TarFlow`, `ValueError` where `out` has a model.json that is not of an
    export.
    """
    check_kind("flow", flow, TarFlow, "a TarFlow, such as jacobiflow.load('fashion-p2') returns")
    check_path("out", out)
    check_guidance(guidance)
    guidance, config, folder = in_force(guidance), flow.config, Path(out)
    check_ours(folder / MANIFEST, _KEYS)
    weights = SharedWeights(WEIGHTS, _tensors(flow))
    rows = 1 if guidance is None else 2
    graphs = {f"block-{i}.onnx": block_graph(config, i, rows, weights) for i in range(config.num_blocks)}
    manifest: dict[str, Any] = {
        "export_version": FORMAT_VERSION,
        "weights": WEIGHTS,
        "blocks": list(graphs),
        "orders": [block.permutation.kind for block in flow.blocks],
        **{name: getattr(config, name) for name in ("num_tokens", "token_channels", "image_size", "in_channels")},
        "patch_size": config.patch_size,
        "num_classes": config.num_classes,
        "keys_per_token": 2 * config.layers_per_block * rows * config.channels,
        "prior_scale": flow.var.detach().float().sqrt().flatten().tolist(),
        "logit_scale": [1.0] if guidance is None else [1.0, 1 / guidance.attn_temperature],
        "guidance": None,
        "denoise": None,
    }
    if guidance is not None:
        found = guidance.extrapolation(flow.var.new_zeros(1, config.num_tokens, 1))
        manifest["guidance"] = {"log_scale": found.log_scale.tolist(), "shift": found.shift.tolist()}
    if config.noise_std:
        manifest["denoise"] = "denoise.onnx"
        graphs["denoise.onnx"] = denoising_graph(flow, weights)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, weights.data)
    for name, graph in graphs.items():
        write_atomically(folder / name, graph.SerializeToString())
    write_json(folder / MANIFEST, manifest, indent=None)
    return manifest


def _tensors(flow: TarFlow) -> dict[str, Tensor]:
    """The weights, with the position embeddings in the causal order of their block."""
    tensors = dict(flow.named_parameters()) | {"var": flow.var}
    for i, block in enumerate(flow.blocks):
        tensors[f"blocks.{i}.pos_embed"] = block.permutation(block.pos_embed, dim=0)
    return tensors
