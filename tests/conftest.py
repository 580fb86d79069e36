"""What all tests share: no network, one thread, seeds, and small models."""

import importlib.util
import os
import sys
from pathlib import Path


# Read at import by huggingface_hub, so it is set before anything imports it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch
from PIL import Image
from transformers import ConvNextConfig
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.utils import logging

from modeling_rbi import RBIConfig, RBIForImageClassification


# The workers of pytest-xdist share the cores.
torch.set_num_threads(1)
logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def backbone_config():
    """A ConvNeXt of a few thousand parameters for images of 32 x 32, 24 features."""
    return ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], image_size=32)


@pytest.fixture(params=["paper", "kernel"])
def config(request, backbone_config):
    """Both presets, 5 classes."""
    return getattr(RBIConfig, request.param)(backbone_config=backbone_config, num_labels=5)


@pytest.fixture
def pixel_values():
    """7 different smooth images, normalized with ImageNet's mean and std."""
    images = torch.nn.functional.interpolate(torch.rand(7, 3, 4, 4), size=(32, 32), mode="bilinear")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean[:, None, None]) / std[:, None, None]


@pytest.fixture(scope="session")
def image_files(tmp_path_factory):
    """9 different smooth images, `cat_0.png` to `fox_2.png`, of 40 x 48."""
    folder = tmp_path_factory.mktemp("image_files")
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog", "fox"):
        color = torch.rand(3, generator=generator)
        for number in range(3):
            pixels = 255 * (0.6 * color + 0.4 * torch.rand(4, 4, 3, generator=generator))
            image = Image.fromarray(pixels.to(torch.uint8).numpy())
            image.resize((40, 48), Image.Resampling.BICUBIC).save(folder / f"{name}_{number}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, image_files):
    """
    A saved model, with its image processor and code, of the classes cat, dog and fox and with a bank of 6 labeled
    images: small, random, and sure enough of its answers that they can be told apart.
    """
    torch.manual_seed(0)
    backbone_config = ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], image_size=32)
    config = RBIConfig.kernel(
        backbone_config=backbone_config,
        id2label={0: "cat", 1: "dog", 2: "fox"},
        label2id={"cat": 0, "dog": 1, "fox": 2},
    )
    model = RBIForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    statistics = {"image_mean": config.image_mean, "image_std": config.image_std}
    image_processor = ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=1.0, **statistics)
    references = [
        {"image": Image.open(path).convert("RGB"), "label": config.label2id[Path(path).stem.split("_")[0]]}
        for path in image_files
        if not path.stem.endswith("2")
    ]
    model.set_references(references, image_processor=image_processor)
    folder = tmp_path_factory.mktemp("model_folder") / "pets"
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hub_module():
    """The small Hub of `hub.py`."""
    spec = importlib.util.spec_from_file_location("hub", Path(__file__).with_name("hub.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the types of their fields
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(hub_module):
    """A running Hub, empty."""
    with hub_module.Hub() as hub:
        yield hub
