"""Model cards: front matter as the Hugging Face Hub reads it, how to load and to sample, and what else is known."""

from __future__ import annotations

from collections.abc import Sequence

from huggingface_hub import ModelCard, ModelCardData

from jacobiflow.flows.config import FlowConfig
from jacobiflow.flows.settings import SamplingSettings

_TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{{ description }}

```python
{{ code }}
```

Recommended settings: {{ settings }}.
{% if sections %}
{{ sections }}
{% endif %}"""


def model_card(
    data: ModelCardData,
    kind: str,
    config: FlowConfig,
    recommended: SamplingSettings,
    parameters: int,
    *,
    name: str = "",
    description: str = "",
    license: str | None = None,
    datasets: Sequence[str] = (),
    sections: str = "",
) -> ModelCard:
    """A card for a flow of the class `kind`.

    **Arguments:**

    - `data`: the front matter that all flows share.
    - `name`: what `jacobiflow.load` takes for it; `description`: by default its class and shape.
    - `license`, `datasets`: as the hub names them, for the front matter.
    - `sections`: Markdown for the end, such as intended use and limits.
    """
    entries = (
        data.to_dict() | ({"license": license} if license else {}) | ({"datasets": [*datasets]} if datasets else {})
    )
    size, classes = config.image_size, config.num_classes
    channels = f"{config.in_channels} channel{'s' * (config.in_channels > 1)}"
    of = f", class-conditional over {classes} classes" if classes else ""
    card: ModelCard = ModelCard.from_template(
        ModelCardData(**entries),
        template_str=_TEMPLATE,
        name=name or kind,
        description=description
        or f"A {kind}, an autoregressive normalizing flow, of {size}x{size} images of {channels}{of}: "
        f"{parameters:,} parameters, T = {config.num_tokens} tokens of C = {config.token_channels} values, "
        f"{config.num_blocks} blocks. [jacobiflow](https://pypi.org/project/jacobiflow/) samples from it in parallel "
        "(`pip install jacobiflow`).",
        code=_code(name or kind, config),
        settings=_words(recommended),
        sections=sections,
    )
    return card


def _code(name: str, config: FlowConfig) -> str:
    classes, size = config.num_classes, config.image_size
    lines = [
        *(["import torch"] if classes else []), "import jacobiflow as jf", "",
        f'flow = jf.load("{name}")', "settings = flow.recommended",
        *([f"labels = torch.arange(8) % {classes}"] if classes else []),
        f"out = jf.sample(flow, 8, {'labels, ' * bool(classes)}guidance=settings.guidance, denoise=settings.denoise)",
        f"print(tuple(out.images.shape))  # (8, {config.in_channels}, {size}, {size}), nominally in [-1, 1]",
    ]  # fmt: skip
    return "\n".join(lines)


def _words(settings: SamplingSettings) -> str:
    words = []
    if settings.guidance is not None:
        guidance = settings.guidance
        kind = "annealed guidance" if guidance.annealed else "guidance"
        on = "" if guidance.on == "both" else f" of the {guidance.on}"
        words.append(f"{kind}{on} of weight {guidance.weight:g} at attention temperature {guidance.attn_temperature:g}")
    if settings.denoise:
        words.append(f"one denoising step of rate {settings.denoise:g}")
    return " and ".join(words) or "none, neither guidance nor denoising"
