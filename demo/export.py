"""A TarFlow as a folder of ONNX graphs, which a page solves block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from torch import Tensor

import jacobiflow as jf
from demo.block import block_graph
from demo.denoising import denoising_graph
from demo.graphs import SharedWeights, file_name
from jacobiflow.files import write_atomically, write_json


def export(flow: jf.TarFlow, out: Path, guidance: jf.Guidance | None = None) -> dict[str, Any]:
    """Writes `flow` to the folder `out` as ONNX graphs over one file of weights; returns the content of model.json.

    The folder has a graph for each block, with two rows under `guidance`, and one for the denoising step if the flow
    records the noise of its training. model.json names these files and has the sizes, the order in which each block
    reads the tokens, the prior's standard deviations, the number of classes, and the weights of guidance. The other
    files have the hash of their content in their names, so a browser's cache is never stale.
    """
    config, weights, rows = flow.config, SharedWeights(_tensors(flow)), 1 if guidance is None else 2
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / weights.location, weights.data)

    def add(stem: str, graph: onnx.ModelProto) -> str:
        content = graph.SerializeToString()
        name = file_name(stem, content, ".onnx")
        write_atomically(out / name, content)
        return name

    manifest: dict[str, Any] = {
        "export_version": 1,
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
        log_scale, shift = guidance.weights(flow.var.new_zeros(1, config.num_tokens, 1))
        manifest["guidance"] = {"log_scale": log_scale.tolist(), "shift": shift.tolist()}
    write_json(out / "model.json", manifest, indent=None)
    return manifest


def _tensors(flow: jf.TarFlow) -> dict[str, Tensor]:
    """Returns the weights, with the position embeddings in the causal order of their block."""
    tensors = dict(flow.named_parameters()) | {"var": flow.var}
    for i, block in enumerate(flow.blocks):
        tensors[f"blocks.{i}.pos_embed"] = block.permutation(block.pos_embed, dim=0)
    return tensors
