"""Writes the page that solves in the browser, complete and static: `python -m demo.live_page FOLDER`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import onnx

import jacobiflow as jf
from benchmarks.common import ROOT
from benchmarks.npm import npm_files
from demo.block import block_graph
from demo.denoising import denoising_graph
from demo.graphs import SharedWeights, file_name
from jacobiflow.files import write_atomically, write_json

MODEL = "fashion-p2"
RUNTIME, VERSION = "onnxruntime-web", "1.30.0"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def export(flow: jf.TarFlow, out: Path, guidance: jf.Guidance) -> dict[str, Any]:
    """Writes a flow with classes and noise to the folder `out`, as ONNX graphs over one file of weights.

    The folder has a graph for each block and one for the denoising step. Its model.json names these files and has
    sizes, the order in which each block reads the tokens, the prior's standard deviations and the weights of guidance.
    The other files have a hash of their content in their names, so a browser's cache is never stale.

    Returns:
        The content of model.json.
    """
    config, tensors = flow.config, {**dict(flow.named_parameters()), "var": flow.var}
    assert isinstance(config, jf.TarFlowConfig)
    for i, block in enumerate(flow.blocks):  # in the causal order of the block
        tensors[f"blocks.{i}.pos_embed"] = block.permutation(block.pos_embed, dim=0)
    weights = SharedWeights(tensors)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / weights.location, weights.data)

    def add(stem: str, graph: onnx.ModelProto) -> str:
        content = graph.SerializeToString()
        name = file_name(stem, content, ".onnx")
        write_atomically(out / name, content)
        return name

    log_scale, shift = guidance.weights(flow.var.new_zeros(1, config.num_tokens, 1))
    sizes = ("num_tokens", "token_channels", "image_size", "in_channels", "patch_size", "num_classes")
    manifest: dict[str, Any] = {
        "weights": weights.location,
        "blocks": [add(f"block-{i}", block_graph(config, i, weights)) for i in range(config.num_blocks)],
        "denoise": add("denoise", denoising_graph(flow, weights)),
        "orders": [block.permutation.order for block in flow.blocks],
        **{name: getattr(config, name) for name in sizes},
        "keys_per_token": 4 * config.layers_per_block * config.channels,
        "prior_scale": flow.var.detach().float().sqrt().flatten().tolist(),
        "logit_scale": [1.0, 1 / guidance.attn_temperature],
        "guidance": {"log_scale": log_scale.tolist(), "shift": shift.tolist()},
    }
    write_json(out / "model.json", manifest, indent=None)
    return manifest


def build(out: Path) -> None:
    """Writes the page, the model under the guidance that it recommends, and ONNX Runtime Web to the folder `out`."""
    (out / "ort").mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "demo" / "page", out, dirs_exist_ok=True)
    for file in npm_files(RUNTIME, VERSION, SHA512, FILES):
        shutil.copyfile(file, out / "ort" / file.name)
    flow = jf.load(MODEL)
    assert isinstance(flow, jf.TarFlow) and flow.recommended.guidance is not None
    export(flow, out / "model", flow.recommended.guidance)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
