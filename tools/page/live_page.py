"""The page "See it solve": its recording, and the model that runs in the browser."""

from __future__ import annotations

import shutil
from pathlib import Path
from string import Template
from typing import Any

import onnx

import jacobiflow as jf
from benchmarks.sources import ROOT
from jacobiflow.utils.files import write_atomically, write_json
from tools.npm import npm_files
from tools.page.block import block_graph
from tools.page.denoising import denoising_graph
from tools.page.graphs import SharedWeights, file_name
from tools.page.recording import SOLVER, record

MODEL = "fashion-p2"
SOURCE = "tools/page/static/index.md"
RUNTIME, VERSION = "onnxruntime-web", "1.30.0"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
FOLDERS = {  # of the files of ONNX Runtime Web, for the CPU and for WebGPU
    "ort.wasm.min.mjs": "ort",
    "ort-wasm-simd-threaded.mjs": "ort",
    "ort-wasm-simd-threaded.wasm": "ort",
    "ort.webgpu.min.mjs": "ort-webgpu",
    "ort-wasm-simd-threaded.asyncify.mjs": "ort-webgpu",
    "ort-wasm-simd-threaded.asyncify.wasm": "ort-webgpu",
}


def export(flow: jf.TarFlow, out: Path, guidance: jf.Guidance) -> dict[str, Any]:
    """Writes a flow with classes and noise to the folder `out`, as ONNX graphs over one file of weights.

    The folder has a graph for each block and one for the denoising step. Its model.json names these files and has
    sizes, the order in which each block reads the tokens, the prior's standard deviations, the weights of guidance, and
    the window and the tolerance of the solver. The other files have a hash of their content in their names, so a
    browser's cache is never stale.

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
        "window": SOLVER.partition.stop(0, config.num_tokens),
        "tolerance": SOLVER.stopping.atol,
        "prior_scale": flow.var.detach().float().sqrt().flatten().tolist(),
        "logit_scale": [1.0, 1 / guidance.attn_temperature],
        "guidance": {"log_scale": log_scale.tolist(), "shift": shift.tolist()},
    }
    write_json(out / "model.json", manifest, indent=None)
    return manifest


def write_page(out: Path) -> str:
    """Writes the scripts, the style and the recording of the page to the folder `out`, and returns its Markdown."""
    source = ROOT / SOURCE
    shutil.copytree(source.parent, out, ignore=shutil.ignore_patterns(source.name), dirs_exist_ok=True)
    recording = record(_flow())
    write_json(out / "recording.json", recording, indent=None)
    return Template(source.read_text()).substitute(
        calls=len(recording["calls"]),
        exact_calls=f"{recording['exact_calls']:,}",
        window=SOLVER.partition.stop(0, recording["num_tokens"]),
        residual=f"{recording['residual']:.1e}".replace("e-0", "e-"),
        difference=f"{recording['difference'] * 127.5:.2f}",
    )


def write_model(out: Path) -> None:
    """Writes the model under the guidance that it recommends, and ONNX Runtime Web, to the folder `out`."""
    for file in npm_files(RUNTIME, VERSION, SHA512, list(FOLDERS)):
        folder = out / FOLDERS[file.name]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / file.name)
    flow = _flow()
    assert flow.recommended.guidance is not None
    export(flow, out / "model", flow.recommended.guidance)


def _flow() -> jf.TarFlow:
    flow = jf.load(MODEL)
    assert isinstance(flow, jf.TarFlow)
    return flow
