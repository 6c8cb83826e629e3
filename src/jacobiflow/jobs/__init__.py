"""Work that any number of processes share through a folder, and that resumes after an interruption."""

from jacobiflow.jobs.job import CompletedJob, Job, Unit, run
from jacobiflow.jobs.store import JobFolderError, JobStore, UnitOutput

__all__ = ["CompletedJob", "Job", "JobFolderError", "JobStore", "Unit", "UnitOutput", "run"]
