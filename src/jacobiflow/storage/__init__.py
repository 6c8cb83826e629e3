"""Many samples on disk: drawn by several processes, resumed after interruptions."""

from jacobiflow.storage.folder import SampleFolder
from jacobiflow.storage.manifest import Cost, Manifest, SampleFolderError
from jacobiflow.storage.sample import FirstProcessFailed, Processes, processes, sample_to_folder

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
