"""The record of a shard: no change to it goes unnoticed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from sample_folders import record_of, signed

from jacobiflow.storage.record import Record


def test_json_gives_it_back_in_any_order() -> None:
    for record in (
        record_of(),
        record_of(labels=None, certificate=None, resolved=(), lost=(), figures={}),
        record_of(labels=(-1, 0, 1, 2), certificate=(1e-5, math.inf, 0.5, math.inf)),
    ):
        value = json.loads(json.dumps(record.to_json(), allow_nan=False))
        assert value == signed(value)
        assert Record.from_json(value) == Record.from_json(dict(reversed(value.items()))) == record


CHANGED: list[Callable[[dict[str, Any]], Any]] = [
    lambda value: value | {"lost": []},
    lambda value: value | {"figures": {"seconds": 1.0}},
    lambda value: value | {"record_sha256": "0" * 64},
    lambda value: {key: entry for key, entry in value.items() if key != "record_sha256"},
    lambda value: signed({key: entry for key, entry in value.items() if key != "figures"}),
    lambda value: signed(value | {"colour": 1}),
    lambda value: signed(value | {"labels": 4}),
    lambda _: [],
    lambda _: {},
]


@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_record_is_refused(change: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(ValueError, match=r"^not a record \(|^does not match its own checksum$"):
        Record.from_json(change(record_of().to_json()))


def test_no_flipped_bit_is_believed() -> None:
    data = json.dumps(record_of().to_json()).encode()
    for place in range(len(data)):
        try:
            found = Record.from_json(json.loads(data[:place] + bytes([data[place] ^ 2]) + data[place + 1 :]))
        except ValueError:
            continue
        assert found == record_of(), f"byte {place}"  # a number's last digit may be beyond its precision
