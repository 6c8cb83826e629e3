"""The page that solves in the browser, timed in headless Chromium: `python benchmarks/browser.py`.

Five minutes on two idle cores. The same seeds by both loops, on one thread and on one for each core, and what a call
takes by the number of its tokens, which explains the ratio. Writes docs/results/browser.json.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import live_page
from chromium import chromium, served
from playwright.sync_api import Browser, Page

from jacobiflow.files import write_json
from jacobiflow.measuring import machine

RESULT = live_page.ROOT / "docs" / "results" / "browser.json"
SEEDS, WARM_UP = range(8), 1_000_000  # a seed that does not count: V8 has compiled after it
LOOPS = ("parallel", "sequential")
SIZES, REPEATS = (1, 2, 4, 8, 16, 32, 64, 195), 30
DRAWN = """(() => {
  const of = ({ kind, tokens, denoised, ...figures }) => figures;
  const { parallel, sequential, first, arrived } = jacobiflow;
  return { parallel: of(parallel), sequential: of(sequential), first, arrived };
})()"""
# Milliseconds of calls of some sizes that end at the middle of the sequence, or take all of it, on one thread.
PROFILE = """async ([sizes, repeats]) => {
  const { Solver } = await import("./solver.js");
  const read = async (name) => new Uint8Array(await (await fetch(`model/${name}`)).arrayBuffer());
  const model = JSON.parse(new TextDecoder().decode(await read("model.json")));
  const names = [model.weights, model.blocks[0]];
  const files = Object.fromEntries(await Promise.all(names.map(async (name) => [name, await read(name)])));
  await Solver.start(1);
  const solver = await Solver.load({ ...model, blocks: [model.blocks[0]], denoise: null }, files);
  const { num_tokens: length, token_channels: c, keys_per_token: s } = model;
  const random = (count) => Float32Array.from({ length: count }, () => Math.random() - 0.5);
  const cost = { calls: 0, evaluations: 0 };
  const state = { block: 0, x: random(length * c), z: random(length * c), keys: random(length * s), label: 0, cost };
  const times = Object.fromEntries(sizes.map((size) => [size, []]));
  for (let i = -repeats; i < repeats; i++) // the first half does not count: V8 compiles in it
    for (const size of sizes) {
      const first = Math.max(1, Math.min(length >> 1, length - size));
      const started = performance.now();
      for (let k = 0; k < 10; k++) await solver.evaluate(state, first, first + size);
      if (i >= 0) times[size].push((performance.now() - started) / 10);
    }
  const median = (all) => all.sort((a, b) => a - b)[all.length >> 1];
  return Object.fromEntries(sizes.map((size) => [size, median(times[size])]));
}"""


def draw(page: Page, seed: int) -> dict[str, Any]:
    """The figures of one drawing by both loops."""
    page.fill("#seed", str(seed))
    page.click("#draw")
    page.wait_for_selector("#draw:enabled", timeout=600_000)
    status = page.inner_text("#status")
    if not status.startswith("Done"):
        raise RuntimeError(f"seed {seed}: {status}")
    return page.evaluate(DRAWN)


def measure(browser: Browser, address: str, threads: int) -> dict[str, Any]:
    """Medians over the seeds on so many threads, and the seconds from the model's arrival to the first picture."""
    page = browser.new_page()
    page.goto(address)
    page.wait_for_function("crossOriginIsolated")  # behind the service worker, which threads need
    page.goto(f"{address}?threads={threads}")
    page.wait_for_selector("#draw:enabled")
    first = draw(page, WARM_UP)
    drawn = [draw(page, seed) for seed in SEEDS]
    page.close()

    def median(loop: str, name: str) -> float:
        return statistics.median(figures[loop][name] for figures in drawn)

    rows = {loop: {name: median(loop, name) for name in drawn[0][loop]} for loop in LOOPS}
    return {
        "threads": threads,
        "first_picture_seconds": (first["first"] - first["arrived"]) / 1000,
        "ratio": statistics.median(d["sequential"]["seconds"] / d["parallel"]["seconds"] for d in drawn),
        "worst_certificate": max(d[loop]["certificate"] for d in drawn for loop in LOOPS),
        **rows,
    }


def main() -> None:
    """A row for each number of threads, the profile of calls, and the sizes of the page's files in bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        live_page.build(folder)
        with served(folder) as server, chromium() as browser:
            address = f"{server}/index.html"
            rows = [measure(browser, address, threads) for threads in sorted({1, min(os.cpu_count() or 1, 8)})]
            page = browser.new_page()
            page.goto(f"{address}?threads=1")
            profile = page.evaluate(PROFILE, [SIZES, REPEATS])
            sizes = {
                part: sum(path.stat().st_size for path in (folder / part).iterdir() if path.is_file())
                for part in (".", "model", "ort")
            }
            version = browser.version
    write_json(
        RESULT,
        {
            "command": "python benchmarks/browser.py", "model": live_page.MODEL, "chromium": version,
            "runtime": f"{live_page.RUNTIME}@{live_page.VERSION}", "machine": machine(), "seeds": len(SEEDS),
            "bytes": sizes, "rows": rows, "call_milliseconds": profile,
        },
    )  # fmt: skip
    for row in rows:
        print(row)
    print(profile)


if __name__ == "__main__":
    main()
