"""TensorBoard, if it is installed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from jacobiflow.training.folder import TrainMetrics


class Board:
    """Writes metrics for TensorBoard to the folder `tensorboard` of a run; does nothing if it is not installed."""

    def __init__(self, out: Path, step: int) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, metrics: TrainMetrics) -> None:
        """Adds the metrics of a step."""
        if self._writer is not None:
            for name, value in asdict(metrics).items():
                if value is not None and name != "step":
                    self._writer.add_scalar(name, value, metrics.step)

    def close(self) -> None:
        """Writes what is not on disk yet."""
        if self._writer is not None:
            self._writer.close()
