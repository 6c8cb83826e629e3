"""Work that any number of processes share through a folder, and that resumes after an interruption."""

from jacobiflow.jobs.folder import JobFolder, JobFolderError, UnitOutput
from jacobiflow.jobs.job import CompletedJob, Job, run

__all__ = ["CompletedJob", "Job", "JobFolder", "JobFolderError", "UnitOutput", "run"]
