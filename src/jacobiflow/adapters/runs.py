"""Compositions of which native code knows only some layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from torch import nn

from jacobiflow.adapters.adapter import Adapter
from jacobiflow.adapters.library_module import library_class, shallow_copy
from jacobiflow.adapters.native_module import NativeModule

AccelerateRun = Callable[[nn.Module, Adapter], None]


def compose_runs(
    module: nn.Module, adapter: Adapter, is_conditional: bool, accelerate_run: AccelerateRun
) -> nn.Module | None:
    """Returns a composition in which consecutive layers that native code knows are one layer; `None` if none are.

    The run of these layers is a composition of the same class, and shares its layers with the module.

    Args:
        module: Any module of which native code does not know a part.
        adapter: That of the module.
        is_conditional: Whether there is a context.
        accelerate_run: Accelerates a run.
    """
    list_transforms = adapter.list_transforms
    if not adapter.layers or list_transforms is None or library_class(module) is not adapter.target:
        return None
    layers = list(getattr(module, adapter.layers))

    def is_known(layer: nn.Module) -> bool:
        return NativeModule(layer, list_transforms, is_conditional).obstacle is None

    def compose(parts: Sequence[nn.Module]) -> nn.Module:
        attributes = vars(nn.Module()) | {"_modules": {adapter.layers: nn.ModuleList(parts)}}
        return shallow_copy(module, adapter.target, **attributes)

    parts: list[nn.Module] = []
    for is_run, group in groupby(layers, is_known):
        members = list(group)
        if is_run and len(members) > 1:
            members = [compose(members)]
            accelerate_run(members[0], adapter)
        parts += members
    return None if len(parts) in (1, len(layers)) else compose(parts)
