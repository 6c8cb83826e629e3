"""Samples on disk, drawn by any number of processes, and resumed after interruptions."""

from jacobiflow.sampling.folder.job import sample_to_folder
from jacobiflow.sampling.folder.reader import SampleFolder
from jacobiflow.sampling.folder.spec import SampleSpec

__all__ = ["SampleFolder", "SampleSpec", "sample_to_folder"]
