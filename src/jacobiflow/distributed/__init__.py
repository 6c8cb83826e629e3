"""Work shared by the processes of a job, and by jobs that are parts of one."""

from jacobiflow.distributed.group import Processes, processes
from jacobiflow.distributed.parts import Part
from jacobiflow.distributed.watch import ProcessFailed

__all__ = ["Part", "ProcessFailed", "Processes", "processes"]
