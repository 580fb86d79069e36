"""Folders of publications: their content, what is refused, and the arguments."""

import json
import pickle
import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import modeling_rbi
from modeling_rbi import RBIForImageClassification
from training.deployment import publication
from training.deployment.publication import (
    is_publication,
    left_out,
    load_published_model,
    make_folder,
    requirements,
)
from training.record import weights_fingerprint


CODE = {path.name for path in Path(modeling_rbi.__file__).parent.glob("*_rbi.py")}
FIGURES = {f"assessment/{name}.png" for name in ("batch_size", "confusion_matrix", "reliability")}
TABLES = {f"assessment/{name}" for name in ("results.json", "results.csv", "per_class.csv")}


@pytest.fixture
def make(arguments, given, tmp_path):
    """Gives a function that makes a publication; keywords change its arguments."""

    def make(card=given, **changes):
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return make_folder(arguments(**changes), card, folder)

    return make


def names_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_folder_has_all_and_nothing_else(made, trained):
    assert made.problems == []
    examples = {"examples/cat_0.png", "examples/cat_1.png", "examples/cat_2.png"}
    settings = {"config.json", "preprocessor_config.json", "README.md", "handler.py", "requirements.txt"}
    images = {"assessment/confused_pairs.png"}
    assert names_in(made.folder) == {"model.safetensors"} | settings | CODE | examples | TABLES | FIGURES | images
    auto_map = json.loads((made.folder / "config.json").read_text())["auto_map"]
    assert {value.split(".")[0] + ".py" for value in auto_map.values()} <= CODE
    assert (made.folder / "handler.py").read_bytes() == (publication.MODEL_CARDS / "handler.py").read_bytes()
    models = [AutoModelForImageClassification.from_pretrained(each) for each in (made.folder, trained / "model")]
    assert weights_fingerprint(models[0]) == weights_fingerprint(models[1])


def test_nothing_tells_where_files_lie_here(made, trained):
    root = str(trained.parent)
    for path in made.folder.rglob("*"):
        if path.suffix in (".json", ".md", ".csv", ".py", ".txt"):
            assert root not in path.read_text(), path
    assert root in (trained / "assessment" / "results.json").read_text(), "it is there before"
    arguments = json.loads((made.folder / "assessment" / "results.json").read_text())["arguments"]
    assert arguments["model"] == "model"


def test_the_card_has_the_measured_figures(made, trained):
    card = ModelCard.load(made.folder / "README.md")
    results = json.loads((trained / "assessment" / "results.json").read_text())["results"]
    assert {row["protocol"] for row in results} == {"single", "reference", "shuffled", "sorted"}
    told = {
        (result.metric_type, result.metric_config, result.metric_args.get("batch_size")): result
        for result in card.data.eval_results
    }
    assert len(told) == 4 * len(results)
    for row in results:
        for metric, metric_type in (("accuracy", "accuracy"), ("macro_f1", "f1")):
            result = told[metric_type, row["protocol"], row["batch_size"]]
            assert result.metric_value == pytest.approx(row[metric]["value"], abs=5e-5)
            assert result.metric_args["interval"] == pytest.approx([row[metric]["low"], row[metric]["high"]], abs=5e-5)
            assert (result.task_type, result.dataset_split) == ("image-classification", "test")
    assert card.data.widget[0] == {"src": "examples/cat_0.png", "example_title": "cat_0"}
    for figure in re.findall(r"!\[.*?\]\((.*?)\)", card.text):
        assert (made.folder / figure).exists()
    assert "Missing" not in str(card)
    run = json.loads((trained / "model" / "run.json").read_text())
    assert f"commit {run['environment']['git']['commit'][:12]}" in card.text
    assert "12 of them labeled" in card.text


def test_requirements_are_those_of_the_package():
    dependencies = tomllib.loads((publication.MODEL_CARDS.parent / "pyproject.toml").read_text())["project"]
    assert set(requirements("convnext").split()) == set(dependencies["dependencies"])
    of_timm = set(requirements("timm_wrapper").split()) - set(requirements("convnext").split())
    assert of_timm == set(dependencies["optional-dependencies"]["timm"])


@pytest.mark.parametrize("may_be_seen", [{"share_images": True}, {"private": True, "share_images": False}, {}])
def test_images_in_the_model_are_shared_only_if_said_so(make, may_be_seen):
    made = make(**({"share_images": False} | may_be_seen))
    assert ("assessment/confused_pairs.png" in names_in(made.folder)) == bool(may_be_seen)
    if may_be_seen:
        assert made.problems == []
    else:
        (problem,) = made.problems
        assert "12 images" in problem and "--share_images" in problem and "--private" in problem


FACTS = {
    "license": "--license",
    "description": "--description",
    "data_license": "--data_license",
    "data_bias": "--data_bias",
}


@pytest.mark.parametrize("fact", FACTS)
def test_missing_facts_are_shown_and_stand_in_the_way(make, given, fact):
    made = make(card=replace(given, **{fact: None}))
    (problem,) = made.problems
    assert FACTS[fact] in problem
    assert ("**Missing:" in (made.folder / "README.md").read_text()) == (fact != "license")


@pytest.mark.slow
def test_what_was_not_measured_is_missing(make):
    (problem,) = make(assessment=None).problems
    assert "training.assess" in problem
    (problem,) = make(examples=None).problems
    assert "--examples none" in problem
    assert make(examples=["none"]).problems == []


@pytest.mark.slow
def test_a_model_that_was_trained_elsewhere(make, given, model_folder):
    """Without a record of the training, the user describes it, or the card lacks it."""
    made = make(card=replace(given, dataset_title=None), model=str(model_folder), assessment=None)
    problems = "\n".join(made.problems)
    for flag in ("--base_model", "--training_procedure", "--dataset_title", "training.assess"):
        assert flag in problems
    told = replace(given, base_model="facebook/convnext-tiny-224", training_procedure="By hand.", dataset_title="Pets")
    made = make(card=told, model=str(model_folder), assessment=None)
    (problem,) = made.problems
    assert "training.assess" in problem
    assert ModelCard.load(made.folder / "README.md").data.base_model == "facebook/convnext-tiny-224"


@pytest.mark.slow
def test_a_backbone_from_a_folder(make, given, copy):
    """A local backbone is not taken for a Hub model of the same name; the user names the base model, if any."""
    record = json.loads((copy / "run.json").read_text())
    edit(copy / "run.json", model=record["model"] | {"backbone": "/data/facebook/convnext-tiny-224"})
    (problem,) = make(model=str(copy)).problems
    assert "--base_model" in problem
    for name, expected in (("none", None), ("facebook/convnext-tiny-224", "facebook/convnext-tiny-224")):
        made = make(card=replace(given, base_model=name), model=str(copy))
        assert not made.problems
        assert ModelCard.load(made.folder / "README.md").data.base_model == expected


@pytest.mark.slow
def test_secrets_are_found_and_not_repeated(make, given, monkeypatch):
    secret = "hf_" + "x" * 34
    (problem,) = make(card=replace(given, description=f"Load it with {secret}.")).problems
    assert "README.md holds a token of Hugging Face" in problem and secret not in problem
    monkeypatch.setenv("HF_TOKEN", "an unusual token")
    (problem,) = make(card=replace(given, data_bias="Ask me for an unusual token")).problems
    assert "your Hub token" in problem


# What does not fit


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.slow
def test_facts_that_contradict_the_model(make, given, copy):
    record = json.loads((copy / "run.json").read_text())

    def refuses(match, card=given, **changes):
        edit(copy / "run.json", **record | changes)
        with pytest.raises(ValueError, match=match):
            make(card=card, model=str(copy))

    refuses("parameters.*record of another model", model=record["model"] | {"parameters": 5})
    refuses("names 2 classes", data=record["data"] | {"label_names": ["cat", "dog"]})
    refuses("The training is interrupted", status="interrupted")
    refuses("made from facebook/x", replace(given, base_model="facebook/y"), model={"backbone": "facebook/x"})
    refuses("made from no pretrained weights", replace(given, base_model="facebook/y"))
    packaged = {"backbone": "packaged/mobilenet_v2"}
    refuses("made from packaged/mobilenet_v2", replace(given, base_model="facebook/y"), model=packaged)
    results = {"results": {}}
    refuses("run.json or .* lacks 'train': .*Create it again", **results)
    of_the_hub = {"arguments": record["arguments"] | {"dataset_name": "alice/cats"}}
    refuses("trained on alice/cats", replace(given, datasets=["alice/dogs"]), **of_the_hub)


def test_an_assessment_of_other_weights(make, copy, tmp_path):
    model = RBIForImageClassification.from_pretrained(copy)
    model.classifier.bias.data[0] += 0.01
    model.save_pretrained(copy)
    with pytest.raises(ValueError, match=r"other weights or references.*assess"):
        make(model=str(copy))
    with pytest.raises(ValueError, match=r"not an output folder of training\.assess"):
        make(assessment=str(tmp_path))


def test_folders_that_are_no_model_to_publish(tmp_path, copy):
    def refuses(match, folder=copy):
        with pytest.raises(ValueError, match=match):
            load_published_model(str(folder))

    refuses("there is no such folder", tmp_path / "nothing")
    refuses(r"no config\.json", tmp_path)
    other = tmp_path / "vit"
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    ViTForImageClassification(config).save_pretrained(other)
    refuses("is a vit model.*from_image_classifier", other)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refuses(r"no weights in safetensors files \(only pickles, which are not read: pytorch_model\.bin")
    (copy / "preprocessor_config.json").unlink()
    refuses(r"no preprocessor_config\.json")
    (copy / "pytorch_model.bin").rename(copy / "model.safetensors")
    (copy / "preprocessor_config.json").touch()
    backbone = json.loads((copy / "config.json").read_text())["backbone_config"] | {"num_channels": 1}
    edit(copy / "config.json", image_mean=[0.5], image_std=[0.5], backbone_config=backbone)
    refuses("images of one channel")


@pytest.mark.slow
def test_example_images(make, tmp_path, image_files):
    image = Image.open(image_files[0]).resize((1500, 900))
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    image.save(tmp_path / "my holiday.jpg", exif=exif)
    made = make(examples=[str(tmp_path / "my holiday.jpg")])
    example = Image.open(made.folder / "examples" / "my_holiday.png")
    assert not example.getexif() and not example.info and max(example.size) == 512
    shutil.copy(image_files[0], tmp_path / "my_holiday.png")
    with pytest.raises(ValueError, match="two images named"):
        make(examples=[str(tmp_path / "my holiday.jpg"), str(tmp_path / "my_holiday.png")])
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        shutil.copy(image_files[0], tmp_path / name / "1.png")
    made = make(examples=[str(tmp_path / "cat" / "1.png"), str(tmp_path / "dog" / "1.png")])
    assert {path.name for path in (made.folder / "examples").iterdir()} == {"cat_1.png", "dog_1.png"}
    (tmp_path / "broken.png").write_bytes(pickle.dumps("no image"))
    with pytest.raises(ValueError, match=r"broken\.png"):
        make(examples=[str(tmp_path / "broken.png")])
    Image.new("RGB", (2, 201)).save(tmp_path / "narrow.png")
    with pytest.raises(ValueError, match=r"narrow\.png has 2 x 201 pixels.*crop it"):
        make(examples=[str(tmp_path / "narrow.png")])
    (tmp_path / "cut.png").write_bytes(image_files[0].read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.png"):
        make(examples=[str(tmp_path / "cut.png")])
    Image.new("1", (20_000, 9_000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match=r"huge\.png"):
        make(examples=[str(tmp_path / "huge.png")])
    with pytest.raises(ValueError, match="at most 8 are allowed"):
        make(examples=[str(image_files[0].parent)])
    with pytest.raises(ValueError, match="no such image"):
        make(examples=[str(tmp_path / "nothing.png")])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"repo_id": "birds"}, "user/name"),
        ({"repo_id": "a/b/c"}, "repo_id"),
        ({"repo_id": "a/-b"}, "repo_id"),
        ({"output_dir": "here"}, "goes with --dry_run"),
        ({"max_shard_size": "abc"}, "max_shard_size abc is not a size"),
    ],
)
def test_wrong_arguments(arguments, changes, match):
    with pytest.raises(ValueError, match=match):
        arguments(**changes)


def test_a_publication_is_known_from_other_folders(made, trained, tmp_path):
    assert is_publication(made.folder) and not is_publication(tmp_path)
    assert not is_publication(trained / "model")
    folder = shutil.copytree(made.folder, tmp_path / "folder")
    (folder / "examples" / "mine").mkdir()
    (folder / "examples" / "mine" / "notes.md").touch()
    assert not is_publication(folder)
    assert {"run.json", "all_results.json"} <= set(left_out(trained / "model", made))


def test_half_precision_in_shards(made_in_half):
    """`test_checks.py` reloads it."""
    assert made_in_half.model.dtype == torch.float16
    assert len(list(made_in_half.folder.glob("model-*.safetensors"))) > 1
    assert "model.safetensors.index.json" in names_in(made_in_half.folder)
    card = (made_in_half.folder / "README.md").read_text()
    assert card.count('return_tensors="pt").to(model.dtype)') == 3
