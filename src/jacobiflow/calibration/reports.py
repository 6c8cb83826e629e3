"""The reports in a flow's model folder."""

from __future__ import annotations

from pathlib import Path

from jacobiflow import codec
from jacobiflow.calibration.report import Report, Settings
from jacobiflow.errors import InputError
from jacobiflow.files import read_object
from jacobiflow.flows.image_flow import ImageFlow, check_flow
from jacobiflow.guidance import Guidance, check_guidance, in_force


def find_report(flow: ImageFlow, guidance: Guidance | None = None) -> Path | None:
    """The file of the report in the flow's model folder that was calibrated under `guidance`.

    Where there is none, that of another guidance: report.json, or else the first by name; `None` where there is no
    report at all. A folder's reports are report.json and report-*.json.

    **Raises** `ValueError` where a report is broken, `TypeError` for other kinds of arguments.
    """
    check_flow(flow)
    check_guidance(guidance)
    for file in flow.report_files:
        if _guidance_of(file) == in_force(guidance):
            return file
    return next(iter(flow.report_files), None)


def _guidance_of(file: Path) -> Guidance | None:
    """The guidance that a report was made under; the rest of it, which takes long to read, is left alone."""
    try:
        settings: Settings = codec.decode(Settings, (read_object(file) or {}).get("settings"))
    except InputError:
        settings = Report.load(file).settings  # which says what is wrong with the file
    return in_force(settings.guidance)
