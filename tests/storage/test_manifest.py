"""The manifest: what it says, which files are not one, and which runs it lets resume."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import make_flow
from sample_folders import manifest_of

import jacobiflow as jf
from jacobiflow.measuring import machine
from jacobiflow.storage import Manifest, SampleFolderError

GUIDANCE = jf.Guidance(0.7, annealed=False, on="shift", attn_temperature=0.8)
NAMES = [entry.name for entry in fields(Manifest)]
few = settings(max_examples=25, deadline=None, derandomize=True)


def test_it_says_what_is_drawn() -> None:
    flow, labels = make_flow(in_channels=3, image_size=4, num_classes=5), torch.tensor([1, -1, 4])
    given: dict[str, Any] = {"batch_size": 2, "shard_size": 4, "strategy": "jacobi", "certify": False, "model": "mine"}
    manifest = Manifest.of(flow, 3, labels, 9, guidance=GUIDANCE, denoise=1, tolerance=1e-4, files="png", **given)
    digest = hashlib.sha256(b"".join(i.to_bytes(8, "little", signed=True) for i in (1, -1, 4))).hexdigest()
    assert asdict(manifest) == given | {
        "num": 3, "image_shape": (3, 4, 4), "seed": 9, "labels_sha256": digest, "num_classes": 5, "files": "png",
        "fingerprint": manifest.fingerprint, "dtype": "float64", "strategy_sha256": None, "guidance": asdict(GUIDANCE),
        "denoise": 1.0, "tolerance": 1e-4, "machine": machine("cpu"), "checksums": None,
    }  # fmt: skip
    assert len(manifest.fingerprint) == 64
    off = Manifest.of(flow, 3, None, 9, guidance=jf.Guidance(0.0), denoise=0.0, **given)
    assert (off.guidance, off.labels_sha256, off.tolerance, off.files) == (None, None, None, "npz")


def test_json_gives_it_back() -> None:
    for manifest in (
        manifest_of(1, batch_size=1, shard_size=1, image_shape=(1, 1, 1), num_classes=0, denoise=1, checksums=("a",)),
        manifest_of(files="png", guidance=asdict(GUIDANCE), checksums=("a", "b", "c")),
    ):
        value = json.loads(json.dumps(manifest.to_json()))
        assert list(value) == ["format_version", *NAMES]
        assert value["format_version"] == 1
        assert Manifest.from_json(value) == manifest


WRONG: list[tuple[str, Any]] = [
    ("format_version", 2), ("num", 0), ("num", "10"), ("batch_size", True), ("shard_size", 2.0),
    ("image_shape", [1, 8]), ("image_shape", [1, 0, 8]), ("image_shape", 8), ("seed", -1), ("num_classes", -1),
    ("files", "bmp"), ("guidance", 0.5), ("denoise", "0"), ("machine", None), ("checksums", "abc"), ("checksums", [1]),
]  # fmt: skip


@pytest.mark.parametrize("name, value", WRONG)
def test_a_wrong_entry_is_named(name: str, value: Any) -> None:
    shown = re.escape(repr(tuple(value) if isinstance(value, list) else value))
    with pytest.raises(ValueError, match=f"^{name} is {shown}"):
        Manifest.from_json({**manifest_of().to_json(), name: value})


def test_what_is_missing_unknown_or_not_an_object_is_named() -> None:
    good = manifest_of().to_json()
    for value, words in (
        ({name: entry for name, entry in good.items() if name != "seed"}, "seed is missing"),
        (good | {"colour": 1}, "colour is unknown"),
        ({"name": "a web page"}, "format_version is None, not 1"),
        ([], r"\[\] is not a JSON object"),
        (good | {"checksums": ["a", "b"]}, "2 checksums of 3 shards"),
    ):
        with pytest.raises(ValueError, match=f"^{words}$"):
            Manifest.from_json(value)


@given(
    name=st.sampled_from(NAMES),
    value=st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), st.lists),
)
@few
def test_any_entry_gives_a_manifest_or_a_value_error(name: str, value: Any) -> None:
    try:
        manifest = Manifest.from_json({**manifest_of().to_json(), name: value})
    except ValueError as error:
        assert name in str(error)
    else:
        assert getattr(manifest, name) == value or value != value or isinstance(value, list)


@given(num=st.integers(1, 500), shard_size=st.integers(1, 60), some=st.sets(st.integers(0, 8)))
@few
def test_the_shards_hold_all_samples_in_order(num: int, shard_size: int, some: set[int]) -> None:
    manifest = manifest_of(num, shard_size=shard_size)
    spans = manifest.spans()
    assert [i for start, stop in spans for i in range(start, stop)] == list(range(num))
    assert all(start % shard_size == 0 < stop - start <= shard_size for start, stop in spans)
    some = {shard for shard in some if shard < len(spans)}
    assert manifest.num_in(some) == sum(1 for i in range(num) if i // shard_size in some)


def test_a_run_resumes_with_the_same_settings_only() -> None:
    changed: dict[str, Any] = {
        "image_shape": (3, 4, 4), "seed": 5, "num_classes": 4, "batch_size": 4, "shard_size": 6, "files": "png",
        "fingerprint": "g", "dtype": "float64", "strategy": "sequential", "guidance": {"weight": 1.0}, "denoise": 1.0,
        "tolerance": 1e-3, "certify": False,
    }  # fmt: skip
    free: dict[str, Any] = {
        "num": 11, "labels_sha256": "l", "model": "other", "strategy_sha256": "s", "machine": {}, "checksums": ("c",),
    }  # fmt: skip
    assert {*changed, *free} == set(NAMES)
    begun, out = manifest_of(), Path("out")
    for name, value in changed.items():
        with pytest.raises(SampleFolderError) as error:
            begun.check_resumes(replace(begun, **{name: value}), out)
        words = f"out: holds samples of {name} {getattr(begun, name)}, not {value}; "
        assert str(error.value) == f"{words}give another folder, or overwrite=True to replace them"
    for name, value in free.items():
        begun.check_resumes(replace(begun, **{name: value}), out)
    with pytest.raises(
        SampleFolderError, match=r"^out: holds a run of 10 samples, more than 9; give num=10; or give an"
    ):
        begun.check_resumes(manifest_of(9), out)
    for length, shown in ((60, "x" * 60), (61, "x" * 57 + "...")):  # long values are cut
        with pytest.raises(SampleFolderError, match=f"strategy {shown}, not invented"):
            manifest_of(strategy="x" * length).check_resumes(begun, out)
