# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Publishes a trained RBI model on the Hub, in one commit: weights, code, image processor, card, examples, assessment.

    python -m training.publish --model outputs/mine --assessment outputs/assess --repo_id user/name --dry_run

The card is filled from the record of the training and the assessment; what they do not tell, arguments do (or a YAML
file of them, --config). What can't be loaded back, pickles, secrets and cards that lack facts are refused. The same
command again goes on after an interruption.

Exit code 0: published, or the folder of --dry_run is fit to be. 1: it is refused, or the Hub is out of reach. 2: the
arguments are wrong.
"""

import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console

from model_cards.card import CardArguments
from modeling_rbi import UserError

from .cli import parse_arguments
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


logger = logging.getLogger(__name__)

_LOADS_BACK = "Loaded back in a fresh process without this package: the same answers."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    args = None
    try:
        args, given, _ = parse_arguments(
            sys.argv[1:] if argv is None else argv, (PublicationArguments, CardArguments), {}, description=__doc__
        )
        return _dry_run(args, given, console) if args.dry_run else _publish(args, given, console)
    except KeyboardInterrupt:
        print("Stopped. What is published is as it was, but if it was in the last moment.", file=sys.stderr)
        return 130
    except (ValueError, ImportError, OSError, StrictDataclassError) as error:
        logger.debug("Where it happened:", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 2 if args is None else 1


def _dry_run(args: PublicationArguments, given: CardArguments, console: Console) -> int:
    folder = Path(args.output_dir or "")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not is_publication(folder))):
        raise UserError(f"--output_dir {folder} holds other things than a publication: name a new folder.")
    if folder.resolve() == Path(args.model).resolve():
        raise UserError(f"--output_dir {folder} is the model's own folder: name a new one.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".", suffix=".tmp") as draft:
        publication = make_folder(args, given, Path(draft) / "folder")
        publication.check_loads_back()
        text = _describe(publication, args)
        if folder.exists():
            folder.rename(Path(draft) / "former")
        publication.folder.rename(folder)
    console.print(f"{text}\n{_LOADS_BACK}\nFolder: {folder.resolve()}")
    if publication.problems:
        print(
            "error: it would be refused:\n" + "\n".join(f"- {each}" for each in publication.problems), file=sys.stderr
        )
        return 1
    console.print(
        "Fit to be published, as far as can be seen without the Hub: the same command without --dry_run sends it to "
        f"{args.repo_id}."
    )
    return 0


def _publish(args: PublicationArguments, given: CardArguments, console: Console) -> int:
    api = HfApi()
    check_destination(args, api)
    with tempfile.TemporaryDirectory() as draft:
        publication = make_folder(args, given, Path(draft) / "folder")
        commit = publish(args, publication, api)
        console.print(_describe(publication, args))
    console.print(
        f"{_LOADS_BACK}\nPublished: {commit.commit_url}\n"
        f'AutoModelForImageClassification.from_pretrained("{args.repo_id}", revision="{commit.oid}", '
        "trust_remote_code=True)"
    )
    return 0


def _describe(publication: Publication, args: PublicationArguments) -> str:
    names = left_out(Path(args.model), publication)
    return describe(publication.folder) + (f"\nNot published, of {args.model}: {', '.join(names)}" if names else "")


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    sys.exit(main())
