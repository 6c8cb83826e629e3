"""MAF: its config, its masked layers, and the model."""

from jacobiflow.flows.maf.config import MAFConfig
from jacobiflow.flows.maf.model import MAF, MAFBlock, full_pass

__all__ = ["MAF", "MAFBlock", "MAFConfig", "full_pass"]
