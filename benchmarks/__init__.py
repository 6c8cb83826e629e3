"""Measurements that the documentation shows: `python -m benchmarks.NAME`. Each writes files of docs/results.

A benchmark that was stopped goes on when it is started again.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FIGURES = ROOT / "docs" / "results", ROOT / "docs" / "figures"
MODELS = ROOT / "src" / "jacobiflow" / "bundled"
