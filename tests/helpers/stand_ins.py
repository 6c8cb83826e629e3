"""Small files in place of large ones that cannot be had here: a T5 encoder, and the weights of Inception."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

WORDS = ["<pad>", "</s>", "<unk>", "red", "apple", "green"]


def write_t5(folder: Path) -> None:
    """Writes a T5 encoder of random weights, with states of 16 channels, which knows `WORDS`."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = transformers.T5Config(vocab_size=len(WORDS), d_model=16, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.T5EncoderModel(config).save_pretrained(folder)


def write_inception(path: Path) -> None:
    """Writes random weights of an Inception network, whose activations keep their size: a file of 95 MB."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3 as inception_module

    class Random(inception_module.FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *args: Any, **kwargs: Any) -> None: ...

    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr(inception_module, "load_state_dict_from_url", lambda *_, **__: {})
        network = Random("inception-v3-compat", ["2048"])
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
