"""Recipes build and train a step, alone and composed, and set what they say."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import CONFIG_MAPPING, AutoModel

from training import train
from training.data import tiny
from training.fine_tuning import run
from training.fine_tuning.arguments import Arguments


RECIPES = Path(__file__).parents[2] / "training" / "recipes"
PUBLISHED = ("cub_200_2011", "stanford_dogs", "nabirds", "tiny_imagenet")
# The models of the paper, with the class of their backbones.
MODELS = {
    "convnext_base": "ConvNextModel",
    "convnext_large": "ConvNextModel",
    "densenet201": "TimmWrapperModel",
    "mobilenet_v3_large": "TimmWrapperModel",
    "swinv2_base": "Swinv2Model",
    "swinv2_small": "Swinv2Model",
}
LEARNING_RATES = {"ours": 1e-4, "authors": 1e-5}
WHOLE = ("cards", "elpv", "emoji", "fashion_mnist", "orl_faces")
TINY = {"model_type": "convnext", "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "image_size": 32}


def composed(data, model, settings):
    """The words of a command line that composes three recipes."""
    parts = {"data": data, "models": model, "settings": settings}
    return ["--config", *(str(RECIPES / folder / f"{name}.yaml") for folder, name in parts.items())]


def parse(words):
    return Arguments.parse([*words, "--use_cpu", "--bf16", "False"])


def names_in(folder):
    return {path.stem for path in folder.glob("*.yaml")}


def test_each_recipe_is_tested():
    """What is added to a folder of recipes must be added here."""
    assert names_in(RECIPES) == set(WHOLE)
    assert names_in(RECIPES / "data") == {*PUBLISHED, *WHOLE}
    assert names_in(RECIPES / "models") == {*MODELS, "mobilenet_v2"}
    assert names_in(RECIPES / "settings") == {*LEARNING_RATES, "few_images"}


@pytest.mark.slow
def test_composed_recipes_say_what_their_names_say():
    for data, model, settings in itertools.product(PUBLISHED, MODELS, LEARNING_RATES):
        args = parse(composed(data, model, settings))
        assert args.data.dataset_format == data
        assert not args.data.crop_to_boxes
        recipe = yaml.safe_load((RECIPES / "models" / f"{model}.yaml").read_text())
        assert args.model.model_name_or_path == recipe["model_name_or_path"]
        assert args.model.preset == "paper"
        assert args.training.learning_rate == LEARNING_RATES[settings]
        assert args.training.output_dir == str(Path("outputs") / f"{data}-{model}-{settings}")


def test_the_authors_settings_are_those_known():
    args = parse(composed("cub_200_2011", "convnext_base", "authors"))
    assert (args.fine_tuning.optimizer, args.training.learning_rate) == ("radam", 1e-5)
    assert (args.training.num_train_epochs, args.training.per_device_train_batch_size) == (100, 50)
    assert args.training.lr_scheduler_type == "constant" and args.training.label_smoothing_factor == 0
    assert (args.model.image_size, args.model.image_mean, args.model.image_std) == (224, [0.5] * 3, [0.5] * 3)
    augmentation = args.augmentation
    assert (augmentation.train_crop, augmentation.horizontal_flip, augmentation.rotation_degrees) == (
        "resize",
        True,
        15,
    )


def dry_run(words):
    return train.main([*words, "--dry_run", "--use_cpu", "--disable_tqdm", "True"])


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """Makes each made-up data set of a dry run once."""
    made = {}

    def make_published(name, folder):
        if name not in made:
            made[name] = tiny.make_published(name, tmp_path_factory.mktemp(name))
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RBI_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(run, "make_published", make_published)
        yield


@pytest.mark.slow  # all of them together
@pytest.mark.parametrize(
    "words",
    [
        *(["--config", str(RECIPES / f"{name}.yaml")] for name in WHOLE),
        *(composed(*parts) for parts in itertools.product(PUBLISHED, MODELS, LEARNING_RATES)),
    ],
    ids=lambda words: "-".join(Path(word).stem for word in words[1:]),
)
def test_each_combination_trains_a_step(words, made_once, capsys):
    """With the published layout of its data and all its settings, on a small backbone."""
    assert dry_run([*words, "--backbone_config", json.dumps(TINY)]) == 0, capsys.readouterr().err


def backbone_config_of(model):
    return yaml.safe_load((RECIPES / "models" / f"{model}.yaml").read_text())["backbone_config"]


def build(fields):
    with torch.device("meta"):
        return AutoModel.from_config(CONFIG_MAPPING[fields["model_type"]].from_dict(fields))


# Millions of parameters with a classifier of 1000 classes, as timm's table of results has them.
@pytest.mark.parametrize(
    ("model", "millions"),
    [("convnext_base", 88.59), ("convnext_large", 197.77), ("swinv2_base", 87.92), ("swinv2_small", 49.73)],
)
def test_backbones_are_those_of_the_paper(model, millions):
    backbone = build(backbone_config_of(model))
    assert type(backbone).__name__ == MODELS[model]
    num_features = backbone.layernorm.weight.numel()
    number = sum(parameter.numel() for parameter in backbone.parameters()) + 1000 * (num_features + 1)
    assert round(number / 1e6, 2) == millions


def dry_run_of_backbone(model, monkeypatch, capsys, *more):
    built = []
    original = run.load_model

    def load_model(*args, **kwargs):
        built.append(original(*args, **kwargs))
        return built[-1]

    monkeypatch.setattr(run, "load_model", load_model)
    assert dry_run([*composed("tiny_imagenet", model, "authors"), *more]) == 0, capsys.readouterr().err
    return type(built[0][0].rbi.backbone).__name__


@pytest.mark.slow  # all of them together
@pytest.mark.parametrize("model", [name for name, kind in MODELS.items() if kind != "TimmWrapperModel"])
def test_each_backbone_trains_a_step(model, made_once, monkeypatch, capsys):
    """With all of its fields, at its image size, but with one block per stage and fewer features."""
    fields = backbone_config_of(model) | {"depths": [1] * 4}
    if "hidden_sizes" in fields:
        fields["hidden_sizes"] = [size // 16 for size in fields["hidden_sizes"]]
    else:
        fields["embed_dim"] = 4 * fields["num_heads"][0]
    kind = dry_run_of_backbone(model, monkeypatch, capsys, "--backbone_config", json.dumps(fields))
    assert kind == MODELS[model]


@pytest.mark.timm
@pytest.mark.parametrize("model", [name for name, kind in MODELS.items() if kind == "TimmWrapperModel"])
def test_each_backbone_of_timm_trains_a_step(model, made_once, monkeypatch, capsys):
    assert dry_run_of_backbone(model, monkeypatch, capsys) == MODELS[model]


@pytest.mark.slow
def test_a_recipe_of_real_photographs(tmp_path):
    """Small ORL faces, with images and pretrained weights from package registries."""
    line = ["--config", str(RECIPES / "orl_faces.yaml"), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    line += ["--image_size", "64", "--num_train_epochs", "8", "--max_test_samples", "140", "--disable_tqdm", "True"]
    assert train.main(line) == 0
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["test_single"]["accuracy"] > 0.4  # 1 / 40 by chance
