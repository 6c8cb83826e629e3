"""Errors that a caller can correct, told apart from faults of the library."""

from __future__ import annotations


class InputError(Exception):
    """Base class of the errors that a caller can correct: a wrong argument, option, file or folder.

    The message names the value and the remedy. Every other exception is a fault of the library or of the machine.

    Args:
        message: What is wrong, or what to give.
        argument: Name of the argument at fault, with which `str(error)` begins. The command line names its option.
        value: Value of that argument, as the message shows it.

    Example:
        >>> error = InputValueError("give a positive whole number", argument="num", value=0)
        >>> str(error)
        'num=0: give a positive whole number'
    """

    def __init__(self, message: str, *, argument: str | None = None, value: object = None) -> None:
        super().__init__(message if argument is None else f"{argument}={value}: {message}")
        self.message, self.argument, self.value = message, argument, value


class InputTypeError(InputError, TypeError):
    """An argument is of the wrong kind."""


class InputValueError(InputError, ValueError):
    """An argument is of the right kind and has a wrong value."""


class CheckpointError(InputValueError):
    """A model folder or file cannot be used; the message names it and the entries at fault.

    Example:
        >>> try:
        ...     jf.load("no-such-model")
        ... except jf.CheckpointError as error:
        ...     print(str(error)[:30])
        'no-such-model': no such model
    """


class DataError(InputValueError):
    """Data, or a file or folder of data, cannot be used; the message names it and the remedy."""


class UnsupportedError(Exception):
    """Native code, or another fast way, does not take these arguments; the caller computes the result without it.

    A block's `sequential_inverse` raises it; the message is then the `obstacle` of a `Solution`.

    Example:
        >>> block, z = jf.load("digits-p1").blocks[0].bfloat16(), torch.ones(2, 64, 1, dtype=torch.float64)
        >>> solution = jf.solve(block, z, jf.Solver(jf.Sequential()))
        >>> solution.backend, solution.obstacle
        ('sweeps', 'weights of torch.bfloat16 for tokens of torch.float64')
    """


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its class if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
