"""Patterns of module names."""

from __future__ import annotations

import pytest

from condconv.patterns import matches, matches_end, nearest


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("blocks.4.0", "blocks.4.*", True),
        ("blocks.4", "blocks.4.*", False),
        ("blocks.4.0.conv_pw", "blocks.4.*", False),
        ("blocks.14.0", "blocks.[14].*", False),
        ("blocks.14.0", "blocks.?4.*", True),
        ("blocks.4.0.conv_pw", "blocks.**", True),
        ("blocks.4.0.conv_pw", "**.conv_pw", True),
        ("conv_pw", "**.conv_pw", True),
        ("Blocks.4", "blocks.4", False),
    ],
)
def test_a_wildcard_matches_one_part_of_a_name(name: str, pattern: str, expected: bool) -> None:
    assert matches(name, pattern) == expected


def test_ends_of_names() -> None:
    assert matches_end("blocks.4.0.se", "se") and matches_end("se", "se") and matches_end("a.b.conv.0", "conv.?")
    assert not matches_end("blocks.4.0.base", "se") and not matches_end("blocks.se.0", "se")


def test_near_names() -> None:
    assert nearest("block.4", ["blocks.4", "stem"]) == " (near names: blocks.4)"
    assert nearest("xyz", ["blocks.4", "stem"]) == ""
