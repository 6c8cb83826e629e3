"""Uses of PyTorch's autograd with accelerated flows, and the gradients that are left to the libraries."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_full_backward_hook
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import jacobiflow as jf
from tests.helpers.library_flows import (
    BISECTED,
    CASES,
    NATIVE,
    default_dtype,
    gradient_gap,
    masked_layers,
    normal,
    values,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

DOUBLE = torch.float64
EXACT = 1e-9  # relative to the largest entry
LIBRARIES = ["zuko MAF", "zuko NSF", "nflows affine", "normflows affine", "pyro affine"]


@dataclass
class Problem:
    """A small flow with rows and contexts that need gradients."""

    flow: Any
    x: Tensor
    context: Tensor | None
    is_inverse: bool

    @classmethod
    def of(cls, name: str, is_inverse: bool, context: int = 2, features: int = 4, rows: int = 5) -> Problem:
        x, c = (normal(rows, size, seed=size, dtype=DOUBLE).requires_grad_() for size in (features, context))
        return cls(CASES[name].make(context, features, DOUBLE, 8), x, c if context else None, is_inverse)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.context, *self.flow.parameters()) if t is not None]

    def results(self, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        return values(self.flow, self.x[rows], None if self.context is None else self.context[rows], self.is_inverse)

    def loss(self, rows: slice = slice(None)) -> Tensor:
        return loss_of(self.results(rows))

    def gradients(self) -> Any:
        return torch.autograd.grad(self.loss(), self.leaves, allow_unused=True)


def loss_of(results: tuple[Tensor, ...]) -> Any:
    return sum((part.sin() * (1 + part.sigmoid())).sum() for part in results)


def go_backward_twice(p: Problem) -> None:
    loss = p.loss()
    loss.backward(retain_graph=True)
    loss.backward()


def accumulate(p: Problem) -> None:
    p.loss().backward()
    p.flow.zero_grad(set_to_none=False)
    for rows in (slice(0, 2), slice(2, 5)):
        p.loss(rows).backward()


def use_checkpoints(p: Problem) -> None:
    for use_reentrant in (False, True):
        checkpoint(lambda _: p.loss(), p.x, use_reentrant=use_reentrant).backward()


def save_elsewhere(p: Problem) -> None:
    with saved_tensors_hooks(torch.clone, torch.clone):
        p.loss().backward()


def triple(parameter: Tensor) -> None:
    parameter.grad *= 3


def use_hooks_of_parameters(p: Problem) -> None:
    for parameter in p.flow.parameters():
        parameter.register_hook(lambda gradient: 2 * gradient)
        parameter.register_post_accumulate_grad_hook(triple)
    p.loss().backward()


def tie_weights(p: Problem) -> None:
    for layer, other in combinations(masked_layers(p.flow), 2):
        for key, parameter in layer.named_parameters():
            if getattr(other, key).shape == parameter.shape:
                setattr(other, key, parameter)
    p.loss().backward()


def apply_it_twice(p: Problem) -> None:
    y, log_det = p.results()
    loss_of((*values(p.flow, y, y[:, :2], p.is_inverse), log_det)).backward()


def change_weights(p: Problem) -> None:
    p.context = p.context.detach()  # or the library raises an error for its plain layers
    loss = p.loss()
    with torch.no_grad():
        for layer in masked_layers(p.flow):
            layer.weight *= 2
            layer.bias.data = 2 * layer.bias.data
    loss.backward()


def change_results_in_place(p: Problem) -> None:
    loss_of(tuple(part.mul_(2).add_(1) for part in p.results())).backward()


USES = (
    go_backward_twice, accumulate, use_checkpoints, save_elsewhere, use_hooks_of_parameters, tie_weights,
    apply_it_twice, change_weights, change_results_in_place,
)  # fmt: skip


@pytest.mark.parametrize("is_inverse", [False, True])
@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("use", USES)
def test_uses_of_autograd(use: Callable[[Problem], None], name: str, is_inverse: bool) -> None:
    answers = []
    for is_accelerated in (False, True):
        p = Problem.of(name, is_inverse)
        leaves = p.leaves
        with default_dtype(DOUBLE), jf.accelerate(p.flow) if is_accelerated else nullcontext() as handle:
            use(p)
        answers.append([tensor.grad for tensor in leaves])
    assert gradient_gap(*answers) < EXACT
    assert set(handle.backends.values()) == {"native"}


@pytest.mark.parametrize("is_inverse", [False, True])
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_backward_pass_after_restore(name: str, is_inverse: bool) -> None:
    p = Problem.of(name, is_inverse)
    with default_dtype(DOUBLE), jf.accelerate(p.flow):
        losses = [p.loss(), p.loss()]
    losses.append(p.loss())
    for create_graph in (True, False):
        first, _, last = (
            torch.autograd.grad(loss, p.leaves, create_graph=create_graph, allow_unused=True) for loss in losses
        )
        assert gradient_gap(last, first) < EXACT


CHANGES: dict[str, Callable[[Problem, Any], Any]] = {
    "rows": lambda p, _: p.x.mul_(2),
    "weights": lambda _, weight: weight.mul_(2),
    "data": lambda _, weight: setattr(weight, "data", 2 * weight.data),
}


@pytest.mark.parametrize("changed", CHANGES)
@pytest.mark.parametrize("name", LIBRARIES)
def test_changes_before_the_backward_pass_are_noticed(name: str, changed: str) -> None:
    p = Problem.of(name, is_inverse=False)
    expected, leaves = p.gradients(), p.leaves
    with jf.accelerate(p.flow):
        p.x = 1 * p.x
        loss = p.loss()
        with torch.no_grad():
            CHANGES[changed](p, masked_layers(p.flow)[0].weight)
        try:
            result = torch.autograd.grad(loss, leaves, create_graph=changed != "rows", allow_unused=True)
        except RuntimeError as error:
            assert any(reason in str(error) for reason in ("modified by an inplace operation", "weights have changed"))
        else:
            assert gradient_gap(expected, result) < EXACT


@pytest.mark.parametrize("is_inverse", [False, True])
@pytest.mark.parametrize("name", [name for name in NATIVE if name not in BISECTED])
def test_second_derivatives_and_several_cotangents_at_once(name: str, is_inverse: bool) -> None:
    p = Problem.of(name, is_inverse, features=3, rows=2)
    x, c = p.leaves[:2]

    def loss(x: Tensor, c: Tensor) -> Any:
        return sum(part.sin().sum() for part in values(p.flow, x, c, is_inverse))

    def derivatives() -> list[Tensor]:
        first = torch.autograd.grad(loss(x, c), p.leaves, create_graph=True, allow_unused=True)
        penalty = sum(gradient.square().sum() for gradient in first if gradient is not None)
        second = torch.autograd.grad(penalty, p.leaves, allow_unused=True)
        log_det, each = p.results()[1], torch.eye(2, dtype=DOUBLE)
        at_once = torch.autograd.grad(log_det, p.leaves, each, is_grads_batched=True, allow_unused=True)
        hessians = [block for flag in (False, True) for row in hessian(loss, (x, c), vectorize=flag) for block in row]
        return [*second, *at_once, *hessians, *jacobian(loss, (x, c), vectorize=True)]

    with default_dtype(DOUBLE):
        expected = derivatives()
        with jf.accelerate(p.flow) as handle:
            assert gradient_gap(expected, derivatives()) < EXACT
    assert set(handle.backends.values()) == {"native"}


def add_backward_hooks(p: Problem) -> Any:
    calls: list[int] = []
    masked_layers(p.flow)[0].register_full_backward_hook(lambda *_: calls.append(1))
    masked_layers(p.flow)[-1].register_full_backward_pre_hook(lambda *_: calls.append(2))
    gradients = p.gradients()
    assert set(calls) == {1, 2}
    return gradients


def add_a_hook_on_all_modules(p: Problem) -> Any:
    handle = register_module_full_backward_hook(lambda *_: None)
    try:
        return p.gradients()
    finally:
        handle.remove()


def add_parametrizations(p: Problem) -> Any:
    for layer in masked_layers(p.flow):
        parametrizations.weight_norm(layer)
    return p.gradients()


@pytest.mark.parametrize("is_inverse", [False, True])
@pytest.mark.parametrize("name", ["zuko MAF", "nflows affine", "normflows affine"])
@pytest.mark.parametrize("use", [add_backward_hooks, add_a_hook_on_all_modules, add_parametrizations])
def test_what_is_left_to_the_library(use: Callable[[Problem], Any], name: str, is_inverse: bool) -> None:
    answers = []
    for is_accelerated in (False, True):
        p = Problem.of(name, is_inverse, context=0, features=8)
        with jf.accelerate(p.flow) if is_accelerated else nullcontext() as handle:
            answers.append(use(p))
    assert gradient_gap(*answers) < EXACT
    assert "native" not in handle.backends.values()


def test_data_parallel_training() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    answers = []
    try:
        for is_accelerated in (False, True):
            p = Problem.of("nflows affine", is_inverse=False)
            with jf.accelerate(p.flow) if is_accelerated else nullcontext() as handle:
                loss_of(nn.parallel.DistributedDataParallel(p.flow)(p.x, p.context)).backward()
            answers.append([tensor.grad for tensor in p.leaves])
    finally:
        torch.distributed.destroy_process_group()
    assert gradient_gap(*answers) < EXACT
    assert set(handle.backends.values()) == {"native"}


@pytest.mark.parametrize("name", NATIVE)
def test_a_graph_keeps_no_more_memory_than_the_library_s(name: str) -> None:
    flow, x, context = CASES[name].make(2, 6, hidden=32), normal(512, 6), normal(512, 2, seed=1)
    own = {parameter.data_ptr() for parameter in flow.parameters()}
    sizes = []
    for is_accelerated in (False, True):
        saved: dict[int, int] = {}

        def note(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with jf.accelerate(flow) if is_accelerated else nullcontext(), saved_tensors_hooks(note, lambda t: t):
            results = values(flow, x, context, False)
        sizes.append(sum(size for address, size in saved.items() if address not in own))
        assert results[0].requires_grad
    packed = 2 * sum(parameter.nbytes for parameter in flow.parameters())  # at most, with padding
    assert 0 < sizes[1] <= sizes[0] + packed
