"""Writes the page that solves in the browser, complete and static: `python benchmarks/live_page.py FOLDER`.

Beside the files of docs/live it has the model, exported with the settings below, and ONNX Runtime Web, which is
fetched once from the npm registry (npm is needed) and kept in build/web.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jacobiflow as jf
from jacobiflow.export import export
from jacobiflow.files import write_beside

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "build" / "web"
PAGE = ("index.html", "style.css", "page.js", "worker.js", "solver.js", "isolate.js")
MODEL, GUIDANCE = "fashion-p2", jf.Guidance(3.0, attn_temperature=1.4)
PACKAGE = "onnxruntime-web@1.30.0"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def runtime() -> dict[str, bytes]:
    """The files of ONNX Runtime Web by name, kept or from the registry.

    **Raises** `RuntimeError` where the package cannot be fetched, or is not the one that is meant.
    """
    kept = KEPT / PACKAGE
    if not all((kept / name).is_file() for name in RUNTIME):
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            try:
                subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise RuntimeError(
                    f"npm pack {PACKAGE}: {error}; install npm, and let it reach the registry"
                ) from error
            (packed,) = Path(folder).glob("*.tgz")
            found = base64.b64encode(hashlib.sha512(packed.read_bytes()).digest()).decode()
            if found != SHA512:
                raise RuntimeError(f"{PACKAGE}: the registry gave another file (SHA-512 {found})")
            with tarfile.open(packed) as package:
                for name in RUNTIME:
                    content = package.extractfile(f"package/dist/{name}")
                    assert content is not None
                    with write_beside(kept / name) as path:
                        path.write_bytes(content.read())
    return {name: (kept / name).read_bytes() for name in RUNTIME}


def build(out: Path) -> None:
    """Write the page to the folder `out`, over an older one of it. **Raises** as `runtime` and `export` do."""
    (out / "ort").mkdir(parents=True, exist_ok=True)
    for name in PAGE:
        shutil.copyfile(ROOT / "docs" / "live" / name, out / name)
    for name, content in runtime().items():
        (out / "ort" / name).write_bytes(content)
    flow = jf.load(MODEL)
    assert isinstance(flow, jf.TarFlow)
    export(flow, out / "model", GUIDANCE)


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of the page in `folder`, which a server on this machine has until the block ends."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/index.html"
        server.shutdown()


if __name__ == "__main__":
    build(Path(sys.argv[1]))
