"""Many samples, to disk: by as many processes as there are, and over interruptions."""

from jacobiflow.storage.folder import (
    FILES,
    MANIFEST,
    SHARDS,
    STRATEGY,
    Manifest,
    Record,
    SampleFolder,
    SampleFolderError,
    labels_sha256,
)
from jacobiflow.storage.generate import (
    DEFAULT_BATCH,
    Draw,
    Drawn,
    draw_by_strategy,
    figures_of,
    generate,
    sample_to_folder,
    total,
)
from jacobiflow.storage.processes import FirstProcessFailed, Processes, processes

__all__ = [
    "DEFAULT_BATCH",
    "FILES",
    "MANIFEST",
    "SHARDS",
    "STRATEGY",
    "Draw",
    "Drawn",
    "FirstProcessFailed",
    "Manifest",
    "Processes",
    "Record",
    "SampleFolder",
    "SampleFolderError",
    "draw_by_strategy",
    "figures_of",
    "generate",
    "labels_sha256",
    "processes",
    "sample_to_folder",
    "total",
]
