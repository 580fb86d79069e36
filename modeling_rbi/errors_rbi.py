# Copyright 2026 The RBI authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Errors that a user can fix, and how names are shown, in their messages and elsewhere."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(ValueError):
    """Base class of errors that the user can fix. The message says what is wrong and what to do."""


class MissingPackageError(UserError, ImportError):
    """A package that the request needs is not installed."""


class MismatchedWeightsError(UserError, RuntimeError):
    """The weights of a checkpoint have other shapes than its config describes."""


class UnreadableImageError(UserError):
    """An image is missing, of an unknown format, broken, cut off or too large; the message names it and says which."""


def listed(names: Iterable[Any], limit: int = 5) -> str:
    """The first `limit` names, separated by commas, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def normalized(name: Any) -> str:
    """A name with single spaces and letters as Unicode composes them (NFC): names that look the same become equal."""
    return " ".join(unicodedata.normalize("NFC", str(name)).split())


def shown_names(names: Mapping[Any, Any]) -> dict[Any, str]:
    r"""
    Names of classes as they are shown, all different. A class is its number, so several may have the same name. Then,
    and if a class has no name, the number is appended: `crane (134)` and `crane (517)`.

    Names that look the same count as the same, see [`normalized`].

    Args:
        names (`Mapping[int, str]`):
            Name of each class by its number, such as `config.id2label`.
    """
    looks = {number: normalized(name) for number, name in names.items()}
    counts = Counter(looks.values())
    shown = {}
    for number, name in names.items():
        shown[number] = str(name)
        if counts[looks[number]] > 1 or not looks[number]:
            shown[number] = looks[number]
            while not shown[number] or shown[number] in counts:
                shown[number] = f"{shown[number]} ({number})".strip()
    return shown


__all__ = [
    "MismatchedWeightsError",
    "MissingPackageError",
    "UnreadableImageError",
    "UserError",
    "listed",
    "normalized",
    "shown_names",
]
