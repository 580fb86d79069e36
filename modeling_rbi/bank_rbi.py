# Copyright 2026 The RBI authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The reference bank: the images, features and labels that a model stores for others to attend to."""

from typing import Any

import torch
from torch import nn

from .configuration_rbi import RBIConfig
from .errors_rbi import UserError


NO_LABEL = -100
# With 1,280 features a bank of this size weighs 97 MB, and costs an image 55 million multiply-adds.
MAX_REFERENCES = 16_384


class ReferenceBank(nn.Module):
    r"""
    Features, small images and labels of the references, and what attention reads of them: their mean, keys and
    values, which are computed once for a model in evaluation.

    Args:
        config (`RBIConfig`):
            Of the model, with its `references`.
    """

    features: torch.Tensor  # (N, d)
    labels: torch.Tensor  # (N,)
    images: torch.Tensor | None  # (N, C, height, width)
    probe: torch.Tensor  # (d,)
    mean: torch.Tensor  # (d,)
    keys: torch.Tensor  # (N, d)
    values: torch.Tensor  # (N, d)

    def __init__(self, config: RBIConfig):
        super().__init__()
        references: dict[str, Any] = config.references or {}
        size, image_shape = references["num_references"], references["image_shape"]
        num_features = config.feature_size or 0
        self.mean_similarity = references["mean_similarity"]
        # Whether mean, keys and values are those of the head as it is.
        self.is_prepared = False
        self.register_buffer("features", torch.zeros(size, num_features))
        self.register_buffer("labels", torch.full((size,), NO_LABEL))
        images = None if image_shape is None else torch.zeros(size, *image_shape, dtype=torch.uint8)
        self.register_buffer("images", images)
        # Features of a fixed pattern, by which a backbone that is not the bank's is known.
        self.register_buffer("probe", torch.zeros(num_features))
        self.register_buffer("mean", torch.zeros(num_features), persistent=False)
        self.register_buffer("keys", torch.zeros(size, num_features), persistent=False)
        self.register_buffer("values", torch.zeros(size, num_features), persistent=False)

    def __len__(self) -> int:
        return self.features.shape[0]

    def unit_range_images(self) -> torch.Tensor:
        """The small images, (N, C * height * width) in float32, pixels in [0, 1]."""
        if self.images is None:
            raise UserError("The bank keeps no images.")
        return self.images.flatten(1).float() / 255


def quantized(images: torch.Tensor) -> torch.Tensor:
    """Pixels in [0, 1] as 8-bit numbers: rounding alone is 58.9 dB, above what PSNR is cut at by default."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def check_size(num_references: int):
    r"""
    Raises:
        UserError: if a bank would be larger than `MAX_REFERENCES`.
    """
    if num_references > MAX_REFERENCES:
        raise UserError(
            f"{num_references} references are more than a model carries ({MAX_REFERENCES}): choose fewer by "
            "`num_references` or `per_class`."
        )
