"""Tokens that settle, and the picture that appears: an animation and a still of one block's solves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw

from jacobiflow.experiments.front import Trajectory
from jacobiflow.plots.sheets import image_grid
from jacobiflow.plots.style import FAINT, INK, PAPER, WAITING, font, readable, sampler_style

Color = tuple[int, int, int]

_FRAME, _SIDE, _MARGIN = 800, 224, 24  # of an animation: its width, that of a picture, the space round it
_STILL, _CELL, _CELLS, _NAMES = 1660, 168, 6, 330  # of a still: its width, a picture's, how many, and room for names
_VEIL = 0.62  # how much of a token that is not settled its colour covers


def front_frames(title: str, trajectories: Mapping[str, Trajectory]) -> list[Image.Image]:
    """A frame for each network call of the longest trajectory, and one before the first: all trajectories side by side.

    Above, the picture that the remaining blocks make of the tokens so far; below, the tokens: settled ones in their
    sampler's colour, those that the next call evaluates in a light shade of it, waiting ones in grey. For long
    sequences a frame stands for the calls between two states that were kept. 800 pixels wide for three trajectories.
    """
    longest = max(trajectories.values(), key=lambda trajectory: trajectory.calls)
    return [_frame(title, trajectories, call) for call in longest.after]


def front_still(title: str, trajectories: Mapping[str, Trajectory]) -> Image.Image:
    """A row for each trajectory: its picture at six of its calls, a bar as long as its calls, and its certificate.

    Tokens that are not settled lie under a veil, in the sampler's colour where the next call evaluates them. 1660
    pixels wide.
    """
    most = max(trajectory.calls for trajectory in trajectories.values())
    height = _CELL + 112
    sheet = Image.new("RGB", (_STILL, 64 + len(trajectories) * height + 40), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 32), title, fill=INK, font=font(28), anchor="lm")
    for row, (name, trajectory) in enumerate(trajectories.items()):
        _row(sheet, 64 + row * height, name, trajectory, most)
    colors = [sampler_style(name).color for name in trajectories]
    draw.text((_NAMES, sheet.height - 24), "clear: settled", fill=INK, font=font(24), anchor="lm")
    _key(draw, _NAMES + 220, sheet.height - 24, 24, _meanings(colors)[1:])
    return sheet


def _frame(title: str, trajectories: Mapping[str, Trajectory], call: int) -> Image.Image:
    width = max(_FRAME, len(trajectories) * (_SIDE + _MARGIN) + _MARGIN)
    step = width / len(trajectories)
    top = 96
    frame = Image.new("RGB", (width, top + 2 * _SIDE + 78), PAPER)
    draw = ImageDraw.Draw(frame)
    draw.text((width / 2, 20), title, fill=INK, font=font(17), anchor="mm")
    for column, (name, trajectory) in enumerate(trajectories.items()):
        k, color = _state(trajectory, call), sampler_style(name).color
        middle = (column + 0.5) * step
        left = round(middle - _SIDE / 2)
        draw.text((middle, 52), name, fill=readable(color), font=font(19), anchor="mm")
        draw.text((middle, 78), _count(trajectory, call), fill=INK, font=font(15), anchor="mm")
        frame.paste(_picture(trajectory, k, _SIDE), (left, top))
        frame.paste(_tokens(trajectory, k, color, _SIDE), (left, top + _SIDE + 8))
        settled = f"{int(trajectory.settled[k].sum())} of {trajectory.settled.shape[1]} tokens settled"
        draw.text((middle, top + 2 * _SIDE + 24), settled, fill=INK, font=font(15), anchor="mm")
    _key(draw, _MARGIN, frame.height - 22, 15, _meanings([sampler_style(name).color for name in trajectories]))
    return frame


def _state(trajectory: Trajectory, call: int) -> int:
    """The last state that was kept within `call` calls."""
    return max(k for k, after in enumerate(trajectory.after) if after <= call)


def _count(trajectory: Trajectory, call: int) -> str:
    if call < trajectory.calls:
        return f"call {call} of {trajectory.calls}"
    return f"done: {trajectory.calls} calls, {_certificate(trajectory)}"


def _certificate(trajectory: Trajectory) -> str:
    return "exact" if _first_run(trajectory) == 1 else f"certified {trajectory.certificate:.0e}"


def _first_run(trajectory: Trajectory) -> int:
    """How many tokens the first call evaluates; the last one may certify all."""
    start, stop = trajectory.runs[0]
    return stop - start


def _row(sheet: Image.Image, top: int, name: str, trajectory: Trajectory, most: int) -> None:
    draw, color = ImageDraw.Draw(sheet), sampler_style(name).color
    size, tokens = _first_run(trajectory), trajectory.settled.shape[1]
    many = "one token a call" if size == 1 else "all open tokens a call" if size == tokens else f"{size} tokens a call"
    lines = ((name, readable(color), 30), (many, INK, 22), (f"{trajectory.calls} calls", INK, 22),
             (f"{trajectory.token_evaluations:,} token evaluations", INK, 22))  # fmt: skip
    for i, (text, fill, letters) in enumerate(lines):
        draw.text((8, top + 24 + 36 * i), text, fill=fill, font=font(letters), anchor="lm")
    gap = (_STILL - _NAMES - 232 - _CELLS * _CELL) // (_CELLS - 1)
    for cell in range(_CELLS):
        k = round(cell * (len(trajectory.after) - 1) / (_CELLS - 1))
        left = _NAMES + cell * (_CELL + gap)
        sheet.paste(_veiled(trajectory, k, color), (left, top))
        text = f"call {trajectory.after[k]}"
        draw.text((left + _CELL / 2, top + _CELL + 18), text, fill=INK, font=font(22), anchor="mm")
    width, below = _CELLS * (_CELL + gap) - gap, top + _CELL + 44
    end = _NAMES + width * trajectory.calls / most
    draw.rectangle((_NAMES, below, _NAMES + width, below + 18), fill=FAINT)
    draw.rectangle((_NAMES, below, end, below + 18), fill=color)
    if trajectory.calls < most:
        fewer = f"{most / trajectory.calls:.1f} times fewer calls"
        draw.text((end + 12, below + 9), fewer, fill=readable(color), font=font(22), anchor="lm")
    exact = size == 1
    promise = (
        ("exact by", "construction") if exact else ("certificate:", "|g(x) − x|", f"≤ {trajectory.certificate:.1e}")
    )
    for i, text in enumerate(promise):
        fill = INK if i == 0 or exact else readable(color)
        draw.text((_STILL - 214, top + 40 + 36 * i), text, fill=fill, font=font(24), anchor="lm")


def _picture(trajectory: Trajectory, k: int, side: int) -> Image.Image:
    return image_grid(trajectory.images[k : k + 1], 1, 1, 0).resize((side, side), Image.Resampling.NEAREST)


def _shades(trajectory: Trajectory, k: int, color: str) -> list[tuple[Color, bool]]:
    """The colour of each token in raster order, and whether it is settled."""
    full, light = _mixed(color, 0.0), _mixed(color, 0.6)
    start, stop = trajectory.runs[trajectory.after[k]] if trajectory.after[k] < trajectory.calls else (0, 0)
    shades = [(_mixed(WAITING, 0.0), False)] * len(trajectory.positions)
    for token, place in enumerate(trajectory.positions.tolist()):
        if trajectory.settled[k, token]:
            shades[place] = (full, True)
        elif start <= token < stop:
            shades[place] = (full if stop - start == 1 else light, False)
    return shades


def _tokens(trajectory: Trajectory, k: int, color: str, side: int) -> Image.Image:
    """The tokens as squares in their colours."""
    across = math.isqrt(len(trajectory.positions) - 1) + 1
    image = Image.new("RGB", (side, side), PAPER)
    draw, step = ImageDraw.Draw(image), side / across
    for place, (shade, _) in enumerate(_shades(trajectory, k, color)):
        left, top = place % across * step, place // across * step
        draw.rectangle((left, top, left + step - 2, top + step - 2), fill=shade)
    return image


def _veiled(trajectory: Trajectory, k: int, color: str) -> Image.Image:
    """The picture, with a veil over the tokens that are not settled."""
    across = math.isqrt(len(trajectory.positions) - 1) + 1
    image, step = _picture(trajectory, k, _CELL), _CELL / across
    veil, mask = image.copy(), Image.new("L", image.size, 0)
    for place, (shade, settled) in enumerate(_shades(trajectory, k, color)):
        if not settled:
            box = tuple(
                round(step * v) for v in (place % across, place // across, place % across + 1, place // across + 1)
            )
            veil.paste(shade, box)  # type: ignore[arg-type]
            mask.paste(round(255 * _VEIL), box)  # type: ignore[arg-type]
    return Image.composite(veil, image, mask)


def _mixed(color: str, white: float) -> Color:
    red, green, blue = (round(255 * (value + (1 - value) * white)) for value in to_rgb(color))
    return red, green, blue


def _meanings(colors: Sequence[str]) -> list[tuple[str, list[Color]]]:
    """What the colours of tokens mean."""
    return [
        ("settled", [_mixed(color, 0.0) for color in colors]),
        ("in the next call", [_mixed(color, 0.6) for color in colors]),
        ("waiting", [_mixed(WAITING, 0.0)]),
    ]


def _key(
    draw: ImageDraw.ImageDraw, left: float, middle: float, letters: int, entries: Sequence[tuple[str, list[Color]]]
) -> None:
    """Squares of their colours before each of the meanings."""
    for text, shades in entries:
        for shade in shades:
            box = (left, middle - letters / 2, left + letters, middle + letters / 2)
            draw.rectangle(box, fill=shade, outline=FAINT)
            left += letters + 3
        draw.text((left + 4, middle), text, fill=INK, font=font(letters), anchor="lm")
        left += 4 + font(letters).getlength(text) + 2 * letters
