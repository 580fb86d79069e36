# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Command lines: recipes in YAML, overridden by flags."""

import difflib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_arguments(
    argv: Sequence[str], dataclass_types: Sequence[type], defaults: dict[str, Any], description: str | None = None
) -> tuple[Any, ...]:
    r"""
    Parses `--config RECIPE.yaml [RECIPE.yaml ...] --flag value ...` into dataclasses. What stands later wins: the
    defaults, the recipes in their order, the flags.

    Args:
        argv (`Sequence[str]`):
            The command line's arguments.
        dataclass_types (`Sequence[type]`):
            Whose fields are the flags and the recipes' keys.
        defaults (`dict[str, Any]`):
            Values that differ from the dataclasses' own.
        description (`str`, *optional*):
            For `--help`.

    Returns:
        One instance of each dataclass, and the recipes that were read, `list[str]`.

    Raises:
        ValueError: for an unknown flag or key (names the nearest one), a wrong value, a recipe that is no mapping or
            extends itself.
        OSError: if a recipe is not there.
    """
    parser = _Parser(dataclass_types, description=description, allow_abbrev=False)
    parser.add_argument("--config", nargs="+", default=[], metavar="RECIPE", help="Recipes in YAML; the last wins.")
    # Found first, by a parser of its own: their values come before the flags'.
    finder = _Parser([], add_help=False, allow_abbrev=False)
    finder.add_argument("--config", nargs="+", default=[])
    recipes = finder.parse_known_args(argv)[0].config
    names = {action.dest for action in parser._actions} - {"help", "config"}
    values = dict(defaults)
    for recipe in recipes:
        for path, content in _read_recipe(Path(recipe), ()):
            for key in content:
                if key not in names:
                    raise ValueError(f"{path} has the unknown key `{key}`{_nearest(key, names)}")
            values |= content
    arguments = [argument for name, value in values.items() for argument in _as_flags(name, value)]
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        [*arguments, *argv], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        flag = unknown[0].split("=")[0]
        hint = _nearest(flag.lstrip("-").replace("-", "_"), names, prefix="--")
        raise ValueError(f"There is no argument {flag}{hint}")
    return (*parsed, list(recipes))


def _read_recipe(path: Path, above: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A recipe with those that it extends, these first."""
    if path.resolve() in above:
        raise ValueError(f"{path} extends itself.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a mapping of arguments to values.")
    bases = content.pop("extends", [])
    for base in [bases] if isinstance(bases, str) else bases:
        yield from _read_recipe(path.parent / base, (*above, path.resolve()))
    yield path, content


def _as_flags(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, dict):
        return [f"--{name}", json.dumps(value)]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", str(value)]


def _nearest(name: str, names: set[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f": did you mean `{prefix}{close[0]}`?" if close else "; `--help` lists all."


def default_output_dir(recipes: Sequence[str]) -> str:
    """`outputs/` and the last recipe's name."""
    return os.path.join("outputs", Path(recipes[-1]).stem if recipes else "train")
