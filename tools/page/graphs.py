"""ONNX graphs of the blocks of a TarFlow, exported from PyTorch.

All blocks of a flow have the same two graphs, and each block has a file of weights that both graphs read. Tokens are in
the causal order of the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import jacobiflow as jf

LEVELS = 50  # of a weight, above 0 and below; the bundled model then compresses to less than 3 MB
WEIGHTS = "weights"  # the name of the file of weights in a graph


def round_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to multiples of a step. Returns the multiples in int8, and the steps, (rows, 1)."""
    steps = matrix.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LEVELS
    return (matrix / steps).round().to(torch.int8), steps


def stored_weights(block: Any) -> dict[str, Tensor]:
    """Returns the weights of a block as its file has them: of a matrix the multiples and the steps of `round_rows`."""
    stored = {}
    for name, parameter in block.named_parameters():
        value = parameter.detach().float()
        if name == "pos_embed":
            value = block.permutation(value, dim=0)
        if value.ndim == 2:
            stored[f"{name}.multiples"], stored[f"{name}.steps"] = round_rows(value)
        else:
            stored[name] = value
    return stored


class BlockFunctions(torch.nn.Module):
    """The functions of a block of a flow with classes that become graphs: a token, and a gradient.

    `stored` are the weights of the block. S = 4 * layers * width are the keys and values of a token, in two rows, with
    the label and without a label.
    """

    def __init__(self, config: jf.TarFlowConfig, guidance: jf.Guidance) -> None:
        super().__init__()
        self.layers, self.heads = config.layers_per_block, config.width // config.head_dim
        self.scale = config.head_dim**-0.5
        self.row_scales = torch.tensor([self.scale, self.scale / guidance.attn_temperature]).view(2, 1, 1, 1)
        self.guidance = torch.stack(guidance.weights(torch.zeros(1, config.num_tokens, 1))).unsqueeze(2)

    def forward(
        self, stored: Mapping[str, Tensor], x: Tensor, z: Tensor, cache: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns token m + 1 under guidance, (1, C), and the keys and values of token m, (1, S).

        Args:
            x: Token m, (1, C).
            z: Token m + 1 of the block's input, (1, C).
            cache: Keys and values of the tokens before m, (m, S).
            label: The class, (1,).
        """
        token = cache.shape[0] + 1
        labels = torch.cat((label, torch.full_like(label, -1)))
        (conditional, unconditional), keys = self._transformer(stored, x, cache, labels, self.row_scales)
        log_scale, shift = conditional + self.guidance[:, token : token + 1] * (conditional - unconditional)
        return log_scale.exp() * z + shift, keys

    def gradient(self, stored: Mapping[str, Tensor], x: Tensor, dz: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Returns z, the block's output for its input `x`, and the gradient of log p at x, of which z has `dz`."""

        x = x.detach().requires_grad_()
        nothing = x.new_zeros(0, 2 * self.layers * stored["pos_embed.multiples"].shape[1])
        (out,), _ = self._transformer(stored, x[:-1], nothing, label, self.scale)
        log_scale, shift = F.pad(out, (0, 0, 1, 0))
        z = (x - shift) * (-log_scale).exp()
        (dx,) = torch.autograd.grad((z * dz).sum() - log_scale.sum(), x)
        return z.detach(), dx

    def _transformer(
        self, stored: Mapping[str, Tensor], x: Tensor, cache: Tensor, labels: Tensor, scale: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Returns log-scales and shifts (rows, 2, n, C), and keys and values; label -1 is the mean of all classes."""

        def weight(name: str) -> Tensor:
            return stored[name] if name in stored else stored[f"{name}.multiples"] * stored[f"{name}.steps"]

        def linear(x: Tensor, name: str) -> Tensor:
            return F.linear(x, weight(f"{name}.weight"), weight(f"{name}.bias"))

        def norm(x: Tensor, name: str) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], weight(f"{name}.weight"), weight(f"{name}.bias"))

        (m, _), (n, _), rows, classes = cache.shape, x.shape, labels.shape[0], weight("class_embed")
        context = torch.cat((classes, classes.mean(dim=0, keepdim=True)))[labels]
        h = linear(x, "proj_in") + weight("pos_embed")[m : m + n] + context
        old = cache.view(m, self.layers, 2, rows, self.heads, h.shape[2] // self.heads).permute(1, 2, 3, 4, 0, 5)
        is_later, new = torch.ones(n, n, dtype=torch.bool).triu(1), []
        for i in range(self.layers):
            layer = f"attn_blocks.{i}"
            qkv = linear(norm(h, f"{layer}.attention.norm"), f"{layer}.attention.qkv")
            qkv = qkv.view(rows, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            key, value = torch.cat((old[i], qkv[1:]), dim=3)
            logits = qkv[0] * scale @ key.mT
            if n > 1:  # the gradient, which has no cache
                logits = logits.masked_fill(is_later, -torch.inf)
            read = (logits.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
            h = h + linear(read, f"{layer}.attention.proj")
            h = h + linear(F.gelu(linear(norm(h, f"{layer}.mlp.norm"), f"{layer}.mlp.main.0")), f"{layer}.mlp.main.2")
            new.append(qkv[1:])
        out = linear(h, "proj_out").unflatten(2, (2, -1)).transpose(1, 2)
        return out, torch.stack(new).permute(4, 0, 1, 2, 3, 5).flatten(1)


def block_graphs(config: jf.TarFlowConfig, guidance: jf.Guidance, stored: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Returns the two graphs of a flow's blocks, `BlockFunctions.forward` and `BlockFunctions.gradient`.

    `stored` are the weights of any of its blocks.
    """
    functions, stored = BlockFunctions(config, guidance), dict(stored)
    x, z = torch.zeros(2, config.num_tokens, config.token_dim)
    cache, label = torch.zeros(4, 4 * config.layers_per_block * config.width), torch.tensor([0])
    step, gradient = (stored, x[:1], z[:1], cache, label), (stored, x, z, label)
    sizes = dict.fromkeys(stored), None, None, {0: Dim.DYNAMIC}, None
    exported = torch.export.export(functions, step, dynamic_shapes=sizes)
    # A derivative is traced first, since torch.export does not differentiate.
    traced = make_fx(lambda *inputs: functions.gradient(*inputs))(*gradient)
    derivative = torch.export.export(traced, gradient)
    return {
        "step": _to_onnx(exported, stored, ["x", "z", "cache", "label"], ["y", "keys"]),
        "gradient": _to_onnx(derivative, stored, ["x", "dz", "label"], ["z", "dx"]),
    }


def _to_onnx(
    exported: torch.export.ExportedProgram, stored: Mapping[str, Tensor], inputs: list[str], outputs: list[str]
) -> bytes:
    """Converts a function of `stored` and `inputs` to a graph of `inputs`, with `stored` in the file of weights."""
    program = torch.onnx.export(
        exported, input_names=[*stored, *inputs], output_names=outputs, dynamo=True, verbose=False
    )
    assert program is not None
    model, offset = program.model_proto, 0
    graph = model.graph
    for name, tensor in stored.items():
        entry = onnx.numpy_helper.from_array(tensor.numpy(), name)
        onnx.external_data_helper.set_external_data(entry, WEIGHTS, offset, tensor.nbytes)
        entry.ClearField("raw_data")
        graph.initializer.append(entry)
        offset += tensor.nbytes
    del graph.input[: len(stored)]
    for node in graph.node:  # which names lines of this file
        node.ClearField("metadata_props")
    return bytes(model.SerializeToString(deterministic=True))
