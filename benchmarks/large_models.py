"""Measures models larger than a device: `python -m benchmarks.large_models`, about five minutes and 4 GiB.

A STARFlow of the released width with fewer layers and random weights, in a folder of several files in bfloat16: the
peak memory while it is loaded, and while it is sampled as a whole and by one block at a time. Each is measured in a
process of its own. Writes docs/results/large-models.json, which fills docs/devices.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import jacobiflow as jf
from benchmarks.common import RESULTS, Json, complete, parser
from benchmarks.memory import in_new_process, memory, random_starflow, reset_peak_memory
from jacobiflow import native
from jacobiflow.models.latents import draw_latents
from jacobiflow.models.memory import memory_needs
from jacobiflow.utils.files import sha256

CONFIG = jf.STARFlowConfig(layers_per_block=(1, 1, 4))
SHARD_SIZE = 500_000_000  # Bytes in a file.
INTERVAL = 0.002  # Seconds between two looks at the memory.


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the largest increase of this process's own memory, without pages of files."""
    before, peak, is_over = memory("RssAnon"), 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not is_over.wait(INTERVAL):
            peak = max(peak, memory("RssAnon") - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: peak
    finally:
        is_over.set()
        thread.join()


def load(folder: str, dtype: str) -> Json:
    """Peak memory of loading, in units of the weights: of the process's own, and with the pages of mapped files."""
    jf.load("digits-p1")  # What a first load sets up is not of this model.
    before = memory("VmRSS")
    reset_peak_memory()
    with peak_memory() as peak:
        flow = jf.load(folder, dtype=dtype)
    weights = sum(tensor.nbytes for tensor in flow.state_dict().values())
    with_files = memory("VmHWM") - before
    return {"weights": weights, "peak": peak() / weights, "peak_with_files": with_files / weights}


def sample(folder: str, how: str) -> Json:
    """Peak memory of one sample by the exact loop, the loading included."""
    native.load_library()
    jf.sample(jf.load("digits-p1"), 1, labels=[0], strategy="sequential")
    with peak_memory() as peak:
        flow: Any = jf.load(folder, dtype="bfloat16", offload=how == "offloaded")
        z = draw_latents(1, flow.config.num_tokens, flow.config.token_channels, seed=1)
        states = draw_latents(1, flow.config.text_tokens, flow.config.text_channels, seed=2)
        x = jf.sample(flow, latents=z, context=states, strategy="sequential", settings=None).x
    needs = memory_needs(flow, torch.device("cpu"), torch.bfloat16)
    return {
        "weights": needs.weights, "largest_block": needs.largest_block,
        "sample_bytes": needs.sample, "keys_values": needs.keys_values, "peak": peak(),
        "samples": sha256(x.numpy().tobytes()),
    }  # fmt: skip


def measure(folder: str, key: Json) -> Json:
    """Measures in a process of its own."""
    if not any(Path(folder).iterdir()):
        random_starflow(CONFIG, "bfloat16").save_pretrained(folder, max_shard_size=SHARD_SIZE)
    run, how = (load, key["load"]) if "load" in key else (sample, key["sample"])
    return in_new_process(run, folder, how)


def main() -> None:
    parser(__doc__).parse_args()
    keys: list[Json] = [{"load": "bfloat16"}, {"load": "float32"}, {"sample": "offloaded"}, {"sample": "whole"}]
    with TemporaryDirectory() as folder:
        complete(RESULTS / "large-models.json", keys, lambda key: measure(folder, key))


if __name__ == "__main__":
    main()
