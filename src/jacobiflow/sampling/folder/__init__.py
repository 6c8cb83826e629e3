"""Samples on disk, drawn by one or more processes, and resumed after interruptions."""

from jacobiflow.sampling.folder.manifest import Cost, Manifest, SampleFolderError
from jacobiflow.sampling.folder.reader import SampleFolder
from jacobiflow.sampling.folder.writer import sample_to_folder

__all__ = [
    "Cost",
    "Manifest",
    "SampleFolder",
    "SampleFolderError",
    "sample_to_folder",
]
