# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Config and image processor of an export, in the form that transformers.js loads."""

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
# transformers.js refuses unknown model types, but treats all image classifiers alike.
_CLIENT_MODEL_TYPE = "vit"
# Largest difference of two image processors in gray levels, as between the resizing of torchvision and Pillow.
_MAX_GRAY_LEVELS = 2.0


def client_config(
    config: PreTrainedConfig, facts: dict[str, Any], files: Sequence[ExportedFile], is_onnx: bool
) -> dict[str, Any]:
    """
    Content of `config.json`. transformers.js uses the first of the files by default. Class names are as shown, since
    clients know a class by its name only.
    """
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
    Converts an image processor to a `CLIPImageProcessor`, whose steps (resize, crop, rescale, normalize) are the same
    in transformers and transformers.js. Some others are implemented differently there (EfficientNet) or unknown by
    name (those that end in Pil).

    Args:
        image_processor (`BaseImageProcessor`):
            The model's image processor.
        num_channels (`int`):
            Number of channels of the model's images.

    Returns:
        The content of `preprocessor_config.json` and `None`; or, if the processor does more than these steps, `None`
        and a sentence that says so.
    """
    given = image_processor.to_dict()
    size, crop_size = _lengths(given.get("size")), _lengths(given.get("crop_size"))
    if not given.get("do_center_crop"):
        crop_size = None
    if given.get("crop_pct") and size and (edge := size.get("shortest_edge")):
        # ConvNeXt crops only if the size is below 384.
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
        f"{type(image_processor).__name__} has steps that transformers.js may not support: pass prepared "
        "pixel_values to the model there."
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
    """A warning for models whose scores are not a softmax, which is all that transformers.js computes."""
    if config.num_labels > 1 and config.problem_type in (None, "single_label_classification"):
        return None
    return (
        "The pipeline of transformers.js applies a softmax, which is wrong for this model: use the logits of "
        "AutoModelForImageClassification there."
    )
