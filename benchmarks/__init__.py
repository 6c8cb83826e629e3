"""Measurements that the documentation shows: `python -m benchmarks.NAME [FILE ...]`.

Each benchmark writes files of docs/results: all of its own, or those that are named. A stopped one goes on when it is
started again.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FIGURES = ROOT / "docs" / "results", ROOT / "docs" / "figures"
MODELS = ROOT / "src" / "jacobiflow" / "bundled"
