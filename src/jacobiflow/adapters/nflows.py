"""nflows: `AutoregressiveTransform`, affine, spline or one's own, whose slow side is `inverse`, hence `sample`."""

from nflows.transforms.autoregressive import AutoregressiveTransform
from nflows.transforms.made import MaskedLinear

from jacobiflow.adapters.elementwise import Accelerated
from jacobiflow.adapters.modules import Adapter

ADAPTER = Adapter(AutoregressiveTransform, "inverse", Accelerated, MaskedLinear)
