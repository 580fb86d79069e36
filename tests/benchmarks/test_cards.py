"""The commands that make the committed cards: arguments that are there, each made from what came before."""

from pathlib import Path

import pytest

from benchmarks.cards import MODELS, write_examples
from model_cards.card import CardArguments
from training.assess import AssessmentArguments
from training.cli import parse_arguments
from training.data.reading import DataArguments
from training.deployment.publication import PublicationArguments
from training.fine_tuning.arguments import Arguments
from training.references import ReferenceArguments


TYPES = {
    "training.references": (ReferenceArguments, DataArguments),
    "training.assess": (AssessmentArguments, DataArguments),
    "training.publish": (PublicationArguments, CardArguments),
}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_commands_fit_each_other(model, tmp_path):
    made = set()
    for program, words, result in model.commands(tmp_path, ("--use_cpu",)):
        if program.__name__ == "training.train":
            assert Arguments.parse(words).training.seed == 42
        else:
            parsed = parse_arguments([*words], TYPES[program.__name__], {})
            assert parsed[0].model in made
        made.add(str(Path(result).parent))
    card = parsed[1]
    assert card.license and card.description and card.data_bias and card.data_license
    assert parsed[0].assessment in made and parsed[0].dry_run


@pytest.mark.slow
def test_examples_are_of_different_classes(tmp_path):
    write_examples("orl_faces", tmp_path)
    assert len(list(tmp_path.glob("person_*.png"))) == 3
