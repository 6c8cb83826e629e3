"""The page "See it solve": its model, which runs in the browser, and the runtime."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import onnx
import torch

import jacobiflow as jf
from benchmarks import ROOT
from jacobiflow.utils.files import write_atomically, write_json
from tools.npm import npm_files
from tools.page.block import block_graph
from tools.page.denoising import denoising_graph
from tools.page.graphs import SharedWeights, file_name, round_rows

MODEL, WINDOW, TOLERANCE = "fashion-p2", 8, 1e-3
STATIC = ROOT / "tools/page/static"
RUNTIME, VERSION = "onnxruntime-web", "1.30.0"
RUNTIME_FILES = ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"]
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="


def round_weights(flow: jf.TarFlow) -> jf.TarFlow:
    """Rounds the matrices of a flow in place, as an export stores them. Returns the flow."""
    for parameter in flow.parameters():
        if parameter.ndim == 2:
            multiples, steps = round_rows(parameter.data)
            parameter.data = multiples * steps
    return flow


def export(flow: jf.TarFlow, out: Path, guidance: jf.Guidance) -> dict[str, Any]:
    """Writes a flow with classes and noise to the folder `out`, as ONNX graphs over one file of weights.

    The folder has a graph for each block and one for the denoising step. Its model.json names these files and has
    sizes, the order in which each block reads the tokens, the prior's standard deviations, the weights of guidance, and
    the window and the tolerance of the sweeps. The other files are compressed, and have a hash of their content in
    their names, so a browser's cache is never stale.

    Returns:
        The content of model.json.
    """
    config, tensors = flow.config, dict[str, torch.Tensor](flow.named_parameters())
    assert isinstance(config, jf.TarFlowConfig)
    for i, block in enumerate(flow.blocks):  # in the causal order of the block
        tensors[f"blocks.{i}.pos_embed"] = block.permutation(block.pos_embed, dim=0)
    weights = SharedWeights(tensors)
    out.mkdir(parents=True, exist_ok=True)

    def add(name: str, content: bytes) -> str:
        write_atomically(out / name, gzip.compress(content, mtime=0))
        return name

    def add_graph(stem: str, graph: onnx.ModelProto) -> str:
        content = graph.SerializeToString()
        return add(file_name(stem, content, ".onnx.gz"), content)

    log_scale, shift = guidance.weights(flow.var.new_zeros(1, config.num_tokens, 1))
    sizes = ("num_tokens", "token_channels", "image_size", "in_channels", "patch_size", "num_classes")
    manifest: dict[str, Any] = {
        "weights": add(weights.location, bytes(weights.data)),
        "blocks": [add_graph(f"block-{i}", block_graph(config, i, weights)) for i in range(config.num_blocks)],
        "denoise": add_graph("denoise", denoising_graph(flow, weights)),
        "orders": [block.permutation.order for block in flow.blocks],
        **{name: getattr(config, name) for name in sizes},
        "keys_per_token": 4 * config.layers_per_block * config.channels,
        "window": WINDOW,
        "tolerance": TOLERANCE,
        "prior_scale": flow.var.detach().float().sqrt().flatten().tolist(),
        "logit_scale": [1.0, 1 / guidance.attn_temperature],
        "guidance": {"log_scale": log_scale.tolist(), "shift": shift.tolist()},
    }
    write_json(out / "model.json", manifest, indent=None)
    return manifest


def write_scripts(out: Path) -> None:
    """Writes the scripts and the style of the page, the model and ONNX Runtime Web to the folder `out`."""
    shutil.copytree(STATIC, out, ignore=shutil.ignore_patterns("*.md"), dirs_exist_ok=True)
    (out / "ort").mkdir(exist_ok=True)
    for file in npm_files(RUNTIME, VERSION, SHA512, RUNTIME_FILES):
        shutil.copyfile(file, out / "ort" / file.name)
    flow = jf.load(MODEL)
    assert isinstance(flow, jf.TarFlow)
    assert flow.recommended.guidance is not None
    export(flow, out / "model", flow.recommended.guidance)
