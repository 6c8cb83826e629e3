"""The denoising step of a TarFlow as an ONNX graph: one pass, and the gradient of log p written out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx

from jacobiflow.models.tarflow import TarFlow, TarFlowConfig
from tools.page.block import UNREAD
from tools.page.graphs import Graph, SharedWeights


def denoising_graph(flow: TarFlow, weights: SharedWeights) -> onnx.ModelProto:
    """The graph of x + sigma^2 grad log p(x | label), `jacobiflow.denoise` at rate 1, for one image.

    Inputs: `x` (T, C), tokens in raster order, and `label` (1). Output: `denoised` (T, C).
    """
    config, g = flow.config, Graph(weights)
    assert isinstance(config, TarFlowConfig)
    mask = g("Trilu", g("Expand", g.number(UNREAD), g.ints(*[config.num_tokens - 1] * 2)), g.ints(1), upper=1)
    blocks = [_Block(g, config, i, flow.blocks[i].permutation.order == "flip", mask) for i in range(config.num_blocks)]
    x = "x"
    for block in blocks:
        x = block.forward(x)
    gradient = g("Neg", g("Div", x, g.constant(flow.var.detach().float().numpy())))
    for block in reversed(blocks):
        gradient = block.backward(gradient)
    g("Add", "x", g("Mul", gradient, g.number(config.noise_std**2)), outputs="denoised")
    tokens = (config.num_tokens, config.token_channels)
    return g.model({"x": tokens}, {"label": (1,)}, {"denoised": tokens})


@dataclass
class _Layer:
    """A transformer layer over (T - 1, channels), with values of its forward pass for the backward one."""

    g: Graph
    name: str
    heads: int
    dim: int
    mask: str

    def forward(self, h: str) -> str:
        g, name = self.g, self.name
        self.norm, a = self._normalized(h, f"{name}.attention.norm")
        qkv = g("Reshape", g.linear(a, f"{name}.attention.qkv"), g.ints(-1, 3, self.heads, self.dim))
        q, self.k, self.v = self._split(g("Transpose", qkv, perm=[1, 2, 0, 3]))
        self.q = g("Mul", q, g.number(self.dim**-0.5))
        logits = g("Add", g("MatMul", self.q, _transposed(g, self.k)), self.mask)
        self.p = g("Softmax", logits, axis=-1)
        read = g("Transpose", g("MatMul", self.p, self.v), perm=[1, 0, 2])
        h = g("Add", h, g.linear(self._flat(read), f"{name}.attention.proj"))
        self.mlp_norm, b = self._normalized(h, f"{name}.mlp.norm")
        self.up = g.linear(b, f"{name}.mlp.main.0")
        return g("Add", h, g.linear(g("Gelu", self.up), f"{name}.mlp.main.2"))

    def backward(self, dh: str) -> str:
        g, name = self.g, self.name
        up = g("Mul", self._through(dh, f"{name}.mlp.main.2"), _gelu_slope(g, self.up))
        dh = g("Add", dh, self._through_norm(self._through(up, f"{name}.mlp.main.0"), *self.mlp_norm))
        read = g("Reshape", self._through(dh, f"{name}.attention.proj"), g.ints(-1, self.heads, self.dim))
        read = g("Transpose", read, perm=[1, 0, 2])
        dp = g("MatMul", read, _transposed(g, self.v))
        mean = g("ReduceSum", g("Mul", dp, self.p), g.ints(-1))
        logits = g("Mul", self.p, g("Sub", dp, mean))
        dq = g("Mul", g("MatMul", logits, self.k), g.number(self.dim**-0.5))
        dk, dv = g("MatMul", _transposed(g, logits), self.q), g("MatMul", _transposed(g, self.p), read)
        qkv = g("Concat", *(g("Unsqueeze", part, g.ints(0)) for part in (dq, dk, dv)), axis=0)
        qkv = g("Reshape", g("Transpose", qkv, perm=[2, 0, 1, 3]), g.ints(-1, 3 * self.heads * self.dim))
        return g("Add", dh, self._through_norm(self._through(qkv, f"{name}.attention.qkv"), *self.norm))

    def _flat(self, x: str) -> str:
        return self.g("Reshape", x, self.g.ints(-1, self.heads * self.dim))

    def _split(self, qkv: str) -> list[str]:
        return [self.g("Squeeze", part, self.g.ints(0)) for part in self.g.split(qkv, 3)]

    def _normalized(self, h: str, name: str) -> tuple[tuple[str, str, str], str]:
        """The arguments of `_through_norm` after `dy`, and the layer norm `name` of `h`."""
        y, mean, inverse = self.g.norm(h, name, outputs=3)
        return (name, self.g("Mul", self.g("Sub", h, mean), inverse), inverse), y

    def _through(self, dy: str, name: str) -> str:
        """The gradient at the input of the linear layer `name`."""
        return self.g("MatMul", dy, self.g.weight(f"{name}.weight"))

    def _through_norm(self, dy: str, name: str, normal: str, inverse: str) -> str:
        """The gradient at the input of the layer norm `name`; `normal` is that input, normalised."""
        g = self.g
        dy = g("Mul", dy, g.weight(f"{name}.weight"))
        along = g("Mul", normal, g("ReduceMean", g("Mul", dy, normal), g.ints(-1)))
        return g("Mul", inverse, g("Sub", g("Sub", dy, g("ReduceMean", dy, g.ints(-1))), along))


class _Block:
    """z = (x - shift) exp(-log_scale) of one block, all tokens in one pass, and its gradient."""

    def __init__(self, g: Graph, config: TarFlowConfig, index: int, flipped: bool, mask: str) -> None:
        self.g, self.config, self.flipped, self.name = g, config, flipped, f"blocks.{index}"
        heads = config.channels // config.head_dim
        self.layers = [
            _Layer(g, f"{self.name}.attn_blocks.{i}", heads, config.head_dim, mask)
            for i in range(config.layers_per_block)
        ]

    def forward(self, x: str) -> str:
        g = self.g
        x = self._permuted(x)
        read = g("Slice", x, g.ints(0), g.ints(-1), g.ints(0))
        places = g("Slice", g.weight(f"{self.name}.pos_embed"), g.ints(0), g.ints(-1), g.ints(0))
        h = g("Add", g.linear(read, f"{self.name}.proj_in"), places)
        h = g("Add", h, g("Gather", g.classes(self.name), "label"))
        for layer in self.layers:
            h = layer.forward(h)
        out = g("Pad", g.linear(h, f"{self.name}.proj_out"), g.ints(1, 0, 0, 0))
        log_scale, shift = g.split(out, 2, axis=1)
        self.inverse = g("Exp", g("Neg", log_scale))
        self.z = g("Mul", g("Sub", x, shift), self.inverse)
        return self._permuted(self.z)

    def backward(self, dz: str) -> str:
        """The gradient of log p at the block's input, from `dz`, that at its output."""
        g = self.g
        dz = self._permuted(dz)
        dx = g("Mul", dz, self.inverse)
        log_scale = g("Neg", g("Add", g("Mul", dz, self.z), g.number(1)))
        out = g("Concat", log_scale, g("Neg", dx), axis=1)
        out = g("Slice", out, g.ints(1), g.ints(self.config.num_tokens), g.ints(0))
        dh = g("MatMul", out, g.weight(f"{self.name}.proj_out.weight"))
        for layer in reversed(self.layers):
            dh = layer.backward(dh)
        read = g("MatMul", dh, g.weight(f"{self.name}.proj_in.weight"))
        return self._permuted(g("Add", dx, g("Pad", read, g.ints(0, 0, 1, 0))))

    def _permuted(self, x: str) -> str:
        if not self.flipped:
            return x
        return self.g("Gather", x, self.g.ints(*reversed(range(self.config.num_tokens))))


def _transposed(g: Graph, x: str) -> str:
    return g("Transpose", x, perm=[0, 2, 1])


def _gelu_slope(g: Graph, x: str) -> str:
    """The derivative of GELU: Phi(x) + x phi(x)."""
    phi = g("Mul", g("Exp", g("Mul", g("Mul", x, x), g.number(-0.5))), g.number(1 / math.sqrt(2 * math.pi)))
    distribution = g("Mul", g("Add", g("Erf", g("Mul", x, g.number(math.sqrt(0.5)))), g.number(1)), g.number(0.5))
    return g("Add", distribution, g("Mul", x, phi))
