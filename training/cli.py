# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What all commands share: arguments, recipes, console, errors and exit codes."""

import difflib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import datasets
import huggingface_hub.errors
import yaml
from rich.console import Console
from transformers import HfArgumentParser

from modeling_rbi import UserError


logger = logging.getLogger(__name__)

# Errors of huggingface_hub, of which some are neither `OSError` nor derived from a common class.
_HUB_ERRORS = tuple(
    error
    for error in vars(huggingface_hub.errors).values()
    if isinstance(error, type) and issubclass(error, Exception) and error.__module__ == huggingface_hub.errors.__name__
)
USER_ERRORS = (UserError, OSError, datasets.exceptions.DatasetsError, *_HUB_ERRORS)


class ArgumentError(UserError):
    """The arguments of a command are wrong, so that nothing was begun."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C, with a sentence for the user: what is left, and how to go on."""


def run_command(
    command: Callable[[Sequence[str], Console], int | None],
    argv: Sequence[str] | None = None,
    *,
    width: int = 120,
    on_stop: str = "Nothing was written.",
) -> int:
    r"""
    Runs a command: gives it its arguments and a console, and turns errors that a user can fix into one line on stderr.
    Other errors are bugs, and show their traceback.

    Args:
        command (`Callable[[Sequence[str], Console], int | None]`):
            Parses the arguments with [`parse_arguments`], works, prints, and returns its exit code (`None`: 0).
        argv (`Sequence[str]`, *optional*):
            Arguments of the command line; by default those of this process.
        width (`int`, *optional*, defaults to 120):
            Columns of the console where it is no terminal.
        on_stop (`str`, *optional*):
            What to say after Ctrl-C, unless `command` raises [`Stopped`] with a sentence of its own.

    Returns:
        `int`: the exit code of `command`; 1 after an error, 2 after wrong arguments, 130 after Ctrl-C.
    """
    console = Console()
    if not console.is_terminal:
        console.width = width
    try:
        return command(list(sys.argv[1:] if argv is None else argv), console) or 0
    except KeyboardInterrupt as stop:
        print(f"Stopped. {stop.args[0] if stop.args else on_stop}", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        logger.debug("Where it happened:", exc_info=True)
        if os.environ.get("RANK", "0") == "0":  # in a distributed run, all processes fail alike
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ArgumentError(message)


class _RecipeLoader(yaml.SafeLoader):
    """Reads as YAML 1.2 does: `no`, as in `eval_strategy: no`, is a word, and 1e-5 a number."""


_BOOL_TAG, _FLOAT_TAG = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL_TAG]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


_RecipeLoader.add_implicit_resolver(_BOOL_TAG, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


_RecipeLoader.add_implicit_resolver(
    _FLOAT_TAG, re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_arguments(
    argv: Sequence[str], dataclass_types: Sequence[type], defaults: dict[str, Any], description: str | None = None
) -> tuple[Any, ...]:
    r"""
    Parses `--config RECIPE.yaml [RECIPE.yaml ...] --flag value ...` into dataclasses. What stands later wins: the
    defaults, the recipes in their order, the flags. `null` in a recipe takes back what was set before it.

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
        ArgumentError: for an unknown flag or key (names the nearest one), a wrong value, and a recipe that does not
            exist, is no mapping or extends itself.
    """
    try:
        return _parse(argv, dataclass_types, defaults, description)
    except (ValueError, ImportError, OSError) as error:
        raise ArgumentError(str(error)) from error


def _parse(
    argv: Sequence[str], dataclass_types: Sequence[type], defaults: dict[str, Any], description: str | None
) -> tuple[Any, ...]:
    parser = _Parser(dataclass_types, description=description, allow_abbrev=False)
    _add_config(parser)
    names = {action.dest for action in parser._actions} - {"help", "config"}
    lists = {action.dest for action in parser._actions if action.nargs == "+"}
    recipes = find_recipes(argv)
    values = dict(defaults)
    for recipe in recipes:
        for path, content in _read_recipe(Path(recipe), ()):
            for key, value in content.items():
                if key not in names:
                    raise UserError(f"{path} has the unknown key `{key}`{_nearest(str(key), names)}")
                if isinstance(value, list) and key not in lists:
                    raise UserError(f"{path} has a list for `{key}`, which takes one value.")
            values |= content
    arguments = [argument for name, value in values.items() for argument in _as_flags(name, value)] + list(argv)
    # Before the dataclasses are made, which may miss the very value whose flag is misspelt.
    if unknown := parser.parse_known_args(arguments)[1]:
        flag = unknown[0].split("=")[0]
        hint = _nearest(flag.lstrip("-").replace("-", "_"), names, prefix="--")
        raise UserError(f"There is no argument {flag}{hint}")
    *parsed, _ = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    return (*parsed, recipes)


def find_recipes(argv: Sequence[str]) -> list[str]:
    """The recipes that a command line names, in their order."""
    finder = _Parser([], add_help=False, allow_abbrev=False)
    _add_config(finder)
    return finder.parse_known_args(list(argv))[0].config


def _add_config(parser: HfArgumentParser):
    parser.add_argument(
        "--config", nargs="+", action="extend", default=[], metavar="RECIPE", help="Recipes in YAML; the last wins."
    )


def _read_recipe(path: Path, above: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A recipe with those that it extends, these first."""
    if path.resolve() in above:
        raise UserError(f"{path} extends itself.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _RecipeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping of arguments to values.")
    bases = content.pop("extends", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path} must name the recipes that it extends, by their paths from its own folder.")
    for base in bases:
        yield from _read_recipe(path.parent / base, (*above, path.resolve()))
    yield path, content


def _as_flags(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    # In one word, as a value such as -1e-5 would be taken for a flag.
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]


def _nearest(name: str, names: set[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f": did you mean `{prefix}{close[0]}`?" if close else "; `--help` lists all."


def default_output_dir(recipes: Sequence[str]) -> str:
    """`outputs/` and the last recipe's name."""
    return os.path.join("outputs", Path(recipes[-1]).stem if recipes else "train")
