"""The MAF model."""

from jacobiflow.flows.config import MAFConfig
from jacobiflow.flows.maf.model import MAF, MAFBlock, full_pass

__all__ = ["MAF", "MAFBlock", "MAFConfig", "full_pass"]
