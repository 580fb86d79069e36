# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`python -m training.references`: what it chooses on planted images, and that it writes what it measured."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_rbi import RBIForImageClassification, modeling_rbi
from training import references
from training.data import image_dataset
from training.evaluation.reference_settings import KERNELS, SHARES, VOTE_WEIGHTS, ReferenceSettings


CLASSES = ("cat", "dog", "fox")
# Not the data's, which is alphabetical.
MODEL_CLASSES = ("fox", "cat", "dog")
COLORS = {"cat": (200, 60, 60), "dog": (60, 200, 60), "fox": (60, 60, 200)}
NUM_TRAIN = {"cat": 4, "dog": 5, "fox": 6}
NUM_VALIDATION = 34  # of each class: enough to choose by

pytestmark = pytest.mark.usefixtures("own_cache")


def save_image(path, color, rng):
    """A smooth pattern around a color."""
    small = rng.normal(color, 40, (4, 4, 3)).clip(0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize((32, 32), Image.Resampling.BILINEAR).save(path)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Folders of the classes, in `train`, `validation` and `test`; the color of an image tells its class."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        for name in CLASSES:
            number = {"train": NUM_TRAIN[name], "validation": NUM_VALIDATION, "test": 2}[split]
            for index in range(number):
                save_image(folder / split / name / f"{index}.png", COLORS[name], rng)
    return folder


@pytest.fixture(scope="module")
def camera(tmp_path_factory):
    """7 images without labels, one of them in a folder of its own."""
    folder, rng = tmp_path_factory.mktemp("camera"), np.random.default_rng(1)
    for index in range(6):
        save_image(folder / f"{index}.png", (128, 128, 128), rng)
    save_image(folder / "more" / "deeper" / "6.png", (128, 128, 128), rng)
    return folder


def processor():
    return ViTImageProcessorPil(size={"height": 32, "width": 32})


def pixels_of(paths):
    return processor()([Image.open(path).convert("RGB") for path in paths], return_tensors="pt")["pixel_values"]


def make_classifier():
    """A ResNet for the classes that knows nothing: all scores are the same."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[32, 256],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(MODEL_CLASSES)),
        label2id={name: label for label, name in enumerate(MODEL_CLASSES)},
    )
    model = ResNetForImageClassification(config).eval()
    for parameter in model.classifier.parameters():
        nn.init.zeros_(parameter)
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def classifier_dir(tmp_path_factory):
    """A classifier that is no RBI model, and knows nothing."""
    return saved(make_classifier(), tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def rbi_dir(tmp_path_factory):
    """The same as an RBI model of the paper's form."""
    model = RBIForImageClassification.from_image_classifier(
        make_classifier(), preset="paper", image_processor=processor()
    )
    return saved(model, tmp_path_factory.mktemp("rbi"))


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command; gives its exit code, and keeps the model that it had in memory."""
    loaded, original = [], references.load_rbi

    def load(args):
        loaded.append(original(args))
        return loaded[-1]

    monkeypatch.setattr(references, "load_rbi", load)

    def run(**arguments):
        words = []
        for name, value in (
            {"output_dir": tmp_path / "out", "use_cpu": True, "disable_tqdm": True} | arguments
        ).items():
            words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
        code = references.main(words)
        run.model = loaded[-1][0] if loaded else None
        return code

    return run


def record_of(folder):
    return json.loads((folder / "references.json").read_text())


def answers_of(model, pixel_values, **kwargs):
    with torch.no_grad():
        return model(pixel_values, **kwargs).logits


def assert_it_loads(folder, model, pixel_values):
    """By the auto classes, and answers as the model in memory."""
    loaded = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    kept, expected = (each.config.to_dict() for each in (loaded, model))
    assert {name for name in kept if kept[name] != expected.get(name)} <= {"_name_or_path", "auto_map"}
    inputs = AutoImageProcessor.from_pretrained(folder)([Image.new("RGB", (40, 20), "teal")], return_tensors="pt")
    torch.testing.assert_close(
        inputs["pixel_values"], processor()([Image.new("RGB", (40, 20), "teal")], return_tensors="pt")["pixel_values"]
    )
    for scope in ("self", "reference", None):
        expected = answers_of(model, pixel_values, relation_scope=scope)
        # Loaded weights may lie in memory otherwise, so that kernels round otherwise.
        torch.testing.assert_close(answers_of(loaded, pixel_values, relation_scope=scope), expected)
    assert loaded.config.relation_scope == "reference"


def everything_in(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classifier", "rbi"])
def test_unlabeled_images(kind, classifier_dir, rbi_dir, camera, data_dir, command, tmp_path, capsys):
    source = {"classifier": classifier_dir, "rbi": rbi_dir}[kind]
    before = everything_in(source)
    assert command(model=source, unlabeled_dir=camera) == 0
    assert everything_in(source) == before
    record = record_of(tmp_path / "out")
    assert record["model"] == source and record["arguments"]["unlabeled_dir"] == [str(camera)]
    assert record["run"] is None, "it was not trained by `training.train`"
    assert record["references"]["num_references"] == 7 and record["references"]["num_labeled"] == 0
    assert record["settings"]["share"] == (0.25 if kind == "classifier" else None)
    assert "candidates" not in record and record["environment"]["hardware"]["device"] == "cpu"
    printed = " ".join(capsys.readouterr().out.split())
    for part in (
        "was not measured",
        "7 references",
        "16 x 16" if kind == "classifier" else "32 x 32",
        str(tmp_path / "out"),
    ):
        assert part in printed, part
    # The bank is that of the images in the folder, in any order.
    paths = sorted(camera.rglob("*.png"))
    expected = (
        RBIForImageClassification.from_pretrained(source)
        if kind == "rbi"
        else (RBIForImageClassification.from_image_classifier(make_classifier(), image_processor=processor()))
    )
    expected.set_references([{"pixel_values": pixels} for pixels in pixels_of(paths)])
    pixel_values = pixels_of(sorted((data_dir / "test").rglob("*.png")))
    torch.testing.assert_close(answers_of(command.model, pixel_values), answers_of(expected, pixel_values))
    assert_it_loads(tmp_path / "out", command.model, pixel_values)


@pytest.fixture(scope="module")
def fitted(classifier_dir, camera, data_dir, tmp_path_factory):
    """The folder of a run with both kinds of images, for a classifier that knows nothing, and the files it read."""
    folder = tmp_path_factory.mktemp("fitted") / "out"
    words = ["--model", classifier_dir, "--unlabeled_dir", camera, "--train_dir", data_dir, "--output_dir", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RBI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        read, decode = [], image_dataset.decode_image

        def note(image, **kwargs):
            read.append(Path(image["path"]))
            return decode(image, **kwargs)

        patch.setattr(image_dataset, "decode_image", note)
        assert references.main([*map(str, words), "--use_cpu"]) == 0
    return folder, read


@pytest.mark.slow
def test_the_record_says_what_was_tried(fitted):
    record = record_of(fitted[0])
    number = 3 * NUM_VALIDATION
    assert record["held_out_images"] == number and record["fitted"]
    first, *others = record["candidates"]
    assert first["scope"] == "self" and set(first["settings"].values()) == {None, 0.0}
    tried = [tuple(each["settings"].values()) for each in others]
    assert len(tried) == len(set(tried)) == len(SHARES) * len(KERNELS) * len(VOTE_WEIGHTS)
    # The classifier by itself tells nothing.
    assert first["metrics"]["accuracy"] == pytest.approx(1 / 3) and first["loss"] == pytest.approx(np.log(3), rel=1e-5)
    best = min(record["candidates"], key=lambda each: each["loss"])
    assert record["settings"] == best["settings"] and best["settings"]["vote_weight"] == 0.5
    gain = record["gains"]["accuracy"]
    assert gain["value"] == pytest.approx(100 * (best["metrics"]["accuracy"] - 1 / 3), abs=1e-3)
    assert 0 < gain["low"] < gain["value"] <= gain["high"] and record["gains"]["macro_f1"]["low"] > 0
    assert record["arguments"]["train_dir"] and record["arguments"]["num_references"] == 1000
    assert {"versions", "git", "hardware"} <= record["environment"].keys()


def test_labels_are_matched_by_name(fitted, data_dir):
    """The data's order is another one than the model's."""
    model = RBIForImageClassification.from_pretrained(fitted[0])
    assert [model.config.id2label[label] for label in range(3)] == list(MODEL_CLASSES)
    bank = model.rbi.references
    assert record_of(fitted[0])["references"]["references_per_class"] == NUM_TRAIN
    assert (bank.labels == -100).sum() == 7
    for name in CLASSES:
        # By the color that each class has most of.
        strongest = bank.images[bank.labels == MODEL_CLASSES.index(name)].float().mean((2, 3)).argmax(1)
        assert (strongest == CLASSES.index(name)).all()
    # The votes know the test images, and each has the number that the model's classes have.
    paths = sorted((data_dir / "test").rglob("*.png"))
    answers = answers_of(model, pixels_of(paths)).argmax(1).tolist()
    assert [MODEL_CLASSES[label] for label in answers] == [path.parent.name for path in paths]


def test_test_images_are_not_read(fitted):
    """The backbone sees each of the others once."""
    _, read = fitted
    splits = [path.parent.parent.name for path in read if path.parent.name in CLASSES]
    assert {split: splits.count(split) for split in set(splits)} == {
        "train": sum(NUM_TRAIN.values()),
        "validation": 3 * NUM_VALIDATION,
    }
    assert len(read) == len(set(read)) == len(splits) + 7


def test_it_carries_the_code_of_the_model(fitted):
    """As `save_pretrained` writes it. That such a folder loads without the package is tested with the models."""
    names = {path.name for path in Path(modeling_rbi.__file__).parent.glob("*_rbi.py")}
    assert {path.name for path in fitted[0].glob("*.py")} >= names
    auto_map = json.loads((fitted[0] / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageClassification"] == "modeling_rbi.RBIForImageClassification"


@pytest.mark.slow
@pytest.mark.parametrize("keep_images", [True, False])
def test_the_papers_form_with_labeled_data(rbi_dir, data_dir, camera, command, tmp_path, keep_images, capsys):
    arguments = {
        "model": rbi_dir,
        "train_dir": data_dir,
        "unlabeled_dir": camera,
        "keep_images": keep_images,
        "force": True,
    }
    assert command(**arguments) == 0
    record, model = record_of(tmp_path / "out"), command.model
    assert len(record["candidates"]) == 1 + len(SHARES) * len(VOTE_WEIGHTS)
    assert record["settings"]["temperature"] is None and record["settings"]["gain"] is None
    assert ReferenceSettings(**record["settings"]) == ReferenceSettings.of(model)
    pixel_values = pixels_of(sorted((data_dir / "test").rglob("*.png")))
    assert_it_loads(tmp_path / "out", model, pixel_values)
    assert record["references"]["has_images"] == keep_images
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.endswith("references.images") for name in weights) == keep_images
    assert any(value.dtype == torch.uint8 for value in weights.values()) == keep_images
    assert ("contains thumbnails" in capsys.readouterr().out) == keep_images


@pytest.mark.slow
def test_nothing_is_written_where_relations_hurt(data_dir, tmp_path, command, capsys):
    """Labels of chance, learned one by one: likeness tells nothing, and any other feature does harm."""
    paths = {split: sorted((data_dir / split).rglob("*.png")) for split in ("train", "validation")}
    for split, own in paths.items():
        lines = [f"{path},{MODEL_CLASSES[index % 3]}" for index, path in enumerate(own)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["image,label", *lines]))
    model = make_classifier()
    with torch.no_grad():
        features = model.resnet(pixels_of(paths["validation"])).pooler_output.flatten(1).double()
        targets = nn.functional.one_hot(torch.arange(len(features)) % 3, 3).double() - 1 / 3
        model.classifier[1].weight.copy_(torch.linalg.lstsq(features, targets, driver="gelsd").solution.T)
    arguments = {
        "model": saved(model, tmp_path / "model"),
        "train_file": tmp_path / "train.csv",
        "validation_file": tmp_path / "validation.csv",
    }
    assert command(**arguments) == 1
    printed = capsys.readouterr()
    assert "do not show that relations help" in printed.err and "--force" in printed.err
    assert "no references" in printed.out and not (tmp_path / "out").exists()
    assert command(**arguments, force=True) == 0
    record = record_of(tmp_path / "out")
    losses = [each["loss"] for each in record["candidates"]]
    assert losses[0] == min(losses) and record["candidates"][0]["metrics"]["accuracy"] == 1
    assert "optimistic" not in printed.out
    # The preset's own, since none was better.
    assert ReferenceSettings(**record["settings"]) == ReferenceSettings(0.25, 0.3, 1.0, 0.0)
    assert_it_loads(tmp_path / "out", command.model, pixels_of(paths["train"][:3]))


@pytest.mark.slow
def test_few_held_out_images_choose_nothing(classifier_dir, data_dir, tmp_path, command, capsys):
    assert command(model=classifier_dir, train_dir=data_dir, max_eval_samples=99, force=True) == 0
    record = record_of(tmp_path / "out")
    assert record["held_out_images"] == 99 and not record["fitted"]
    assert len(record["candidates"]) == 1 and record["candidates"][0]["scope"] == "self"
    assert (
        ReferenceSettings(**record["settings"])
        == ReferenceSettings.of(command.model)
        == ReferenceSettings(0.25, 0.3, 1.0, 0.0)
    )
    assert record["gains"].keys() == {"accuracy", "macro_f1"}
    printed = " ".join(capsys.readouterr().out.split())
    assert "99 held-out images are too few to choose settings" in printed and "optimistic" not in printed
    assert command(model=classifier_dir, train_dir=data_dir, max_eval_samples=100, output_dir=tmp_path / "more") == 0
    assert record_of(tmp_path / "more")["fitted"]
    assert "optimistic" in capsys.readouterr().out


def test_without_held_out_images_nothing_is_measured(classifier_dir, data_dir, tmp_path, command, capsys):
    data = {"train_dir": data_dir / "train", "train_val_split": 0}
    assert command(model=classifier_dir, **data, references_per_class=3, strategy="herding") == 0
    record = record_of(tmp_path / "out")
    assert record["references"]["references_per_class"] == dict.fromkeys(CLASSES, 3)
    assert record["references"]["strategy"] == "herding" and "gains" not in record
    assert "was not measured" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_labels_do_not_vote_where_they_are_not_to(classifier_dir, data_dir, tmp_path, command):
    model = RBIForImageClassification.from_image_classifier(
        make_classifier(), image_processor=processor(), reference_vote_weight=0.5
    )
    source = saved(model, tmp_path / "voting")
    for number in (99, 102):
        folder = tmp_path / str(number)
        arguments = {"model": source, "train_dir": data_dir, "max_eval_samples": number, "use_labels": False}
        assert command(**arguments, output_dir=folder, force=True) == 0
        record = record_of(folder)
        assert all(each["settings"]["vote_weight"] == 0 for each in record["candidates"])
        assert record["settings"]["vote_weight"] == command.model.config.reference_vote_weight == 0


@pytest.mark.slow
def test_the_number_of_unlabeled_images(classifier_dir, camera, data_dir, tmp_path, command):
    """Of each folder, as many as there are at most, by chance and by the seed."""
    folders = [camera, data_dir / "test"]
    assert command(model=classifier_dir, unlabeled_dir=folders, num_references=5) == 0
    assert record_of(tmp_path / "out")["references"]["num_references"] == 10
    assert command(model=classifier_dir, unlabeled_dir=folders, num_references=10**6, output_dir=tmp_path / "all") == 0
    whole = command.model.rbi.references.images.flatten(1).int()
    assert len(whole) == 13
    chosen = []
    for seed in (0, 0, 1, 2):
        folder = tmp_path / f"{len(chosen)}"
        assert command(model=classifier_dir, unlabeled_dir=camera, num_references=3, seed=seed, output_dir=folder) == 0
        images = command.model.rbi.references.images.flatten(1).int()
        # Thumbnails of another batch may be a gray level off.
        is_same = (images[:, None] - whole).abs().amax(-1) <= 1
        assert is_same.sum(1).tolist() == [1, 1, 1]
        chosen.append(is_same.int().argmax(1).tolist())
    assert chosen[0] == chosen[1] and (chosen[0] != chosen[2] or chosen[0] != chosen[3])


@pytest.fixture
def with_bank(tmp_path):
    """An RBI model with a bank of its own."""
    model = RBIForImageClassification.from_image_classifier(make_classifier(), image_processor=processor())
    model.set_references([{"pixel_values": torch.randn(3, 32, 32), "labels": label} for label in range(3)])
    return model


@pytest.mark.slow
@pytest.mark.parametrize("keep_images", [True, False])
def test_a_bank_that_is_there_is_replaced(with_bank, camera, tmp_path, command, keep_images):
    source = saved(with_bank, tmp_path / "model")
    assert command(model=source, unlabeled_dir=camera, keep_images=keep_images) == 0
    assert record_of(tmp_path / "out")["references"]["num_references"] == 7
    bank = RBIForImageClassification.from_pretrained(tmp_path / "out").rbi.references
    assert len(bank) == 7 and (bank.labels == -100).all() and (bank.images is not None) == keep_images


@pytest.mark.slow
def test_added_classes_keep_references(with_bank, camera, data_dir, tmp_path, command, capsys):
    """They are known by the bank alone."""
    with_bank.add_classes(["wolf"], [{"pixel_values": torch.randn(3, 32, 32), "labels": 0}])
    source = saved(with_bank, tmp_path / "model")
    for data, missing in (({"unlabeled_dir": camera}, "'fox'"), ({"train_dir": data_dir}, "'wolf'")):
        assert command(model=source, **data) == 1
        assert "classes that were added by references" in (error := capsys.readouterr().err) and missing in error
        assert not (tmp_path / "out").exists()
    rng = np.random.default_rng(3)
    lines = [f"{path},{path.parent.name}" for path in sorted((data_dir / "train").rglob("*.png"))]
    for index in range(4):
        save_image(tmp_path / "wolf" / f"{index}.png", (200, 200, 60), rng)
        lines.append(f"wolf/{index}.png,wolf")
    (tmp_path / "train.csv").write_text("\n".join(["image,label", *lines]))
    assert command(model=source, train_file=tmp_path / "train.csv", train_val_split=0) == 0
    save_image(tmp_path / "other.png", (200, 200, 60), rng)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.config.id2label[int(answers_of(model, pixels_of([tmp_path / "other.png"])).argmax())] == "wolf"


@pytest.mark.slow
def test_bad_images_are_named_or_left_out(classifier_dir, camera, tmp_path, command, capsys):
    for index, path in enumerate(sorted(camera.rglob("*.png"))):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{index}.png").write_bytes(path.read_bytes()[: -40 if index == 3 else None])
    arguments = {"model": classifier_dir, "unlabeled_dir": tmp_path / "images"}
    assert command(**arguments) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "images" / "3.png") in error and "--skip_bad_images" in error
    assert not (tmp_path / "out").exists()
    assert command(**arguments, skip_bad_images=True) == 0
    record = record_of(tmp_path / "out")
    assert record["references"]["num_references"] == 6 and record["arguments"]["skip_bad_images"]


@pytest.mark.slow
def test_bad_images_are_left_out_beside_labeled_ones(classifier_dir, data_dir, tmp_path, command, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    Image.new("RGB", (32, 32), "teal").save(tmp_path / "images" / "good.png")
    labeled = {"train_dir": data_dir / "train", "train_val_split": 0}
    arguments = {"model": classifier_dir, "unlabeled_dir": tmp_path / "images", **labeled}
    assert command(**arguments) == 1
    assert "bad.png" in capsys.readouterr().err
    assert command(**arguments, skip_bad_images=True) == 0
    assert record_of(tmp_path / "out")["references"]["num_references"] == sum(NUM_TRAIN.values()) + 1


def test_unlike_classifiers_are_refused(camera, tmp_path, command, capsys):
    """PoolFormer has a normalization before its classifier."""
    config = PoolFormerConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], image_size=32)
    source = saved(PoolFormerForImageClassification(config), tmp_path / "model")
    assert command(model=source, unlabeled_dir=camera) == 1
    assert "PoolFormerForImageClassification does more than pooling" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def places(classifier_dir, camera, data_dir, tmp_path):
    """What the bad command lines name."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    rng = np.random.default_rng(4)
    for index in range(8):
        save_image(tmp_path / "others" / ("cat", "yak")[index % 2] / f"{index}.png", (99, 99, 99), rng)
    return {"model": classifier_dir, "camera": camera, "data": data_dir, "tmp": tmp_path}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ({}, 1, "Name images for the bank: --unlabeled_dir FOLDER, or labeled data"),
        ({"unlabeled_dir": "{tmp}/empty"}, 1, "holds no images"),
        ({"unlabeled_dir": "{tmp}/nowhere"}, 1, "nowhere is not a folder"),
        ({"unlabeled_dir": "{camera}", "output_dir": "{tmp}/full"}, 1, "full is not empty: name a new folder"),
        ({"unlabeled_dir": "{camera}", "output_dir": "{tmp}/full/note.txt"}, 1, "note.txt is a file"),
        ({"unlabeled_dir": "{camera}", "model": "{tmp}/nowhere"}, 1, "there is no such folder"),
        ({"unlabeled_dir": "{camera}", "model": "{camera}"}, 1, "config.json"),
        ({"train_dir": "{tmp}/others"}, 1, "The model lacks 1 of the 2 labels of the data (yak"),
        ({"unlabeled_dir": "{camera}", "references_per_class": 2}, 1, "--references_per_class is for training images"),
        ({"unlabeled_dir": "{camera}", "strategy": "herding"}, 1, "--strategy is for training images"),
        (
            {"train_dir": "{data}", "references_per_class": 2, "strategy": "random"},
            2,
            "--references_per_class needs",
        ),
        ({"unlabeled_dir": "{camera}", "num_references": 0}, 2, "--num_references must be at least 1, got 0"),
        ({"train_dir": "{data}", "references_per_class": 0}, 2, "--references_per_class must be at least 1, got 0"),
        ({"unlabeled_dir": "{camera}", "strategy": "best"}, 2, "invalid choice: 'best'"),
        ({"unlabeled_dir": "{camera}", "unlabeled": "x"}, 2, "did you mean `--unlabeled_dir`"),
        ({"unlabeled_dir": "{camera}", "train_dir": "{data}", "train_file": "x"}, 2, "exactly one way"),
    ],
)
def test_errors(places, arguments, code, message, command, capsys):
    before = everything_in(places["tmp"])
    arguments = {name: str(value).format(**places) for name, value in arguments.items()}
    assert command(**{"model": places["model"]} | arguments) == code
    printed = capsys.readouterr()
    assert printed.err.lstrip().startswith("error: ") and message in printed.err
    assert not printed.out and everything_in(places["tmp"]) == before
    assert not (places["tmp"] / "out").exists()


@pytest.mark.slow
def test_the_bank_has_a_limit(classifier_dir, camera, data_dir, tmp_path, command, monkeypatch, capsys):
    """That is told before the backbone runs."""
    monkeypatch.setattr(references, "MAX_REFERENCES", 14)
    monkeypatch.setattr(RBIForImageClassification, "set_references", None)
    for arguments, counts in (
        ({"train_dir": data_dir}, "15 training images and 0 from --unlabeled_dir"),
        ({"train_dir": data_dir, "unlabeled_dir": camera, "references_per_class": 4}, "12 training images and 7 from"),
        ({"unlabeled_dir": [camera, camera, camera], "num_references": 5}, "0 training images and 15 from"),
    ):
        assert command(model=classifier_dir, **arguments) == 1
        error = capsys.readouterr().err
        assert counts in error and "above the limit of 14" in error and "--references_per_class" in error
    assert not (tmp_path / "out").exists()


def test_the_limit_itself_is_kept(classifier_dir, camera, data_dir, tmp_path, command, monkeypatch):
    monkeypatch.setattr(references, "MAX_REFERENCES", 14)
    labeled = {"train_dir": data_dir / "train", "train_val_split": 0, "references_per_class": 3}
    assert command(model=classifier_dir, unlabeled_dir=camera, num_references=5, **labeled) == 0
    assert record_of(tmp_path / "out")["references"]["num_references"] == 14


def test_an_interrupted_run_writes_nothing(classifier_dir, camera, tmp_path, command, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(references, "write_json", stop)
    assert command(model=classifier_dir, unlabeled_dir=camera) == 130
    assert "Nothing was written" in capsys.readouterr().err
    assert not everything_in(tmp_path / "out")
