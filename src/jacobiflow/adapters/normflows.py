"""normflows: `Autoregressive`, whose slow side is `inverse`: `log_prob` of an affine one, `sample` of a spline."""

from normflows.flows.affine.autoregressive import Autoregressive
from normflows.nets import made

from jacobiflow.adapters.elementwise import AcceleratedInverse
from jacobiflow.adapters.swapped import Adapter


class Accelerated(AcceleratedInverse):
    """With normflows's MADE."""

    made = made


ADAPTERS = (Adapter(Autoregressive, "inverse", Accelerated),)
