"""`jacobiflow sample`: draw samples into a folder."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Literal

import jacobiflow as jf
from jacobiflow.cli import loading, options
from jacobiflow.cli.output import format_count, format_duration, format_rate, format_speed_up, progress_bar
from jacobiflow.errors import InputValueError
from jacobiflow.utils.provenance import Provenance

if TYPE_CHECKING:
    from jacobiflow.blocks.context import Context
    from jacobiflow.comparison.compare import Comparison
    from jacobiflow.evaluation import SampleErrors
    from jacobiflow.models.flow import Flow
    from jacobiflow.sampling.folder import SampleSpec
    from jacobiflow.sampling.result import Outcome
    from jacobiflow.utils.progress import Progress

_SHEET = "samples.png"
_SHEET_IMAGES = 100
_DEFAULT_NUM = 16
_SHORT = 1.0  # seconds of the original sampler below which one run is no measure


@dataclass(frozen=True, kw_only=True)
class SampleConfig(options.Config):
    """Draw samples into a folder, exact or certified.

    Guidance and denoising are as the model recommends. --guidance and --denoise each override one of them; --plain
    turns both off.

    Rerun the same command to resume a stopped run. Any number of processes that run it share the work and write the
    same bytes, whether started from several terminals, as tasks of srun or of an array, or by torchrun
    --nproc-per-node 2 -m -- jacobiflow sample ...

    Example: jacobiflow sample --model emoji-star --prompts sunglasses "broken heart" --out out/emoji

    Attributes:
        num: Number of samples. Default: one for each prompt, else 16. A larger one than before adds to those in --out;
            the last file is drawn again if it was not full.
        batch_size: Samples solved together, or auto: as many as fit in memory. Default: the batch size of the samples
            already in --out, else --num, at most 64.
        shard_size: Samples in a file. A run that was stopped keeps whole files. Default: about 1,024.
        files: png: also a file for each image, in folders by class.
        strategy: auto (recommended) measures which is fastest on this machine. sequential: token by token. jacobi:
            sweeps of all tokens; window:N: of N tokens; gs-jacobi:G: of G segments. jacobi-J, gs-jacobi:G-J and the
            paper's [Stack-GS-J-Else] make J sweeps, without a check. Or a .json file of plan.
        denoise: Rate of one denoising step; 0 is off. Default: as recommended by the model.
        denoise_dtype: Dtype of the denoising step; bfloat16 is faster and changes images a little. Default: the
            model's.
        plain: No guidance and no denoising.
        certify: Measure each sample's residual, and solve samples above the tolerance again.
        certify_always: Check every block, even those solved token by token.
        sensitivity: Measure how much rounding changes each sample, by drawing it a second time.
        compare: Also draw the first batch with the original sampler, and compare.
        offload: Keep one block at a time on the device, for a model larger than its memory.
        overwrite: Replace the samples in the folder, or another job.
        out: Folder for the samples, and for samples.png if they are images.
    """

    model: options.Model = "fashion-p2"
    num: Annotated[int | None, options.MODEL, options.within(1, 100_000_000)] = None
    labels: options.Labels = ("balanced",)
    prompts: options.Prompts = ()
    encode_text: options.EncodeText = None
    seed: options.Seed = 0
    batch_size: options.BatchSize | None = None
    shard_size: Annotated[int | None, options.OUTPUT, options.within(1)] = None
    files: Annotated[Literal["npz", "png"], options.OUTPUT] = "npz"
    strategy: Annotated[str, options.SPEED, options.STRATEGY] = "auto"
    tolerance: options.Tolerance = None
    report: options.ReportFile = None
    guidance: options.RecommendedGuidance = None
    denoise: Annotated[float | None, options.GUIDANCE, options.within(0)] = None
    denoise_dtype: Annotated[Literal["bfloat16"] | None, options.GUIDANCE] = None
    plain: Annotated[options.Flag, options.GUIDANCE] = False
    certify: Annotated[options.Flag, options.SPEED, options.NEGATABLE] = True
    certify_always: Annotated[options.Flag, options.SPEED] = False
    sensitivity: Annotated[options.Flag, options.SPEED] = False
    compare: Annotated[options.Flag, options.SPEED] = False
    device: options.Device = "auto"
    offload: Annotated[options.Flag, options.SPEED] = False
    dtype: options.Dtype = "float32"
    overwrite: Annotated[options.Flag, options.OUTPUT] = False
    out: Annotated[Path, options.OUTPUT] = Path("out/samples")
    folder_kind = "samples"

    def check_options(self) -> None:
        """Also refuses options that exclude each other."""
        super().check_options()
        if self.report is not None and loading.has_own_guesses(self.strategy):
            raise InputValueError(f"--report {self.report}: {self.strategy} has its own guesses; leave one of them out")
        if self.certify_always and not self.certify:
            raise InputValueError("--certify-always: excludes --no-certify; leave one of them out")


@dataclass(frozen=True)
class SampleResult(Provenance):
    """The samples in a folder.

    Attributes:
        settings: A line that names guidance and denoising.
        num_new: Number of samples that were missing when the command began.
        seconds: The time in which they were drawn, denoising included.
        preparation_seconds: The time before, for a plan and the check of samples that are there.
        comparison: The strategy and the original sampler on the first batch, denoising included.
        error: The difference of their samples.
        rounding: The largest change of these samples by rounding, before denoising.
    """

    spec: SampleSpec
    settings: str
    num_new: int
    seconds: float
    preparation_seconds: float
    outcome: Outcome
    comparison: Comparison | None = None
    error: SampleErrors | None = None
    rounding: float | None = None


def run(config: SampleConfig) -> SampleResult | None:
    """Draws the samples, and compares the first batch with the original sampler if asked to."""
    from jacobiflow.models.contexts import class_names
    from jacobiflow.utils.timing import describe_machine

    flow = loading.load_model(
        config.model, config.device, config.dtype, offload=config.offload, encode_text=config.encode_text
    )
    prompts = options.parse_prompts(config.prompts, config.encode_text, flow)
    num = config.num or len(prompts) or _DEFAULT_NUM
    if num < len(prompts):
        warnings.warn(f"--num {num}: leaves out {format_count(len(prompts) - num, 'prompt')}", stacklevel=1)
    classes = options.parse_labels(config.labels, num, flow, config.seed)
    texts = _texts(config, prompts, num, flow)
    conditions = classes if texts is None else texts
    settings, line = loading.resolve_settings(
        flow, config.guidance, config.denoise, config.plain, conditions is not None, config.denoise_dtype
    )
    flow = flow.guided(settings.guidance)
    started = perf_counter()
    with progress_bar() as progress:
        folder = jf.sample_to_folder(
            flow, num, config.out, seed=config.seed, context=conditions, settings=settings,
            strategy=loading.load_strategy(config.strategy, config.report, flow), tolerance=config.tolerance,
            certify="always" if config.certify_always else config.certify, sensitivity=config.sensitivity,
            batch_size=config.batch_size, shard_size=config.shard_size, files=config.files,
            overwrite=config.overwrite, progress=progress,
        )  # fmt: skip
        if not folder.should_print:
            print(f"all {num:,} samples are in {config.out}; another process prints their outcome")
            return None
        result = SampleResult(
            folder.spec, line, folder.num_new, folder.seconds, perf_counter() - started - folder.seconds,
            folder.outcome(), machine=describe_machine(flow.var.device),
        )  # fmt: skip
        if config.compare:
            context = flow.context_kind.resolve(conditions, num)
            result = _compare(config, result, flow, folder, context, progress)
    if result.comparison is not None and folder.spec.has_pictures:
        names = class_names(classes, flow.classes) if texts is None else texts
        _save_comparison(result.comparison, config.strategy, names, config.out / _SHEET)
    return result


def _texts(config: SampleConfig, prompts: list[str], num: int, flow: Flow) -> list[str] | None:
    """Returns the text of each sample: the prompts in turn, or captions of the training if there are no prompts."""
    from jacobiflow.models.latents import draw_labels

    captions = flow.config.captions if isinstance(flow, jf.STARFlow) else ()
    if prompts:
        return [prompts[i % len(prompts)] for i in range(num)]
    if not captions or config.labels == ("none",):
        return None
    return [captions[i] for i in draw_labels(num, len(captions), config.seed)]


def _open_earlier(out: Path) -> jf.SampleFolder | None:
    """Opens the samples of an earlier run, if there are any."""
    from jacobiflow.utils.files import MANIFEST, read_object

    is_there = (read_object(out / MANIFEST) or {}).get("kind") == "samples"
    return jf.SampleFolder.open(out) if is_there else None


def _compare(
    config: SampleConfig, result: SampleResult, flow: Flow, folder: jf.SampleFolder, context: Context,
    progress: Progress | None,
) -> SampleResult:  # fmt: skip
    """Adds a comparison of the strategy with the original sampler on the first batch to a result."""
    import torch

    from jacobiflow.comparison.compare import compare_samplers
    from jacobiflow.evaluation import sample_errors
    from jacobiflow.models.latents import draw_latents
    from jacobiflow.sampling.request import SamplingRequest

    spec = folder.spec
    num = min(spec.num, spec.batch_size)
    z = draw_latents(num, flow.config.num_tokens, flow.config.token_dim, spec.seed)
    resolve = partial(
        SamplingRequest.resolve, flow, num, context=context[:num], certify=spec.certify, strategy=folder.strategy()
    )
    request = resolve(settings=jf.SamplingSettings(denoise=spec.denoise, denoise_dtype=spec.denoise_dtype))
    if progress is not None:  # The original sampler may take minutes until its first step.
        print("drawing the first batch again, also by the original sampler", file=sys.stderr)
    with torch.no_grad():
        rounding = resolve(settings=None, sensitivity=True).run(z)
        runs = {config.strategy: partial(request.run, z)}
        denoising = request.denoising if spec.denoise else None
        timed = partial(compare_samplers, flow, z, context[:num].values, runs, settings=denoising, progress=progress)
        comparison = timed(repeats=1, warm_up=False)
        if comparison.result(comparison.original).seconds.median < _SHORT:
            comparison = timed()
    error = sample_errors(*(comparison.result(name).x for name in (config.strategy, comparison.original)))
    return replace(result, comparison=comparison, error=error, rounding=rounding.outcome.sensitivity)


def _save_comparison(comparison: Comparison, strategy: str, names: list[str], path: Path) -> None:
    """Saves the first samples beside those of the original sampler as one picture."""
    from jacobiflow import plots

    original, ours = (comparison.result(name).x[:_SHEET_IMAGES] for name in (comparison.original, strategy))
    sheet = plots.comparison_sheet(original, ours, ("original sampler", "jacobiflow"), names[:_SHEET_IMAGES])
    plots.save_png(sheet, path)


def show(config: SampleConfig, result: SampleResult) -> None:
    """Prints the samples, their speed and exactness, and the files."""
    spec, num_new = result.spec, result.num_new
    print(
        f"{config.model}: {format_count(spec.num, 'sample')} by {config.strategy} on {result.machine['device']}, batch "
        f"size {spec.batch_size}\n{result.settings}"
    )
    if num_new:
        existing = f" ({spec.num - num_new:,} were there)" * (num_new < spec.num)
        denoising = ", denoising included" * (spec.denoise > 0)
        preparation = result.preparation_seconds
        before = f" (planning and checks before: {format_duration(preparation)})" if preparation >= 1 else ""
        print(
            f"drew {num_new:,}{existing} in {_format_seconds(result.seconds)}{denoising}: "
            f"{format_rate(num_new, result.seconds)} a second{before}"
        )
    else:
        print(f"all {spec.num:,} were there already, and match their checksums; --overwrite draws them again")
    if result.outcome.denoise_change is not None:
        mean, largest = (_format_difference(change, spec) for change in result.outcome.denoise_change)
        print(f"denoised in {spec.denoise_dtype}: images change by {mean} on average, by {largest} at most")
    if not result.outcome.has_shortfall:  # A warning has told of a shortfall.
        print(result.outcome)
    if result.comparison is not None:
        _print_comparison(config, result, result.comparison)
    files = [_SHEET] * spec.has_pictures + ["manifest.json", "strategy.json", format_count(spec.num_shards, "shard")]
    images = ", images" * (spec.files == "png")
    print(f"{'wrote' if num_new else 'complete:'} {config.out / ', '.join(files)}{images}")


def _print_comparison(config: SampleConfig, result: SampleResult, comparison: Comparison) -> None:
    assert result.error is not None and result.rounding is not None
    original, ours = (comparison.result(name) for name in (comparison.original, config.strategy))
    speed_up = comparison.speed_up(ours, comparison.original)
    denoising = "denoising included" if result.spec.denoise else "without denoising"
    before = share = ""
    if result.spec.denoise and ours.outcome is not None:
        before, seconds = " before denoising", ours.outcome.denoise_seconds
        share = f" ({seconds / (ours.outcome.seconds + seconds):.0%} of it denoising)"
    print(
        f"first batch of {comparison.batch_size:,} again, {denoising}: original sampler "
        f"{_format_seconds(original.seconds.median)}, here {_format_seconds(ours.seconds.median)}{share}: "
        f"{format_speed_up(speed_up)}\n"
        f"largest difference from the original sampler {_format_difference(result.error.max, result.spec)}; rounding "
        f"changes these samples by up to {_format_difference(result.rounding, result.spec)}{before}"
    )


def _format_difference(difference: float, spec: SampleSpec) -> str:
    """Formats a difference of samples, that of pictures in grey levels, as on the sheet of a comparison."""
    return f"{difference * 255 / 2:.2g} of 255 grey levels" if spec.has_pictures else f"{difference:.1e}"


def _format_seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def describe_kept(config: SampleConfig) -> str:
    """Describes what an interrupted run leaves, and how to go on."""
    folder = _open_earlier(config.out)
    if folder is None:
        return "no sample is drawn; run the same command to start again"
    num, num_kept = folder.spec.num, folder.num_drawn
    hint = "" if num_kept else f"; a file is kept once its {folder.spec.shard_size:,} samples are drawn (--shard-size)"
    return f"{num_kept:,} of {num:,} samples are kept in {config.out}{hint}; run the same command to resume"
