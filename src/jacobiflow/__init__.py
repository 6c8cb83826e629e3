"""Fast, certified sampling from autoregressive normalizing flows."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from jacobiflow.utils.deprecation import find_renamed, retired

if TYPE_CHECKING:
    from jacobiflow.api import *  # noqa: F403

__version__ = "0.1.0"
_RENAMED = {
    "Report": "CalibrationReport", "Weights": "ImportanceWeights", "register": "register_piece",
    "solve_certified": "solve",
}  # fmt: skip
_RETIRED = ("CausalLinear", "Chord", "Correction", "MeanAffine", "Plain", "Tuning", "find_tuning", "tune")


def __getattr__(name: str) -> Any:
    """Imports the public names, and with them PyTorch, when the first is used."""
    if name == "__all__" or not (name.startswith("_") or find_spec(f"jacobiflow.{name}")):  # no submodule
        from jacobiflow import api

        if name in ("__all__", *api.__all__):
            return getattr(api, name)
    if name in _RETIRED:
        raise AttributeError(f"{retired(f'jacobiflow.{name}')}; call jacobiflow.plan")
    return find_renamed(__name__, _RENAMED, name)


def __dir__() -> list[str]:
    from jacobiflow import api

    return sorted([*globals(), *api.__all__])
