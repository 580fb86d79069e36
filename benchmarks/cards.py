# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Trains and measures the models whose cards are in `model_cards/`, and writes the cards (minutes on 2 cores).

    python -m benchmarks.cards --output_dir outputs/cards

Models and measurements that exist in the output folder are reused: after a change that affects them, name another
folder. The cards are always rewritten.
"""

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from model_cards.card import TEMPLATE
from training import assess, publish, references, train
from training.data.arguments import DataArguments
from training.data.decode import decode_image
from training.data.reading import load_images


ROOT = Path(__file__).parents[1]
SEED = 42
_NUM_EXAMPLES = 3


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


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/cards"), help="Folder of models and records.")
    parser.add_argument("--use_cpu", action="store_true", help="Use the CPU even if there is a GPU.")
    args = parser.parse_args(argv)
    for model in MODELS:
        folder = args.output_dir / model.name
        write_examples(model.name, folder / "examples")
        shutil.rmtree(folder / "published", ignore_errors=True)
        for program, words, result in model.commands(folder, ("--use_cpu",) if args.use_cpu else ()):
            if not Path(result).exists() and program.main(words) != 0:
                print(f"{program.__name__} {' '.join(words)} failed.", file=sys.stderr)
                return 1
    # After all trainings, because their records say whether the checkout has changes.
    for model in MODELS:
        card = TEMPLATE.with_name(f"{model.name}.md")
        shutil.copyfile(args.output_dir / model.name / "published" / "README.md", card)
        print(f"Written: {card}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
