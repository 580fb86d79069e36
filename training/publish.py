# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Publishes a trained RBI model on the Hub in one commit: weights, code, image processor, card, examples, assessment.

    python -m training.publish --model outputs/mine --assessment outputs/assess --repo_id user/name --dry_run

The card is filled from the records of training and assessment, and from arguments, which a YAML file (--config) may
hold. The command refuses models that do not load in a fresh process, pickles, secrets and cards that lack facts. After
an interruption, run the same command again to continue.

Exit code 0: published, or the folder of --dry_run is ready to be. 1: refused, or the Hub cannot be reached. 2: wrong
arguments.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import transformers
from huggingface_hub import HfApi
from rich.console import Console

from model_cards.card import CardArguments
from modeling_rbi import UserError

from .cli import parse_arguments, run_command
from .deployment.publication import (
    Publication,
    PublicationArguments,
    check_destination,
    describe,
    is_publication,
    left_out,
    make_folder,
    publish,
)
from .files import check_output_dir, names_in


_LOADS_BACK = "Reloaded in a fresh process without this package: the same logits, up to rounding."


def command(argv: Sequence[str], console: Console) -> int:
    """Publishes, or makes the folder of `--dry_run`; returns the exit code."""
    args, given, _ = parse_arguments(argv, (PublicationArguments, CardArguments), {}, description=__doc__)
    return (_dry_run if args.dry_run else _publish)(args, given, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_command(command, argv, on_stop="Nothing was published, unless the final commit had just gone through.")


def _dry_run(args: PublicationArguments, given: CardArguments, console: Console) -> int:
    folder = Path(args.output_dir or "")
    if folder.resolve() == Path(args.model).resolve():
        raise UserError(f"--output_dir {folder} is the model's own folder: name another folder.")
    check_output_dir(folder, "a publication", names_in(folder), is_publication)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".", suffix=".tmp") as draft:
        publication = make_folder(args, given, Path(draft) / "folder")
        publication.check_loads_back()
        text = _describe(publication, args)
        if folder.exists():
            folder.rename(Path(draft) / "former")
        publication.folder.rename(folder)
    _print(console, f"{text}\n{_LOADS_BACK}\nFolder: {folder.resolve()}")
    if publication.problems:
        problems = "\n".join(f"- {each}" for each in publication.problems)
        print(f"error: it would be refused:\n{problems}", file=sys.stderr)
        return 1
    _print(
        console,
        "Ready to be published, as far as can be checked without the Hub. The same command without --dry_run uploads "
        f"it to {args.repo_id}.",
    )
    return 0


def _publish(args: PublicationArguments, given: CardArguments, console: Console) -> int:
    api = HfApi()
    check_destination(args, api)
    with tempfile.TemporaryDirectory() as draft:
        publication = make_folder(args, given, Path(draft) / "folder")
        commit = publish(args, publication, api)
        _print(console, _describe(publication, args))
    _print(
        console,
        f"{_LOADS_BACK}\nPublished: {commit.commit_url}\n"
        f'AutoModelForImageClassification.from_pretrained("{args.repo_id}", revision="{commit.oid}", '
        "trust_remote_code=True)",
    )
    return 0


def _describe(publication: Publication, args: PublicationArguments) -> str:
    names = left_out(Path(args.model), publication)
    return describe(publication.folder) + (f"\nNot published from {args.model}: {', '.join(names)}" if names else "")


def _print(console: Console, text: str):
    console.print(text, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    sys.exit(main())
