# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Which images become references, and what they are read from."""

import io
import math
import re

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_rbi import (
    MAX_REFERENCES,
    RBIConfig,
    UnreadableImageError,
    choose_references,
)
from modeling_rbi.errors_rbi import shown_names
from modeling_rbi.reference_images_rbi import read_batches
from tests.modeling_rbi.shared import (
    CLASS_NAMES,
    NUM_LABELS,
    assert_same_bank,
    assert_same_state,
    bank_of,
    collate,
    make_items,
    make_model,
    state_of,
    transformers_log,
)
from tests.odd_images import ODD_IMAGES
from training.data.image_dataset import ImageDataset


@pytest.fixture
def config(backbone_config):
    """What is chosen and read does not depend on the preset."""
    return RBIConfig.kernel(backbone_config=backbone_config, num_labels=NUM_LABELS)


# --- Which images are chosen -----------------------------------------------------------------------------------------


def numbers_of_each(chosen, labels):
    return torch.bincount(labels[chosen], minlength=NUM_LABELS).tolist()


def uneven_labels():
    return torch.tensor([0] * 20 + [1] * 7 + [2] * 2 + [3] * 11 + [4] * 5)[torch.randperm(45)]


@pytest.mark.parametrize("strategy", ["balanced", "herding"])
@pytest.mark.parametrize(
    ("kwargs", "numbers"),
    [
        ({"per_class": 1}, [1, 1, 1, 1, 1]),
        ({"per_class": 5}, [5, 5, 2, 5, 5]),
        ({"per_class": 100}, [20, 7, 2, 11, 5]),
        ({"num_references": 10}, [2, 2, 2, 2, 2]),
        ({"num_references": 22}, [5, 5, 2, 5, 5]),
        ({"num_references": 34}, [10, 7, 2, 10, 5]),
        ({"num_references": 1000}, [20, 7, 2, 11, 5]),
        ({}, [20, 7, 2, 11, 5]),
    ],
)
def test_classes_are_balanced(strategy, kwargs, numbers):
    labels = uneven_labels()
    features = torch.randn(45, 6)
    for seed in range(3):
        chosen = choose_references(labels, CLASS_NAMES, strategy=strategy, seed=seed, features=features, **kwargs)
        assert numbers_of_each(chosen, labels) == numbers
        assert (chosen.diff() > 0).all() and chosen.dtype == torch.int64


@pytest.mark.parametrize("strategy", ["balanced", "herding"])
@pytest.mark.parametrize("number", [1, 3, 7, 13, 29])
def test_numbers_differ_by_one_where_they_do_not_divide(strategy, number):
    labels = torch.arange(50) % NUM_LABELS
    features = torch.randn(50, 6)
    chosen = choose_references(labels, CLASS_NAMES, num_references=number, strategy=strategy, features=features)
    numbers = numbers_of_each(chosen, labels)
    assert sum(numbers) == number and max(numbers) - min(numbers) <= 1


def test_balanced_is_the_choice_where_labels_are_known():
    labels = uneven_labels()
    kwargs = {"num_references": 15, "seed": 3}
    by_default = choose_references(labels, CLASS_NAMES, **kwargs)
    assert torch.equal(by_default, choose_references(labels, CLASS_NAMES, strategy="balanced", **kwargs))
    labels[4] = -100
    by_default = choose_references(labels, CLASS_NAMES, **kwargs)
    assert torch.equal(by_default, choose_references(labels, CLASS_NAMES, strategy="random", **kwargs))


@pytest.mark.parametrize("strategy", ["balanced", "random"])
def test_the_seed_makes_the_choice(strategy):
    labels = torch.arange(60) % NUM_LABELS
    choices = [
        choose_references(labels, CLASS_NAMES, num_references=10, strategy=strategy, seed=seed).tolist()
        for seed in (0, 0, 1, 2)
    ]
    assert choices[0] == choices[1]
    assert len({tuple(choice) for choice in choices}) == 3
    # And it alone.
    torch.manual_seed(1234)
    again = choose_references(labels, CLASS_NAMES, num_references=10, strategy=strategy, seed=0)
    assert again.tolist() == choices[0]


@pytest.mark.parametrize("kwargs", [{"num_references": 12, "strategy": "random"}, {"per_class": 4}])
def test_every_image_has_the_same_chance(kwargs):
    """By Hoeffding's inequality the bound fails for one of 15 images once in 10^8."""
    labels = torch.arange(15) % NUM_LABELS if "strategy" in kwargs else torch.arange(30) % NUM_LABELS
    share = {15: 12 / 15, 30: 4 / 6}[len(labels)]
    chosen = torch.cat([choose_references(labels, CLASS_NAMES, seed=seed, **kwargs) for seed in range(1000)])
    frequency = torch.bincount(chosen, minlength=len(labels)) / 1000
    assert (frequency - share).abs().max() < 0.1


def test_random_pays_no_heed_to_classes():
    labels = torch.tensor([0] * 90 + [-100] * 10)
    chosen = choose_references(labels, CLASS_NAMES, num_references=50, strategy="random")
    assert len(chosen) == len(set(chosen.tolist())) == 50
    assert torch.equal(choose_references(labels, CLASS_NAMES, strategy="random"), torch.arange(100))


def greedy_herding(features):
    """The order of iCaRL's construction of an exemplar set, by trying each image, in float64."""
    features = features.double().numpy()
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    mean, order = features.mean(0), []
    while len(order) < len(features):
        left = [row for row in range(len(features)) if row not in order]
        distances = [np.linalg.norm(mean - features[[*order, row]].mean(0)) for row in left]
        order.append(left[int(np.argmin(distances))])
    return order


@pytest.mark.parametrize("per_class", [1, 2, 5, 9])
def test_herding_is_the_greedy_choice(per_class):
    labels = torch.arange(45)[torch.randperm(45)] % NUM_LABELS
    features = torch.randn(45, 8) + 2 * torch.randn(NUM_LABELS, 8)[labels]
    expected = []
    for label in range(NUM_LABELS):
        rows = (labels == label).nonzero().flatten()
        expected += rows[greedy_herding(features[rows])[:per_class]].tolist()
    for seed in (0, 1):
        chosen = choose_references(
            labels, CLASS_NAMES, per_class=per_class, strategy="herding", features=features, seed=seed
        )
        assert chosen.tolist() == sorted(expected)


def test_herding_without_labels_is_of_all_images():
    features = torch.randn(30, 8) + 1
    chosen = choose_references(
        torch.full((30,), -100), CLASS_NAMES, num_references=6, strategy="herding", features=features
    )
    assert chosen.tolist() == sorted(greedy_herding(features)[:6])


def test_herding_comes_closer_to_the_mean_than_chance():
    labels = torch.zeros(200, dtype=torch.int64)
    features = nn.functional.normalize(torch.randn(200, 16) + 0.5, dim=-1)

    def error(chosen):
        return (features[chosen].mean(0) - features.mean(0)).norm()

    def choose(strategy, seed):
        return choose_references(labels, {0: "all"}, 10, strategy=strategy, seed=seed, features=features)

    by_chance = [error(choose("balanced", seed)) for seed in range(50)]
    assert error(choose("herding", 0)) < min(by_chance) / 2


@pytest.mark.parametrize(
    ("labels", "kwargs", "message"),
    [
        ([0, 1, 2, 3, 4], {"strategy": "nearest"}, "`strategy` must be one of balanced, herding, random.*'nearest'"),
        ([0, 1, 2, 3, 4], {"per_class": 1, "num_references": 5}, "`per_class` or `num_references`, not both"),
        ([0, 1, 2, 3, 4], {"per_class": 0}, "`per_class` must be at least 1, got 0"),
        ([0, 1, 2, 3, 4], {"num_references": -3}, "`num_references` must be at least 1, got -3"),
        ([], {}, "no images"),
        ([0, 1, 2, 3, 4, 5], {}, r"label 5, but the model's classes are 0\.\.4 \(-100: no label\)"),
        ([0, 1, 2, -1], {}, "label -1"),
        ([0, 1, -7, 9], {"strategy": "random"}, "label 9"),
        ([0, 1, 2, 3, 4], {"per_class": 1, "strategy": "random"}, "give `num_references` instead"),
        ([-100, -100], {"per_class": 1}, "give `num_references` instead"),
        ([0, 1, 2, 3, 4, -100], {"strategy": "balanced"}, "1 have none.*`add_references`"),
        ([0, 1, 2, 3, 4, -100, -100], {"strategy": "herding"}, "2 have none.*`add_references`"),
        ([-100, -100], {"strategy": "balanced"}, "needs labels, and no image has one"),
        ([0, 1, 4, 4], {}, "2 of the model's classes have no image, for instance 'class 2'"),
        ([0, 1, 2, 3, 4], {"strategy": "herding"}, "needs `features`"),
        ([0] * (MAX_REFERENCES + 1), {"strategy": "random"}, f"{MAX_REFERENCES + 1} references .*{MAX_REFERENCES}"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(labels, kwargs, message):
    with pytest.raises(ValueError, match=message):
        choose_references(torch.tensor(labels, dtype=torch.int64), CLASS_NAMES, **kwargs)


@pytest.mark.parametrize("names", [["crane", "dog", "crane"], ["crane"] * 3, ["dog", "", "crane (2) "]])
def test_a_class_without_images_is_named_as_it_is_shown(names):
    names = dict(enumerate(names))
    for label in names:
        labels = torch.tensor([other for other in names if other != label])
        with pytest.raises(ValueError, match=rf"instance {re.escape(repr(shown_names(names)[label]))}: add"):
            choose_references(labels, names)


def test_as_many_references_as_the_limit():
    labels = torch.arange(MAX_REFERENCES + 10) % NUM_LABELS
    assert len(choose_references(labels, CLASS_NAMES, num_references=MAX_REFERENCES)) == MAX_REFERENCES


def test_small_classes_are_warned_of(caplog):
    with transformers_log(caplog):
        choose_references(uneven_labels(), CLASS_NAMES, per_class=6)
        assert "2 classes have fewer than 6 images" in caplog.text
    with transformers_log(caplog):
        choose_references(uneven_labels(), CLASS_NAMES, per_class=2)
        assert caplog.text == ""


# --- What images are read from ---------------------------------------------------------------------------------------


NAMES = list(CLASS_NAMES.values())


PROCESSOR = ViTImageProcessorPil(
    size={"height": 32, "width": 32}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
)


class CountingDataset(Dataset):
    """Items of a list, with a note of those that were asked for."""

    def __init__(self, items, labels=None):
        self.items, self.read = items, []
        if labels is not None:
            self.labels = labels

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.read.append(index)
        return self.items[index]


def pil_images(number, size=(40, 36)):
    pixels = np.random.default_rng(0).integers(0, 256, (number, 4, 4, 3)).astype("uint8")
    return [Image.fromarray(each).resize(size, Image.Resampling.BILINEAR) for each in pixels]


def pil_dataset(number, column="label"):
    columns = {"image": pil_images(number), column: [index % NUM_LABELS for index in range(number)]}
    features = datasets.Features({"image": datasets.Image(), column: datasets.ClassLabel(names=NAMES)})
    return datasets.Dataset.from_dict(columns, features=features)


# Pillow warns of broken EXIF.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ODD_IMAGES)
def test_odd_images(name):
    given = []

    def processor(image, return_tensors):
        given.append(image)
        return {"pixel_values": torch.zeros(1, 3, 32, 32)}

    list(read_batches([{"image": Image.open(io.BytesIO(ODD_IMAGES[name].file))}], None, processor, 1))
    ODD_IMAGES[name].check(given[0])


@pytest.mark.parametrize("add", ["set_references", "add_references", "add_classes"])
def test_a_photograph_of_a_telephone_stands_upright_in_the_bank(bare_model, add):
    bare_model.set_references(make_items(23))
    odd = ODD_IMAGES["orientation 6"]
    for image in (Image.open(io.BytesIO(odd.file)), Image.fromarray(odd.pixels)):
        items = [{"image": image, "label": 0}]
        if add == "add_classes":
            bare_model.add_classes(["new" if image.format else "other"], items, image_processor=PROCESSOR)
        else:
            getattr(bare_model, add)(items, image_processor=PROCESSOR, strategy="random")
        bank = bank_of(bare_model)
        last = {name: values[-1] for name, values in bank.items() if name in ("features", "images")}
        if image.format:
            expected = last
    # Computed in two passes of the backbone, which may round otherwise, and thumbnails with them by one gray level.
    torch.testing.assert_close(last["features"], expected["features"], atol=1e-5, rtol=1e-5)
    assert (last["images"].int() - expected["images"].int()).abs().max() <= 1


def test_a_gray_model_gets_gray_images(backbone_config):
    backbone_config.num_channels = 1
    model = make_model(RBIConfig.kernel(backbone_config=backbone_config, image_mean=[0.5], image_std=[0.5]))
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.5])
    image = pil_images(1)[0]
    model.set_references([{"image": image}, {"image": image.convert("L")}], image_processor=processor)
    first, second = bank_of(model)["features"]
    torch.testing.assert_close(first, second)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    path = tmp_path / "nowhere.tif"
    Image.new("F", (5, 4), float("nan")).save(path)
    with pytest.raises(UnreadableImageError, match=r"nowhere\.tif has pixels that are not finite"):
        list(read_batches([{"image": Image.open(path)}], None, PROCESSOR, 1))


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("form", ["list", "dataset", "labeled dataset", "generator", "loader", "batches", "numpy"])
def test_images_come_in_several_forms(bare_model, form, batch_size):
    items = make_items(23)
    images = {
        "list": lambda: items,
        "dataset": lambda: CountingDataset(items),
        "labeled dataset": lambda: CountingDataset(items, [item["labels"] for item in items]),
        "generator": lambda: iter(items),
        "loader": lambda: DataLoader(CountingDataset(items), batch_size=5, collate_fn=collate),
        "batches": lambda: [collate(items[:20]), collate(items[20:])],
        "numpy": lambda: [
            {"pixel_values": each["pixel_values"].numpy(), "labels": np.int64(each["labels"])} for each in items
        ],
    }[form]()
    bare_model.set_references(images, batch_size=batch_size)
    bank = bank_of(bare_model)
    pixel_values = torch.stack([item["pixel_values"] for item in items])
    with torch.no_grad():
        features, _ = bare_model.rbi.extract_features(pixel_values)
    torch.testing.assert_close(bank["features"], features, atol=1e-5, rtol=1e-5)
    assert bank["labels"].tolist() == [item["labels"] for item in items]
    thumbnails = bare_model.rbi.rpe.thumbnails(pixel_values)
    assert (bank["images"].int() - thumbnails.int()).abs().max() <= 1, "but for the rounding to 8 bits"


def test_batches_are_as_large_as_asked_for(bare_model):
    sizes = []
    bare_model.rbi.backbone.register_forward_pre_hook(
        lambda module, args: sizes.append(len(args[0])) if args else None
    )
    bare_model.set_references(make_items(23), batch_size=10)
    # The last is the pattern by which the backbone is known.
    assert sizes == [10, 10, 3, 1]


@pytest.mark.parametrize("column", ["label", "labels"])
def test_images_of_a_hugging_face_data_set(bare_model, column):
    split = pil_dataset(20, column)
    bare_model.set_references(split, image_processor=PROCESSOR)
    bank = bank_of(bare_model)
    pixel_values = PROCESSOR(split["image"][:], return_tensors="pt")["pixel_values"]
    bare_model.set_references(
        [{"pixel_values": each, column: split[index][column]} for index, each in enumerate(pixel_values)]
    )
    assert_same_bank(bank, bank_of(bare_model))
    assert bank["labels"].tolist() == split[column][:]


def test_only_the_chosen_images_of_a_hugging_face_data_set_are_decoded(bare_model):
    decoded = []

    def transform(examples):
        decoded.extend(examples["label"])
        return {**PROCESSOR(examples["image"], return_tensors="pt"), "label": examples["label"]}

    split = pil_dataset(40)
    split.set_transform(transform)
    bare_model.set_references(split, per_class=2, seed=5)
    assert len(decoded) == 10
    rows = choose_references(torch.arange(40) % NUM_LABELS, CLASS_NAMES, per_class=2, seed=5)
    bank = bank_of(bare_model)
    bare_model.set_references([split[int(row)] for row in rows])
    assert_same_bank(bank, bank_of(bare_model))


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4, None], [None] * 6])
def test_unknown_labels_of_a_hugging_face_data_set(bare_model, labels):
    split = datasets.Dataset.from_dict(
        {"image": pil_images(6), "label": labels},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    bare_model.set_references(split, image_processor=PROCESSOR)
    assert bare_model.rbi.references.labels.tolist() == [-100 if label is None else label for label in labels]


def test_images_of_a_stream(bare_model):
    split = pil_dataset(12)
    bare_model.set_references(split.to_iterable_dataset(), image_processor=PROCESSOR)
    bank = bank_of(bare_model)
    bare_model.set_references(split, image_processor=PROCESSOR)
    assert_same_bank(bank, bank_of(bare_model))


def test_an_attribute_labels_that_is_something_else_is_passed_over(bare_model):
    images = CountingDataset(make_items(20), labels=NAMES)
    bare_model.set_references(images, per_class=1)
    assert len(images.read) == 20 and len(bare_model.rbi.references) == 5


def test_images_of_the_training_package(bare_model):
    split = pil_dataset(30)
    images = ImageDataset(split, lambda image: PROCESSOR(image, return_tensors="pt")["pixel_values"][0])
    bare_model.set_references(images, per_class=2, seed=1)
    bank = bank_of(bare_model)
    bare_model.set_references(split, per_class=2, seed=1, image_processor=PROCESSOR)
    assert_same_bank(bank, bank_of(bare_model))


@pytest.mark.parametrize(
    "kwargs", [{"per_class": 2}, {"num_references": 7}, {"num_references": 7, "strategy": "random"}]
)
def test_only_the_chosen_images_are_read_where_labels_are_known(bare_model, kwargs):
    items = make_items(40)
    labels = torch.tensor([item["labels"] for item in items])
    images = CountingDataset(items, labels.tolist())
    bare_model.set_references(images, seed=3, **kwargs)
    expected = choose_references(labels, CLASS_NAMES, seed=3, **kwargs).tolist()
    assert images.read == expected
    bank = bank_of(bare_model)
    # Where they are not, all are read, and the choice is the same.
    unlabeled = CountingDataset(items)
    bare_model.set_references(unlabeled, seed=3, **kwargs)
    assert unlabeled.read == list(range(40))
    assert_same_bank(bank, bank_of(bare_model))


def test_herding_reads_all_and_keeps_the_greedy_choice(bare_model):
    items = make_items(40)
    labels = torch.tensor([item["labels"] for item in items])
    images = CountingDataset(items, labels.tolist())
    bare_model.set_references(images, per_class=3, strategy="herding")
    assert images.read == list(range(40))
    with torch.no_grad():
        features, _ = bare_model.rbi.extract_features(torch.stack([item["pixel_values"] for item in items]))
    expected = choose_references(labels, CLASS_NAMES, 3, strategy="herding", features=features)
    torch.testing.assert_close(bank_of(bare_model)["features"], features[expected], atol=1e-5, rtol=1e-5)


def test_images_without_labels(bare_model, pixel_values):
    bare_model.set_references([{"pixel_values": image} for image in pixel_values])
    assert (bare_model.rbi.references.labels == -100).all()
    facts = bare_model.config.references
    assert (facts["num_references"], facts["num_labeled"], facts["strategy"]) == (7, 0, "random")
    bare_model.set_references(make_items(9, [0, 1, 2, -100, 3, -100, 4, 0, -100]))
    assert bare_model.config.references["num_labeled"] == 6
    bare_model.set_references([{"pixel_values": image, "label": None} for image in pixel_values])
    assert (bare_model.rbi.references.labels == -100).all()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"strategy": "nearest"},
        {"per_class": 1, "num_references": 5},
        {"per_class": 0},
        {"num_references": 0},
        {"per_class": 1, "strategy": "random"},
    ],
)
def test_arguments_are_checked_before_anything_is_read(bare_model, kwargs):
    images = CountingDataset(make_items(10))
    with pytest.raises(ValueError, match=r"strategy|per_class|num_references"):
        bare_model.set_references(images, **kwargs)
    assert images.read == []


def raising(items):
    yield from items
    raise OSError("the disk is gone")


def bad_images(form):
    items = make_items(10)
    return {
        "no dicts": [item["pixel_values"] for item in items],
        "no pixels": [{"pixels": item["pixel_values"]} for item in items],
        "pil without processor": [{"image": image} for image in pil_images(3)],
        "two axes": [{"pixel_values": torch.zeros(32, 32)}],
        "five axes": [{"pixel_values": torch.zeros(1, 2, 3, 32, 32)}],
        "channels": [{"pixel_values": torch.zeros(1, 32, 32)}],
        "bytes": [{"pixel_values": torch.zeros(3, 32, 32, dtype=torch.uint8)}],
        "labels for one image": [{"pixel_values": torch.zeros(3, 32, 32), "labels": [0, 1]}],
        "labels for a batch": [{"pixel_values": torch.zeros(4, 3, 32, 32), "labels": torch.zeros(3).long()}],
        "labels with a fraction": [{"pixel_values": torch.zeros(3, 32, 32), "labels": 0.5}],
        "labels in words": [{"pixel_values": torch.zeros(3, 32, 32), "labels": "red"}],
        "labels of a column in words": datasets.Dataset.from_dict({"image": pil_images(2), "label": ["red", "blue"]}),
        "labels of an attribute with a fraction": CountingDataset(items, [0.5] * 10),
        "a batch": collate(items),
        "several splits": datasets.DatasetDict(train=pil_dataset(5)),
        "one after the other of several sizes": [*items, *make_items(5, size=24)],
        "label out of range": [*items, {"pixel_values": torch.zeros(3, 32, 32), "labels": 5}],
        "nothing": [],
        "nothing to come": iter(()),
        "not finite": [*items, {"pixel_values": torch.full((3, 32, 32), math.nan), "labels": 0}],
        "missing class": items[:4],
        "several sizes": [collate(make_items(5, size=32)), collate(make_items(5, size=24))],
        "broken": raising(items),
    }[form]


@pytest.mark.parametrize(
    ("form", "error", "message"),
    [
        ("no dicts", ValueError, "must be dicts with `pixel_values`.*got a Tensor"),
        ("no pixels", ValueError, "must be dicts with `pixel_values`.*got the keys pixels"),
        ("pil without processor", ValueError, "pass the model's `image_processor`"),
        ("two axes", ValueError, r"must be \(C, H, W\).*got \(32, 32\)"),
        ("five axes", ValueError, r"batch \(B, C, H, W\), got \(1, 2, 3, 32, 32\)"),
        ("channels", ValueError, "have 1 channels, but the model takes 3"),
        ("bytes", ValueError, "torch.uint8, but must be float"),
        ("labels for one image", ValueError, r"one whole number for each image, got torch.int64 \(2,\)"),
        ("labels for a batch", ValueError, r"one whole number for each image, got torch.int64 \(3,\)"),
        ("labels with a fraction", ValueError, "one whole number for each image, got torch.float32"),
        ("labels in words", ValueError, "one whole number for each image, got 'red'"),
        ("labels of a column in words", ValueError, r"one whole number for each image, got \['red', 'blue'\]"),
        ("labels of an attribute with a fraction", ValueError, "one whole number for each image, got torch.float32"),
        ("a batch", ValueError, "keys pixel_values, labels: pass one of its data sets, or, if it is a batch, a list"),
        ("several splits", ValueError, "a DatasetDict with the keys train: pass one of its data sets"),
        ("one after the other of several sizes", ValueError, "several sizes: pass them through the model's image"),
        ("label out of range", ValueError, r"label 5, but the model's classes are 0\.\.4"),
        ("nothing", ValueError, "no images"),
        ("nothing to come", ValueError, "no images"),
        ("not finite", ValueError, "Image 10 has features that are not finite"),
        ("missing class", ValueError, "1 of the model's classes have no image, for instance 'LABEL_4'"),
        ("broken", OSError, "the disk is gone"),
    ],
)
@pytest.mark.parametrize(
    ("call", "has_bank"), [("set_references", False), ("set_references", True), ("add_references", True)]
)
def test_a_failed_call_leaves_the_model_as_it_was(bare_model, call, has_bank, form, error, message):
    if has_bank:
        bare_model.set_references(make_items(10, seed=3))
    bare_model.train(form in ("not finite", "broken", "missing class"))
    before, bank = state_of(bare_model), bare_model.rbi.references
    with pytest.raises(error, match=message):
        getattr(bare_model, call)(bad_images(form), batch_size=4)
    assert_same_state(state_of(bare_model), before)
    assert bare_model.rbi.references is bank
    assert bare_model.rbi.backbone.training == bare_model.training


def test_images_of_several_sizes_are_refused(resnet_model):
    model = resnet_model
    batches = [collate(make_items(5, size=size)) for size in (32, 24)]
    before = state_of(model)
    with pytest.raises(ValueError, match="have several sizes: pass them through the model's image processor"):
        model.set_references(batches)
    assert_same_state(state_of(model), before)
