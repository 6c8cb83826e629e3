"""Many samples, to disk: drawn by as many processes as there are, and resumed after interruptions."""

from jacobiflow.storage.figures import figures_of, outcome_of, total
from jacobiflow.storage.folder import SampleFolder
from jacobiflow.storage.manifest import Manifest, SampleFolderError, labels_sha256
from jacobiflow.storage.names import CONTENTS, MANIFEST, SHEET
from jacobiflow.storage.problems import problems
from jacobiflow.storage.processes import FirstProcessFailed, Processes, processes
from jacobiflow.storage.run import Draw, Drawn, generate
from jacobiflow.storage.sample import DEFAULT_BATCH, draw_by_strategy, sample_to_folder, sizes

__all__ = [
    "CONTENTS",
    "DEFAULT_BATCH",
    "MANIFEST",
    "SHEET",
    "Draw",
    "Drawn",
    "FirstProcessFailed",
    "Manifest",
    "Processes",
    "SampleFolder",
    "SampleFolderError",
    "draw_by_strategy",
    "figures_of",
    "generate",
    "labels_sha256",
    "outcome_of",
    "problems",
    "processes",
    "sample_to_folder",
    "sizes",
    "total",
]
