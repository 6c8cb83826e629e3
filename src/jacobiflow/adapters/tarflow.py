"""Live TarFlow blocks: of the original code, of SBG, and of forks, recognised by their structure and a trial."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from jacobiflow.adapters.acceleration import AcceleratedModule, Adapter, library_class
from jacobiflow.adapters.state import BlockState
from jacobiflow.adapters.trial import MAX_GUIDANCE, TEMPERATURES, Trial, TrialResult
from jacobiflow.native import describe as native_line
from jacobiflow.native import load_library
from jacobiflow.native.boundary import is_traced
from jacobiflow.native.transformer import CausalTransformer, GuidanceTerms

_PARTS = ("proj_in", "pos_embed", "attn_blocks", "proj_out", "permutation", "reverse")
_PARAMETERS = {"self", "x", "y", "cond", "guidance", "guide_what", "attn_temp", "annealed_guidance"}
_SETTINGS: dict[Any, dict[str, Any]] = {nn.LayerNorm: {"eps": 1e-5}, nn.GELU: {"approximate": "none"}}  # of native code


def resembles(module: nn.Module) -> bool:
    """True if a module has the parts of a TarFlow block."""
    return all(hasattr(module, name) for name in _PARTS)


def recognise(module: Any, results: list[tuple[BlockState, TrialResult]]) -> tuple[Adapter | None, str]:
    """Returns the adapter of a block, or `None` and the reason.

    Its parts must have the names and the types of the original's. Whether its code computes the same shows in a trial,
    without which no block is accelerated.

    Args:
        results: Those of other blocks; that of this block is added. Blocks that differ in the values of their weights
            only share the trial with random weights.
    """
    kind: Any = library_class(module)
    signature = inspect.signature(kind.reverse)
    unknown = [name for name in signature.parameters if name not in _PARAMETERS]
    if unknown:
        return None, f"its reverse takes {unknown[0]}"
    if "reverse" in vars(module):
        return None, "its reverse was replaced"
    if (part := _other_part(module)) is not None:
        return None, f"{part} is not that of a TarFlow block"
    if load_library() is None:
        return None, f"native code is {native_line()}"
    if is_traced():
        return None, "it cannot be tried while PyTorch traces, or has hooks on all modules"
    parameters = signature.parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    try:
        state, trial = BlockState(module), Trial(module, partial(_reverse, **defaults), signature.parameters)
        shared = next((result for other, result in results if other.is_like(state)), None)
    except Exception as error:
        return None, f"it cannot be tried: {type(error).__name__}: {error}"
    if not trial.agrees_on_own_weights():
        return None, trial.obstacle
    result = shared or trial.try_random_weights()
    if result is None:
        return None, trial.obstacle
    results.append((state, result))
    fields = {"tried_signature": signature, "tried_state": state, "trial_result": result}
    return Adapter(kind, ("reverse",), type("_Accelerated", (_Accelerated,), fields), describe=None), ""


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
        part: Any = parts.get(name)
        if type(part) is not kind or any(getattr(part, key) != value for key, value in _SETTINGS.get(kind, {}).items()):
            return name
        if kind in (nn.Linear, nn.LayerNorm) and (part.weight is None or part.bias is None):
            return name
    return None


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
    if guidance > 0:
        weights = x.new_full((tokens,), guidance)
        if annealed_guidance:
            weights *= torch.arange(tokens, device=x.device) / max(tokens - 1, 1)
        zeros = torch.zeros_like(weights)
        of_scale, of_shift = (weights if parameter in guide_what else zeros for parameter in "ab")
        extrapolation = GuidanceTerms(of_scale, of_shift, other, attn_temp, by_density=False)
    layers = [_layer(layer) for layer in block.attn_blocks]
    network = CausalTransformer(
        proj_in=block.proj_in.weight,
        position=block.permutation(block.pos_embed, dim=0)[:tokens] + block.proj_in.bias,
        layers=layers,
        heads=block.attn_blocks[0].attention.num_heads,
        proj_out=block.proj_out.weight,
        out_bias=block.proj_out.bias,
        has_scale=len(block.proj_out.bias) == 2 * x.shape[2],
    )
    answer = network.invert(z, context, extrapolation)
    return None if answer is None else (block.permutation(answer[0], inverse=True), answer[1])


def _layer(layer: Any) -> dict[str, Tensor]:
    modules = {
        "norm": layer.attention.norm, "qkv": layer.attention.qkv, "proj": layer.attention.proj,
        "mlp_norm": layer.mlp.norm, "up": layer.mlp.main[0], "down": layer.mlp.main[-1],
    }  # fmt: skip
    tensors = {name: module.weight for name, module in modules.items()}
    return tensors | {f"{name}_bias": module.bias for name, module in modules.items()}


class _Accelerated(AcceleratedModule):
    """A block that leaves calls to its own code if they are not of a form that was tried, or if it has changed."""

    library_class: ClassVar[Any]
    tried_signature: ClassVar[inspect.Signature]
    tried_state: ClassVar[BlockState]
    trial_result: ClassVar[TrialResult]
    pos_embed: Tensor
    proj_in: nn.Linear

    def reverse(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the block's own `reverse` does."""
        answer = self._answer(args, kwargs)
        if answer is None:
            return self._own_reverse(args, kwargs)
        return answer if self.trial_result.has_log_det else answer[0]

    def _answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        try:
            call = self.tried_signature.bind(self, *args, **kwargs)
        except TypeError:  # the block's own message is better
            return None
        call.apply_defaults()
        arguments = {name: value for name, value in call.arguments.items() if name != "self"}
        if is_traced() or not self.tried_state.is_current() or not self._is_tried(**arguments):
            return None
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tensors, *self.parameters())):
            return None
        with torch.no_grad():
            answer = _reverse(self, **arguments)
        if answer is None:
            return None
        if (overflows := ~answer[0].isfinite().all(dim=(1, 2))).any():  # such rows are left to the block's own code
            rows = {name: value[overflows] if isinstance(value, Tensor) else value for name, value in arguments.items()}
            results = self._own_reverse((), rows)
            for ours, theirs in zip(answer, results if isinstance(results, tuple) else (results,), strict=False):
                ours[overflows] = theirs
        self.acceleration.count(self, 0, "native")
        return answer

    def _is_tried(
        self, x: Any, y: Any = None, cond: Any = None, guidance: Any = 0.0, guide_what: Any = "ab",
        attn_temp: Any = 1.0, annealed_guidance: Any = False,
    ) -> bool:  # fmt: skip
        """True if the arguments have a form that the trial compared."""
        if not (
            type(guidance) in (int, float) and 0 <= guidance <= MAX_GUIDANCE
            and type(guide_what) is str and guide_what in ("a", "b", "ab")
            and type(attn_temp) in (int, float) and TEMPERATURES[0] <= attn_temp <= TEMPERATURES[1]
            and type(annealed_guidance) is bool and isinstance(x, Tensor) and x.ndim == 3
        ):  # fmt: skip
            return False
        rows, tokens, positions = x.shape[0], x.shape[1], len(self.pos_embed)
        if not (
            rows and 0 < tokens <= positions and (tokens == positions or self.trial_result.takes_fewer_tokens)
            and _has_form(x, torch.float32, rows, tokens, self.proj_in.in_features)
            and (self.trial_result.in_training or not any(part.training for part in self.modules()))
        ):  # fmt: skip
            return False
        projection, embeddings = getattr(self, "cond_proj", None), getattr(self, "class_embed", None)
        if projection is not None:
            form = torch.float32, rows, tokens, projection.in_features
            return y is None and guidance == 0 and _has_form(cond, *form)
        if cond is not None or y is None:
            return cond is None
        if embeddings is None or not _has_form(y, torch.int64, rows):
            return False
        return bool(((y >= 0) & (y < len(embeddings))).all())  # below 0: whatever the block's own code makes of them

    def _own_reverse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.acceleration.count(self, 0, "library")
        return super().reverse(*args, **kwargs)  # type: ignore[misc]


def _has_form(value: Any, dtype: torch.dtype, *shape: int) -> bool:
    return type(value) is Tensor and value.dtype is dtype and value.is_cpu and value.shape == shape
