# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Config and image processors of exports, in a form that transformers.js supports."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.mobilevit.image_processing_pil_mobilevit import MobileViTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_rbi import RBIConfig
from training.deployment.client import client_config, client_image_processor


@pytest.mark.parametrize(
    "image_processor",
    [
        ViTImageProcessorPil(size={"height": 48, "width": 40}),
        ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=0.875),
        ConvNextImageProcessorPil(size={"shortest_edge": 384}),
        CLIPImageProcessorPil(size={"shortest_edge": 70}, crop_size={"height": 64, "width": 64}),
        EfficientNetImageProcessorPil(size={"height": 48, "width": 48}, include_top=True),
        ViTImageProcessorPil(size={"height": 32, "width": 32}, rescale_factor=1 / 127.5, do_normalize=False),
    ],
    ids=["vit", "convnext-crop", "convnext-384", "clip", "efficientnet", "own-scale"],
)
def test_image_processors_in_a_form_that_clients_have(image_processor, tmp_path):
    fields, note = client_image_processor(image_processor, 3)
    assert note is None and fields["image_processor_type"] == "CLIPImageProcessor"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (150, 101, 3), dtype=np.uint8))
    expected, got = (each(image, return_tensors="pt")["pixel_values"] for each in (image_processor, loaded))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_image_processors_that_clients_do_not_have():
    fields, note = client_image_processor(MobileViTImageProcessorPil(do_flip_channel_order=True), 3)
    assert fields is None and "MobileViTImageProcessor" in note


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["cat", "dog", "fox"], ["cat", "dog", "fox"]),
        (["crane", "dog", "crane"], ["crane (0)", "dog", "crane (2)"]),
        (["crane", "crane", "crane (0)"], ["crane (0) (0)", "crane (1)", "crane (0)"]),
    ],
)
def test_no_class_is_lost(names, shown):
    content = client_config(RBIConfig(id2label=dict(enumerate(names))), {"files": {}}, [], is_onnx=False)
    assert content["id2label"] == {str(number): name for number, name in enumerate(shown)}
    assert content["label2id"] == {name: number for number, name in enumerate(shown)}
