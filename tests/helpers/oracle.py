"""TarFlow, STARFlow, MAF and their solvers again, from the state dict alone: no cache, no code of the library, float64.

Everything is recomputed from the current tokens whenever anything is needed. Tokens of a block are in its own causal
order, blocks are numbered in encoding order, and odd blocks read the patches in reverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guide:
    """Guidance: weight, annealed or not, the guided parameters, the temperature of the unconditional row, the rule."""

    weight: float
    annealed: bool
    on: str
    temperature: float
    rule: str = "linear"


class FlowOracle:
    """A stack of affine blocks; subclasses say how images become tokens, and give the parameters of a block."""

    def __init__(self, flow: Any) -> None:
        self.state = {name: value.detach().double() for name, value in flow.state_dict().items()}
        self.num_blocks, self.var = flow.config.num_blocks, self.state["var"]

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of images, and the log-determinant of that map."""
        raise NotImplementedError

    def images(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def parameters(self, i: int, x: Tensor, labels: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-scale and shift of all entries of block i; `x` is in its causal order."""
        raise NotImplementedError

    def flip(self, i: int, x: Tensor) -> Tensor:
        return x[:, torch.arange(x.shape[1] - 1, -1, -1)] if i % 2 else x

    def unflip(self, i: int, x: Tensor) -> Tensor:
        return self.flip(i, x)

    def g(
        self, i: int, x: Tensor, z: Tensor, labels: Tensor | None = None, guide: Guide | None = None,
        temperature: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """The map whose fixed point is the inverse of block i at z; `temperature` is that of the conditional rows."""
        log_scale, shift = self.parameters(i, x, labels, temperature)
        if guide is not None and self.supports_guidance(i):
            guide_away(guide, log_scale, shift, *self.parameters(i, x, None, guide.temperature))
        return log_scale.exp() * z + shift

    def supports_guidance(self, i: int) -> bool:
        return True

    def invert_block(self, i: int, z: Tensor, labels: Tensor | None = None, guide: Guide | None = None) -> Tensor:
        return sequential(lambda x: self.g(i, x, z, labels, guide), z)

    def decode(self, latents: Tensor, labels: Tensor | None = None, guide: Guide | None = None) -> Tensor:
        """Images at standard normal latents, token after token."""
        x = latents.double() * self.var.sqrt()
        for i in reversed(range(self.num_blocks)):
            x = self.unflip(i, self.invert_block(i, self.flip(i, x), labels, guide))
        return self.images(x)

    def encode(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents and log-determinant, prior's scale included."""
        x, log_det = self.tokens(images.double())
        for i in range(self.num_blocks):
            x = self.flip(i, x)
            log_scale, shift = self.parameters(i, x, labels)
            x = self.unflip(i, (x - shift) / log_scale.exp())
            log_det = log_det - log_scale.flatten(1).sum(dim=1)
        return x / self.var.sqrt(), log_det - self.var.sqrt().log().sum()


class Oracle(FlowOracle):
    """A TarFlow over images."""

    def __init__(self, flow: Any) -> None:
        super().__init__(flow)
        self.nvp, self.head_dim = getattr(flow.config, "nvp", True), flow.config.head_dim
        self.read_layout(flow.config)

    def read_layout(self, config: Any) -> None:
        self.patch, self.in_channels = config.patch_size, config.in_channels
        self.side = config.image_size // config.patch_size

    def patches(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to (N, T, C p p): patches in raster order, inside a patch channel, row, column."""
        x = images.reshape(len(images), self.in_channels, self.side, self.patch, self.side, self.patch)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(len(images), self.side**2, -1)

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.patches(images), torch.zeros(len(images), dtype=torch.float64)

    def images(self, tokens: Tensor) -> Tensor:
        x = tokens.reshape(len(tokens), self.side, self.side, self.in_channels, self.patch, self.patch)
        size = self.side * self.patch
        return x.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), self.in_channels, size, size)

    def parameters(self, i: int, x: Tensor, labels: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        w = {n.removeprefix(f"blocks.{i}."): v for n, v in self.state.items() if n.startswith(f"blocks.{i}.")}
        batch = len(x)
        h = x.double() @ w["proj_in.weight"].T + w["proj_in.bias"] + self.flip(i, w["pos_embed"][None])
        if "class_embed" in w:
            h = h + embedded(w["class_embed"][:, 0], labels, batch)[:, None]
        if "proj_context.weight" in w and labels is not None:
            numbers = labels.double() @ w["proj_context.weight"].T + w["proj_context.bias"]
            h = h + (numbers[:, None] if numbers.ndim == 2 else self.flip(i, numbers))
        h = self.layers(w, h, temperature)
        out = h @ w["proj_out.weight"].T + w["proj_out.bias"]
        out = torch.cat((torch.zeros_like(out[:, :1]), out[:, :-1]), dim=1)
        channels = x.shape[2]
        return (out[..., :channels], out[..., channels:]) if self.nvp else (torch.zeros_like(out), out)

    def layers(self, w: dict[str, Tensor], h: Tensor, temperature: float, angles: Tensor | None = None) -> Tensor:
        """The transformer; `angles` (T, D / 2) turn pairs of the channels of queries and keys, as complex numbers."""
        batch, length, _ = h.shape
        heads = h.shape[2] // self.head_dim
        past = torch.ones(length, length, dtype=torch.float64).tril()
        for layer in range(sum(name.endswith("attention.qkv.bias") for name in w)):
            a, m = f"attn_blocks.{layer}.attention.", f"attn_blocks.{layer}.mlp."
            n = _layer_norm(h, w[a + "norm.weight"], w[a + "norm.bias"])
            q, k, v = (n @ w[a + "qkv.weight"].T + w[a + "qkv.bias"]).split(h.shape[2], dim=2)
            q, k, v = (y.reshape(batch, length, heads, -1) for y in (q, k, v))
            if angles is not None:
                turns = torch.polar(torch.ones_like(angles), angles)[:, None]
                pairs = (torch.view_as_complex(y.unflatten(3, (-1, 2)).contiguous()) for y in (q, k))
                q, k = (torch.view_as_real(y * turns).flatten(3) for y in pairs)
            logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[3]) / temperature
            weights = (logits - logits.amax(dim=3, keepdim=True)).exp() * past
            weights = weights / weights.sum(dim=3, keepdim=True)
            mixed = torch.einsum("bhij,bjhd->bihd", weights, v).reshape(batch, length, -1)
            h = h + mixed @ w[a + "proj.weight"].T + w[a + "proj.bias"]
            n = _layer_norm(h, w[m + "norm.weight"], w[m + "norm.bias"])
            n = n @ w[m + "main.0.weight"].T + w[m + "main.0.bias"]
            n = 0.5 * n * (1 + torch.erf(n / math.sqrt(2)))
            h = h + n @ w[m + "main.2.weight"].T + w[m + "main.2.bias"]
        return h


class StarOracle(Oracle):
    """A STARFlow; its labels are the states of texts."""

    def read_layout(self, config: Any) -> None:
        super().read_layout(config)
        self.clip = config.soft_clip

    def patches(self, images: Tensor) -> Tensor:
        """Inside a patch row, column, channel."""
        x = super().patches(images).reshape(len(images), self.side**2, self.in_channels, self.patch**2)
        return x.transpose(2, 3).flatten(2)

    def images(self, tokens: Tensor) -> Tensor:
        return super().images(tokens.unflatten(2, (self.patch**2, self.in_channels)).transpose(2, 3).flatten(2))

    def flip(self, i: int, x: Tensor) -> Tensor:
        return x if i % 2 else x[:, torch.arange(x.shape[1] - 1, -1, -1)]

    def supports_guidance(self, i: int) -> bool:
        return i == self.num_blocks - 1

    def parameters(self, i: int, x: Tensor, labels: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        w = {n.removeprefix(f"blocks.{i}."): v for n, v in self.state.items() if n.startswith(f"blocks.{i}.")}
        tokens = torch.cat((w["sos_embed"].expand(len(x), -1, -1), x[:, :-1].double()), dim=1)
        h = tokens @ w["proj_in.weight"].T + w["proj_in.bias"]
        texts = 0
        if "proj_txt.weight" in w:
            states = w["null_text"].expand(len(x), -1, -1) if labels is None else labels.double()
            texts = states.shape[1]
            h = torch.cat((states @ w["proj_txt.weight"].T + w["proj_txt.bias"], h), dim=1)
        angles = torch.zeros(h.shape[1], self.head_dim // 2, dtype=torch.float64)
        places = (self.head_dim // 2 - 8) // 2  # frequencies of rows, and of columns
        for position in range(h.shape[1]):
            row, column = divmod(position - texts, self.side) if position >= texts else (0, 0)
            text = position / texts * self.side if position < texts else 0.0
            angles[position] = torch.tensor(
                [row * 10_000 ** (-k / places) for k in range(places)]
                + [column * 10_000 ** (-k / places) for k in range(places)]
                + [text * 10_000 ** (-k / 8) for k in range(8)],
                dtype=torch.float64,
            )
        h = self.layers(w, h, temperature, angles)[:, texts:]
        h = h / (h.square().mean(dim=2, keepdim=True) + 1e-6).sqrt() * (1 + w["final_norm.weight"])
        out = self.clip * ((h @ w["proj_out.weight"].T + w["proj_out.bias"]) / self.clip).tanh()
        channels = x.shape[2]
        return (1 + (out[..., :channels] + math.log(math.e - 1)).exp()).log().log(), out[..., channels:]


class TokenOracle(Oracle):
    """A TarFlow over tokens, whose context may be numbers."""

    def read_layout(self, config: Any) -> None:
        names = {"identity": range(config.num_tokens), "flip": range(config.num_tokens)[::-1]}
        self.orders = [list(names.get(order, order)) for order in config.orders]

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, torch.zeros(len(images), dtype=torch.float64)

    def images(self, tokens: Tensor) -> Tensor:
        return tokens

    def flip(self, i: int, x: Tensor) -> Tensor:
        return x[:, self.orders[i % len(self.orders)]]

    def unflip(self, i: int, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[:, self.orders[i % len(self.orders)]] = x
        return out


class MAFOracle(FlowOracle):
    """A MAF; its masks are written entry by entry from the definition of the degrees."""

    def __init__(self, flow: Any) -> None:
        super().__init__(flow)
        config = flow.config
        self.shape = (config.in_channels, config.image_size, config.image_size)
        self.length = math.prod(self.shape)
        self.layers, self.alpha = config.hidden_layers, config.logit_alpha

    def mask(self, layer: int, rows: int, columns: int) -> Tensor:
        """1 where an output may see an input: units see degrees up to their own, entry t sees degrees below t."""

        def sees(row: int, column: int) -> bool:
            seen = column if layer == 0 else column * (self.length - 1) // columns
            if layer == self.layers:
                return seen < row // 2
            return seen <= row * (self.length - 1) // rows

        return torch.tensor([[float(sees(row, column)) for column in range(columns)] for row in range(rows)]).double()

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """All masked weights."""
        names = [name for name in self.state if name.endswith(".weight")]
        return {name: w * self.mask(int(name.split(".")[3]), *w.shape) for name in names for w in [self.state[name]]}

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        p = (images.flatten(1) + 1) / 2
        s = self.alpha + (1 - 2 * self.alpha) * p
        log_det = (math.log(0.5 - self.alpha) - s.log() - (1 - s).log()).sum(dim=1)
        return (s.log() - (1 - s).log()).unsqueeze(-1), log_det

    def images(self, tokens: Tensor) -> Tensor:
        p = (1 / (1 + (-tokens).exp()) - self.alpha) / (1 - 2 * self.alpha)
        return (2 * p - 1).reshape(-1, *self.shape)

    def parameters(self, i: int, x: Tensor, labels: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        h = x.double().flatten(1)
        for layer in range(self.layers + 1):
            name = f"blocks.{i}.layers.{layer}."
            h = h @ self.weights[name + "weight"].T + self.state[name + "bias"]
            if name + "class_embed" in self.state:
                h = h + embedded(self.state[name + "class_embed"], labels, len(x))
            if layer < self.layers:
                h = h.clamp(min=0)
        return h[:, 0::2].unsqueeze(-1), h[:, 1::2].unsqueeze(-1)


def embedded(table: Tensor, labels: Tensor | None, batch: int) -> Tensor:
    """A row of the table for each label; the mean of all for a label below 0 or none."""
    classes = [-1] * batch if labels is None else labels.tolist()
    return torch.stack([table.mean(dim=0) if y < 0 else table[y] for y in classes])


def guide_away(guide: Guide, log_scale: Tensor, shift: Tensor, free_log_scale: Tensor, free_shift: Tensor) -> None:
    """Move parameters (B, T, C) away from the free ones, in place, entry by entry."""
    length = log_scale.shape[1]
    for t in range(length):
        weight = guide.weight * (t / (length - 1) if guide.annealed else 1.0)
        if guide.rule == "density":  # p^(1 + w) / p_free^w of Gaussians, p_free no narrower than p
            given, free = (-2 * log_scale[:, t]).exp(), (-2 * free_log_scale[:, t]).exp()
            free = torch.minimum(given, free)
            precision = (1 + weight) * given - weight * free
            shift[:, t] = ((1 + weight) * given * shift[:, t] - weight * free * free_shift[:, t]) / precision
            log_scale[:, t] = -0.5 * precision.log()
            continue
        if guide.on in ("both", "scale"):
            log_scale[:, t] = log_scale[:, t] + weight * (log_scale[:, t] - free_log_scale[:, t])
        if guide.on in ("both", "shift"):
            shift[:, t] = shift[:, t] + weight * (shift[:, t] - free_shift[:, t])


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight + bias


Map = Callable[[Tensor], Tensor]


def sequential(g: Map, z: Tensor) -> Tensor:
    """The fixed point of g, one token after another; a token that is not known yet is 0."""
    x = torch.zeros_like(z, dtype=torch.float64)
    for t in range(z.shape[1]):
        x = torch.cat([x[:, :t], g(x)[:, t : t + 1], x[:, t + 1 :]], dim=1)
    return x


@dataclass(frozen=True)
class Swept:
    """The end of `swept`: tokens, sweeps, tokens times samples over them, and the state of each sample.

    `residual` is the largest move of a token in the sweep that settled it or was its last; `missed`, whether a token
    ran out of sweeps; `fronts`, where the front stood after each sweep.
    """

    x: Tensor
    sweeps: int
    evaluations: int
    residual: Tensor
    missed: Tensor
    fronts: list[int]


def swept(
    g: Map, guess: Tensor, stop_of: Callable[[int], int], *, atol: float | None = None,
    limits: list[int] | None = None, ebound: float = -1.0, keys: bool = True,
) -> Swept:  # fmt: skip
    """Sweeps of [front, stop_of(front)) by a batch with one front.

    A sweep settles the leading tokens of a sample that it changes by at most `atol`. The front passes those that all
    samples have settled and one more, those that had their number of sweeps (`limits`, one per token), and all of a run
    whose change has a norm of at most `ebound` times the entries of x. Later sweeps read tokens that were settled or
    stopped early as that sweep read them, before its change, or with `keys=False` as they are.
    """
    x, read = guess.double().clone(), guess.double().clone()
    batch, length, _ = x.shape
    had, fronts = [0] * length, [0]
    residual, missed = torch.zeros(batch, dtype=torch.float64), torch.zeros(batch, dtype=torch.bool)
    cached = evaluations = 0
    while (front := fronts[-1]) < length:
        stop = stop_of(front)
        first_read = max(cached - 1, 0) if keys else 0
        read[:, first_read:] = x[:, first_read:]
        evaluations += batch * (stop - cached)
        moves = g(read)[:, front:stop] - x[:, front:stop]
        x[:, front:stop] += moves
        size = stop - front
        settled = [0] * batch  # leading tokens
        for n in range(batch):
            while size > 1 and settled[n] < size:
                t = settled[n]
                if moves[n, t].abs().max() > (-1 if atol is None else atol):
                    break
                residual[n] = max(residual[n], moves[n, t].abs().max())
                settled[n] += 1
        passed = cached = front + min(min(settled) + 1, size)
        for t in range(front, stop):
            had[t] += 1
        while limits is not None and passed < stop and had[passed] >= limits[passed]:
            passed += 1
        if moves.norm() <= ebound * x.numel():
            passed = cached = stop
        for n in range(batch) if passed > front + min(settled) + 1 else ():
            beyond = moves[n, settled[n] + 1 : passed - front]
            residual[n] = max(residual[n], beyond.abs().max() if len(beyond) else 0)
            missed[n] |= len(beyond) > 0 and cached < stop
        fronts.append(passed)
    return Swept(x, len(fronts) - 1, evaluations, residual, missed, fronts)
