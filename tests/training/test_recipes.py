"""Every recipe builds and trains a step, and says what its name says."""

import itertools
import json
from pathlib import Path

import pytest
import yaml

from training import train
from training.fine_tuning import run as fine_tuning


RECIPES = Path(__file__).parents[2] / "training" / "recipes"
FRAGMENTS = ("data", "models", "settings")
PAPERS_DATA = ("cub_200_2011", "stanford_dogs", "nabirds", "tiny_imagenet")
PAPERS_MODELS = {
    "convnext_base": "ConvNextModel",
    "convnext_large": "ConvNextModel",
    "densenet201": "TimmWrapperModel",
    "mobilenet_v3_large": "TimmWrapperModel",
    "swinv2_base": "Swinv2Model",
    "swinv2_small": "Swinv2Model",
}
WHOLE = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name not in FRAGMENTS)
TINY = {"model_type": "convnext", "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "image_size": 32}


def name_of(path):
    return path.relative_to(RECIPES).with_suffix("").as_posix()


def parse(path):
    return train.Arguments.parse(["--config", str(path), "--use_cpu", "--bf16", "False"])


def test_each_backbone_of_the_paper_has_recipes_for_each_data_set():
    expected = {
        f"{data}/{model}{setting}"
        for data, model, setting in itertools.product(PAPERS_DATA, PAPERS_MODELS, ("", "_authors"))
    }
    assert expected <= {name_of(path) for path in WHOLE}
    assert {"orl_faces", "emoji", "elpv", "cards", "fashion_mnist"} <= {name_of(path) for path in WHOLE}


@pytest.mark.parametrize("data", PAPERS_DATA)
@pytest.mark.parametrize("model", PAPERS_MODELS)
def test_recipes_are_composed_and_say_what_their_names_say(data, model):
    for setting, learning_rate in (("", 1e-4), ("_authors", 1e-5)):
        path = RECIPES / data / f"{model}{setting}.yaml"
        assert set(yaml.safe_load(path.read_text())) == {"extends"}
        args = parse(path)
        assert args.data.dataset_format == data
        assert args.model.preset == "paper"
        assert args.training.learning_rate == learning_rate
        fragment = yaml.safe_load((RECIPES / "models" / f"{model}.yaml").read_text())
        assert args.model.model_name_or_path == fragment["model_name_or_path"]
        assert args.training.output_dir == str(Path("outputs") / path.stem)
        assert not args.data.crop_to_boxes


def test_the_authors_settings_are_those_known():
    args = parse(RECIPES / "cub_200_2011" / "convnext_base_authors.yaml")
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


@pytest.mark.slow  # all of them together
@pytest.mark.parametrize("path", WHOLE, ids=name_of)
def test_each_recipe_trains_a_step(path, capsys, monkeypatch, tmp_path):
    """With its data in their layout and all its settings, on a small backbone."""
    monkeypatch.setenv("RBI_CACHE", str(tmp_path))
    line = ["--config", str(path), "--dry_run", "--use_cpu", "--disable_tqdm", "True"]
    assert train.main([*line, "--backbone_config", json.dumps(TINY)]) == 0, capsys.readouterr().err


def dry_run_of_the_whole_backbone(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RBI_CACHE", str(tmp_path))
    built = []
    original = fine_tuning.load_model

    def load_model(*args, **kwargs):
        built.append(original(*args, **kwargs))
        return built[-1]

    monkeypatch.setattr(fine_tuning, "load_model", load_model)
    path = RECIPES / "tiny_imagenet" / f"{model}_authors.yaml"
    assert train.main(["--config", str(path), "--dry_run", "--use_cpu", "--disable_tqdm", "True"]) == 0, (
        capsys.readouterr().err
    )
    assert type(built[0][0].rbi.backbone).__name__ == PAPERS_MODELS[model]


@pytest.mark.slow
@pytest.mark.parametrize("model", [name for name, kind in PAPERS_MODELS.items() if kind != "TimmWrapperModel"])
def test_each_backbone_trains_a_step(model, monkeypatch, tmp_path, capsys):
    dry_run_of_the_whole_backbone(model, monkeypatch, tmp_path, capsys)


@pytest.mark.timm
@pytest.mark.parametrize("model", [name for name, kind in PAPERS_MODELS.items() if kind == "TimmWrapperModel"])
def test_each_backbone_of_timm_trains_a_step(model, monkeypatch, tmp_path, capsys):
    dry_run_of_the_whole_backbone(model, monkeypatch, tmp_path, capsys)


@pytest.mark.slow
def test_a_recipe_of_real_photographs(tmp_path):
    """Eight epochs on the ORL faces, with images and pretrained weights that install by package name."""
    line = ["--config", str(RECIPES / "orl_faces.yaml"), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    assert train.main([*line, "--num_train_epochs", "8", "--disable_tqdm", "True"]) == 0
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["test_single"]["accuracy"] > 0.4  # 1 / 40 by chance
