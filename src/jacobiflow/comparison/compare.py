"""Samplers timed in turn on the same latents, beside the original sampler, the exact loop and an encoding pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.blocks.context import Context
from jacobiflow.blocks.guidance import SamplingSettings
from jacobiflow.comparison.baselines import SEQUENTIAL, original_sampler, sequential_samples
from jacobiflow.evaluation import SampleErrors, sample_errors
from jacobiflow.models.flow import Flow
from jacobiflow.sampling.denoise import denoise_checked
from jacobiflow.sampling.result import Outcome, Samples
from jacobiflow.utils.progress import Progress
from jacobiflow.utils.timing import Timing, time_interleaved

ENCODING_PASS = "encoding pass"


@dataclass(frozen=True)
class SamplerResult:
    """Time and error of one sampler at one batch size.

    Attributes:
        strategy: Name of the sampler.
        seconds: Seconds for the whole batch.
        error: Difference from the x of the exact loop.
        x: Images or tokens of its first round.
        outcome: Exactness and cost of the samples; `None` for an original sampler, which returns x only.
        evaluations_per_token: Token evaluations over samples, blocks and tokens: 1 for the exact loop.
    """

    strategy: str
    seconds: Timing
    error: SampleErrors
    x: Float[Tensor, "n ..."]
    outcome: Outcome | None = None
    evaluations_per_token: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON value."""
        outcome = self.outcome
        return {
            "strategy": self.strategy,
            "seconds": asdict(self.seconds),
            "error": asdict(self.error),
            "network_calls": outcome and outcome.network_calls,
            "token_evaluations": outcome and outcome.token_evaluations,
            "evaluations_per_token": self.evaluations_per_token,
            "residual": outcome and outcome.residual,
            "exact": outcome is not None and outcome.is_exact,
            "used_fallback": outcome and outcome.num_fallback,
            "sweeps": outcome and list(outcome.sweeps),
        }


@dataclass(frozen=True)
class Comparison:
    """Samplers at one batch size, timed in turn.

    Attributes:
        batch_size: Samples in the batch.
        results: The original sampler if the flow has one, the exact loop, then `candidates`.
        encoding_pass: Time of one encoding of the batch without guidance. No solver is faster, because it must evaluate
            each block at least once.
    """

    batch_size: int
    results: tuple[SamplerResult, ...]
    encoding_pass: Timing

    @property
    def original(self) -> str:
        """The name of the original sampler; see `jacobiflow.comparison.baselines.original_sampler`."""
        return self.results[0].strategy

    @property
    def baselines(self) -> tuple[str, ...]:
        """The names of the original sampler and of the exact loop; one name if they are the same."""
        return tuple(dict.fromkeys((self.original, SEQUENTIAL)))

    @property
    def candidates(self) -> tuple[SamplerResult, ...]:
        """All results but those of the baselines."""
        return self.results[len(self.baselines) :]

    def result(self, strategy: str) -> SamplerResult:
        """Returns the result of the sampler of that name."""
        return {result.strategy: result for result in self.results}[strategy]

    def title(self, name: str) -> str:
        """Returns the name of a sampler in tables and figures."""
        return {self.original: "original sampler", SEQUENTIAL: "exact loop"}.get(name, name)

    def speed_up(self, result: SamplerResult, baseline: str) -> float:
        """Returns the median seconds of the baseline of that name, divided by those of `result`."""
        return self.result(baseline).seconds.median / result.seconds.median

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON value: a row for each sampler with its speed-ups, and the encoding pass."""
        return {
            "batch_size": self.batch_size,
            "rows": [
                result.to_json() | {"speed_up": {name: self.speed_up(result, name) for name in self.baselines}}
                for result in self.results
            ],
            "encoding_pass": asdict(self.encoding_pass),
        }


def compare_samplers(
    flow: Flow,
    latents: Float[Tensor, "n t c"],
    context: Tensor | None,
    runs: Mapping[str, Callable[[], Samples]],
    *,
    settings: SamplingSettings | None = None,
    repeats: int = 5,
    warm_up: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Times samplers in turn with the original sampler, the exact loop and an encoding pass.

    Args:
        flow: The model; its device and its guidance are used.
        latents: Standard normal latents, before the prior's scale.
        context: Context of each latent, or `None`.
        runs: Samplers by name, for the same latents, context and guidance. The baselines' names are taken.
        settings: The denoising step of the baselines, `None` for none; `runs` denoise themselves.
        repeats: Number of rounds that are timed.
        warm_up: If True, one more round comes first, which is not timed.
        progress: Is called after each run.
    """
    original, sample_original = original_sampler(flow)
    sequential = partial(sequential_samples, flow, latents, context, settings)
    exact = sequential()

    def run_original() -> Tensor:
        x = sample_original(flow, exact.latents, exact.context)
        return x if settings is None else denoise_checked(flow, x, Context(exact.context), settings, len(x))

    all_runs: dict[str, Callable[[], Any]] = {
        original: run_original,
        SEQUENTIAL: sequential,  # replaces the original sampler if the flow has none
        **runs,
        ENCODING_PASS: torch.no_grad()(partial(flow.encode, exact.x, exact.context)),
    }
    seconds, answers = time_interleaved(all_runs, repeats, flow.var.device, progress, warm_up)
    num_entries, results = latents[..., 0].numel() * flow.config.num_blocks, []
    for name in dict.fromkeys((original, SEQUENTIAL, *runs)):
        x, outcome, evaluations = answers[name], None, None
        if isinstance(x, Samples):
            outcome, x = x.outcome, x.x
            evaluations = outcome.token_evaluations / num_entries
        results.append(SamplerResult(name, seconds[name], sample_errors(x, exact.x), x, outcome, evaluations))
    return Comparison(len(latents), tuple(results), seconds[ENCODING_PASS])
