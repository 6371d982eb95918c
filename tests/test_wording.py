"""Wording that messages share."""

import pytest

from ccnet_d2.wording import first_line, listed


@pytest.mark.parametrize(
    ("names", "expected"),
    [([], ""), (["a"], "a"), (["a", "b"], "a, b"), ("abc", "a, b and 1 more"), (range(5), "0, 1 and 3 more")],
)
def test_names_beyond_the_most_are_counted(names, expected):
    assert listed(names, 2) == expected


@pytest.mark.parametrize(
    ("message", "expected"), [("no such size.\nmore", "no such size"), ("", ""), ("one", "one")]
)
def test_the_first_line_of_an_error(message, expected):
    assert first_line(ValueError(message)) == expected
