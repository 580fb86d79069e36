"""What all tests share: no network, one thread, seeds, and small models."""

import os


# Read at import by huggingface_hub, so it is set before anything imports it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch
from transformers import ConvNextConfig
from transformers.utils import logging

from modeling_rbi import RBIConfig


# The workers of pytest-xdist share the cores.
torch.set_num_threads(1)
logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def backbone_config():
    """A ConvNeXt of a few thousand parameters for pictures of 32 x 32, 24 features."""
    return ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], image_size=32)


@pytest.fixture(params=["paper", "kernel"])
def config(request, backbone_config):
    """Both presets, 5 classes."""
    return getattr(RBIConfig, request.param)(backbone_config=backbone_config, num_labels=5)


@pytest.fixture
def pixel_values():
    """7 different smooth pictures, normalised with ImageNet's mean and std."""
    pictures = torch.nn.functional.interpolate(torch.rand(7, 3, 4, 4), size=(32, 32), mode="bilinear")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pictures - mean[:, None, None]) / std[:, None, None]
