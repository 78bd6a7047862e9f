"""A peer's text cannot steer a terminal."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aci_p2p.protocol.text import printable, printable_lines

CASES = [
    ("plain", "plain"),
    ("gare où Grüße 東京 🚂", "gare où Grüße 東京 🚂"),
    ("\x1b[31mred\x1b[0m", " [31mred [0m"),
    ("a\u202eb\u200fc", "a b c"),
    ("bell\x07 back\x08 del\x7f c1\x9b", "bell  back  del  c1 "),
    ("zero\u200bwidth\ufeff", "zero width "),
    ("\u2028line\u2029paragraph", " line paragraph"),
    ("lone \ud800", "lone  "),
]


@pytest.mark.parametrize(("text", "safe"), [*CASES, ("a\r\nb\tc\0d", "a  b c d"), (" \n ", "")])
def test_on_one_line(text: str, safe: str) -> None:
    assert printable(text) == safe.strip()


@pytest.mark.parametrize(("text", "safe"), [*CASES, ("a\r\nb\tc\0d", "a \nb\tc d"), (" \n ", " \n ")])
def test_on_many_lines(text: str, safe: str) -> None:
    assert printable_lines(text) == safe


@given(st.text())
def test_nothing_but_what_prints(text: str) -> None:
    line, lines = printable(text), printable_lines(text)
    assert line.isprintable()
    assert line == line.strip()
    assert len(lines) == len(text)
    for char in lines:
        assert char in "\n\t" or unicodedata.category(char)[0] != "C"
