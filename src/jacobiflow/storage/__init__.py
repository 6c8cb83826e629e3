"""Many samples on disk: drawn by several processes, resumed after interruptions."""

from jacobiflow.storage.folder import SampleFolder, check
from jacobiflow.storage.manifest import Cost, Manifest, SampleFolderError
from jacobiflow.storage.processes import FirstProcessFailed, Processes, processes
from jacobiflow.storage.run import OnShard
from jacobiflow.storage.sample import sample_to_folder, sizes

__all__ = [
    "Cost",
    "FirstProcessFailed",
    "Manifest",
    "OnShard",
    "Processes",
    "SampleFolder",
    "SampleFolderError",
    "check",
    "processes",
    "sample_to_folder",
    "sizes",
]
