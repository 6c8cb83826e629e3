"""Tests of native code need the compiled library."""

from __future__ import annotations

import pytest

from jacobiflow import native


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if native.load_library() is None:
        pytest.skip(native.describe())
