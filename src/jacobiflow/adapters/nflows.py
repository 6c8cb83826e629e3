"""nflows: `AutoregressiveTransform`, affine, spline or one's own, whose slow side is `inverse`, hence `sample`."""

from nflows.transforms import made
from nflows.transforms.autoregressive import AutoregressiveTransform
from nflows.transforms.base import InputOutsideDomain

from jacobiflow.adapters.elementwise import AcceleratedInverse
from jacobiflow.adapters.swapped import Adapter


class Accelerated(AcceleratedInverse):
    """With nflows's MADE."""

    made = made
    refusals = (AssertionError, InputOutsideDomain)


ADAPTERS = (Adapter(AutoregressiveTransform, "inverse", Accelerated),)
