"""What all tests share: no network, one thread, seeds, and small models."""

import gc
import importlib.util
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path


# Read at import by huggingface_hub, so it is set before anything imports it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# The workers of pytest-xdist share the cores. Processes that tests start inherit this.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from PIL import Image
from transformers import ConvNextConfig
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.utils import logging

from modeling_rbi import RBIConfig, RBIForImageClassification, modeling_rbi


torch.set_num_threads(1)
logging.disable_progress_bar()


def pytest_collection_finish():
    """
    Accelerate collects garbage after each training, which takes 0.7 s with all that torch and transformers have made
    at import. That stays, so it need not be looked through.
    """
    gc.collect()
    gc.freeze()


NODE_FOLDER = Path(__file__).with_name("node")
_CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
_SKIPPED = "is missing: "


def _find_chromium() -> str | None:
    return shutil.which(os.environ.get("CHROMIUM", "")) or next(filter(None, map(shutil.which, _CHROMIUM_NAMES)), None)


def _find_node() -> str | None:
    return shutil.which("node") if (NODE_FOLDER / "node_modules" / ".made").exists() else None


def _find_apt() -> str | None:
    """apt-get, if its lists name the packages that the tests download."""
    path = shutil.which("apt-get")
    command = ["apt-cache", "show", "gnome-cards-data", "dataset-fashion-mnist"]
    return path if path and subprocess.run(command, capture_output=True).returncode == 0 else None


# What tests need besides Python: how it is found, and how to get it.
_TOOLS = {
    "Chromium": (_find_chromium, "`apt-get install chromium`, or set CHROMIUM to the path of a Chromium"),
    "Node.js": (_find_node, "`apt-get install nodejs npm && npm ci --prefix tests/node --ignore-scripts`"),
    "npm": (lambda: shutil.which("npm"), "`apt-get install npm`"),
    "apt-get": (_find_apt, "`apt-get update`, on Debian or one of its derivatives"),
}


def _require(name: str) -> str:
    """The path of a tool. Without it the test is skipped or, in CI, fails."""
    find, fix = _TOOLS[name]
    if (path := find()) is None:
        reason = f"{name} {_SKIPPED}{fix}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def chromium():
    """Path of a Chromium."""
    return _require("Chromium")


@pytest.fixture(scope="session")
def node():
    """Path of Node.js, for scripts in `NODE_FOLDER`, where their packages are installed."""
    return _require("Node.js")


@pytest.fixture(scope="session")
def npm():
    """Path of npm, for the data sets that are npm packages."""
    return _require("npm")


@pytest.fixture(scope="session")
def apt_get():
    """Path of apt-get, for the data sets that are Debian packages."""
    return _require("apt-get")


def pytest_terminal_summary(terminalreporter):
    """Names the tests that were skipped because a tool is missing, and the command that installs it."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple) and _SKIPPED in report.longrepr[2]
    )
    for reason, number in sorted(reasons.items()):
        terminalreporter.write_line(f"{number} tests were skipped, since {reason}", yellow=True)


@pytest.fixture(scope="session", autouse=True)
def _each_backbone_is_measured_once():
    """A measurement takes longer than building the model, and it depends on nothing but this key."""
    sizes = {}

    def measure_once(config, measure=modeling_rbi.measure_feature_size):
        key = config.backbone_config.to_json_string(), config.pooling, len(config.image_mean)
        if key not in sizes:
            sizes[key] = measure(config)
        return sizes[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_rbi, "measure_feature_size", measure_once)
        yield


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
