"""The error recursion matrix of Appendix A of the paper, as products with a vector, and its norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from jacobiflow.checks import check_count, check_number, check_seed
from jacobiflow.flows.base import Block, evaluate
from jacobiflow.solvers.solve import check_tokens

Products = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def gamma_products(
    block: Block, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], context: Tensor | None = None
) -> Products:
    """The maps v -> Gamma v and v -> Gamma^T v on (B, T, C), for Gamma = dg/dx at `x`, one matrix per sample.

    Gamma carries the error from sweep to sweep near a solution: e^(k+1) = Gamma e^(k) (eq. 6 of the paper, where the
    sign is in its gamma_ti). It is strictly lower triangular in the tokens, so Gamma^T = 0. Both products are backward
    passes through graphs that are built once: Gamma v is the derivative of Gamma^T w along v, which is linear in w.

    **Raises** `TypeError` or `ValueError` where `x` and `z` are no tokens of the block, or `context` has not a row for
    each of theirs.
    """
    check_tokens(block, z, context, x=x)
    # The other kernels of attention cannot be differentiated twice.
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        x, z = x.clone().requires_grad_(), z.clone()
        g = evaluate(block, x, z, context)
        if not g.requires_grad:  # g does not depend on x: a single token, or constant parameters
            return torch.zeros_like, torch.zeros_like
        cotangent = torch.zeros_like(g).requires_grad_()
        (pulled,) = torch.autograd.grad(g, x, cotangent, create_graph=True, materialize_grads=True)

    def product(v: Tensor) -> Tensor:
        if not pulled.requires_grad:  # g does not depend on x
            return torch.zeros_like(v)
        (out,) = torch.autograd.grad(pulled, cotangent, v, retain_graph=True, materialize_grads=True)
        return out

    def transposed_product(v: Tensor) -> Tensor:
        (out,) = torch.autograd.grad(g, x, v, retain_graph=True, materialize_grads=True)
        return out

    return product, transposed_product


def gamma_norm(
    block: Block, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], context: Tensor | None = None,
    rtol: float = 1e-3, max_iterations: int = 100, seed: int = 0,
) -> Float[Tensor, " b"]:  # fmt: skip
    """Spectral norm of Gamma = dg/dx at `x`, per sample, by power iteration on Gamma^T Gamma.

    Power iteration on Gamma itself would find nothing: it is nilpotent, all its eigenvalues are 0. The estimate grows
    towards the norm from below, and stops where an iteration adds less than a share `rtol` of it for every sample, or
    after `max_iterations`. `seed` fixes where it starts. **Raises** as `gamma_products` does.
    """
    check_number("rtol", rtol)
    check_count("max_iterations", max_iterations)
    check_seed(seed)
    product, transposed_product = gamma_products(block, x, z, context)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    norm = x.new_zeros(len(x))
    for _ in range(max_iterations):
        v = v / v.norm(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
        image = product(v)
        grown = image.norm(dim=(1, 2))
        done = bool(((grown - norm).abs() <= rtol * grown).all())
        norm = grown
        if done:
            break
        v = transposed_product(image)
    return norm
