"""Random changes of training images, by torchvision."""

from __future__ import annotations

from typing import Any

from jacobiflow.errors import InputValueError
from jacobiflow.utils.checks import check_count, check_number


def image_transform(
    image_shape: tuple[int, int, int], horizontal_flip: bool = False, translate: int = 0, hue: float = 0.0
) -> Any:
    """Returns a torchvision transform of 8-bit images for `train`; None if it changes nothing.

    Args:
        image_shape: Shape of an image, (C, H, W).
        horizontal_flip: Whether to mirror half of the images, left to right.
        translate: Largest translation in pixels, vertically and horizontally. Pixels at the border are repeated.
        hue: Largest change of the hue in degrees, at most 180.

    Example:
        >>> image_transform((3, 32, 32), horizontal_flip=True, hue=10)
        Compose(
              RandomHorizontalFlip(p=0.5)
              ColorJitter(hue=(-0.027777777777777776, 0.027777777777777776))
        )
    """
    channels, height, width = image_shape
    translate = check_count("translate", translate, minimum=0)
    hue = check_number("hue", hue)
    if hue > 180:
        raise InputValueError("give an angle of at most 180 degrees", argument="hue", value=hue)
    if hue and channels != 3:
        raise InputValueError(f"images of {channels} channels have no hue; give 0", argument="hue", value=hue)
    if translate >= min(height, width):
        message = f"give fewer pixels than images of {(height, width)} have"
        raise InputValueError(message, argument="translate", value=translate)
    if not (horizontal_flip or translate or hue):
        return None
    try:
        from torchvision.transforms import v2  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputValueError("random changes of images need torchvision: pip install torchvision") from error
    transforms = [v2.RandomHorizontalFlip()] if horizontal_flip else []
    if translate:
        transforms.append(v2.RandomCrop((height, width), padding=translate, padding_mode="edge"))
    if hue:
        transforms.append(v2.ColorJitter(hue=hue / 360))
    return v2.Compose(transforms)
