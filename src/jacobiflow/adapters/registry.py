"""The adapters of a library's classes, if its version is supported."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

from jacobiflow.adapters.adapter import Adapter
from jacobiflow.adapters.library_module import LIBRARIES
from jacobiflow.adapters.nflows import SIGMOID_SCALE, WIDE_SCALE, Library, make_adapters
from jacobiflow.errors import InputValueError

BUILDERS = {"sbi": ("nflows", "zuko")}  # Packages that make flows of these libraries.


def load_adapters(library: str) -> tuple[Adapter, ...]:
    """Returns the adapters of a library's classes; raises InputValueError if its version is not supported."""
    package, first, end = LIBRARIES[library]
    installed = version(package)
    if not Version(first).release <= Version(installed).release < Version(end).release:
        raise InputValueError(f"{library} {installed}: supported are {first} to below {end}; nothing was changed")
    # These modules import their library, which may not be installed.
    if library == "zuko":
        from jacobiflow.adapters.zuko import ADAPTERS
    elif library == "nflows":
        from nflows import transforms
        from nflows.nn.nets import resnet

        nets = resnet.ResidualNet, resnet.ResidualBlock
        return make_adapters(Library(transforms, nets, (transforms.AffineCouplingTransform,), {None: SIGMOID_SCALE}))
    elif library == "glasflow":
        from glasflow.nflows import transforms
        from glasflow.nflows.nn.nets import resnet
        from glasflow.transforms.coupling import AffineCouplingTransform
        from glasflow.transforms.utils import SCALE_ACTIVATIONS as SCALES

        base = transforms.AffineCouplingTransform
        scales = dict.fromkeys((base.DEFAULT_SCALE_ACTIVATION, SCALES["nflows"]), SIGMOID_SCALE)
        wide = (base.GENERAL_SCALE_ACTIVATION, SCALES["nflows_general"], SCALES["wide"])
        scales |= dict.fromkeys(wide, WIDE_SCALE)
        nets = resnet.ResidualNet, resnet.ResidualBlock
        return make_adapters(Library(transforms, nets, (base, AffineCouplingTransform), scales))
    elif library == "normflows":
        from jacobiflow.adapters.normflows import ADAPTERS
    else:
        from jacobiflow.adapters.pyro import ADAPTERS
    return ADAPTERS
