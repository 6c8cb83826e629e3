"""The library's messages in the words of the command line."""

from __future__ import annotations

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from jacobiflow.cli.app import app
from jacobiflow.cli.words import in_options, one_line


@pytest.mark.parametrize(
    "message, words",
    [
        ("batch_size=0: give a positive number", "--batch-size 0: give a positive number"),
        ("files='bmp': give npz or png", "--files bmp: give npz or png"),
        ("denoise=-1.0, seed=5 (num=3)", "--denoise -1.0, --seed 5 (--num 3)"),
        ("or overwrite=True to replace them", "or --overwrite to replace them"),
        ("certify=False; bf16=True", "--no-certify; --bf16"),
        ("num_blocks=3 and layers_per_block=2", "--blocks 3 and --layers 2"),
        # What is not an argument that an option sets.
        ("overwrite=False: has no option", "overwrite=False: has no option"),
        ("Segments(count=0): give a positive number", "Segments(count=0): give a positive number"),
        ("runs/seed=3/x: holds samples of seed 0, not 5", "runs/seed=3/x: holds samples of seed 0, not 5"),
        ("a batch_size", "a batch_size"),
    ],
)
def test_arguments_become_options(message: str, words: str) -> None:
    commands = get_command(app)
    assert isinstance(commands, TyperGroup)
    assert in_options(message, commands, ()) == words


def test_text_that_the_user_typed_stays_as_it_is() -> None:
    commands = get_command(app)
    assert isinstance(commands, TyperGroup)
    message = "seed=3/run: no model, and seed=-1: give 0 or more"
    assert in_options(message, commands, ("doctor", "seed=3/run", "--seed=-1")) == (
        "seed=3/run: no model, and --seed -1: give 0 or more"
    )


def test_a_long_message_is_cut_in_its_middle() -> None:
    assert one_line("two\nlines  of words") == "two lines of words"
    assert one_line("x" * 300) == "x" * 300
    assert one_line("a" * 200 + "b" * 200) == "a" * 147 + " ... " + "b" * 147
