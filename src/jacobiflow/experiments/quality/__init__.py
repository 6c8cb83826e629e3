"""Strategies side by side, as in the paper's Tables 3 and 4: quality of many samples, and time.

An `Experiment` is begun, timed, drawn row by row, and scored; each step resumes what its folder holds.
"""

from jacobiflow.experiments.quality.draw import draw
from jacobiflow.experiments.quality.experiment import ORIGINAL, Experiment
from jacobiflow.experiments.quality.folder import FIGURES, begin, largest_row
from jacobiflow.experiments.quality.problems import problems
from jacobiflow.experiments.quality.score import WITHIN, Row, finalists, score
from jacobiflow.experiments.quality.timings import timings

__all__ = [
    "FIGURES",
    "ORIGINAL",
    "WITHIN",
    "Experiment",
    "Row",
    "begin",
    "draw",
    "finalists",
    "largest_row",
    "problems",
    "score",
    "timings",
]
