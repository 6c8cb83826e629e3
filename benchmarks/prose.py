"""Figures in sentences: `python benchmarks/prose.py` writes them anew from docs/results and the bundled reports.

`SENTENCES` has each sentence with its figures left open, and how they follow; `uncovered` finds figures in prose that
are in none of them, nor among `EXCEPTIONS`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jacobiflow as jf
from jacobiflow.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "src" / "jacobiflow" / "models"
NUMBER = r"[-+]?\d(?:[\d,]*\d)?(?:\.\d+)?(?:e[-+]?\d+)?"
COUNT = rf"(?:{NUMBER}|\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty)\b)"
UNIT = r"\s?(?:%|×|per cent\b|m?s\b)|x\b(?!\d)|\s(?:times|(?:milli)?seconds?|minutes?|hours?)\b"
PART = r"\b(?:half|thirds?|quarters?|fifths?|tenths?) (?:of )?(?:the |its |an? )?"
SHARE = rf"{PART}(?:time|faster|slower|smaller|less|more|hour)"
FIGURE = re.compile(rf"{COUNT}(?:{UNIT})|\b(?:{SHARE}|twice as)\b")


class Sentence(NamedTuple):
    """A piece of a page, `{}` in place of its figures, as `str.format` has them."""

    page: str
    text: str
    figures: Callable[[], Sequence[float]]

    def pattern(self) -> re.Pattern[str]:
        """Finds the piece with any figures, however its lines are broken; a group for each figure."""
        words = re.split(r"(\{[^}]*\}|\s+)", self.text)
        parts = (f"({NUMBER}%?)" if w.startswith("{") else r"\s+" if w.isspace() else re.escape(w) for w in words)
        return re.compile("".join(parts))

    def shown(self) -> list[str]:
        """The figures, as the page has them."""
        forms = re.findall(r"\{([^}]*)\}", self.text)
        return [form.format(figure) for form, figure in zip((f"{{{f}}}" for f in forms), self.figures(), strict=True)]


# ----------------------------------------------------------------------------------------------------- where they are


@cache
def result(name: str) -> Any:
    """A result file."""
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())


@cache
def report(model: str = "fashion-p2") -> jf.Report:
    """The report of a bundled model."""
    return jf.Report.load(MODELS / model / "report.json")


def sweeps(guess: str, blocks: slice, model: str = "fashion-p2") -> tuple[float, ...]:
    """Mean plain sweeps to 1e-3 of fresh latents."""
    return report(model).mean_sweeps("noise", 1e-3, guess)[blocks]


def slowest(blocks: slice) -> list[int]:
    """Plain sweeps to 1e-3 from z of every sample of these blocks."""
    traces = report().traces["noise"][blocks]
    return [count or report().num_tokens for row in traces for count in row["latent"].reach(1e-3)]


def fitted(model: str) -> list[float]:
    """Mean sweeps of all tokens to 1e-3 of each block, with what is fitted to it."""
    tuning = report(model).tuning
    assert tuning is not None
    found = []
    for block in tuning.blocks:
        whole = [r for r in block.runs if r.partition.stop(0, tuning.num_tokens) == tuning.num_tokens]
        (run,) = (r for r in whole if r.tolerance == 1e-3 and not r.coarse)
        found.append(sum(run.sweeps) / len(run.sweeps))
    return found


def amplified() -> float:
    """How many times a residual the largest error of an image was that it caused, at most, in a tuning."""
    tuning = report().tuning
    assert tuning is not None
    return max(r.error / r.residual * b.amplification for b in tuning.blocks for r in b.runs if r.residual)


def scheduled(name: str, batch: int, entry: str) -> float:
    """A figure of one of the paper's strategies for fashion-p2."""
    rows = result("fashion-p2-strategies")["rows"]
    return float(next(row[entry] for row in rows if (row["strategy"], row["batch"]) == (name, batch)))


def compared(name: str, entry: str, part: str = "rows") -> float:
    """A figure of a row of the comparison in PyTorch."""
    return float(next(row[entry] for row in result("comparison-in-pytorch")[part] if row["name"] == name))


def in_few_sweeps() -> float:
    """By how much Jacobi-30 and segments of the tough blocks raise emoji-FID at least, in steps of 10%."""
    rows = result("emoji-p2-comparison")["rows"]
    cut = [row["relative"] for row in rows if row["name"].startswith(("Jacobi-30", "[5/0-4-", "[5/0-8-"))]
    return math.floor(10 * min(cut)) / 10


def below() -> list[float]:
    """How many times the RMS errors of `auto` are below its tolerance."""
    names = {"auto:1e-1": 1e-1, "auto:1e-2": 1e-2, "auto": 1e-3}
    return [tolerance / compared(name, "rms") for name, tolerance in names.items()]


def few_sweeps() -> list[float]:
    """By what share the strategies of the paper with a tough block cut short miss the original's distance."""
    rows = result("comparison-in-pytorch")["rows"]
    return [row["relative"] for row in rows if row["name"].startswith("[") and row["relative"] > 0.01]


def in_bfloat16(batch: str) -> float:
    """The share of a float32 sweep's time that one in bfloat16 takes."""
    found = result("performance")["compiled"][batch]
    return float(found["bfloat16"]["as it is"] / found["float32"]["as it is"])


def with_avx2() -> list[float]:
    """How many times as long the loop takes, compiled for AVX2."""
    return [row["builds"]["AVX2"] / row["loop"] for row in result("loop-profile")["rows"]]


def chord_share(preset: str) -> float:
    """Multiplications of a chord over those of a block's dense layers, for a token."""
    config = jf.PRESETS[preset].config
    return 24 * config.token_channels**2 / (12 * config.channels**2 * config.layers_per_block)


def windows_by_loop() -> float:
    """Seconds of `window:32` over those of the loop at batch 64."""
    rows = {row["strategy"]: row["after"]["seconds"] for row in result("versions")["rows"] if row["batch_size"] == 64}
    return float(rows["window:32"] / rows["sequential"])


def gained(model: str, before: tuple[float, float], after: tuple[float, float] | None = None) -> float:
    """By what share a setting, of weight and rate, lowers the distance of another; without `after`, the best of all."""
    found = {(r["weight"], r["attn_temperature"], r["denoise"]): r for r in result(f"{model}-search")["rows"]}
    first = found[before[0], 1, before[1]]["pixel_distance"]
    last = result(f"{model}-search")["best"] if after is None else found[after[0], 1, after[1]]
    return float(1 - last["pixel_distance"] / first)


def in_the_browser() -> float:
    """How often the parallel loop in the browser evaluates a token, on one thread."""
    found, model = result("browser"), report(result("browser")["model"])
    return float(found["rows"][0]["parallel"]["evaluations"] / (model.num_blocks * model.num_tokens))


CALIBRATION, EVALUATION, SOLVERS = (f"docs/{name}.md" for name in ("calibration", "evaluation", "solvers"))
PERFORMANCE, ARCHITECTURE = "docs/performance.md", "docs/architecture.md"
EASY = slice(7)  # the blocks of fashion-p2 that are not tough

SENTENCES = (
    Sentence(EVALUATION, "and 4 or 8 segments, raise emoji-FID by at least {:.0%}.", lambda: (in_few_sweeps(),)),
    Sentence(CALIBRATION, "took {:.0f} s for `fashion-p2` and {:.0f} s for `emoji-p2`",
             lambda: [result(f"{model}-calibration")["seconds"] for model in ("fashion-p2", "emoji-p2")]),
    Sentence(CALIBRATION, "mean error of {:.0e} at batch 16, and its worst pixel is {:.1f} off",
             lambda: [scheduled("[7-8-12-10]", 16, entry) for entry in ("mean_error", "max_error")]),
    Sentence(SOLVERS, "to 1e-3, from z: {} to {} in block 7, {} to {} in the rest",
             lambda: (min(slowest(slice(7, 8))), max(slowest(slice(7, 8))), min(slowest(EASY)), max(slowest(EASY)))),
    Sentence(SOLVERS, "{:.2%} and {:.1%} of the arithmetic of the block's network",
             lambda: (chord_share("img128cond"), chord_share("afhq"))),
    Sentence(SOLVERS, "such a sweep takes {:.0%} of the time at 16 samples", lambda: (in_bfloat16("16"),)),
    Sentence(SOLVERS, "plain sweeps from z take {:.1f} in block 7 and {:.1f} to {:.1f} elsewhere",
             lambda: (sweeps("latent", slice(7, 8))[0], min(sweeps("latent", EASY)), max(sweeps("latent", EASY)))),
    Sentence(SOLVERS, "with guess and chord {:.2f} and {:.1f} to {:.1f}, a sweep that confirms included",
             lambda: (fitted("fashion-p2")[7], min(fitted("fashion-p2")[:7]), max(fitted("fashion-p2")[:7]))),
    Sentence(SOLVERS, "plain sweeps take {:.1f} to {:.1f}, and with what is fitted {:.2f} to {:.1f}",
             lambda: (*(f(sweeps("latent", slice(4), "digits-p1")) for f in (min, max)),
                      *(f(fitted("digits-p1")) for f in (min, max)))),
    Sentence(SOLVERS, "a calibration of `fashion-p2` up to {:.0f} times", lambda: (amplified(),)),
    Sentence(EVALUATION, "training images is at {:.3f} from all of them, the 156 test images, which are other emoji, "
             "at {:.3f}", lambda: (result("emoji-features")["distance_of_614_training_images"],
                                   result("emoji-features")["distance_of_test_images"])),
    Sentence(EVALUATION, "(0.6 MB, {:.1%} test accuracy", lambda: (result("fashion-features")["test_accuracy"],)),
    Sentence(EVALUATION, "the 10,000 test images are at {:.3f} from the 60,000 training images, the first 2,000 "
             "training images at {:.3f}", lambda: (result("fashion-features")["distance_of_test_images"],
                                                   result("fashion-features")["distance_of_2000_training_images"])),
    Sentence(EVALUATION, "the worst is beyond it ({:.1e} to 1e-1, {:.1e} to 1e-2, {:.1e} to 1e-3), among 10,000 it is "
             "{:.1e} to 1e-1. RMS errors are {:.0f} to {:.0f} times below it.",
             lambda: (*(compared(name, "max") for name in ("auto:1e-1", "auto:1e-2", "auto")),
                      compared("auto:1e-1", "max", "final"), min(below()), max(below()))),
    Sentence(EVALUATION, "moves fashion-FID by less than {:.0%}, downwards; `[7-196-1-6]` errs by {:.1f} and moves it "
             "by {:.1%}.", lambda: (math.ceil(-100 * compared("STARFlow", "relative")) / 100,
                                 compared("[7-196-1-6]", "max"),
                                 -compared("[7-196-1-6]", "relative"))),
    Sentence(EVALUATION, "few sweeps on the tough block 7 cost {:.0%} to {:.0%} of fashion-FID",
             lambda: (min(few_sweeps()), max(few_sweeps()))),
    Sentence(EVALUATION, "slower than the sequential loop**, {:.2f}x against {:.2f}x",
             lambda: (compared("auto", "rate"), compared("sequential", "rate"))),
    Sentence(EVALUATION, "was {:.3f}; the same setting gives {:.3f} on",
             lambda: (result("fashion-p2-search")["best"]["fashion_fid"], compared("Original", "distance"))),
    Sentence(PERFORMANCE, "no more than twice as long, and takes {:.1f} to {:.1f} times as long",
             lambda: (min(with_avx2()), max(with_avx2()))),
    Sentence(PERFORMANCE, "Calls of whole sweeps grow like T^{:.2f}, of the loop like T; seconds of the growing cache "
             "like T^{:.1f}", lambda: (result("growth")["by_tokens"]["exponents"]["jacobi"]["network_calls"],
                                       result("growth")["by_tokens"]["exponents"]["growing cache"]["seconds"])),
    Sentence(PERFORMANCE, "evaluates each token {:.1f} times, its certificate included", lambda: (in_the_browser(),)),
    Sentence(ARCHITECTURE, "takes {:.1f} times the time of the loop at batch 64", lambda: (windows_by_loop(),)),
    Sentence(EVALUATION, "a denoising step, which lowers it by {:.0%}, is recommended for `digits-p1`, and guidance, "
             "which lowers it by another {:.0%}, or by {:.0%} for `digits-maf`",
             lambda: (gained("digits-p1", (0, 0), (0, 1)), gained("digits-p1", (0, 1)), gained("digits-maf", (0, 0)))),
)  # fmt: skip

EXCEPTIONS = {
    "a definition, or a constant of the code": (
        "sweeps every block 30 times", "stays above 4 times its smallest", "up to 4 times it", "is swept five times",
        "gains more than 3%", "more than twice its largest block", "no more than twice as long",
        "In under ten minutes it compares", "adds 0 times a finite number", "at most 1% above Original",
        "the settings that hold it within 1%", "that is within 1% of the best rate",
        "The target was three times the sequential loop", "was to be 1.4 times as fast as the fused loop",
    ),
    "a figure of the paper": ("as the paper's 4.5x and 5.3x on a GPU",),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ checking


def pages() -> Iterator[str]:
    """The pages with prose; model cards and outputs of notebooks are generated and tested as a whole."""
    for pattern in ("README.md", "docs/*.md", "docs/*/*.md"):
        yield from (str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(pattern)))


def prose(text: str) -> str:
    """A page with all blank that is no prose or is generated as a whole: parts between marks, and code."""
    for pattern in (r"<!-- ([^>]+) -->.*?<!-- end of \1 -->", r"^```.*?^```", r"^    .*?$", r"`[^`\n]*`"):
        text = re.sub(pattern, lambda m: re.sub(r"\S", " ", m[0]), text, flags=re.DOTALL | re.MULTILINE)
    return text


def uncovered(page: str, text: str) -> list[str]:
    """The figures in the prose of a page that are neither generated nor excepted, with the numbers of their lines."""
    known = [sentence.pattern() for sentence in SENTENCES if sentence.page == page]
    known += [re.compile(r"\s+".join(map(re.escape, e.split()))) for group in EXCEPTIONS.values() for e in group]
    spans = [match.span() for pattern in known for match in pattern.finditer(text)]
    return [
        f"line {text.count(chr(10), 0, found.start()) + 1}: {' '.join(found[0].split())}"
        for found in FIGURE.finditer(prose(text))
        if not any(start <= found.start() and found.end() <= end for start, end in spans)
    ]


def written(page: str, text: str) -> str:
    """The page with the figures of its sentences. **Raises** `ValueError` for one that is not there once."""
    for sentence in (sentence for sentence in SENTENCES if sentence.page == page):
        found = list(sentence.pattern().finditer(text))
        if len(found) != 1:
            raise ValueError(f"{page}: {sentence.text!r} is there {len(found)} times")
        for group, figure in reversed(list(enumerate(sentence.shown(), 1))):
            text = f"{text[: found[0].start(group)]}{figure}{text[found[0].end(group) :]}"
    return text


def main() -> None:
    """Write the figures, and say which are not known."""
    for page in pages():
        before = (ROOT / page).read_text()
        text = written(page, before)
        if text != before:
            write_atomically(ROOT / page, text.encode())
        for figure in uncovered(page, text):
            print(f"{page}, {figure}: in no sentence of SENTENCES")


if __name__ == "__main__":
    main()
