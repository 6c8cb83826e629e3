"""A block of a TarFlow as an ONNX graph: g of a run of tokens, against the keys of other tokens."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from demo.graphs import Graph, Shape, SharedWeights
from jacobiflow.flows.tarflow import TarFlowConfig

UNREAD = float(np.finfo(np.float32).min)  # added to the logit of a token that is not read


def block_graph(config: TarFlowConfig, index: int, rows: int, weights: SharedWeights) -> onnx.ModelProto:
    """The graph of g at n tokens of block `index`, whose keys and values join those of m other tokens.

    `rows` is 2 under guidance: the conditional row, and then the unconditional one, which both read the same tokens.

    **Inputs:** `x` (n, C), the token before each entry; `z` (n, C), the entries of the block's input; `places` (n), the
    positions of `x` in the block's causal order; `kept` (m, S), the keys and values of other tokens, and
    `kept_places` (m); `logit_scale` (rows), one over the attention temperature; with classes `labels` (rows), where
    the number of classes stands for none; and with two rows `guidance` (2, n, 1), the weights for the log-scale and for
    the shift.

    **Outputs:** `g` (n, C) and `keys` (n, S), the keys and values of `x`. S = 2 * layers * rows * channels.
    """
    g, name, dim = Graph(weights), f"blocks.{index}", config.head_dim
    heads, groups = config.channels // dim, 2 * config.layers_per_block
    size = groups * rows * config.channels
    h = g("Add", g.linear("x", f"{name}.proj_in"), g("Gather", g.weight(f"{name}.pos_embed"), "places"))
    h = g("Expand", g("Unsqueeze", h, g.ints(0)), g.ints(rows, 1, 1))
    if config.num_classes:
        h = g("Add", h, g("Unsqueeze", g("Gather", g.classes(name), "labels"), g.ints(1)))
    h = g("Reshape", h, g.ints(-1, config.channels))
    scale = g("Unsqueeze", g("Mul", "logit_scale", g.number(dim**-0.5)), g.ints(1, 2, 3))
    all_places = g("Concat", "kept_places", "places", axis=0)
    unread = g("Greater", g("Unsqueeze", all_places, g.ints(0)), g("Unsqueeze", "places", g.ints(1)))
    mask = g("Mul", g("Cast", unread, to=TensorProto.FLOAT), g.number(UNREAD))
    kept = g("Reshape", "kept", g.ints(-1, groups, rows, heads, dim))
    kept = g.split(g("Transpose", kept, perm=[1, 2, 3, 0, 4]), groups)
    keys: list[str] = []
    for layer in range(config.layers_per_block):
        prefix = f"{name}.attn_blocks.{layer}"
        qkv = g.linear(g.norm(h, f"{prefix}.attention.norm"), f"{prefix}.attention.qkv")
        qkv = g("Reshape", qkv, g.ints(rows, -1, 3, heads, dim))
        q, k, v = g.split(g("Transpose", qkv, perm=[2, 0, 3, 1, 4]), 3)
        keys += [k, v]
        k, v = (g("Concat", old, new, axis=3) for old, new in zip(kept[2 * layer :][:2], (k, v), strict=True))
        logits = g("MatMul", g("Mul", q, scale), g("Transpose", k, perm=[0, 1, 2, 4, 3]))
        read = g("MatMul", g("Softmax", g("Add", logits, mask), axis=-1), v)
        read = g("Reshape", g("Transpose", read, perm=[0, 1, 3, 2, 4]), g.ints(-1, config.channels))
        h = g("Add", h, g.linear(read, f"{prefix}.attention.proj"))
        up = g("Gelu", g.linear(g.norm(h, f"{prefix}.mlp.norm"), f"{prefix}.mlp.main.0"))
        h = g("Add", h, g.linear(up, f"{prefix}.mlp.main.2"))
    joined = g("Transpose", g("Concat", *keys, axis=0), perm=[3, 0, 1, 2, 4])
    g("Reshape", joined, g.ints(-1, size), outputs="keys")
    _read_out(g, g.linear(h, f"{name}.proj_out"), config, rows)
    floats: dict[str, Shape] = {
        "x": ("n", config.token_channels), "z": ("n", config.token_channels), "kept": ("m", size),
        "logit_scale": (rows,), **({"guidance": (2, "n", 1)} if rows == 2 else {}),
    }  # fmt: skip
    ints: dict[str, Shape] = {"places": ("n",), "kept_places": ("m",)}
    ints |= {"labels": (rows,)} if config.num_classes else {}
    return g.model(floats, ints, {"g": ("n", config.token_channels), "keys": ("n", size)})


def _read_out(g: Graph, out: str, config: TarFlowConfig, rows: int) -> None:
    """`g` = exp(log_scale) z + shift; under guidance these are extrapolated."""
    out = g("Reshape", out, g.ints(rows, -1, 1 + config.nvp, config.token_channels))
    out = g("Transpose", out, perm=[0, 2, 1, 3])
    if rows == 2:
        first, second = g.split(out, 2)
        weight = "guidance" if config.nvp else g("Slice", "guidance", g.ints(1), g.ints(2), g.ints(0))
        out = g("Add", first, g("Mul", g("Sub", first, second), weight))
    parameters = g("Squeeze", out, g.ints(0))
    log_scale, shift = g.split(parameters, 2) if config.nvp else (None, parameters)
    scaled = "z" if log_scale is None else g("Mul", g("Exp", log_scale), "z")
    g("Squeeze", g("Add", scaled, shift), g.ints(0), outputs="g")
