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
"""Errors that a user can fix, and how their messages list names."""

from collections.abc import Iterable
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


__all__ = ["MismatchedWeightsError", "MissingPackageError", "UnreadableImageError", "UserError", "listed"]
