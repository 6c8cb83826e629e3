"""Writes what docs/paper.md shows of a calibration under guidance: `python -m benchmarks.calibration MODEL REPORT`.

Writes docs/results/MODEL-calibration-guided.json, in seconds, from a report that `jacobiflow calibrate --guidance 1`
writes.
"""

from __future__ import annotations

import jacobiflow as jf
from benchmarks.common import RESULTS, origin, parser
from jacobiflow.calibration.report import GUESS_NAMES
from jacobiflow.utils.files import write_json

TOLERANCE = 1e-3


def write_guided(model: str, report: jf.CalibrationReport) -> None:
    """Writes what the page shows of a calibration under guidance."""
    sweeps = {guess: {f"{TOLERANCE:g}": report.mean_sweeps("noise", TOLERANCE, guess)} for guess in GUESS_NAMES}
    write_json(RESULTS / f"{model}-calibration-guided.json", {
        **origin(write_guided), "model": model,
        "guess": [report.best_guess(block) for block in range(report.num_blocks)],
        "crm_percent": report.crm_percent, "gamma": [sum(norms) / len(norms) for norms in report.gamma],
        "mean_sweeps": {"noise": sweeps},
    })  # fmt: skip


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("model", help="a bundled model, such as fashion-p2")
    arguments.add_argument("report", help="its calibration under guidance (JSON)")
    options = arguments.parse_args()
    write_guided(options.model, jf.CalibrationReport.load(options.report))


if __name__ == "__main__":
    main()
