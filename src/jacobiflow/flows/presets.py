"""The four models of the GS-Jacobi paper (arXiv 2505.12849): their shape, and how the paper samples them."""

from __future__ import annotations

from dataclasses import dataclass

from jacobiflow.checks import check_fields, check_number, check_positive
from jacobiflow.flows.tarflow import TarFlowConfig


@dataclass(frozen=True)
class Preset:
    """A model of the paper with the settings of its tables 3 and 4.

    `strategy` is, in the paper's notation, the fastest of those whose FID is within 1% of sequential sampling's.
    `denoise` multiplies the denoising step. `source` is the hub repository and the file that the paper's authors name
    for these weights; `TarFlow.from_original(file, config)` takes it. **Raises** `TypeError` or `ValueError` for values
    of another kind or out of range.
    """

    description: str
    source: str
    config: TarFlowConfig
    guidance_weight: float
    denoise: float
    strategy: str
    annealed: bool = True
    attn_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_number("guidance_weight", self.guidance_weight)
        check_number("denoise", self.denoise)
        check_positive("attn_temperature", self.attn_temperature)


_SOURCE = "encoreus/Transformer_Autoregressive_Flow"

PRESETS: dict[str, Preset] = {
    "img128cond": Preset(
        description="class-conditional ImageNet 128x128 (table 3a)",
        source=f"{_SOURCE}/imagenet_model_4_1024_8_8_0.15.pth",
        config=TarFlowConfig(
            in_channels=3, image_size=128, patch_size=4, channels=1024, num_blocks=8, layers_per_block=8,
            num_classes=1000, noise_std=0.15,
        ),
        guidance_weight=1.5,
        denoise=0.97,
        strategy="[6-8-32-10]",
    ),
    "img64uncond": Preset(
        description="unconditional ImageNet 64x64 (table 3b)",
        source=f"{_SOURCE}/imagenet64_model_2_768_8_8_0.05.pth",
        config=TarFlowConfig(
            in_channels=3, image_size=64, patch_size=2, channels=768, num_blocks=8, layers_per_block=8,
            noise_std=0.05,
        ),
        guidance_weight=0.2,
        denoise=0.9,
        strategy="[0/6-8-32-20]",
        attn_temperature=0.3,
    ),
    "afhq": Preset(
        description="class-conditional AFHQ 256x256: cat, dog, wild (table 4a)",
        source=f"{_SOURCE}/afhq_model_8_768_8_8_0.07.pth",
        config=TarFlowConfig(
            in_channels=3, image_size=256, patch_size=8, channels=768, num_blocks=8, layers_per_block=8,
            num_classes=3, noise_std=0.07,
        ),
        guidance_weight=3.4,
        denoise=1.4,
        strategy="[7-8-32-10]",
    ),
    "img64cond": Preset(
        description="class-conditional ImageNet 64x64 (table 4b)",
        source=f"{_SOURCE}/imagenet_model_4_1024_8_8_0.05.pth",
        config=TarFlowConfig(
            in_channels=3, image_size=64, patch_size=4, channels=1024, num_blocks=8, layers_per_block=8,
            num_classes=1000, noise_std=0.05,
        ),
        guidance_weight=2.0,
        denoise=1.0,
        strategy="[0/7-16/8-10/13-6]",
    ),
}  # fmt: skip
"""The four models of the paper, by name: their configs, and the settings at which it samples them."""
