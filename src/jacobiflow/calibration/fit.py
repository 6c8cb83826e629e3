"""Least-squares fits of what makes a block converge sooner: a linear guess and a chord correction."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jacobiflow.flows.base import Block
from jacobiflow.solvers import CausalLinear, Chord, Guess
from jacobiflow.solvers.solve import no_gradients

WIDTH = 24  # tokens before one that a fit sees; twice as many brought 3 per cent
_RIDGE_GUESS = 1e-3  # of the latents' variance
_RIDGE_CHORD = 2e-2  # of the residuals' mean square, which is scaled to 1
_SWEEPS = 24  # more of them show nothing new
_ROUNDING = 3e-5  # residuals below it are not learnt from


def fit_guess(x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], width: int = WIDTH) -> CausalLinear:
    """The `CausalLinear` of `width` + 1 latents that is nearest to the solutions `x` at `z`, by ridge regression."""
    rows = _before(z - z.mean(dim=0), width + 1)
    gram = rows.T @ rows
    ridge = _RIDGE_GUESS * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    centred = (x - x.mean(dim=0)).flatten(0, 1).to(rows)
    kernel = _kernel(torch.linalg.solve(gram + ridge, rows.T @ centred), width + 1).to(x)
    linear = CausalLinear(kernel, torch.zeros_like(x[0]))
    return CausalLinear(kernel.cpu(), (x - linear(z)).mean(dim=0).cpu())


def fit_chord(
    block: Block, x: Float[Tensor, "b t c"], z: Float[Tensor, "b t c"], guess: Guess, context: Tensor | None = None,
    width: int = WIDTH,
) -> Chord:  # fmt: skip
    """The `Chord` of `width` tokens that best tells the errors X* - X^(k) from the residuals, by ridge regression.

    The errors are those met by sweeping all tokens from `guess` with the chord of the sweeps so far. Each token counts
    alike, whatever the size of its residuals.
    """
    _, length, channels = x.shape
    features = width * channels
    gram = torch.zeros(features, features, dtype=torch.float64, device=x.device)
    cross = torch.zeros(features, channels, dtype=torch.float64, device=x.device)
    chord = Chord(torch.zeros(1, channels, channels))
    ridge = _RIDGE_CHORD * torch.eye(features).to(gram)
    start = guess(z)
    current, count = start.clone(), 0
    with no_gradients(block):
        for _ in range(min(_SWEEPS, length)):
            g = block.update(current, z, 0, length, block.init_cache(z, context))
            residual = (g - current).nan_to_num(0.0, 0.0, 0.0)
            rows = _before(F.pad(residual, (0, 0, 1, 0))[:, :-1], width)
            size = (rows.square().mean(dim=1) + residual.flatten(0, 1).double().square().mean(dim=1)).sqrt()
            known = (size > _ROUNDING) & torch.isfinite(current).all(dim=2).flatten()
            if not known.any():
                break
            weight = torch.where(known, size.clamp(min=_ROUNDING).reciprocal(), 0).unsqueeze(1)
            rows = rows * weight
            gram += rows.T @ rows
            cross += rows.T @ ((x - current - residual).nan_to_num(0.0, 0.0, 0.0).flatten(0, 1) * weight)
            count += int(known.sum())
            chord = Chord(_kernel(torch.linalg.solve(gram + count * ridge, cross), width).to(x))
            current = chord(current, g)
            current = torch.where(torch.isfinite(current).all(dim=2, keepdim=True), current, start)
    return Chord(chord.kernel.clone().cpu())


def _before(x: Float[Tensor, "b t c"], width: int) -> Float[Tensor, "n f"]:
    """A row per token, in float64: itself and the `width` - 1 tokens before it, oldest first; zeros before token 0."""
    padded = F.pad(x.double(), (0, 0, width - 1, 0))
    return padded.unfold(1, width, 1).transpose(2, 3).flatten(2).flatten(0, 1)


def _kernel(weights: Float[Tensor, "f c"], width: int) -> Float[Tensor, "w c c"]:
    """Regression weights of `_before`'s rows as a kernel: entry d for the token d places before."""
    return weights.view(width, -1, weights.shape[1]).flip(0).transpose(1, 2).contiguous()
