"""The card contains the facts of its sources, and names those that are missing."""

import dataclasses
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import ConvNextConfig

from model_cards import card as card_module
from model_cards.card import CardArguments, CardSources, make_card, read_emissions
from modeling_rbi import RBIConfig


HEADER = "timestamp,duration,emissions,energy_consumed,country_name\n"
REFERENCES = {
    "num_references": 6,
    "num_labeled": 4,
    "num_bytes": 2**20,
    "has_images": True,
    "image_shape": [3, 16, 16],
}


@pytest.fixture
def given():
    return CardArguments(
        license="mit",
        description="Tells pets apart.",
        base_model="facebook/convnext-tiny-224",
        dataset_title="pets",
        datasets=["alice/pets"],
        data_license="CC0.",
        data_bias="None known.",
        training_procedure="By hand.",
    )


@pytest.fixture
def estimate():
    return {"value": 0.5, "low": 0.25, "high": 0.75}


@pytest.fixture
def sources(estimate):
    """Complete sources of a card, except for a record of the training."""
    metrics = dict.fromkeys(("accuracy", "top5_accuracy", "macro_f1", "calibration_error"), estimate)
    assessment = {
        "model": {"classes": 3},
        "arguments": {"dataset_config_name": "full"},
        "data": {"split": "test", "images": 1200, "classes": 3, "left_out": 0},
        "images_in_bank": 0,
        "results": [
            {"protocol": "single", "batch_size": None} | metrics,
            {"protocol": "sorted", "batch_size": 8} | metrics,
        ],
        "findings": {"leak": {"sentence": "No leak seen."}},
    }
    backbone = ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1])
    config = RBIConfig.kernel(backbone_config=backbone, id2label={0: "cat", 1: "dog", 2: "fox"}, dtype="float32")
    needed = ["torch>=2.10", "transformers>=5.17", "timm"]
    return CardSources("alice/pets", config, 1_250_000, needed, assessment=assessment, examples=["cat.png", "dog.png"])


def test_complete(sources, given):
    card, missing = make_card(sources, given)
    assert missing == [] and "Missing" not in str(card)
    data = ModelCard(str(card)).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "image-classification", "mit")
    assert data.base_model == "facebook/convnext-tiny-224" and data.datasets == ["alice/pets"]
    assert {"rbi", "convnext"} <= set(data.tags) and data.metrics == ["accuracy", "f1"]
    assert data.model_name == "pets" and len(data.eval_results) == 8
    assert "| sorted | 8 | 50.0 [25.0, 75.0] |" in card.text and "On the 1,200 test images of pets" in card.text
    assert "- No leak seen." in card.text and "arXiv:2412.19606" in card.text
    assert "`torch>=2.10`, `transformers>=5.17` and `timm`" in card.text and "model.dtype" not in card.text
    assert "1.2 million parameters" in card.text and "with cosine attention" in card.text
    assert not any(line.endswith(" ") or "{{" in line or "{%" in line for line in card.text.splitlines())


def test_nothing_known():
    config = RBIConfig.paper(backbone_config=ConvNextConfig(), num_labels=2)
    card, missing = make_card(CardSources("alice/pets", config, 10, ["torch", "pillow"]), CardArguments())
    assert len(missing) == 9
    assert len([line for line in card.text.splitlines() if "**Missing" in line]) == 7
    assert yaml.safe_load(str(card).split("---")[1]).keys() == {"library_name", "pipeline_tag", "tags"}


def test_each_fact_is_asked_for_by_its_argument(sources, given):
    for fact in ("license", "description", "base_model", "data_license", "data_bias", "training_procedure"):
        (missing,) = make_card(sources, dataclasses.replace(given, **{fact: None}))[1]
        assert f"--{fact}" in missing


def test_the_code_is_that_of_the_model(sources, given):
    def python(**changes):
        card = make_card(dataclasses.replace(sources, **changes), given)[0].text
        blocks = card.split("```python\n")[1:]
        for block in blocks:
            compile(block.split("```")[0], "card", "exec")
        return card

    alone = python()
    assert "set_references(references" in alone and '"examples/dog.png"' in alone
    assert "Each image is classified without neighbors, independently of its batch" in alone.replace("\n", " ")
    sources.config.references = {"num_references": 6, "image_shape": [3, 16, 16], "mean_similarity": 0.5}
    sources.config.relation_scope = "reference"
    with_bank = python(references=REFERENCES)
    assert "describe_references" in with_bank and "4 of them labeled" in with_bank
    assert "classified with the model's references, independently of its batch" in with_bank.replace("\n", " ")
    assert "thumbnails of its 6 reference images (16 x 16 pixels)" in with_bank
    assert "features of its reference images" in python(references=REFERENCES | {"has_images": False})
    sources.config.relation_scope = "batch"
    assert "This is the model's default" in python(references=REFERENCES)
    assert 'Image.open("a.jpg")' not in python(examples=[]) and '"a.jpg"' in python(examples=[], has_examples=False)


def test_what_is_no_test_is_not_called_one(sources, given):
    data = sources.assessment["data"] | {"split": "validation", "left_out": 2}
    assessment = sources.assessment | {"data": data, "images_in_bank": 5}
    text = make_card(dataclasses.replace(sources, assessment=assessment), given)[0].text
    assert "These are not test images" in text and "2 unreadable images" in text
    assert "5 of them are among the model's references" in text


def test_many_classes_are_not_all_listed(sources, given):
    sources.config.id2label = {number: f"kind {number}" for number in range(100)}
    text = make_card(dataclasses.replace(sources, assessment=None), given)[0].text
    assert "`kind 59` and 40 more" in text and "kind 60" not in text


def test_class_names_of_any_kind(sources, given):
    sources.config.id2label = {0: "a `b` c", 1: "line\nbreak", 2: "x" * 500, 3: "<b>|"}
    text = make_card(dataclasses.replace(sources, assessment=None), given)[0].text
    assert f"``  a `b` c ``, `line break`, `{'x' * 80}...`, `<b>|`".replace("  ", " ") in text


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["crane", "dog", "crane", "owl"], "`crane (0)`, `dog`, `crane (2)`, `owl`"),
        (["crane"] * 3, "`crane (0)`, `crane (1)`, `crane (2)`"),
        (["x" * 90, "x" * 91, ""], f"`{'x' * 80}... (0)`, `{'x' * 80}... (1)`, `(2)`"),
    ],
)
def test_classes_of_one_name_are_told_apart(sources, given, names, shown):
    sources.config.id2label = dict(reversed([*enumerate(names)]))  # in whatever order
    assert shown in make_card(dataclasses.replace(sources, assessment=None), given)[0].text


def test_names_of_files_are_strings_in_the_code(sources, given):
    text = make_card(dataclasses.replace(sources, examples=['a "b".png', "c\\d.png", "ä.png"]), given)[0].text
    for block in text.split("```python\n")[1:]:
        compile(block.split("```")[0], "card", "exec")
    assert r'"examples/a \"b\".png"' in text and r'"examples/c\\d.png"' in text and '"examples/ä.png"' in text


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (0.0005, "0.0005"),
        (True, "True"),
        ("linear", "linear"),
        ('{"a": "b|c"}', r'`{"a": "b\|c"}`'),
        ("`*", r"`` `* ``"),
    ],
)
def test_values_of_arguments_in_the_table(value, cell):
    assert card_module._table_value(value) == cell


@pytest.mark.parametrize(
    ("best", "arguments", "text"),
    [
        ({"metric": 0.5}, {}, " The epoch with the best validation result was kept (50.0 %)."),
        ({"metric": 0.5}, {"metric_for_best_model": "eval_loss"}, " The epoch with the best .* was kept (0.500)."),
        ({"metric": None}, {}, ""),
        (None, {}, ""),
    ],
)
def test_the_best_epoch(best, arguments, text):
    hardware = {"gpus": [], "processor": "A Processor", "threads": 1}
    versions = dict.fromkeys(("modeling-rbi", "torch", "transformers"), "1.0")
    run = {
        "environment": {"hardware": hardware, "versions": versions, "git": None},
        "results": {"train": {"runtime": 1.0}},
        "best": best,
        "arguments": arguments,
        "recipes": ["a`b.yaml"],
    }
    pattern = re.escape(text).replace(r"\.\*", ".*")
    assert re.search(rf"Recipe: `` a`b\.yaml ``\.{pattern}$", card_module._training_text(run))


def test_a_backbone_that_is_not_on_the_hub(sources, given):
    card, missing = make_card(sources, dataclasses.replace(given, base_model="none"))
    assert not missing and card.data.base_model is None
    assert "a convnext backbone (from a checkpoint that is not on the Hub)" in card.text


def test_data_sets_are_those_of_the_hub(sources, given):
    for arguments, expected in (
        ({"dataset_name": "alice/pets"}, ["alice/pets"]),
        ({"dataset_name": "/home/alice/pets"}, None),
        ({"dataset_format": "cub_200_2011"}, None),
    ):
        changed = dataclasses.replace(sources, assessment=sources.assessment | {"arguments": arguments})
        card, _ = make_card(changed, dataclasses.replace(given, datasets=None))
        assert card.data.datasets == expected
        kinds = {result.dataset_type for result in card.data.eval_results}
        assert kinds == {"alice/pets" if expected else "imagefolder"}


def test_facts_that_are_no_text():
    for value in ("1000.0", "5", "?"):
        with pytest.raises(ValueError, match="--data_license must be a text"):
            CardArguments(data_license=value)


def test_measured_emissions_are_told(sources, given, tmp_path):
    assert read_emissions(tmp_path) is None
    (tmp_path / "emissions.csv").write_text(HEADER + "2026,60,0.5,1,Iceland\n2026,60,0.00125,0.5,France\n")
    card, _ = make_card(dataclasses.replace(sources, emissions=read_emissions(tmp_path)), given)
    assert "1.25 g CO2-equivalent and 0.5 kWh, measured by CodeCarbon (country: France)" in card.text
    assert card.data.co2_eq_emissions["emissions"] == 1.25
    for content in ("a,b\n1,2\n", HEADER, HEADER + "2026,60,much,0.5,France\n"):
        (tmp_path / "emissions.csv").write_text(content)
        with pytest.raises(ValueError, match=r"not a table of CodeCarbon.*Move it away"):
            read_emissions(tmp_path)


def test_records_that_are_none(sources, given):
    with pytest.raises(ValueError, match=r"lacks arguments, data, environment, model, status.*move it away"):
        make_card(dataclasses.replace(sources, run={"epochs": 5}), given)
    with pytest.raises(ValueError, match="of a model with 7 classes, this model has 3: assess this model"):
        make_card(dataclasses.replace(sources, assessment=sources.assessment | {"model": {"classes": 7}}), given)


def test_other_licences_have_a_name_and_a_link():
    for values in ({"license": "other"}, {"license": "mit", "license_name": "x", "license_link": "y"}):
        with pytest.raises(ValueError, match="--license other"):
            CardArguments(**values)
    assert CardArguments(license="other", license_name="x", license_link="y").license_name == "x"
