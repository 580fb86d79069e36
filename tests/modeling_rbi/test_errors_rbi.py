"""Errors that a user can fix, the names in their messages, and names of classes."""

import pytest

from modeling_rbi import MissingPackageError, UserError
from modeling_rbi.errors_rbi import listed, normalized, shown_names


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


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["crane", "dog", "owl"], ["crane", "dog", "owl"]),
        (["crane", "dog", "crane", "owl"], ["crane (0)", "dog", "crane (2)", "owl"]),
        (["crane"] * 3, ["crane (0)", "crane (1)", "crane (2)"]),
        (["LABEL_0", "LABEL_0"], ["LABEL_0 (0)", "LABEL_0 (1)"]),
        (["Crane", "crane", "CRANE"], ["Crane", "crane", "CRANE"]),
        (["crane", "crane (2)", "crane"], ["crane (0)", "crane (2)", "crane (2) (2)"]),
        (["crane (1)", "crane (1)", "crane", "crane"], ["crane (1) (0)", "crane (1) (1)", "crane (2)", "crane (3)"]),
        (["a", "a (0)", "a", "a (0)"], ["a (0) (0)", "a (0) (1)", "a (2)", "a (0) (3)"]),
        (["", "dog"], ["(0)", "dog"]),
        (["", "(0)", " "], ["(0) (0)", "(0)", "(2)"]),
        (["caf\u00e9", "cafe\u0301", " cat", "cat "], ["caf\u00e9 (0)", "caf\u00e9 (1)", "cat (2)", "cat (3)"]),
        (["cafe\u0301 ", "two  words"], ["cafe\u0301 ", "two  words"]),
        ([1, "1", None], ["1 (0)", "1 (1)", "None"]),
        ([], []),
    ],
)
def test_classes_of_one_name_are_shown_with_their_numbers(names, shown):
    assert shown_names(dict(enumerate(names))) == dict(enumerate(shown))
    assert shown_names(dict(enumerate(shown))) == dict(enumerate(shown))
    assert len({normalized(name) for name in shown}) == len(shown)


def test_numbers_are_those_of_the_table():
    """Also if these come in another order, as the keys of a JSON file do, or are no numbers."""
    assert shown_names({10: "crane", 2: "crane", 3: "owl"}) == {10: "crane (10)", 2: "crane (2)", 3: "owl"}
    assert shown_names({"n1": "crane", "n2": "crane"}) == {"n1": "crane (n1)", "n2": "crane (n2)"}


def test_kinds_of_errors():
    """Callers may catch what Python itself would raise."""
    assert issubclass(UserError, ValueError)
    assert issubclass(MissingPackageError, UserError)
    assert issubclass(MissingPackageError, ImportError)
