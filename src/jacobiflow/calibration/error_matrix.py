"""The error recursion matrix of Appendix A of the paper, as products with a vector, and its norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from jacobiflow.flows.base import Block, evaluate
from jacobiflow.solvers.solve import check_tokens

Products = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
_MOST_ROWS = 100


def gamma_products(
    block: Block, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], context: Tensor | None = None
) -> Products:
    """Builds the maps v -> Gamma v and v -> Gamma^T v on (B, T, C), for Gamma = dg/dx at `x`, one matrix per sample.

    Gamma carries the error from sweep to sweep near a solution: e^(k+1) = Gamma e^(k) (eq. 6 of the paper, where the
    sign is in its gamma_ti). It is strictly lower triangular in the tokens. Both products are backward
    passes through graphs that are built once: Gamma v is the derivative of Gamma^T w along v, which is linear in w.
    """
    check_tokens(block, z, context, x=x)
    # The other kernels of attention cannot be differentiated twice.
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        x, z = x.clone().requires_grad_(), z.clone()
        g = evaluate(block, x, z, context) + 0 * x  # which has a graph even if g does not depend on x
        w = torch.zeros_like(g).requires_grad_()
        (pulled,) = torch.autograd.grad(g, x, w, create_graph=True)

    def product(v: Tensor) -> Tensor:
        return torch.autograd.grad(pulled, w, v, retain_graph=True)[0]

    def transposed_product(v: Tensor) -> Tensor:
        return torch.autograd.grad(g, x, v, retain_graph=True)[0]

    return product, transposed_product


def gamma_norm(
    block: Block, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], context: Tensor | None = None,
    rtol: float = 1e-3,
) -> Float[Tensor, " b"]:  # fmt: skip
    """Computes the spectral norm of Gamma = dg/dx at `x`, per sample, by Golub-Kahan-Lanczos bidiagonalisation.

    k products with Gamma and k with Gamma^T give orthonormal vectors between which Gamma is a bidiagonal matrix of k
    rows. Its norm grows towards that of Gamma from below. The estimate stops once a row adds less than a share `rtol`
    of it for every sample, or after 100 rows.
    """
    product, transposed_product = gamma_products(block, x, z, context)
    generator = torch.Generator().manual_seed(0)
    start, _ = _orthonormal(torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device), [])
    norm = x.new_zeros(len(x))
    left_vectors: list[Tensor] = []
    right, diagonal, above = [start], list[Tensor](), list[Tensor]()
    for _ in range(_MOST_ROWS):
        for matrix, source, basis, lengths in (
            (product, right, left_vectors, diagonal),
            (transposed_product, left_vectors, right, above),
        ):
            vector, length = _orthonormal(matrix(source[-1]), basis)
            basis.append(vector)
            lengths.append(length)
        rows = F.pad(torch.stack(diagonal, 1).diag_embed(), (0, 1)) + F.pad(torch.stack(above, 1).diag_embed(), (1, 0))
        last, norm = norm, torch.linalg.matrix_norm(rows, 2)
        if ((norm - last).abs() <= rtol * norm).all():
            break
    return norm


def _orthonormal(
    v: Float[Tensor, "b t c"], basis: Sequence[Float[Tensor, "b t c"]]
) -> tuple[Float[Tensor, "b t c"], Float[Tensor, " b"]]:
    """`v` without its parts along the unit vectors of `basis`, scaled to length 1, and the length that was left."""
    for other in (*basis, *basis):  # the second time removes what rounding left
        v = v - (v * other).sum(dim=(1, 2), keepdim=True) * other
    length = v.norm(dim=(1, 2), keepdim=True)
    return v / length.clamp(min=torch.finfo(v.dtype).tiny), length.flatten()
