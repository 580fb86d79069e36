# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Labels are matched by name, images put in order by content, and no image attends to itself in the bank."""

import dataclasses

import datasets
import pytest
import torch

from modeling_rbi import RBIConfig, UserError
from tests.training.evaluation.shared import (
    LABELS,
    NAMES,
    NUM_HELD_OUT,
    REFERENCE_LABELS,
    clear_bank,
    images_of,
    make_model,
    noisy_held_out,
)
from training.data.arguments import DataArguments
from training.data.reading import load_images
from training.evaluation.classifiers import (
    class_names,
    count_in_bank,
    in_order_of_content,
    match_labels,
    predict_from,
)
from training.evaluation.features import EightBitPixels


@pytest.fixture
def split(published, own_cache):
    """The 40 test images of the small data set."""
    data = DataArguments(dataset_format="cub_200_2011", dataset_dir=str(published))
    return load_images(data, seed=0)["test"]


def test_images_come_in_one_order(split):
    expected = [image["path"] for image in in_order_of_content(split)["image"]]
    assert expected != [image["path"] for image in split["image"]]
    for order in (range(39, -1, -1), torch.randperm(40).tolist()):
        assert [image["path"] for image in in_order_of_content(split.select(order))["image"]] == expected


def test_labels_are_matched_by_name_with_either_table(split):
    """A config that was given one of them has the numbered names of the library in the other."""
    names = ["Dodo", *reversed(NAMES)]
    named = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    numbered = {
        "id2label": {number: f"LABEL_{number}" for number in range(5)},
        "label2id": {f"LABEL_{number}": number for number in range(5)},
    }
    for tables in (named, {"id2label": named["id2label"]}, numbered | {"id2label": named["id2label"]}):
        config = RBIConfig(**tables)
        assert match_labels(split, config).tolist() == [4, 3, 2, 1]
        assert class_names(config) == names
    config = RBIConfig(**numbered | {"label2id": named["label2id"]})
    assert match_labels(split, config).tolist() == [4, 3, 2, 1]
    assert class_names(config) == names


def test_names_of_a_model_are_matched_as_those_of_data_are_read():
    """A model may have been saved with other spaces and another Unicode form."""
    split = datasets.Dataset.from_dict(
        {"label": [0, 1, 1]}, features=datasets.Features({"label": datasets.ClassLabel(names=["café", "cat"])})
    )
    config = RBIConfig(id2label={0: "cat ", 1: "cafe\u0301"}, label2id={"cat ": 0, "cafe\u0301": 1})
    assert match_labels(split, config).tolist() == [1, 0]


def test_two_labels_of_one_class_are_refused(split):
    config = RBIConfig(id2label=dict(enumerate(NAMES)), label2id=dict(zip(NAMES, [0, 1, 1, 3], strict=True)))
    with pytest.raises(ValueError, match="one class of the model"):
        match_labels(split, config)


def _data(names):
    """A split with an image of each of these classes."""
    feature = datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict({"label": [*range(len(names))]}, datasets.Features({"label": feature}))


def _config(names, **kwargs):
    return RBIConfig(id2label=dict(enumerate(names)), **kwargs)


CRANES = ["crane", "dog", "crane", "owl"]


@pytest.mark.parametrize(
    ("model_names", "names", "numbers"),
    [
        # The names that the model is shown with, in any order.
        (CRANES, ["crane (0)", "crane (2)", "dog", "owl"], [0, 2, 1, 3]),
        (CRANES, ["owl", "crane (2)"], [3, 2]),
        (["crane"] * 3, ["crane (2)", "crane (0)", "crane (1)"], [2, 0, 1]),
        (["crane", "crane (2)", "crane"], ["crane (2) (2)", "crane (2)", "crane (0)"], [2, 1, 0]),
        (["", "dog", ""], ["(2)", "dog", "(0)"], [2, 1, 0]),
        # Names that no other class has.
        (CRANES, ["owl", "dog"], [3, 1]),
        (["Crane", "crane", "CRANE"], ["CRANE", "Crane", "crane"], [2, 0, 1]),
        # The same list in the same order.
        (CRANES, ["crane", "dog", "crane (2)", "owl"], [0, 1, 2, 3]),
        (CRANES, ["crane (0)", "dog", "crane", "owl"], [0, 1, 2, 3]),
        # Names that look the same.
        (["cafe\u0301", "dog ", "two  words"], ["two words", "caf\u00e9", "dog"], [2, 0, 1]),
    ],
)
def test_classes_of_one_name_are_matched_where_they_can_be_told_apart(model_names, names, numbers):
    config = _config(model_names)
    assert match_labels(_data(names), config).tolist() == numbers
    assert len(set(class_names(config))) == len(model_names)


@pytest.mark.parametrize(
    ("model_names", "names", "choices"),
    [
        (CRANES, ["crane", "dog", "owl"], r"crane \(0\), crane \(2\)"),
        (CRANES, ["crane", "crane (2)", "dog", "owl"], r"crane \(0\), crane \(2\)"),
        (CRANES, ["owl", "dog", "crane (2)", "crane"], r"crane \(0\), crane \(2\)"),
        (["crane"] * 3, ["crane", "crane (1)"], r"crane \(0\), crane \(1\), crane \(2\)"),
        (["crane", "crane (2)", "crane"], ["crane", "crane (2)"], r"crane \(0\), crane \(2\) \(2\)"),
        (["caf\u00e9", "cafe\u0301"], ["caf\u00e9", "dog"], "caf\u00e9 \\(0\\), caf\u00e9 \\(1\\)"),
    ],
)
def test_a_label_of_several_classes_is_refused(model_names, names, choices):
    for more in ({}, {"label2id": {name: number for number, name in enumerate(model_names)}}):
        message = rf"several classes of the name {names[0] if names[0] != 'owl' else 'crane'}: .*shown \({choices}\)"
        with pytest.raises(UserError, match=message):
            match_labels(_data(names), _config(model_names, **more))


@pytest.mark.parametrize("psnr_max", [20, 50, 80])
@pytest.mark.parametrize("keep_images", [True, False])
@pytest.mark.parametrize("psnr_image_size", [16, None])
def test_a_held_out_image_does_not_attend_to_itself(backbone_config, keep_images, psnr_image_size, psnr_max):
    """Whichever PSNR counts as that of the same image."""
    model = make_model(backbone_config, psnr_image_size=psnr_image_size, psnr_max=psnr_max, reference_vote_weight=0.4)
    held_out = noisy_held_out()
    in_bank = torch.tensor([3, 50, 77])
    labels = torch.cat([REFERENCE_LABELS, LABELS[in_bank]])
    pixels = torch.cat([images_of(REFERENCE_LABELS), held_out.pixel_values[in_bank]])
    # Another batch size rounds otherwise.
    features = torch.cat([clear_bank(), held_out.features[in_bank] * (1 + 1e-6)])
    model.set_reference_features(features, pixels if keep_images else None, labels)
    mask = torch.ones(NUM_HELD_OUT, len(labels), dtype=torch.bool)
    mask[in_bank, torch.arange(len(REFERENCE_LABELS), len(labels))] = False
    arguments = {"pixel_values": held_out.pixel_values, "image_features": held_out.features}
    with torch.no_grad():
        expected, with_itself = (
            model(**arguments, reference_mask=each).logits for each in (mask, torch.ones_like(mask))
        )
    scores = predict_from(model, held_out)(torch.arange(NUM_HELD_OUT), "reference")
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert count_in_bank(model, held_out) == len(in_bank)
    assert ((with_itself - expected).abs().amax(1) > 1e-4).nonzero().flatten().tolist() == in_bank.tolist()


def test_8_bit_images_are_known_again(backbone_config):
    model = make_model(backbone_config, "paper")
    held_out = noisy_held_out()
    model.set_reference_features(held_out.features[:5], held_out.pixel_values[:5])
    store = EightBitPixels(NUM_HELD_OUT, (3, 16, 16), model.config)
    store[:] = held_out.pixel_values
    mask = ~torch.eye(NUM_HELD_OUT, 5, dtype=torch.bool)
    with torch.no_grad():
        expected = model(store[:], image_features=held_out.features, reference_mask=mask).logits
    images = dataclasses.replace(held_out, pixel_values=store)
    assert count_in_bank(model, images) == 5
    scores = predict_from(model, images)(torch.arange(NUM_HELD_OUT), "reference")
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
