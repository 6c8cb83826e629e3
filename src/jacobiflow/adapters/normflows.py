"""normflows: `Autoregressive`, whose slow side is `inverse`: `log_prob` of an affine one, `sample` of a spline."""

from normflows.flows.affine.autoregressive import Autoregressive
from normflows.nets.made import MaskedLinear

from jacobiflow.adapters.elementwise import Accelerated
from jacobiflow.adapters.modules import Adapter

ADAPTER = Adapter(Autoregressive, "inverse", Accelerated, MaskedLinear)
