"""Model cards."""

from __future__ import annotations

from typing import Any

from jacobiflow.models.contexts import Texts


def format_model_card(flow: Any, name: str) -> str:
    """Returns a model card in Markdown, with front matter for the Hugging Face Hub."""
    config, classes = flow.config, flow.config.num_classes
    reads_text = isinstance(flow.context_kind, Texts)
    conditional = f", class-conditional over {classes} classes" if classes else ""
    tokens = f"{config.num_tokens or 'any number of'} tokens of {config.token_dim} values"
    parameters = sum(parameter.numel() for parameter in flow.parameters())
    if not config.num_tokens:
        task, data = "other", "the positions of a peptide's atoms"
        code = """\
# Whole numbers for each atom, and the orders of the atoms, see `jacobiflow.Prose.for_peptide`.
peptide = flow.for_peptide(encodings, permutations)
out = jf.sample(peptide, 8)
print(tuple(out.tokens.shape))"""
    elif flow.image_shape is None:
        task, data, numbers = "other", "sequences of tokens", getattr(config, "context_dim", 0)
        context = f", context=torch.zeros(8, {numbers})" if numbers else ""
        code = f"""\
out = jf.sample(flow, 8{context})
print(tuple(out.tokens.shape))  # {(8, config.num_tokens, config.token_dim)}
print(out.log_prob)  # densities in nats"""
    else:
        _, size, _ = flow.image_shape
        task = "text-to-image" if reads_text else "unconditional-image-generation"
        data = f"{size}x{size} images"
        context = f", labels={[*flow.classes, 0][0]!r}" if classes else ""
        if reads_text:
            states = f"torch.randn(8, {config.text_tokens}, {config.text_dim})"  # in place of those of a text
            context = f", context={repr(config.captions[0]) if config.captions else states}"
        code = f"""\
out = jf.sample(flow, 8{context})
out.grid().save("samples.png")
print(tuple(out.images.shape))  # {(8, *flow.image_shape)}, nominally in [-1, 1]"""
    return f"""\
---
library_name: jacobiflow
pipeline_tag: {task}
tags:
- normalizing-flow
- {flow.model_type}
---

# {name}

A {type(flow).__name__}, an autoregressive normalizing flow, of {data}{conditional}:
{parameters:,} parameters, {config.num_blocks} blocks, {tokens}.
[jacobiflow](https://github.com/jacobiflow/jacobiflow) samples from it fast, and says how exact each sample is.

```python
import torch
import jacobiflow as jf

flow = jf.load("{name}")
{code}
```
"""
