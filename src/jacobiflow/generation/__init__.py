"""Many samples, to disk: by as many processes as there are, and over interruptions."""

from jacobiflow.generation.folder import (
    FILES,
    MANIFEST,
    SHARDS,
    STRATEGY,
    Manifest,
    Record,
    SampleFolder,
    SampleFolderError,
)
from jacobiflow.generation.generate import (
    DEFAULT_BATCH,
    Draw,
    Drawn,
    draw_by_strategy,
    figures_of,
    generate,
    sample_to_folder,
    total,
)
from jacobiflow.generation.processes import FirstProcessFailed, Processes, processes

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
    "processes",
    "sample_to_folder",
    "total",
]
