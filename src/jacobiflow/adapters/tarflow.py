"""Live TarFlow blocks: of the original code, of SBG, and of forks, recognised by their structure."""

from __future__ import annotations

import copy
import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from jacobiflow.adapters.acceleration import AcceleratedModule, Adapter, library_class
from jacobiflow.adapters.chain import has_hooks, is_traced
from jacobiflow.adapters.passes import is_stateful
from jacobiflow.native.recurrence import Extrapolation, Recurrence

_PARTS = ("proj_in", "pos_embed", "attn_blocks", "proj_out", "permutation", "reverse")
_PARAMETERS = {"self", "x", "y", "cond", "guidance", "guide_what", "attn_temp", "annealed_guidance"}
_TOKENS = 5  # of the trial that compares a block's own `reverse` with native code
_CLOSE = 1e-4  # their largest relative difference, rounding


def resembles(module: nn.Module) -> bool:
    """True if a module has the parts of a TarFlow block."""
    return all(hasattr(module, name) for name in _PARTS)


def recognise(module: Any) -> tuple[Adapter | None, str]:
    """Returns the adapter of a block, or `None` and the reason.

    Its parts must have the names and the types of the original's. Whether its code computes the same shows in a trial:
    a copy with random weights is inverted by its own `reverse` and by native code.
    """
    kind: Any = library_class(module)
    unknown = [name for name in inspect.signature(kind.reverse).parameters if name not in _PARAMETERS]
    if unknown:
        return None, f"its reverse takes {unknown[0]}"
    if "reverse" in vars(module):
        return None, "its reverse was replaced"
    if (part := _other_part(module)) is not None:
        return None, f"{part} is not that of a TarFlow block"
    try:
        has_log_det = _has_log_det(module)
    except Exception as error:  # of the block's own code
        return None, f"its reverse raises {type(error).__name__} in a trial: {error}"
    if has_log_det is None:
        return None, "its reverse computes something else than that of a TarFlow block"
    return Adapter(kind, ("reverse",), _WithLogDet if has_log_det else _Accelerated, describe=None), ""


def _other_part(module: Any) -> str | None:
    """The name of the first part that a TarFlow block lacks or has otherwise."""
    layers = {
        "attention.norm": nn.LayerNorm, "attention.qkv": nn.Linear, "attention.proj": nn.Linear,
        "mlp.norm": nn.LayerNorm, "mlp.main.0": nn.Linear, "mlp.main.1": nn.GELU,
    }  # fmt: skip
    expected: dict[str, Any] = {"proj_in": nn.Linear, "proj_out": nn.Linear}
    if getattr(module, "cond_proj", None) is not None:
        expected["cond_proj"] = nn.Linear
    for i, layer in enumerate(module.attn_blocks):
        expected |= {f"attn_blocks.{i}.{name}": kind for name, kind in layers.items()}
        main = getattr(getattr(layer, "mlp", None), "main", ())
        if len(main) == 4:
            expected[f"attn_blocks.{i}.mlp.main.2"] = nn.Dropout
        expected[f"attn_blocks.{i}.mlp.main.{max(len(main), 3) - 1}"] = nn.Linear
    parts = dict(module.named_modules())
    for name, kind in expected.items():
        if type(parts.get(name)) is not kind:
            return name
    expected_names = {name for full in expected for name in (full, *_prefixes(full))} | {"", "permutation"}
    others = (name for name in parts if name not in expected_names and not name.startswith("permutation"))
    return next((name for name in others if type(parts[name]) is not nn.Dropout), None)


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


@torch.no_grad()
def _has_log_det(module: Any) -> bool | None:
    """Tells if a block's `reverse` also returns the log-determinant; `None` if it is not that of a TarFlow."""
    block = copy.deepcopy(module).cpu().float().eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in block.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name and name.endswith("weight")
        width = 100 if parameter.ndim == 1 or name.startswith("proj_out") else 1
        parameter.copy_(1 + 0.1 * noise if is_norm else noise / (width * parameter.shape[-1]) ** 0.5)
    tokens = min(_TOKENS, len(block.pos_embed))
    x = torch.randn(2, tokens, block.proj_in.in_features, generator=generator)
    arguments: dict[str, Any] = {}
    if getattr(block, "cond_proj", None) is not None:
        arguments["cond"] = torch.randn(2, tokens, block.cond_proj.in_features, generator=generator)
    elif getattr(block, "class_embed", None) is not None:
        arguments["y"] = torch.arange(2) % len(block.class_embed)
    trials = [arguments]
    if "guidance" in inspect.signature(block.reverse).parameters:
        trials.append(arguments | {"guidance": 0.5, "attn_temp": 1.5, "annealed_guidance": True})
    answers = []
    for trial in trials:
        theirs, ours = block.reverse(x.clone(), **trial), _reverse(block, x, **trial)
        pairs = zip(
            theirs if isinstance(theirs, tuple) else (theirs,), ours or (), strict=False
        )  # () without native code
        if any(a.shape != b.shape or not (a - b).abs().max() <= _CLOSE * (1 + b.abs().max()) for a, b in pairs):
            return None
        answers.append(isinstance(theirs, tuple))
    return answers[0]


def _reverse(
    block: Any, x: Tensor, y: Tensor | None = None, cond: Tensor | None = None, guidance: float = 0.0,
    guide_what: str = "ab", attn_temp: float = 1.0, annealed_guidance: bool = False,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Returns the answer of a block's `reverse`, with the log-determinant, by native code; `None` if it cannot."""
    z = block.permutation(x)
    tokens = z.shape[1]
    context = other = None
    if cond is not None:
        context = block.cond_proj(block.permutation(cond))
    elif getattr(block, "class_embed", None) is not None:
        other = block.class_embed.mean(dim=0, keepdim=True)
        context = other if y is None else block.class_embed[y]
    extrapolation = None
    if guidance > 0 and guide_what:
        weights = x.new_full((tokens,), guidance)
        if annealed_guidance:
            weights = weights * torch.arange(tokens) / max(tokens - 1, 1)
        zeros = torch.zeros_like(weights)
        of_scale, of_shift = (weights if parameter in guide_what else zeros for parameter in "ab")
        extrapolation = Extrapolation(of_scale, of_shift, other, attn_temp, by_density=False)
    layers = [_layer(layer) for layer in block.attn_blocks]
    recurrence = Recurrence(
        proj_in=block.proj_in.weight,
        position=block.permutation(block.pos_embed, dim=0)[:tokens] + block.proj_in.bias,
        layers=layers,
        heads=block.attn_blocks[0].attention.num_heads,
        proj_out=block.proj_out.weight,
        out_bias=block.proj_out.bias,
        has_scale=len(block.proj_out.bias) == 2 * x.shape[2],
    )
    answer = recurrence.invert(z, context, extrapolation)
    return None if answer is None else (block.permutation(answer[0], inverse=True), answer[1])


def _layer(layer: Any) -> dict[str, Tensor]:
    modules = {
        "norm": layer.attention.norm, "qkv": layer.attention.qkv, "proj": layer.attention.proj,
        "mlp_norm": layer.mlp.norm, "up": layer.mlp.main[0], "down": layer.mlp.main[-1],
    }  # fmt: skip
    tensors = {name: module.weight for name, module in modules.items()}
    return tensors | {f"{name}_bias": module.bias for name, module in modules.items()}


class _Accelerated(AcceleratedModule):
    """A block whose `reverse` returns x."""

    library_class: ClassVar[Any]

    def reverse(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the block's own `reverse` does."""
        answer = self._answer(args, kwargs)
        return self._own_reverse(args, kwargs) if answer is None else answer[0]

    def _answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        try:
            call = inspect.signature(self.library_class.reverse).bind(self, *args, **kwargs)
        except TypeError:  # the block's own message is better
            return None
        x, *_ = list(call.arguments.values())[1:]
        if is_traced() or not isinstance(x, Tensor) or x.ndim != 3 or not x.shape[1]:
            return None
        tensors = [x, *(value for value in call.arguments.values() if isinstance(value, Tensor)), *self.parameters()]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return None
        if any(is_stateful(part) or has_hooks(part) for part in self.modules()):
            return None
        arguments = {name: value for name, value in call.arguments.items() if name != "self"}
        with torch.no_grad():
            answer = _reverse(self, **arguments)
        if answer is None:
            return None
        if (overflows := ~answer[0].isfinite().all(dim=(1, 2))).any():  # such rows are left to the block's own code
            rows = {
                name: value[overflows] if isinstance(value, Tensor) and value.shape[:1] == x.shape[:1] else value
                for name, value in arguments.items()
            }
            results = self._own_reverse((), rows)
            for ours, theirs in zip(answer, results if isinstance(results, tuple) else (results,), strict=False):
                ours[overflows] = theirs
        self.acceleration.count(self, 0, "native")
        return answer

    def _own_reverse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.acceleration.count(self, 0, "library")
        return super().reverse(*args, **kwargs)  # type: ignore[misc]


class _WithLogDet(_Accelerated):
    """A block whose `reverse` returns x and log|det dx/dz|."""

    def reverse(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the block's own `reverse` does."""
        answer = self._answer(args, kwargs)
        return self._own_reverse(args, kwargs) if answer is None else answer
