# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The config and image processor of an export, for the clients that load it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from modeling_rbi import pixel_statistics

from ..evaluation.classifiers import class_names
from .exporters import ExportedFile


_CLIENT_DTYPES = {"float32": "fp32", "float16": "fp16", "int8": "q8"}
# transformers.js refuses types of model that it does not list, and treats all image classifiers alike.
_CLIENT_MODEL_TYPE = "vit"
# Gray levels that two image processors may differ by, as torchvision's and Pillow's resizing do.
_MAX_GRAY_LEVELS = 2.0


def client_config(
    config: PreTrainedConfig, facts: dict[str, Any], files: Sequence[ExportedFile], is_onnx: bool
) -> dict[str, Any]:
    """The `config.json` of an export; the first of the files is the one that transformers.js takes by default."""
    names = class_names(config)
    content: dict[str, Any] = {
        "architectures": ["RBIForImageClassification"],
        "model_type": _CLIENT_MODEL_TYPE,
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "rbi_export": facts,
    }
    if is_onnx:
        dtypes = [entry["dtype"] for entry in facts["files"].values()]
        content["transformers.js_config"] = {"dtype": _CLIENT_DTYPES[dtypes[0]]}
        if apart := {file.path.name: 1 for file in files if file.weights}:
            content["transformers.js_config"]["use_external_data_format"] = apart
    return content


def client_image_processor(
    image_processor: BaseImageProcessor, num_channels: int
) -> tuple[dict[str, Any] | None, str | None]:
    r"""
    The image processor as a `CLIPImageProcessor`, whose steps (resize, crop, rescale, normalize) transformers.js has,
    and has as transformers does. Of other kinds it does some otherwise (EfficientNet), or does not know the name
    (those that end in Pil).

    Args:
        image_processor (`BaseImageProcessor`):
            The model's.
        num_channels (`int`):
            Channels that the model takes.

    Returns:
        The content of `preprocessor_config.json`; or `None`, where the processor does more than these steps, and a
        sentence that says so.
    """
    given = image_processor.to_dict()
    size, crop_size = _lengths(given.get("size")), _lengths(given.get("crop_size"))
    if not given.get("do_center_crop"):
        crop_size = None
    if given.get("crop_pct") and size and (edge := size.get("shortest_edge")):
        # ConvNeXt's, which crops small images alone.
        is_small = edge < 384
        crop_size = {"height": edge, "width": edge} if is_small else None
        size = {"shortest_edge": int(edge / given["crop_pct"])} if is_small else {"height": edge, "width": edge}
    mean, std = pixel_statistics(image_processor, num_channels)
    fields: dict[str, Any] = {
        "do_resize": bool(given.get("do_resize") and size),
        "do_center_crop": crop_size is not None,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
        "do_convert_rgb": num_channels == 3,
    }
    if fields["do_resize"]:
        fields |= {"size": size, "resample": int(given.get("resample") or 0)}
    if crop_size:
        fields["crop_size"] = crop_size
    if _prepare_alike(image_processor, CLIPImageProcessorPil(**fields), num_channels, min(std)):
        return {"image_processor_type": "CLIPImageProcessor"} | fields, None
    return None, (
        f"{type(image_processor).__name__} prepares images in a way that transformers.js may not have: give the "
        "model prepared pixel_values there."
    )


def _lengths(size: Any) -> dict[str, int] | None:
    return {name: int(length) for name, length in dict(size).items() if length is not None} if size else None


def _prepare_alike(first: Callable, second: Callable, num_channels: int, std: float) -> bool:
    random = np.random.default_rng(0)
    for height, width in ((96, 64), (200, 310), (450, 450)):
        levels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(levels).convert("L" if num_channels == 1 else "RGB")
        prepared = [each(image, return_tensors="pt")["pixel_values"] for each in (first, second)]
        if prepared[0].shape != prepared[1].shape:
            return False
        if (prepared[0] - prepared[1]).abs().max() > _MAX_GRAY_LEVELS / 255 / std:
            return False
    return True


def scores_note(config: PreTrainedConfig) -> str | None:
    if config.num_labels > 1 and config.problem_type in (None, "single_label_classification"):
        return None
    return (
        "The pipeline of transformers.js makes scores by softmax, which this model's are not: take the logits of its "
        "AutoModelForImageClassification there."
    )
