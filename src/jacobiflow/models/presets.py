"""The models of the GS-Jacobi paper, with the settings that it recommends."""

from __future__ import annotations

from dataclasses import dataclass

from jacobiflow.blocks.guidance import Guidance, SamplingSettings
from jacobiflow.models.tarflow import TarFlowConfig


@dataclass(frozen=True)
class Preset:
    """A model of the paper with the settings of its tables 3 and 4.

    Args:
        source: The hub repository and file of the authors' weights, for `TarFlow.from_original`.
        recommended: The paper's guidance and rate of denoising.
        strategy: In the paper's notation, the fastest strategy whose FID is within 1% of sequential sampling's.

    Example:
        >>> preset = jf.PRESETS["afhq"]
        >>> preset.config.num_tokens, preset.strategy
        (1024, '[7-8-32-10]')
    """

    description: str
    source: str
    config: TarFlowConfig
    recommended: SamplingSettings
    strategy: str


_SOURCE = "encoreus/Transformer_Autoregressive_Flow"

PRESETS: dict[str, Preset] = {
    "img128cond": Preset(
        description="class-conditional ImageNet 128x128 (table 3a)",
        source=f"{_SOURCE}/imagenet_model_4_1024_8_8_0.15.pth",
        config=TarFlowConfig(3, 128, 4, 1024, 8, 8, num_classes=1000, noise_std=0.15),
        recommended=SamplingSettings(Guidance(1.5), denoise=0.97),
        strategy="[6-8-32-10]",
    ),
    "img64uncond": Preset(
        description="unconditional ImageNet 64x64 (table 3b)",
        source=f"{_SOURCE}/imagenet64_model_2_768_8_8_0.05.pth",
        config=TarFlowConfig(3, 64, 2, 768, 8, 8, num_classes=0, noise_std=0.05),
        recommended=SamplingSettings(Guidance(0.2, attn_temperature=0.3), denoise=0.9),
        strategy="[0/6-8-32-20]",
    ),
    "afhq": Preset(
        description="class-conditional AFHQ 256x256: cat, dog, wild (table 4a)",
        source=f"{_SOURCE}/afhq_model_8_768_8_8_0.07.pth",
        config=TarFlowConfig(3, 256, 8, 768, 8, 8, num_classes=3, noise_std=0.07),
        recommended=SamplingSettings(Guidance(3.4), denoise=1.4),
        strategy="[7-8-32-10]",
    ),
    "img64cond": Preset(
        description="class-conditional ImageNet 64x64 (table 4b)",
        source=f"{_SOURCE}/imagenet_model_4_1024_8_8_0.05.pth",
        config=TarFlowConfig(3, 64, 4, 1024, 8, 8, num_classes=1000, noise_std=0.05),
        recommended=SamplingSettings(Guidance(2.0), denoise=1.0),
        strategy="[0/7-16/8-10/13-6]",
    ),
}
"""The four models of the paper, by name: "img128cond", "img64uncond", "afhq" and "img64cond"."""
