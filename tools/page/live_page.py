"""The page that races two samplers in the browser: its model, which both draw from, and the code that runs it."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import jacobiflow as jf
from benchmarks import ROOT
from jacobiflow.native import compiler
from jacobiflow.utils.files import sha256, write_atomically, write_json
from tools.npm import npm_files
from tools.page.graphs import block_graphs, stored_weights

MODEL = "fashion-p2"
STATIC, NATIVE = ROOT / "tools/page/static", ROOT / "tools/page/native.cpp"
RUNTIME, VERSION = "onnxruntime-web", "1.30.0"
RUNTIME_FILES = ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"]
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="


def compile_native() -> bytes:
    """Returns native.cpp as WebAssembly. Zig compiles each state of the sources once; build/web stores it."""
    path = ROOT / "build/web" / f"native-{sha256(NATIVE.read_bytes() + compiler.fingerprint().encode())[:16]}.wasm"
    if not path.is_file():
        flags = [flag for flag in compiler.FLAGS if flag not in ("-pthread", "-fPIC")]
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable, "-m", "ziglang", "c++", "-target", "wasm32-wasi", "-mexec-model=reactor", "-rdynamic",
                "-msimd128", *flags, "-s", "-D_WASI_EMULATED_GETPID", "-lwasi-emulated-getpid",
                f"-I{compiler.SOURCES}", str(NATIVE), "-o", f"{folder}/native.wasm",
            ]  # fmt: skip
            subprocess.run(command, check=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, Path(folder, "native.wasm").read_bytes())
    return path.read_bytes()


def export(flow: jf.TarFlow, out: Path, guidance: jf.Guidance) -> dict[str, Any]:
    """Writes a flow with classes and noise to the folder `out`: ONNX graphs, native code, and weights by block.

    The files are compressed, and have a hash of their content in their names, so a browser's cache is never stale.

    Returns:
        The names of these files, and what both samplers read beside them: sizes, the shapes of a block's parameters,
        the order in which each block reads the tokens, guidance, and standard deviations of the prior and the noise.
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
    tokens, width, depth = config.num_tokens, config.width, config.layers_per_block
    hidden, heads = config.expansion * width, width // config.head_dim
    return {
        **{name: add(name, graph) for name, graph in block_graphs(config, guidance, stored[0]).items()},
        "native": add("native", compile_native()),
        "weights": [add(f"weights-{i}", content) for i, content in enumerate(weights)],
        "shapes": [list(p.shape) if p.ndim == 2 else [p.numel()] for p in flow.blocks[0].parameters()],
        "orders": [block.permutation.order for block in flow.blocks],
        **{name: getattr(config, name) for name in sizes},
        "native_sizes": [tokens, config.token_dim, width, hidden, heads, depth, config.num_classes],
        "keys_per_token": 4 * depth * width,
        "guidance": torch.cat(guidance.weights(torch.zeros(1, tokens, 1))).tolist(),
        "attn_temperature": guidance.attn_temperature,
        "prior_scale": flow.var.detach().float().sqrt().flatten().tolist(),
    }


def write_scripts(out: Path) -> None:
    """Writes the scripts and the style of the page, the model and ONNX Runtime Web to the folder `out`."""
    shutil.copytree(STATIC, out, ignore=shutil.ignore_patterns("*.md"), dirs_exist_ok=True)
    (out / "ort").mkdir(exist_ok=True)
    for file in npm_files(RUNTIME, VERSION, SHA512, RUNTIME_FILES):
        shutil.copyfile(file, out / "ort" / file.name)
    flow = jf.load(MODEL)
    assert isinstance(flow, jf.TarFlow)
    assert flow.recommended.guidance is not None
    model = export(flow, out / "model", flow.recommended.guidance)
    model["runtime"] = f"../ort/{RUNTIME_FILES[-1]}"
    files = [model[name] for name in ("step", "gradient", "native", "runtime")] + model["weights"]
    model["bytes"] = {name: (out / "model" / name).stat().st_size for name in files}
    write_json(out / "model/model.json", model)
