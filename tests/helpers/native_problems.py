"""For the tests of native code: small float32 flows of many shapes, threads, and a compiler that takes no time."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jacobiflow as jf
from jacobiflow.blocks.guidance import guided
from tests.helpers.oracle import Guide, MAFOracle, Oracle, StarOracle, sequential
from tests.helpers.problems import make_star


@dataclass(frozen=True)
class Case:
    """A flow, a batch to invert, and the threads to do it with.

    `size` is what distinguishes flows; `labels` are every class and -1, or states of texts, or `None`.
    """

    size: dict[str, Any]
    batch: int = 3
    threads: int = 1
    labels: bool = True
    guide: Guide | None = None
    kind: type[jf.TarFlow] | type[jf.STARFlow] | type[jf.MAF] = jf.TarFlow

    def flow(self) -> Any:
        """Two blocks of which every weight matters."""
        if self.kind is jf.STARFlow:
            return deepcopy(make_star(**self.size)).float()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            return _tarflow(self.size) if self.kind is jf.TarFlow else _maf(self.size)

    def z(self, flow: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch, flow.config.num_tokens, flow.config.token_dim)
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    def context(self) -> Tensor | None:
        if self.kind is jf.STARFlow:
            return torch.randn(self.batch, 3, 5, generator=torch.Generator().manual_seed(2)) if self.labels else None
        classes = self.size.get("num_classes", 0)
        return torch.arange(self.batch) % (classes + 1) - 1 if self.labels and classes else None

    def block(self, flow: Any, i: int = 1) -> Any:
        """Block `i`, the second of which reads its tokens in reverse; guided."""
        return guided(flow.blocks[i], self.guidance())

    def guidance(self) -> jf.Guidance | None:
        guide = self.guide
        return guide and jf.Guidance(guide.weight, guide.annealed, guide.on, guide.temperature, guide.rule)  # type: ignore[arg-type]

    def answer(self, flow: Any, z: Tensor, i: int = 1) -> Tensor:
        """The oracle's inverse, in float64."""
        reference = self.oracle(flow)
        return sequential(lambda x: reference.g(i, x, z.double(), self.context(), self.guide), z)

    def log_det(self, flow: Any, x: Tensor, i: int = 1) -> Tensor:
        """The oracle's sum of the log-scales at `x`: g is exp(log_scale) z + shift."""
        reference, one = self.oracle(flow), torch.ones_like(x)
        step = reference.g(i, x, one, self.context(), self.guide) - reference.g(
            i, x, 0 * one, self.context(), self.guide
        )
        return step.log().sum(dim=(1, 2))

    def oracle(self, flow: Any) -> Oracle | MAFOracle:
        return {jf.TarFlow: Oracle, jf.STARFlow: StarOracle, jf.MAF: MAFOracle}[self.kind](flow)


def _tarflow(size: dict[str, int]) -> jf.TarFlow:
    config = jf.TarFlowConfig(
        in_channels=1, image_size=4, patch_size=1, width=32, num_blocks=2, layers_per_block=1, head_dim=16
    )
    flow = jf.TarFlow(replace(config, **size)).eval()  # type: ignore[arg-type]
    for block in flow.blocks:
        block.pos_embed.mul_(30)
        for name, parameter in block.named_parameters():
            if name.endswith("bias") or "norm" in name or name == "class_embed":
                parameter.add_(0.2 * torch.randn_like(parameter))
        values = flow.config.token_dim
        block.proj_out.weight.normal_(std=0.5 / flow.config.width**0.5)
        if flow.config.nvp:
            block.proj_out.weight[:values].mul_(0.3)
    return flow


def _maf(size: dict[str, int]) -> jf.MAF:
    config = jf.MAFConfig(in_channels=1, image_size=4, hidden_features=20, num_blocks=2)
    flow = jf.MAF(replace(config, **size)).eval()  # type: ignore[arg-type]
    for block in flow.blocks:
        last = block.layers[-1]
        last.weight.normal_(std=0.6 / flow.config.hidden_features**0.5)
        last.weight[0::2].mul_(0.3)
        last.bias.normal_(std=0.2)
        for layer in block.layers if flow.config.num_classes else ():
            layer.class_embed.normal_(std=0.3)
    return flow


def _maf_case(*args: Any, **kwargs: Any) -> Case:
    return Case(*args, kind=jf.MAF, **kwargs)


def _star_case(*args: Any, **kwargs: Any) -> Case:
    return Case(*args, kind=jf.STARFlow, **kwargs)


# Together: heads and widths that are whole vectors and that are not, one token to several blocks of keys, batches that
# are one team's and several teams', and several calls'.
CASES = {
    "one row": Case({}, batch=1, threads=2),
    "one token": Case({"image_size": 1, "num_classes": 2}, batch=2),
    "heads of 32": Case({"width": 64, "head_dim": 32, "num_classes": 5}, batch=7, threads=2),
    "heads of 48": Case(
        {"image_size": 5, "width": 48, "head_dim": 48, "layers_per_block": 2, "num_classes": 3},
        threads=3, guide=Guide(1.5, True, "both", 1.3),
    ),
    "heads of 64, two teams": Case({"width": 128, "head_dim": 64, "num_classes": 4}, batch=33, threads=2),
    "one head of 128": Case(
        {"image_size": 3, "width": 128, "head_dim": 128, "nvp": False, "num_classes": 2},
        batch=5, threads=2, guide=Guide(0.7, False, "shift", 1.0),
    ),
    "no label": Case({"image_size": 2, "width": 20, "head_dim": 10, "num_classes": 5}, batch=7, labels=False),
    "7 wide": Case({"in_channels": 3, "patch_size": 2, "width": 7, "head_dim": 7, "expansion": 1}, batch=17),
    "heads of 17": Case(
        {"width": 51, "head_dim": 17, "layers_per_block": 3, "expansion": 3, "num_classes": 2},
        batch=2, threads=3, guide=Guide(1.0, False, "scale", 0.8),
    ),
    "several calls": Case({"image_size": 2, "num_classes": 3}, batch=33, guide=Guide(1.0, True, "both", 1.0)),
    "four teams": Case({"image_size": 3, "num_classes": 3}, batch=130, threads=4),
    "a team of two and a team of two": Case({"image_size": 3, "width": 33, "head_dim": 11}, batch=32, threads=4),
    "STARFlow": _star_case({"image_size": 8}, batch=7, threads=2),
    "STARFlow, heads of 64": _star_case(
        {"width": 64, "head_dim": 64, "in_channels": 3, "patch_size": 1, "soft_clip": 1.0}, threads=3,
        guide=Guide(2.0, False, "both", 1.0, "density"),
    ),
    "STARFlow, one token": _star_case({"image_size": 2}, batch=2, guide=Guide(1.0, False, "both", 0.7)),
    "STARFlow, no text": _star_case({}, batch=33, labels=False, guide=Guide(1.5, True, "both", 1.3, "density")),
    "STARFlow, a shallow block": _star_case({"layers_per_block": (1, 1, 1)}, batch=65, threads=4),
    "MAF": _maf_case({"num_classes": 3}, batch=5, threads=2),
    "MAF, one token": _maf_case({"image_size": 1}, batch=2),
    "MAF, three layers": _maf_case(
        {"in_channels": 17, "image_size": 1, "hidden_features": 33, "hidden_layers": 3, "num_classes": 4},
        batch=33, threads=3, guide=Guide(0.8, True, "both", 1.0),
    ),
    "MAF, more tokens than units": _maf_case({"in_channels": 66, "image_size": 1, "hidden_features": 40}, batch=7),
    "MAF, more units than tokens": _maf_case(
        {"in_channels": 34, "image_size": 1, "hidden_features": 101, "num_classes": 2},
        batch=17, guide=Guide(0.5, False, "shift", 1.0),
    ),
    "MAF, several panels": _maf_case({"num_classes": 3}, batch=130, threads=2, guide=Guide(1.0, False, "scale", 1.0)),
}  # fmt: skip


def relative_error(x: Tensor, answer: Tensor) -> float:
    """Largest difference, in parts of the largest entry of the answer (of 1 if that is smaller); NaN for any NaN."""
    return float((x - answer).abs().max() / answer.abs().max().clamp(min=1))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch has so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def copying_compiler(path: Path, library: Path, on_link: str = "") -> Path:
    """Writes a compiler to `path` that gives the same library each time, after the shell command `on_link`."""
    path.write_text(f"""#!/bin/sh
case " $* " in *" -c "* | *" -fsyntax-only "*) exit 0;; esac
while [ "$1" != -o ]; do shift; done
{on_link}
cp {shlex.quote(str(library))} "$2"
""")
    path.chmod(0o755)
    return path
