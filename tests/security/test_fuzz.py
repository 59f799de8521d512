"""Any bytes are taken, or refused with the error that the caller expects; they cost memory by their own size alone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fuzz.targets import TARGETS

# What a list of the smallest JSON values, or of names in a header, costs beside its bytes.
_BYTES_A_BYTE = 100
_FIXED_BYTES = 1 << 20
_ATHERIS_S = 2

numbers = st.sampled_from([0, 1, 7, 8, 2**16, 2**20, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1])
patches = st.one_of(
    st.binary(max_size=8),
    numbers.map(lambda number: number.to_bytes(8, "little")),
    numbers.map(lambda number: (number & 0xFFFFFFFF).to_bytes(4, "little")),
    numbers.map(lambda number: str(number).encode()),
    st.sampled_from([b'"', b"[", b"{", b"-", b"null", b"1e999", b"\\ud800", b"\xff", b"GGUF"]),
)
# Where, how much of the seed it replaces, and by what.
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), patches, st.integers(1, 40)), max_size=6)


def edited(seed: bytes, changes: list[tuple[float, int, bytes, int]]) -> bytes:
    for where, removed, patch, times in changes:
        at = int(where * len(seed))
        seed = seed[:at] + patch * times + seed[at + removed :]
    return seed


def check(name: str, data: bytes) -> None:
    tracemalloc.start()
    try:
        TARGETS[name].run(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= _FIXED_BYTES + _BYTES_A_BYTE * len(data)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_right_is_taken_and_any_change_of_it_is_taken_or_refused(name: str) -> None:
    @settings(max_examples=300, deadline=None)
    @given(seed=st.sampled_from(TARGETS[name].seeds), changes=edits)
    def any_change(seed: bytes, changes: list[tuple[float, int, bytes, int]]) -> None:
        check(name, edited(seed, changes))

    for seed in TARGETS[name].seeds:
        TARGETS[name].take(seed)
    any_change()


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_are_refused(name: str) -> None:
    @settings(max_examples=100, deadline=None)
    @given(
        data=st.binary(max_size=300),
        start=st.sampled_from([b"", b"GGUF\x03\0\0\0", b"\x08\0\0\0\0\0\0\0", b"\x01\x92"]),
    )
    def any_bytes(data: bytes, start: bytes) -> None:
        check(name, start + data)

    any_bytes()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("gguf-header", b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16),
        ("gguf-header", b"GGUF" + (3).to_bytes(4, "little") + (1 << 20).to_bytes(8, "little") * 2 + bytes(1 << 20)),
        ("safetensors-header", b"\xff" * 8 + b"{" * 100),
        ("safetensors-header", (200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995),
        ("safetensors-header", (300_002).to_bytes(8, "little") + b"[" + b"{}," * 100_000 + b"0"),
        ("chat-body", b'{"messages":' + b"[" * 200_000),
        ("wire-control", b"\xdd\xff\xff\xff\xff" + b"\xc0" * 100),
        ("wire-data", b"\x01\x92\xa6tokens\xdf\xff\xff\xff\xff"),
    ],
)
def test_what_announces_more_than_it_has_costs_nothing(name: str, data: bytes) -> None:
    check(name, data)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris (pip install atheris)")
@pytest.mark.parametrize("name", TARGETS)
def test_coverage_finds_nothing_in_a_short_time(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.fuzz.run", name, str(_ATHERIS_S), str(tmp_path)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
