# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What all commands share: arguments, recipes, the console, errors and exit codes."""

import difflib
import json
import logging
import math
import os
import re
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import datasets
import huggingface_hub.errors
import yaml
from rich.console import Console
from transformers import HfArgumentParser

from modeling_rbi import UserError


logger = logging.getLogger(__name__)

# Some errors of huggingface_hub are no `OSError`, and they share no base class.
_HUB_ERRORS = tuple(
    error
    for error in vars(huggingface_hub.errors).values()
    if isinstance(error, type) and issubclass(error, Exception) and error.__module__ == huggingface_hub.errors.__name__
)
USER_ERRORS = (UserError, OSError, datasets.exceptions.DatasetsError, *_HUB_ERRORS)


class ArgumentError(UserError):
    """Wrong arguments: the command did not start."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C, with a sentence for the user: what is left on disk, and how to continue."""


def make_console(**options: Any) -> Console:
    """A console that prints paths, class names and messages as they are: `[red]` and `:cat:` are no markup."""
    return Console(markup=False, emoji=False, **options)


def run_command(
    command: Callable[[Sequence[str], Console], int | None],
    argv: Sequence[str] | None = None,
    *,
    width: int = 120,
    on_stop: str = "Nothing was written.",
) -> int:
    r"""
    Runs a command: passes it its arguments and a console, and prints errors that a user can fix as one line on stderr.
    Other errors are bugs and show their traceback. In a distributed run, only the process of rank 0 prints.

    Args:
        command (`Callable[[Sequence[str], Console], int | None]`):
            Parses the arguments with [`parse_arguments`], works, prints, and returns its exit code (`None`: 0).
        argv (`Sequence[str]`, *optional*):
            Arguments of the command line. Defaults to `sys.argv[1:]`.
        width (`int`, *optional*, defaults to 120):
            Width of the console in columns if the output is not a terminal.
        on_stop (`str`, *optional*):
            Sentence to print after Ctrl-C, unless `command` raises [`Stopped`] with its own.

    Returns:
        `int`: the exit code of `command`; 1 after an error, 2 after wrong arguments, 130 after Ctrl-C.
    """
    console = make_console()
    if not console.is_terminal:
        console.width = width
    try:
        return command(list(sys.argv[1:] if argv is None else argv), console) or 0
    except KeyboardInterrupt as stop:
        _print_error(f"Stopped. {stop.args[0] if stop.args else on_stop}")
        return 130
    except USER_ERRORS as error:
        logger.debug("Traceback:", exc_info=True)
        _print_error(f"error: {error}")
        return 2 if isinstance(error, ArgumentError) else 1


def _print_error(message: str):
    if os.environ.get("RANK", "0") == "0":  # all processes of a distributed run fail alike
        print(message, file=sys.stderr)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ArgumentError(message)


class _RecipeLoader(yaml.SafeLoader):
    """Follows YAML 1.2: `no`, as in `eval_strategy: no`, is a string, and 1e-5 is a number."""


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
    argv: Sequence[str],
    dataclass_types: Sequence[type],
    defaults: dict[str, Any],
    description: str | None = None,
    ignored_types: Sequence[type] = (),
) -> tuple[Any, ...]:
    r"""
    Parses `--config RECIPE.yaml [RECIPE.yaml ...] --flag value ...` into dataclasses. Later values win: flags override
    recipes, a recipe overrides the one before it, and all override the defaults. `null` in a recipe removes a value
    that was set before it.

    Args:
        argv (`Sequence[str]`):
            Arguments of the command line.
        dataclass_types (`Sequence[type]`):
            Dataclasses whose fields are the flags and the keys of recipes.
        defaults (`dict[str, Any]`):
            Values that differ from the defaults of the dataclasses.
        description (`str`, *optional*):
            Text for `--help`.
        ignored_types (`Sequence[type]`, *optional*):
            Dataclasses of another command with which this one shares its recipes. Their fields are accepted and
            checked for their type, but have no effect, and `--help` does not list them.

    Returns:
        One instance of each of `dataclass_types`, and the list of recipes that were read, `list[str]`.

    Raises:
        ArgumentError: if a flag or key is unknown (the error names the nearest one), a value is wrong, or a recipe is
            missing, is not a mapping or extends itself.
    """
    try:
        return _parse(argv, dataclass_types, defaults, description, ignored_types)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise ArgumentError(str(error)) from error


def _parse(
    argv: Sequence[str],
    dataclass_types: Sequence[type],
    defaults: dict[str, Any],
    description: str | None,
    ignored_types: Sequence[type],
) -> tuple[Any, ...]:
    # If a field is in both kinds of dataclasses, the command's own, added later, replaces the ignored one.
    parser = _Parser(
        [*ignored_types, *dataclass_types],
        description=description,
        allow_abbrev=False,
        conflict_handler="resolve" if ignored_types else "error",
    )
    parser.dataclass_types = list(dataclass_types)
    _add_config(parser)
    own = {each.name for dataclass_type in dataclass_types for each in fields(dataclass_type)}
    for action in parser._actions:
        if action.dest not in own | {"help", "config"}:
            action.required, action.help = False, SUPPRESS
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
    # Unknown flags come first: a required value may be missing because its flag is misspelt.
    if unknown := parser.parse_known_args(arguments)[1]:
        flag = unknown[0].split("=")[0]
        hint = _nearest(flag.lstrip("-").replace("-", "_"), names, prefix="--")
        raise UserError(f"There is no argument {flag}{hint}")
    *parsed, _ = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    for dataclass in parsed:
        for name, value in vars(dataclass).items():
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise UserError(f"--{name} must be a finite number, got {value}.")
    return (*parsed, recipes)


def find_recipes(argv: Sequence[str]) -> list[str]:
    """The recipes that a command line names, in order."""
    finder = _Parser([], add_help=False, allow_abbrev=False)
    _add_config(finder)
    return finder.parse_known_args(list(argv))[0].config


def _add_config(parser: HfArgumentParser):
    parser.add_argument(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="RECIPE",
        help="YAML recipes; later ones override earlier ones.",
    )


def _read_recipe(path: Path, above: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The recipes that a recipe extends, then the recipe itself."""
    if path.resolve() in above:
        raise UserError(f"{path} extends itself.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _RecipeLoader)
    except OSError as error:
        raise UserError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping of arguments to values.")
    bases = content.pop("extends", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"`extends` in {path} must be a path, or a list of paths, relative to its folder.")
    for base in bases:
        yield from _read_recipe(path.parent / base, (*above, path.resolve()))
    yield path, content


def _as_flags(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    # One word, because argparse takes a separate -1e-5 for a flag.
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]


def _nearest(name: str, names: set[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f": did you mean `{prefix}{close[0]}`?" if close else "; `--help` lists all."


def default_output_dir(recipes: Sequence[str]) -> str:
    """`outputs/` and the names of the recipes, joined by hyphens."""
    return os.path.join("outputs", "-".join(Path(recipe).stem for recipe in recipes) or "train")
