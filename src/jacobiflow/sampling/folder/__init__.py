"""Many samples on disk: drawn by several processes, resumed after interruptions."""

from jacobiflow.sampling.folder.manifest import Cost, Manifest, SampleFolderError
from jacobiflow.sampling.folder.reader import SampleFolder
from jacobiflow.sampling.folder.writer import FirstProcessFailed, Processes, processes, sample_to_folder

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
