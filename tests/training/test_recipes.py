"""Recipes build and train a step, alone and composed, and set what they say."""

import itertools
import json
from pathlib import Path

import pytest
import yaml

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


def dry_run_of_the_whole_backbone(model, monkeypatch, capsys):
    built = []
    original = run.load_model

    def load_model(*args, **kwargs):
        built.append(original(*args, **kwargs))
        return built[-1]

    monkeypatch.setattr(run, "load_model", load_model)
    assert dry_run(composed("tiny_imagenet", model, "authors")) == 0, capsys.readouterr().err
    assert type(built[0][0].rbi.backbone).__name__ == MODELS[model]


@pytest.mark.slow
@pytest.mark.parametrize("model", [name for name, kind in MODELS.items() if kind != "TimmWrapperModel"])
def test_each_backbone_trains_a_step(model, made_once, monkeypatch, capsys):
    dry_run_of_the_whole_backbone(model, monkeypatch, capsys)


@pytest.mark.timm
@pytest.mark.parametrize("model", [name for name, kind in MODELS.items() if kind == "TimmWrapperModel"])
def test_each_backbone_of_timm_trains_a_step(model, made_once, monkeypatch, capsys):
    dry_run_of_the_whole_backbone(model, monkeypatch, capsys)


@pytest.mark.slow
def test_a_recipe_of_real_photographs(tmp_path):
    """Eight epochs on the ORL faces, with images and pretrained weights that install by package name."""
    line = ["--config", str(RECIPES / "orl_faces.yaml"), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    assert train.main([*line, "--num_train_epochs", "8", "--disable_tqdm", "True"]) == 0
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["test_single"]["accuracy"] > 0.4  # 1 / 40 by chance
