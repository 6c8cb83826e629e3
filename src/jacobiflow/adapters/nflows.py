"""nflows: `AutoregressiveTransform`, affine, spline or one's own, whose slow side is `inverse`, hence `sample`."""

from nflows.transforms.autoregressive import AutoregressiveTransform
from nflows.transforms.made import MaskedLinear

from jacobiflow.adapters.elementwise import AcceleratedInverse
from jacobiflow.adapters.swapped import Adapter


class Accelerated(AcceleratedInverse):
    """With nflows's masked linear layers."""

    masked_linear = MaskedLinear


ADAPTER = Adapter(AutoregressiveTransform, "inverse", Accelerated)
