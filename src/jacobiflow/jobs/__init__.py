"""Work that any number of processes share through a folder, and that resumes after an interruption."""

from jacobiflow.jobs.job import CompletedJob, Job, run
from jacobiflow.jobs.store import JobFolderError, JobStore, UnitOutput

__all__ = ["CompletedJob", "Job", "JobFolderError", "JobStore", "UnitOutput", "run"]
