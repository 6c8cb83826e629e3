"""Samples on disk, drawn by one or more processes, and resumed after interruptions."""

from jacobiflow.sampling.folder.manifest import Cost, Manifest, SampleFolderError
from jacobiflow.sampling.folder.process_group import FirstProcessFailed, Processes, processes
from jacobiflow.sampling.folder.reader import SampleFolder
from jacobiflow.sampling.folder.writer import sample_to_folder

__all__ = [
    "Cost",
    "FirstProcessFailed",
    "Manifest",
    "Processes",
    "SampleFolder",
    "SampleFolderError",
    "processes",
    "sample_to_folder",
]
