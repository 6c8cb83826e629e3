"""zuko: `MaskedAutoregressiveTransform`, of which MAF, NSF, NCSF, NAF, UNAF, SOSPF and BPF are made."""

from __future__ import annotations

from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.nn import MaskedLinear, MaskedMLP, Residual
from zuko.transforms import AutoregressiveTransform
from zuko.utils import unpack

from jacobiflow.adapters.masked import MaskedNetwork, chain
from jacobiflow.adapters.network import needs_graph, premasked
from jacobiflow.adapters.retry import with_retry
from jacobiflow.adapters.start import Solvable, solve
from jacobiflow.adapters.swapped import Adapter, Swapped


class Accelerated(Solvable):
    """A lazy transformation whose transform, at a context, has the parallel inverse."""

    fewest_steps = (3, 16)  # its own passes are short

    meta: Any
    passes: int
    hyper: Any
    univariate: Any
    shapes: Any
    total: int

    def forward(self, c: Tensor | None = None) -> ParallelInverse:
        return ParallelInverse(self, c)

    def masked_network(self, features: int, conditional: bool) -> MaskedNetwork | None:
        """Its network as operations; `None` if `meta` is a subclass's, or parts are neither zuko's nor PyTorch's."""
        if getattr(self.library_class, "meta", None) is not MaskedAutoregressiveTransform.meta:
            return None
        if not _is_own(self.univariate):
            return None
        hyper = self.hyper
        operations = chain(list(hyper), MaskedLinear, Residual) if type(hyper) is MaskedMLP else None
        if operations is None:
            return None
        outputs = torch.arange(features * self.total, device="cpu").view(features, self.total)
        return MaskedNetwork(tuple(operations), slice(0, features), outputs)

    def columns(self, y: Float[Tensor, "b k"], parameters: Float[Tensor, "b kp"]) -> Float[Tensor, "b k"]:
        """The inverse of the univariate transforms of k features."""
        unpacked = unpack(parameters.unflatten(-1, (-1, self.total)), self.shapes)
        return self.univariate(*unpacked).inv(y)


class ParallelInverse(AutoregressiveTransform):  # type: ignore[misc]
    """zuko's transform x -> y at a context, whose inverse ends where further passes would change nothing.

    It follows its module: after `restore` the inverse is zuko's. Copies and pickles are of zuko's class.
    """

    def __init__(self, module: Accelerated, context: Float[Tensor, "*batch c"] | None) -> None:
        super().__init__(partial(module.meta, context), module.passes)
        self.module, self.context = module, context

    def __reduce__(self) -> tuple[Any, ...]:
        return AutoregressiveTransform, (self.meta, self.passes)

    def _inverse(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        if Swapped.library_class_of(self.module) is None:
            return super()._inverse(y)
        if not self.module.acceleration.retry_float64:
            return self._solve(y)
        (x,) = with_retry(
            lambda module, y, c: (ParallelInverse(module, c)._solve(y),), self.module, y, self.context, _rows
        )
        return x.reshape(*_batch(y, self.context), y.shape[-1])

    def _solve(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        module, context = self.module, self.context
        cheaper = cache(partial(premasked, module, MaskedLinear))

        def step(x: Tensor, y: Tensor, context: Tensor | None) -> tuple[Tensor]:
            transform = module if torch.is_grad_enabled() else cheaper()
            return (transform.meta(context, x).inv(y),)

        found = solve(module, step, (y, context), _rows, self.passes, needs_graph(module, y, context))
        if found is None:
            return super()._inverse(y)
        return found[0] if module.acceleration.tolerance == 0 else found[0].reshape(*_batch(y, context), y.shape[-1])


def _is_own(univariate: Any) -> bool:
    """True for a univariate transform that is a class or function of zuko, with numbers as its only settings."""
    settings: tuple[Any, ...] = ()
    if isinstance(univariate, partial):
        univariate, settings = univariate.func, (*univariate.args, *univariate.keywords.values())
    own = isinstance(univariate, type | FunctionType) and univariate.__module__.split(".")[0] == "zuko"
    return own and all(isinstance(setting, int | float) for setting in settings)


def _batch(y: Tensor, context: Tensor | None) -> torch.Size:
    return y.shape[:-1] if context is None else torch.broadcast_shapes(y.shape[:-1], context.shape[:-1])


def _rows(y: Tensor, context: Tensor | None) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b c"] | None]:
    """The inputs with a row for each sample of the batch that they make together."""
    batch = _batch(y, context)
    tensors = (
        None if t is None else t.expand(*batch, t.shape[-1]).reshape(batch.numel(), t.shape[-1]) for t in (y, context)
    )
    return tuple(tensors)  # type: ignore[return-value]


ADAPTERS = (Adapter(MaskedAutoregressiveTransform, "forward", Accelerated),)
