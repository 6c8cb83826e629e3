"""Writes the page that solves in the browser, complete and static: `python -m demo.live_page FOLDER`.

Beside the files of demo/page it has the model, exported under the guidance that it recommends, and ONNX Runtime Web.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import jacobiflow as jf
from benchmarks.npm import npm_files
from demo.export import export

ROOT = Path(__file__).resolve().parent.parent
PAGE = ("index.html", "style.css", "page.js", "worker.js", "solver.js", "isolate.js")
MODEL = "fashion-p2"
RUNTIME, VERSION = "onnxruntime-web", "1.30.0"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def build(out: Path) -> None:
    """Writes the page to the folder `out`, over an older one."""
    (out / "ort").mkdir(parents=True, exist_ok=True)
    for name in PAGE:
        shutil.copyfile(ROOT / "demo" / "page" / name, out / name)
    for file in npm_files(RUNTIME, VERSION, SHA512, FILES):
        shutil.copyfile(file, out / "ort" / file.name)
    flow = jf.load(MODEL)
    assert isinstance(flow, jf.TarFlow)
    export(flow, out / "model", flow.recommended.guidance)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
