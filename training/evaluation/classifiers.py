# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Loads a classifier, matches its classes to the classes of a data set, and predicts from cached features."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from modeling_rbi import RBIConfig, RBIForImageClassification, UserError, load_image_processor
from modeling_rbi.errors_rbi import listed

from ..data.form import class_name, iter_rows, labels_of
from .features import CachedImages, is_itself
from .protocols import Predict


def load_config(name: str, revision: str = "main") -> PreTrainedConfig:
    r"""
    Loads the config of a model from a folder or the Hub.

    Raises:
        UserError: if the folder does not exist, or the config cannot be read.
        OSError: if the Hub has no such model, or cannot be reached.
    """
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"--model {name}: there is no such folder.")
    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except ValueError as error:
        raise UserError(f"--model {name}: its config cannot be read ({error}).") from error


def load_classifier(name: str, revision: str, config: PreTrainedConfig) -> tuple[PreTrainedModel, Any]:
    r"""
    Loads a model, in evaluation mode, and its image processor.

    Raises:
        UserError: if it is not an image classifier, or weights are missing (they would be random) or unreadable.
        OSError: if there is no such model, or it has no image processor.
    """
    try:
        image_processor = load_image_processor(name, revision=revision)
    except ValueError as error:
        raise UserError(f"--model {name}: its image processor cannot be read ({error}).") from error
    is_rbi = config.model_type == RBIConfig.model_type
    model_class = RBIForImageClassification if is_rbi else AutoModelForImageClassification
    try:
        model, info = model_class.from_pretrained(name, revision=revision, output_loading_info=True)
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"--model {name}: its weights cannot be read ({error}).") from error
    except ValueError as error:
        raise UserError(f"--model {name}: it cannot be loaded as an image classifier ({error}).") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"--model {name} lacks {len(missing)} weights of {type(model).__name__}, for instance `{missing[0]}`: it "
            "is not a trained image classifier, or was saved from another model class."
        )
    return model.eval(), image_processor


def in_order_of_content(split: datasets.Dataset) -> datasets.Dataset:
    r"""
    Sorts the images by a hash of their path relative to their common folder, or of their bytes if the data set holds
    them. This order carries no meaning and does not depend on the order in which they are read.
    """
    images, boxes = zip(*((row["image"], row.get("box")) for row in iter_rows(split)), strict=True)
    folders = {os.path.dirname(image["path"]) for image in images if image["bytes"] is None}
    root = os.path.commonpath(folders) if folders else ""
    keys = [
        hashlib.sha256(
            (image["bytes"] if image["bytes"] is not None else os.path.relpath(image["path"], root).encode())
            + json.dumps(box).encode()
        ).digest()
        for image, box in zip(images, boxes, strict=True)
    ]
    return split.select(sorted(range(len(keys)), key=keys.__getitem__))


def match_labels(split: datasets.Dataset, config: PreTrainedConfig) -> torch.Tensor:
    r"""
    Matches the classes of the data to the classes of the model by name. Returns the model's number of each class,
    `(num_classes,)`, -100 for classes without images.

    Raises:
        UserError: if all images are of one class, several labels match one class, or the model lacks a class.
    """
    names = split.features["label"].names
    present = labels_of(split).unique().tolist()
    if len(present) < 2:
        raise UserError(f'All images are of one class, "{names[present[0]]}": name images of at least two.')
    numbers = {name: number for number, name in enumerate(class_names(config))} | (config.label2id or {})
    numbers = {class_name(name): number for name, number in numbers.items()}
    if unknown := [names[label] for label in present if names[label] not in numbers]:
        raise UserError(
            f"The model lacks {len(unknown)} of the {len(present)} labels of the data ({listed(unknown)}; the model "
            f"has {listed(class_names(config))}): use the same names in the data and in `id2label` and `label2id` of "
            "the model's config."
        )
    matched = torch.full((len(names),), -100)
    matched[present] = torch.tensor([int(numbers[names[label]]) for label in present])
    if len(matched[present].unique()) < len(present):
        raise UserError("Several labels of the data match one class of the model: see `label2id` of its config.")
    return matched


def class_names(config: PreTrainedConfig) -> list[str]:
    """Class names from `id2label`, or from `label2id` where those are placeholders (`LABEL_0`)."""
    named = {int(number): name for name, number in (config.label2id or {}).items()}
    names = {int(number): name for number, name in config.id2label.items()}
    return [
        named.get(number, names[number]) if names[number] == f"LABEL_{number}" else names[number]
        for number in sorted(names)
    ]


@torch.no_grad()
def count_in_bank(model: PreTrainedModel, images: CachedImages) -> int:
    """Number of images that are also in the model's bank."""
    if not isinstance(model, RBIForImageClassification) or model.rbi.references is None:
        return 0
    number = 0
    for rows in torch.arange(len(images.labels)).split(256):
        pixel_values, features, _ = (values.to(model.device) for values in images.batch(rows))
        number += int(is_itself(model.rbi.rpe, model.rbi.references, pixel_values, features).any(1).sum())
    return number


def predict_from(
    model: PreTrainedModel, images: CachedImages, *, exclude_self: bool = True, only_scope: str | None = None
) -> Predict:
    r"""
    Returns a function that computes the logits of cached images, in float32 on the CPU.

    Args:
        model (`PreTrainedModel`):
            RBI model, or another classifier, whose logits are the cached features.
        images (`CachedImages`):
            Images to choose rows from.
        exclude_self (`bool`, *optional*, defaults to `True`):
            Whether references that show the image itself are masked. `False` saves the search for them.
        only_scope (`str`, *optional*):
            Relation scope that overrides the requested one.
    """

    @torch.no_grad()
    def predict(rows: torch.Tensor, relation_scope: str) -> torch.Tensor:
        relation_scope = only_scope or relation_scope
        pixel_values, features, _ = images.batch(rows)
        if not isinstance(model, RBIForImageClassification):
            return features.float()
        pixel_values, features, mask = pixel_values.to(model.device), features.to(model.device), None
        if exclude_self and relation_scope == "reference" and model.rbi.references is not None:
            mask = ~is_itself(model.rbi.rpe, model.rbi.references, pixel_values, features)
        output = model(
            pixel_values=pixel_values, image_features=features, relation_scope=relation_scope, reference_mask=mask
        )
        return output.logits.float().cpu()

    return predict
