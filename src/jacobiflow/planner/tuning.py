"""`tune`: fits a guess and a correction to each block of a flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from jacobiflow.blocks.context import Context
from jacobiflow.blocks.guidance import Guidance
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point import Correction, Guess, Plain, Solver, Whole
from jacobiflow.fixed_point.attempt import attempt
from jacobiflow.fixed_point.options import SolveOptions
from jacobiflow.fixed_point.problem import Problem
from jacobiflow.fixed_point.registry import JsonDocument, registered_pieces
from jacobiflow.models.checkpoints.fingerprint import check_fingerprint, fingerprint
from jacobiflow.models.checkpoints.folder import find_file_by_guidance
from jacobiflow.models.contexts import ContextLike, Labels, labels_or_context
from jacobiflow.models.flow import Flow, check_flow
from jacobiflow.models.latents import FIRST_CALIBRATION_LATENT, MAX_SAMPLES, draw_latents
from jacobiflow.solutions import exact_solutions
from jacobiflow.utils.checks import check_count, check_seed
from jacobiflow.utils.progress import Progress

NUM_SAMPLES = 16
"""Fresh latents that a tuning is fitted to, by default."""


@dataclass(frozen=True)
class BlockTuning:
    """A guess and a correction that are fitted to a block."""

    guess: Guess
    correction: Correction


@dataclass(frozen=True)
class Tuning(JsonDocument):
    """A guess and a correction for each block of a flow, fitted by `jacobiflow.tune`.

    Attributes:
        fingerprint: The fingerprint of the flow, see `check`.
        num_tokens: T.
        guidance: The guidance that the blocks were solved under.
        samples: The number of latents.
        seed: The seed of the latents.
        blocks: A `BlockTuning` per block, in encoding order.

    Example:
        >>> tuning = jf.Tuning.load(jf.find_tuning(jf.load("digits-p1")))
        >>> tuning.blocks[0].correction
        Chord(kernel=(24, 1, 1))
    """

    _name, _remedy = "tuning", "; make it anew with jacobiflow plan --tune"

    fingerprint: str
    num_tokens: int
    guidance: Guidance | None
    samples: int
    seed: int
    blocks: tuple[BlockTuning, ...]

    def check(self, flow: Flow) -> None:
        """Checks that the tuning is of this flow.

        Raises:
            ValueError: If it is of another.
        """
        check_flow(flow)
        check_fingerprint(self.fingerprint, flow, "the tuning is of", "tune this one")
        if len(self.blocks) != flow.config.num_blocks:
            raise InputValueError(f"tuning of {len(self.blocks)} blocks, but the flow has {flow.config.num_blocks}")


def tune(
    flow: Flow, labels: Labels | None = None, *, context: ContextLike | None = None, samples: int = NUM_SAMPLES,
    batch_size: int = 64, seed: int = 0, progress: Progress | None = None,
) -> Tuning:  # fmt: skip
    """Fits a guess and a correction to each block, to its exact solutions at fresh latents.

    Every registered guess and correction that can be fitted is fitted (`CausalLinear` and `Chord`). The guess with the
    fewest sweeps is taken, and a correction only if it saves sweeps.

    Args:
        flow: The model, or a view of it under guidance (`flow.guided`).
        labels: Classes, taken in turn; `None` takes all classes in turn.
        context: In place of labels: what the flow takes, such as prompts, taken in turn.
        samples: Number of latents, at least 2.
        batch_size: Samples that are solved at a time.
        seed: Fixes the latents. `jacobiflow.sample` never draws the same ones.
        progress: Is called after each block.

    Raises:
        ValueError: If a latent overflows in the exact inverse.

    Example:
        >>> tuning = jf.tune(jf.load("digits-maf"), samples=2)
        >>> len(tuning.blocks)
        5
    """
    check_flow(flow)
    samples = check_count("samples", samples, 2, MAX_SAMPLES)
    batch_size, seed = check_count("batch_size", batch_size, maximum=MAX_SAMPLES), check_seed(seed)
    config = flow.config
    latents = draw_latents(samples, config.num_tokens, config.token_dim, seed, FIRST_CALIBRATION_LATENT)
    solutions = exact_solutions(flow, latents, _context_in_turn(flow, labels, context, samples), batch_size, progress)
    fitted = []
    for i, solution in enumerate(solutions):
        fitted.append(_fit_block(Problem(flow.inverse_block(i), solution.z, solution.context), solution.x, batch_size))
        if progress is not None:
            progress(i + 1, len(solutions), "tuning")
    return Tuning(fingerprint(flow), config.num_tokens, flow.guidance, samples, seed, tuple(fitted))


def find_tuning(flow: Flow) -> Path | None:
    """Returns the file of a tuning in the flow's model folder, tuning.json or tuning-*.json; `None` if it has none.

    A tuning of the flow's guidance comes first, then tuning.json.

    Raises:
        ValueError: If a tuning is broken.

    Example:
        >>> jf.find_tuning(jf.load("digits-p1")).name
        'tuning.json'
    """
    check_flow(flow)
    return find_file_by_guidance(flow, "tuning", lambda file: Tuning.load(file).guidance)


def _context_in_turn(flow: Flow, labels: Labels | None, context: ContextLike | None, samples: int) -> Context:
    """Returns the context of each of the samples; what the arguments give is taken in turn."""
    values = labels_or_context(labels, context)
    if values is None:
        return flow.context_kind.example(samples).to(flow.var.device)
    resolved = flow.context_kind.resolve(values).to(flow.var.device)
    if resolved.values is None:
        return resolved
    if not len(resolved.values):
        raise InputValueError(f"{'context' if labels is None else 'labels'}: empty; give one or more")
    return resolved[torch.arange(samples, device=flow.var.device) % len(resolved.values)]


def _fit_block(problem: Problem, x: Tokens, batch_size: int) -> BlockTuning:
    """The guess and the correction with the fewest sweeps, fitted to the solution `x`."""
    options = SolveOptions(certify=False, batch_size=batch_size)

    def sweeps(guess: Guess, correction: Correction) -> int:
        return int(attempt(problem, Solver(Whole(), guess, correction=correction), options).sample_sweeps.sum())

    kinds = registered_pieces(Guess).values()
    guesses = [fitted for kind in kinds if (fitted := kind.fit(x, problem.z)) is not None]
    guess = guesses[0] if len(guesses) == 1 else min(guesses, key=lambda guess: sweeps(guess, Plain()))
    start = guess(problem.z)
    fits = [kind.fit(problem, x, start) for kind in registered_pieces(Correction).values()]
    corrections: Sequence[Correction] = [Plain(), *(fitted for fitted in fits if fitted is not None)]
    return BlockTuning(guess, min(corrections, key=lambda correction: sweeps(guess, correction)))
