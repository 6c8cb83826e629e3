"""Two checkouts of this project side by side: `python benchmarks/versions.py ../other`, ten minutes on two idle cores.

Each samples `fashion-p2` in a process of its own, certified, and the two take turns, so that what slows the machine
slows both. Writes docs/results/versions.json: seconds, network calls and certificates.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.progress import track

from jacobiflow.files import write_json
from jacobiflow.measuring import machine

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs" / "results" / "versions.json"
MODEL, BATCH_SIZES, ROUNDS = "fashion-p2", (1, 4, 16, 64), 5
BARE = "auto without a report"
STRATEGIES = ("sequential", "jacobi", "window:32", "auto", BARE)
KEEP_FREED_MEMORY = {  # as jacobiflow.memory does, for a checkout of any age
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_THRESHOLD_": str(2**25),
}  # fmt: skip
WORKER = """
import json, sys, torch, jacobiflow as jf
flow = jf.load(sys.argv[1])
now = hasattr(flow, "report_files")  # a checkout of before has one report
reports = flow.report_files if now else flow.report_file
for line in sys.stdin:
    ask = json.loads(line)
    setattr(flow, "report_files" if now else "report_file", reports if ask["report"] else () if now else None)
    labels = torch.arange(ask["num"]) % flow.config.num_classes
    out = jf.sample(flow, ask["num"], labels, ask["seed"], strategy=ask["strategy"], progress=False)
    print(json.dumps({
        "seconds": out.seconds, "network_calls": out.network_calls, "resolved": out.resolved_sequentially,
        "certificate": float(out.certificate.max()),
    }), flush=True)
"""


class Version:
    """A checkout, sampling in a process of its own."""

    def __init__(self, root: Path, cache: str) -> None:
        env = os.environ | {"PYTHONPATH": str(root / "src"), "XDG_CACHE_HOME": cache} | KEEP_FREED_MEMORY
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, MODEL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
        )

    def sample(self, strategy: str, num: int, seed: int) -> dict[str, Any]:
        """What a batch took."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        ask = {"strategy": strategy.partition(" ")[0], "num": num, "seed": seed, "report": strategy != BARE}
        print(json.dumps(ask), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def main() -> None:
    """Sample with both in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, help="root of the other checkout, called 'before'")
    other: Path = parser.parse_args().other.resolve()
    if not (other / "src" / "jacobiflow").is_dir():
        parser.error(f"{other}: no checkout of jacobiflow")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:
        versions = {name: Version(root, f"{cache}/{name}") for name, root in (("before", other), ("after", ROOT))}
        cases = [(strategy, num) for num in BATCH_SIZES for strategy in STRATEGIES]
        for strategy, num in track(cases, description="sampling"):
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in versions}
            for seed in range(-1, ROUNDS):  # the first round plans, and does not count
                for name, version in versions.items():
                    answer = version.sample(strategy, num, max(seed, 0))
                    runs[name] += [answer] if seed >= 0 else []
            rows.append({"strategy": strategy, "batch_size": num} | {name: summary(r) for name, r in runs.items()})
            write_json(RESULT, {"model": MODEL, "rounds": ROUNDS, "machine": machine(), "rows": rows})
        for version in versions.values():
            assert version.process.stdin is not None
            version.process.stdin.close()
            version.process.wait()
    for row in rows:
        before, after = row["before"], row["after"]
        print(
            f"{row['strategy']:>21} {row['batch_size']:>3}: {before['seconds']:.3f} to {after['seconds']:.3f} s, "
            f"{before['network_calls']:.0f} to {after['network_calls']:.0f} calls"
        )


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median seconds and calls over the rounds, each with latents of its own; the largest certificate."""
    return {
        "seconds": statistics.median(run["seconds"] for run in runs),
        "network_calls": statistics.mean(run["network_calls"] for run in runs),
        "certificate": max(run["certificate"] for run in runs),
        "resolved_sequentially": sum(run["resolved"] for run in runs),
    }


if __name__ == "__main__":
    main()
