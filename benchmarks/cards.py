# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Trains and measures the models whose cards are in `model_cards/`, and writes the cards (minutes on 2 cores).

    python -m benchmarks.cards --output_dir outputs/cards

Models and measurements that exist in the output folder are reused: after a change that affects them, name another
folder. The cards are always rewritten.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from rich.console import Console

from model_cards.card import TEMPLATE
from training import assess, publish, references, train
from training.cli import parse_arguments, run_command
from training.data.arguments import DataArguments
from training.data.decode import decode_image
from training.data.reading import load_images


ROOT = Path(__file__).parents[1]
SEED = 42
_NUM_EXAMPLES = 3


@dataclass
class CardsArguments:
    """Options of the command."""

    output_dir: str = field(default="outputs/cards", metadata={"help": "Folder for models and records."})
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU even if there is a GPU."})


@dataclass(frozen=True)
class CardModel:
    r"""
    A model to train, measure and describe by a card.

    Args:
        name (`str`):
            Name of the recipe, of the facts (`model_cards/<name>.yaml`) and of the card.
        repo_id (`str`):
            Repository that the card names.
        options (`tuple[str, ...]`):
            Arguments of the training in addition to the recipe.
        has_references (`bool`):
            Whether the training images become references of the model.
    """

    name: str
    repo_id: str
    options: tuple[str, ...] = ()
    has_references: bool = False

    def commands(self, folder: Path, device: tuple[str, ...]) -> list[tuple]:
        """The commands in order: module, arguments, and the file whose existence shows that the command is done."""
        recipe, data = (str(ROOT / "training" / "recipes" / place / f"{self.name}.yaml") for place in ("", "data"))
        trained, model, assessment = (str(folder / name) for name in ("trained", "model", "assessment"))
        seed = ("--seed", str(SEED))
        steps: list[tuple] = [
            (
                train,
                ["--config", recipe, "--output_dir", trained, *seed, *self.options, *device],
                f"{trained}/config.json",
            )
        ]
        if self.has_references:
            words = ["--model", trained, "--config", data, "--output_dir", model, *seed, *device]
            steps.append((references, words, f"{model}/config.json"))
        else:
            model = trained
        words = ["--model", model, "--config", data, "--output_dir", assessment, *seed, *device]
        steps.append((assess, words, f"{assessment}/results.json"))
        facts = ["--config", str(TEMPLATE.with_name(f"{self.name}.yaml")), "--share_images"]
        words = [*facts, "--model", model, "--assessment", assessment, "--examples", str(folder / "examples")]
        words += ["--repo_id", self.repo_id, "--dry_run", "--output_dir", str(folder / "published")]
        steps.append((publish, words, f"{folder}/published/README.md"))
        return steps


MODELS = (
    CardModel("orl_faces", "user/rbi-mobilenet-v2-orl-faces", ("--preset", "kernel"), has_references=True),
    CardModel("emoji", "user/rbi-mobilenet-v2-emoji"),
)


def write_examples(name: str, folder: Path):
    """Saves a few test images of different classes."""
    recipe = yaml.safe_load((ROOT / "training" / "recipes" / "data" / f"{name}.yaml").read_text(encoding="utf-8"))
    names = ("dataset_format", "dataset_config_name")
    test = load_images(DataArguments(**{name: recipe[name] for name in names}), SEED)["test"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for row in range(0, len(test), -(-len(test) // _NUM_EXAMPLES)):
        label = test.features["label"].names[test[row]["label"]]
        decode_image(test[row]["image"]).save(folder / f"{label}.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, on_stop="The same command continues with the models that are not finished.")


def command(argv: Sequence[str], console: Console) -> int:
    """Trains and measures the models, and writes their cards. Returns the exit code of a command that fails."""
    args, _ = parse_arguments(argv, (CardsArguments,), defaults={}, description=__doc__)
    folders = {model: Path(args.output_dir) / model.name for model in MODELS}
    for model, folder in folders.items():
        write_examples(model.name, folder / "examples")
        shutil.rmtree(folder / "published", ignore_errors=True)
        for program, words, result in model.commands(folder, ("--use_cpu",) if args.use_cpu else ()):
            if not Path(result).exists() and (code := program.main(words)) != 0:
                console.print(f"{program.__name__} {' '.join(words)} failed.", soft_wrap=True, highlight=False)
                return code
    # After all trainings, because their records say whether the checkout has changes.
    for model, folder in folders.items():
        card = TEMPLATE.with_name(f"{model.name}.md")
        shutil.copyfile(folder / "published" / "README.md", card)
        console.print(f"Written: {card}", soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
