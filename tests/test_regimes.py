"""benchmarks/regimes.py and loop_profile.py on small shapes: what they write, never how long it took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import load_script

from jacobiflow import native

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(native.library() is None, reason="no native loop"),
]
