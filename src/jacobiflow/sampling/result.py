"""Samples with their residuals, densities and cost, and the outcome in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jacobiflow.data import image_grid, quantize
from jacobiflow.data.grid import PICTURE_CHANNELS
from jacobiflow.errors import InputValueError
from jacobiflow.fixed_point.solution import Solution, Status
from jacobiflow.sampling.encoding import npz_bytes, pillow, png_bytes
from jacobiflow.utils.deprecation import renamed_attributes
from jacobiflow.utils.files import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

SENSITIVITY_BOUND = 1e-2
"""The change of an entry of x, in the units of x, above which a sample counts as sensitive to rounding."""
_DTYPE_REMEDIES = {"float32": ": use float64", "tf32": ": use float32", "float64": ""}


@dataclass(frozen=True)
class BlockStats:
    """The cost of one block and how its solves ended, over all samples of a run; see `Solution`.

    Under guidance a network call evaluates two rows per sample. If solutions differ in backend, or in obstacle, that of
    the first counts.
    """

    sweeps: int
    network_calls: int
    token_evaluations: int
    seconds: float
    residual: Float[Tensor, " n"]
    status: Int[Tensor, " n"]
    exact: Bool[Tensor, " n"]
    used_fallback: Bool[Tensor, " n"]
    backend: str
    obstacle: str | None

    @classmethod
    def join(cls, solutions: Sequence[Solution]) -> BlockStats:
        """Returns the sums over solutions of different samples, and the entries of all samples."""
        columns = {each.name: [getattr(solution, each.name) for solution in solutions] for each in fields(cls)}
        first: Any = {name: columns.pop(name)[0] for name in ("backend", "obstacle")}
        values: Any = {name: torch.cat(c) if isinstance(c[0], Tensor) else sum(c) for name, c in columns.items()}
        return cls(**values, **first)


@renamed_attributes(
    exact="is_exact", resolved="num_fallback", above="num_above", lost="num_nonfinite", sensitive="num_sensitive"
)
@dataclass(frozen=True)
class Outcome:
    """The exactness and cost of samples; the outcomes of several sets of samples add up.

    Attributes:
        num: Number of samples.
        dtype: The dtype of the network, or "tf32".
        tolerance: The largest residual allowed in any block; `None` if the strategy promises nothing.
        residual: The largest finite residual; `None` if residuals were not measured.
        is_exact: Every block of every sample was solved token by token.
        num_fallback: Samples that some block solved again token by token.
        num_above: Samples above the tolerance, though some block was solved token by token for them.
        num_nonfinite: Samples without values, since the exact inverse is not finite either.
        sensitivity: The largest finite sensitivity; `None` if it was not measured.
        num_sensitive: Samples with a sensitivity above `SENSITIVITY_BOUND`; `None` if it was not measured.
        seconds: Wall-clock time of solving the blocks; `denoise_seconds` is that of denoising.
        denoise_change: See `Samples`; over several sets of samples the largest of each.
        network_calls: Network calls of all blocks.
        token_evaluations: Token evaluations of all blocks.
        sweeps: Sweeps of each block.
        block_seconds: Seconds of each block.
    """

    num: int
    dtype: str
    tolerance: float | None
    residual: float | None
    is_exact: bool
    num_fallback: int
    num_above: int
    num_nonfinite: int
    sensitivity: float | None
    num_sensitive: int | None
    seconds: float
    denoise_seconds: float
    network_calls: int
    token_evaluations: int
    sweeps: tuple[int, ...]
    block_seconds: tuple[float, ...]
    denoise_change: tuple[float, float] | None = None

    @classmethod
    def merge(cls, outcomes: Sequence[Outcome]) -> Outcome:
        """Returns the outcome of all samples together; seconds add up over processes."""
        columns: dict[str, list[Any]] = {each.name: [getattr(o, each.name) for o in outcomes] for each in fields(cls)}
        totals: dict[str, Any] = {}
        for name, values in columns.items():
            if name == "denoise_change":
                totals[name] = tuple(map(max, zip(*filter(None, values), strict=True))) or None
            elif name in ("dtype", "tolerance") or None in values:
                totals[name] = values[0] if name in ("dtype", "tolerance") else None
            elif name in ("residual", "sensitivity"):
                totals[name] = max(values)
            elif isinstance(values[0], tuple):
                totals[name] = tuple(map(sum, zip(*values, strict=True)))
            else:
                totals[name] = all(values) if name == "is_exact" else sum(values)
        return cls(**totals)

    @property
    def has_shortfall(self) -> bool:
        """True if a measured sample is neither exact nor within a tolerance, or if one is not finite or sensitive."""
        is_uncertified = self.residual is not None and self.tolerance is None and not self.is_exact
        return is_uncertified or self.num_above > 0 or self.num_nonfinite > 0 or bool(self.num_sensitive)

    def __str__(self) -> str:
        """One sentence for the user, with the remedy if there is a shortfall."""
        if self.is_exact:
            num_exact = self.num - self.num_above - self.num_nonfinite
            parts = [f"{num_exact:,} exact, since every block was solved token by token"]
        elif self.residual is None:
            parts = ["not certified, since certificates were turned off"]
        elif self.tolerance is None:
            parts = ["not certified, since the strategy stops after a fixed number of sweeps"]
            parts.append(f"the largest residual is {self.residual:.1e}")
        else:
            parts = [f"{self.num - self.num_above - self.num_nonfinite:,} certified to {self.tolerance:g}"]
        if self.num_fallback:
            parts.append(f"{self.num_fallback:,} solved again token by token")
        if self.num_above:
            parts.append(
                f"{self.num_above:,} above the tolerance, up to {self.residual:.1e}, by the rounding of the network "
                "(raise the tolerance, or use a wider dtype), or by a block of your own that is not causal or is random"
            )
        if self.num_nonfinite:
            parts.append(
                f"{self.num_nonfinite:,} not finite, since the exact inverse overflows too, or weights are NaN: lower "
                "the guidance, or use a wider dtype"
            )
        if self.num_sensitive:
            parts.append(
                f"{self.num_sensitive:,} of {self.num:,} samples amplify {self.dtype} rounding above "
                f"{SENSITIVITY_BOUND:g}{_DTYPE_REMEDIES.get(self.dtype, ': use a wider dtype')}"
            )
        elif self.sensitivity is not None:
            parts.append(f"{self.dtype} rounding changes samples by up to {self.sensitivity:.1e}")
        return f"{self.num:,} sample{'s' * (self.num > 1)}: {'; '.join(parts)}"


def _largest_finite(values: Tensor | None) -> float | None:
    return None if values is None else float(values.nan_to_num(posinf=0.0).max())


@renamed_attributes(certificate="residual", trace="intermediates")
@dataclass(frozen=True, repr=False)
class Samples:
    """Samples with their residuals, densities and cost.

    Attributes:
        x: Images, nominally in [-1, 1] and not clipped, or tokens; NaN if the exact inverse overflows.
        latents: Standard normal, before the prior's scale.
        context: Labels or numbers, or `None`.
        log_prob: The log-density of each sample under the flow in nats, at this x. `None` if it was not asked for.
        stats: A `BlockStats` for each block, in encoding order.
        residual: Per sample the largest |g(x) - x| of an entry in any block, guidance included, before
            denoising; `None` if it was not measured. A block that was solved token by token is exact by construction
            and counts as 0, unless it was measured too.
        tolerance: The residual that every block was held to; `None` if sweeps end by the strategy's stopping rules.
            Samples are then not certified, see `outcome`.
        intermediates: The noise, x after each block in sampling order, and the denoised image; `None` if they were not
            asked for.
        seconds: Wall-clock time of solving all blocks; that of denoising is `denoise_seconds`.
        sensitivity: Per sample the largest change of an entry of x by rounding, before denoising and in the units of x.
            It is an estimate by a second solve, from latents that one rounding of `dtype` changes. For an exact sample
            that moves by more than 2.5e-4 it is the difference from a solve in float64. It is infinite if the sample
            is not finite in one of the solves, and `None` if it was not asked for.
        denoise_change: The mean and the largest change of the first images by denoising in bfloat16, over one image in
            64. `None` for fewer images and for other dtypes.
        dtype: The dtype of the network, or "tf32".

    Example:
        >>> samples = jf.sample(jf.load("digits-p1"), 3, labels=[1, 2, 3])
        >>> print(samples.outcome)
        3 samples: 3 exact, since every block was solved token by token
        >>> samples.grid().size
        (1024, 344)
    """

    x: Float[Tensor, "n ..."]
    latents: Float[Tensor, "n t d"]
    context: Tensor | None
    log_prob: Float[Tensor, " n"] | None
    stats: tuple[BlockStats, ...]
    residual: Float[Tensor, " n"] | None
    tolerance: float | None
    intermediates: tuple[Float[Tensor, "n ..."], ...] | None
    seconds: float
    denoise_seconds: float
    sensitivity: Float[Tensor, " n"] | None = None
    dtype: str = "float32"
    denoise_change: tuple[float, float] | None = None

    @property
    def images(self) -> Float[Tensor, "n c h w"]:
        """`x` of a flow over images."""
        if self.x.ndim != 4:
            raise InputValueError("images: these are samples of a flow over tokens; take .tokens")
        return self.x

    @property
    def tokens(self) -> Float[Tensor, "n t d"]:
        """`x` of a flow over tokens."""
        if self.x.ndim != 3:
            raise InputValueError("tokens: these are samples of a flow over images; take .images")
        return self.x

    @property
    def used_fallback(self) -> Bool[Tensor, " n"]:
        """True for samples that some block solved again token by token."""
        return torch.stack([block.used_fallback for block in self.stats]).any(dim=0)

    @property
    def exact(self) -> Bool[Tensor, " n"]:
        """True for samples of which every block was solved token by token."""
        return torch.stack([block.exact for block in self.stats]).all(dim=0)

    @property
    def status(self) -> Int[Tensor, " n"]:
        """The worst `Status` of each sample over its blocks."""
        return torch.stack([block.status for block in self.stats]).amax(dim=0)

    def __repr__(self) -> str:
        return f"Samples({tuple(self.x.shape)}; {self.outcome}; {self.seconds + self.denoise_seconds:.2g} s)"

    def grid(self, columns: int = 10, names: Sequence[str] = ()) -> Image:
        """Returns the images as one picture, with their names if they are given; needs Pillow, for names matplotlib."""
        return image_grid(self.images, min(columns, len(self.x)), names=names)

    def save(self, folder: str | Path) -> None:
        """Writes samples.npz, with all that is known of each sample, and a PNG of each grey or colour image.

        Its arrays are `x`, `latents`, `labels` or `context`, `log_prob`, `residual`, `sensitivity`, `status` and
        `exact`; those that are `None` are left out. `sample_to_folder` is for more samples than fit in memory, and
        resumes.
        """
        folder, is_labels = Path(folder), self.context is not None and not self.context.is_floating_point()
        arrays = {
            "x": self.x, "latents": self.latents, "labels" if is_labels else "context": self.context,
            "log_prob": self.log_prob, "residual": self.residual, "sensitivity": self.sensitivity,
            "status": self.status, "exact": self.exact,
        }  # fmt: skip
        has_pictures = self.x.ndim == 4 and self.x.shape[1] in PICTURE_CHANNELS
        if has_pictures:
            pillow()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "samples.npz", npz_bytes(arrays))
        for i, pixels in enumerate(quantize(self.x).permute(0, 2, 3, 1) if has_pictures else ()):
            write_atomically(folder / f"{i:05}.png", png_bytes(pixels), sync=False)

    @property
    def outcome(self) -> Outcome:
        """The exactness and cost of the samples; `print(samples.outcome)` says it in a sentence."""
        status, sensitivity, stats = self.status, self.sensitivity, self.stats
        num_nonfinite = int((status == Status.NONFINITE).sum())
        num_sensitive = None
        if sensitivity is not None:  # Samples that are not finite have an infinite sensitivity, and do not count.
            num_sensitive = int((sensitivity > SENSITIVITY_BOUND).sum()) - num_nonfinite
        return Outcome(
            num=len(status), dtype=self.dtype, tolerance=self.tolerance, residual=_largest_finite(self.residual),
            is_exact=bool(self.exact.all()), num_fallback=int(self.used_fallback.sum()),
            num_above=int((status == Status.ROUNDING).sum()), num_nonfinite=num_nonfinite,
            sensitivity=_largest_finite(sensitivity), num_sensitive=num_sensitive,
            seconds=self.seconds, denoise_seconds=self.denoise_seconds,
            network_calls=sum(block.network_calls for block in stats),
            token_evaluations=sum(block.token_evaluations for block in stats),
            sweeps=tuple(block.sweeps for block in stats), block_seconds=tuple(block.seconds for block in stats),
            denoise_change=self.denoise_change,
        )  # fmt: skip
