"""What `--html` writes: the tables, pictures and figures of a command, with all that it takes to run it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from jacobiflow.flows.fingerprint import fingerprint
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.measuring import machine
from jacobiflow.plots import Page, Picture, Table, save_page


def write(
    path: Path, context: typer.Context, flow: ImageFlow, title: str, summary: str, figures: Mapping[str, Any],
    tables: Sequence[Table], pictures: Sequence[Picture],
) -> None:  # fmt: skip
    """Write the page of the command that runs in `context` on `flow`; `figures` are those of `--json`."""
    page = Page(
        title, summary, [*map(shlex.quote, ("jacobiflow", *context.obj))], _model(context.params["model"], flow),
        _settings(context), machine(flow.var.device), figures, tables, pictures,
    )  # fmt: skip
    save_page(page, path)


def _model(name: str, flow: ImageFlow) -> dict[str, Any]:
    config = flow.config
    return {
        "name": name,
        "flow": flow.model_type,
        "images": f"{config.in_channels} x {config.image_size} x {config.image_size}",
        "tokens": f"{config.num_tokens} of {config.token_channels} channels",
        "blocks": config.num_blocks,
        "classes": config.num_classes or "none",
        "parameters": f"{sum(p.numel() for p in flow.parameters()):,}",
        "fingerprint": fingerprint(flow),
    }


def _settings(context: typer.Context) -> dict[str, str]:
    """Every option with the value that it had, in the order of the command's help."""
    return {option.opts[0]: _shown(context.params[option.name or ""]) for option in context.command.params}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "not given"
    return "not given" if value is None else str(value)
