"""The commands that make the committed cards, and the text of these cards."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import MobileNetV2Config

from benchmarks import cards
from benchmarks.cards import MODELS, write_examples
from model_cards.card import FIGURES, TEMPLATE, CardArguments, CardSources, make_card
from modeling_rbi import RBIConfig
from training.assess import AssessmentArguments
from training.cli import parse_arguments
from training.data.arguments import DataArguments
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


def prose(text: str) -> list[str]:
    """The lines of a card without tables, with numbers masked."""
    return [re.sub(r"\d[\d,.]*", "#", line) for line in text.splitlines() if not line.startswith("|")]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_committed_cards_have_the_text_of_the_template(model):
    """Compares everything except the measured figures."""
    committed = ModelCard.load(TEMPLATE.with_name(f"{model.name}.md"))
    facts = yaml.safe_load(TEMPLATE.with_name(f"{model.name}.yaml").read_text(encoding="utf-8"))
    given = CardArguments(**{each.name: facts[each.name] for each in fields(CardArguments) if each.name in facts})
    classes = re.search(r"^## Classes\n\n(`.*?`)(?: and (\d+) more.*)?$", committed.text, re.M)
    names = re.findall("`(.*?)`", classes[1]) + [f"class {number}" for number in range(int(classes[2] or 0))]
    config = getattr(RBIConfig, "kernel" if model.has_references else "paper")(
        backbone_config=MobileNetV2Config(), id2label=dict(enumerate(names))
    )
    references = None
    if model.has_references:
        references = {"num_references": 80, "num_labeled": 80, "num_bytes": 2**19}
        references |= {"has_images": True, "image_shape": [3, 16, 16]}
        config.references = {"num_references": 80, "image_shape": [3, 16, 16], "mean_similarity": 0.5}
        config.relation_scope = "reference"
    minutes = re.search(r"Training took \d+ (s|min)", committed.text)[1] == "min"
    numbers = {"images": 1, "min_per_class": 1, "max_per_class": 1}
    splits = {"train": numbers, "validation": numbers, "test": numbers}
    run = {
        "status": "finished",
        "arguments": {"dataset_config_name": re.search(r"^Data: .*\(`(.*)`\)", committed.text, re.M)[1], "seed": 42},
        "environment": {
            "hardware": {"gpus": [], "processor": "Intel(R) Xeon(R) Processor", "threads": 1},
            "versions": {"modeling-rbi": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
            "git": {"commit": re.search(r"\(commit (\w+)\)", committed.text)[1], "changed": False},
        },
        "data": {"label_names": names, "skipped": [], "cropped_to_boxes": False, "fingerprint": {"splits": splits}},
        "model": {"backbone": "packaged/mobilenet_v2"},
        "results": {"train": {"runtime": 300 if minutes else 60}},
        "recipes": [f"{model.name}.yaml"],
        "best": {"metric": 0.9},
    }
    estimate = {"value": 0.5, "low": 0.25, "high": 0.75}
    metrics = dict.fromkeys(("accuracy", "top5_accuracy", "macro_f1", "calibration_error"), estimate)
    findings = re.findall(r"^- (No leak seen.*|Whether relations help.*|Relations help.*)$", committed.text, re.M)
    assessment = {
        "model": {"classes": len(names)},
        "arguments": {},
        "data": {"split": "test", "images": 1, "classes": len(names), "left_out": 0},
        "images_in_bank": 0,
        "results": [{"protocol": "single", "batch_size": None} | metrics],
        "findings": {str(number): {"sentence": sentence} for number, sentence in enumerate(findings)},
    }
    card, missing = make_card(
        CardSources(
            repo_id=model.repo_id,
            config=config,
            num_parameters=1_200_000,
            requirements=TEMPLATE.with_name("requirements.txt").read_text(encoding="utf-8").split(),
            references=references,
            run=run,
            reference_record={
                "gains": {"accuracy": {"value": 1.0, "low": 0.0, "high": 2.0}},
                "held_out_images": 1,
                "fitted": False,
            },
            assessment=assessment,
            figures=list(FIGURES),
            examples=[Path(each["src"]).name for each in committed.data.widget],
        ),
        given,
    )
    assert not missing
    assert prose(card.text) == prose(committed.text)


def test_the_command_reuses_what_is_finished(tmp_path, monkeypatch):
    """It skips commands whose results exist, and writes the cards only if all commands succeed."""
    ran, codes = [], {}

    def fake_main(name):
        def main(words):
            ran.append(name)
            if name == "publish":
                folder = Path(words[words.index("--output_dir") + 1])
                folder.mkdir(parents=True)
                (folder / "README.md").write_text(f"Card of {words[words.index('--repo_id') + 1]}")
            return codes.get(name, 0)

        return main

    for name in ("train", "references", "assess", "publish"):
        monkeypatch.setattr(getattr(cards, name), "main", fake_main(name))
    monkeypatch.setattr(cards, "write_examples", lambda name, folder: None)
    monkeypatch.setattr(cards, "TEMPLATE", tmp_path / "template.md")
    done = tmp_path / "out" / "emoji" / "trained" / "config.json"
    done.parent.mkdir(parents=True)
    done.touch()
    codes["assess"] = 1
    assert cards.main(["--output_dir", str(tmp_path / "out")]) == 1
    assert ran == ["train", "references", "assess"] and not list(tmp_path.glob("*.md"))
    del codes["assess"], ran[:]
    assert cards.main(["--output_dir", str(tmp_path / "out")]) == 0
    assert ran == ["train", "references", "assess", "publish", "assess", "publish"]
    assert (tmp_path / "emoji.md").read_text() == "Card of user/rbi-mobilenet-v2-emoji"
    assert (tmp_path / "orl_faces.md").exists()
    assert cards.main(["--no_such_flag"]) == 2
