"""`jacobiflow info`: what a model is, and the machine and versions that a report of a problem should name."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jacobiflow import native
from jacobiflow.cli import options, paths
from jacobiflow.cli.settings import settings_words
from jacobiflow.flows.settings import SamplingSettings
from jacobiflow.measuring import machine

_LIBRARIES = ("zuko", "nflows", "normflows", "pyro-ppl", "sbi")  # whose flows `accelerate` takes


def info(model: options.Model = "fashion-p2", json: options.Json = None) -> None:
    """Print a model's shape and size, the settings that it recommends, how its exact loops run here, and the versions.

    Please add what --json writes to a report of a problem.

    Example: jacobiflow info --model digits-p1
    """
    paths.check(json, model=model)
    flow = options.load_model(model, "cpu")
    config = flow.config
    figures = {
        "model": model,
        "flow": flow.model_type,
        **asdict(config),
        "num_tokens": config.num_tokens,
        "token_channels": config.token_channels,
        "recommended": "none" if flow.recommended == SamplingSettings() else " ".join(settings_words(flow.recommended)),
        "parameters": sum(p.numel() for p in flow.parameters()),
        "native_loops": native.describe(),
        **machine(),
        **{name: found for name in _LIBRARIES if (found := _installed(name)) is not None},
    }
    table = Table(show_header=False)
    for name, value in figures.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        table.add_row(name, escape(shown))
    Console().print(table)
    options.report(json, figures)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
