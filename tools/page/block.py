"""A block of a TarFlow as an ONNX graph: g of a run of tokens, against the keys of other tokens."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from jacobiflow.models.tarflow import TarFlowConfig
from tools.page.graphs import Graph, Shape, SharedWeights

UNREAD = float(np.finfo(np.float32).min)  # added to the logit of a token that is not read


def block_graph(config: TarFlowConfig, index: int, weights: SharedWeights) -> onnx.ModelProto:
    """The graph of g at n tokens of block `index` under guidance, whose keys and values join those of m other tokens.

    The flow has classes. It runs on two rows, the conditional and the unconditional one, which read the same tokens.

    Inputs: `x` (n, C), the token before each entry; `z` (n, C), the entries of the block's input; `places` (n), the
    positions of `x` in the block's causal order; `cache` (m, S), the keys and values of other tokens, and
    `cache_places` (m); `logit_scale` (2), one over the attention temperatures; `labels` (2), of which the number of
    classes is no class; and `guidance` (2, n, 1), the weights for the log-scale and for the shift.

    Outputs: `g` (n, C) and `keys` (n, S), the keys and values of `x`. S = 4 * layers * channels.
    """
    g, name, dim = Graph(weights), f"blocks.{index}", config.head_dim
    heads, groups, channels = config.channels // dim, 2 * config.layers_per_block, config.token_channels
    h = g("Add", g.linear("x", f"{name}.proj_in"), g("Gather", g.weight(f"{name}.pos_embed"), "places"))
    h = g("Add", g("Unsqueeze", h, g.ints(0)), g("Unsqueeze", g("Gather", g.classes(name), "labels"), g.ints(1)))
    h = g("Reshape", h, g.ints(-1, config.channels))
    scale = g("Unsqueeze", g("Mul", "logit_scale", g.number(dim**-0.5)), g.ints(1, 2, 3))
    all_places = g("Concat", "cache_places", "places", axis=0)
    unread = g("Greater", g("Unsqueeze", all_places, g.ints(0)), g("Unsqueeze", "places", g.ints(1)))
    mask = g("Mul", g("Cast", unread, to=TensorProto.FLOAT), g.number(UNREAD))
    cache = g("Reshape", "cache", g.ints(-1, groups, 2, heads, dim))
    cache = g.split(g("Transpose", cache, perm=[1, 2, 3, 0, 4]), groups)
    keys: list[str] = []
    for layer in range(config.layers_per_block):
        prefix = f"{name}.attn_blocks.{layer}"
        qkv = g.linear(g.norm(h, f"{prefix}.attention.norm"), f"{prefix}.attention.qkv")
        qkv = g("Reshape", qkv, g.ints(2, -1, 3, heads, dim))
        q, k, v = g.split(g("Transpose", qkv, perm=[2, 0, 3, 1, 4]), 3)
        keys += [k, v]
        k, v = (g("Concat", old, new, axis=3) for old, new in zip(cache[2 * layer :][:2], (k, v), strict=True))
        logits = g("MatMul", g("Mul", q, scale), g("Transpose", k, perm=[0, 1, 2, 4, 3]))
        read = g("MatMul", g("Softmax", g("Add", logits, mask), axis=-1), v)
        read = g("Reshape", g("Transpose", read, perm=[0, 1, 3, 2, 4]), g.ints(-1, config.channels))
        h = g("Add", h, g.linear(read, f"{prefix}.attention.proj"))
        up = g("Gelu", g.linear(g.norm(h, f"{prefix}.mlp.norm"), f"{prefix}.mlp.main.0"))
        h = g("Add", h, g.linear(up, f"{prefix}.mlp.main.2"))
    size = 2 * groups * config.channels
    joined = g("Transpose", g("Concat", *keys, axis=0), perm=[3, 0, 1, 2, 4])
    g("Reshape", joined, g.ints(-1, size), outputs="keys")
    # The log-scale and the shift, extrapolated from the unconditional row by way of the conditional one.
    out = g("Reshape", g.linear(h, f"{name}.proj_out"), g.ints(2, -1, 2, channels))
    conditional, unconditional = g.split(g("Transpose", out, perm=[0, 2, 1, 3]), 2)
    out = g("Add", conditional, g("Mul", g("Sub", conditional, unconditional), "guidance"))
    log_scale, shift = g.split(g("Squeeze", out, g.ints(0)), 2)
    g("Squeeze", g("Add", g("Mul", g("Exp", log_scale), "z"), shift), g.ints(0), outputs="g")
    floats: dict[str, Shape] = {
        "x": ("n", channels), "z": ("n", channels), "cache": ("m", size), "logit_scale": (2,), "guidance": (2, "n", 1),
    }  # fmt: skip
    ints: dict[str, Shape] = {"places": ("n",), "cache_places": ("m",), "labels": (2,)}
    return g.model(floats, ints, {"g": ("n", channels), "keys": ("n", size)})
