"""Errors that a user can fix, and the names in their messages."""

import pytest

from modeling_rbi import MissingPackageError, UserError
from modeling_rbi.errors_rbi import listed


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["a"], "a"),
        (["a", "b", "c", "d", "e"], "a, b, c, d, e"),
        (["a", "b", "c", "d", "e", "f"], "a, b, c, d, e and 1 more"),
        (map(str, range(100)), "0, 1, 2, 3, 4 and 95 more"),
        ({"b": 1, "a": 2}, "b, a"),
        ([1, None, "x"], "1, None, x"),
    ],
)
def test_the_first_names_and_the_number_of_the_others(names, text):
    assert listed(names) == text


@pytest.mark.parametrize(("limit", "text"), [(0, " and 3 more"), (1, "a and 2 more"), (3, "a, b, c"), (9, "a, b, c")])
def test_another_limit(limit, text):
    assert listed("abc", limit=limit) == text


def test_kinds_of_errors():
    """Callers may catch what Python itself would raise."""
    assert issubclass(UserError, ValueError)
    assert issubclass(MissingPackageError, UserError)
    assert issubclass(MissingPackageError, ImportError)
