"""The picture of a terminal."""

from __future__ import annotations

from tools.pictures.terminal import draw


def test_a_terminal_shows_the_output_and_asks_no_other_host() -> None:
    picture = draw("$ command\n\x1b[1mdone\x1b[0m", "title")
    assert all(text in picture for text in ("command", "done", "title"))
    assert "@font-face" not in picture and "url(http" not in picture
