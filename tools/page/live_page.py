"""The page "See it solve": its model, which runs in the browser, and the runtime."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import jacobiflow as jf
from benchmarks import ROOT
from jacobiflow.utils.files import sha256, write_atomically, write_json
from tools.npm import npm_files
from tools.page.graphs import block_graphs, stored_weights

MODEL, WINDOW, TOLERANCE = "fashion-p2", 8, 1e-3
STATIC = ROOT / "tools/page/static"
RUNTIME, VERSION = "onnxruntime-web", "1.30.0"
RUNTIME_FILES = ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"]
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="


def export(flow: jf.TarFlow, out: Path, guidance: jf.Guidance) -> dict[str, Any]:
    """Writes a flow with classes and noise to the folder `out`, as two ONNX graphs and the weights of each block.

    Its model.json names these files and has sizes, the order in which each block reads the tokens, standard deviations
    of the prior and of the noise, and the window and the tolerance of the sweeps. The other files are compressed, and
    have a hash of their content in their names, so a browser's cache is never stale.

    Returns:
        The content of model.json.
    """
    config, stored = flow.config, [stored_weights(block) for block in flow.blocks]
    assert isinstance(config, jf.TarFlowConfig)
    out.mkdir(parents=True, exist_ok=True)

    def add(stem: str, content: bytes) -> str:
        name = f"{stem}-{sha256(content)[:16]}.gz"
        write_atomically(out / name, gzip.compress(content, mtime=0))
        return name

    weights = [b"".join(part.numpy().tobytes() for part in parts.values()) for parts in stored]
    sizes = ("num_tokens", "token_dim", "image_size", "in_channels", "patch_size", "noise_std")
    manifest: dict[str, Any] = {
        **{name: add(name, graph) for name, graph in block_graphs(config, guidance, stored[0]).items()},
        "weights": [add(f"weights-{i}", content) for i, content in enumerate(weights)],
        "orders": [block.permutation.order for block in flow.blocks],
        **{name: getattr(config, name) for name in sizes},
        "keys_per_token": 4 * config.layers_per_block * config.width,
        "window": WINDOW,
        "tolerance": TOLERANCE,
        "prior_scale": flow.var.detach().float().sqrt().flatten().tolist(),
    }
    write_json(out / "model.json", manifest)
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
