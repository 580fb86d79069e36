"""The README is true: its Python runs as it stands, and its commands are those that CI runs."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import transformers
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL_IMAGE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


def _blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """Small random checkpoints under the names that the README loads from the Hub, and its two pictures."""
    monkeypatch.chdir(tmp_path)
    # Without torchvision, transformers 5.17 has a placeholder under this name, though the class works without.
    monkeypatch.setattr(transformers, "AutoImageProcessor", AutoImageProcessor)
    dinov2 = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 12], depths=[1, 1, 1, 1], layer_type="basic")
    for name, model in (
        ("facebook/dinov2-small", Dinov2Model(dinov2)),
        ("microsoft/resnet-50", ResNetForImageClassification(resnet)),
    ):
        model.save_pretrained(name)
        BitImageProcessorPil(**SMALL_IMAGE).save_pretrained(name)
    for name, colour in (("a.jpg", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (40, 50), colour).save(name)


def test_python_runs_as_it_stands(checkpoints, capsys):
    blocks = _blocks("python")
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "torch.Size([2, 1, 2])" in printed and "'num_references': 2" in printed


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_exist_and_ci_runs_them(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = set(re.findall(r"^make ([a-z-]+)", "\n".join(_blocks("bash", text)), flags=re.MULTILINE))
    assert targets
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lanes = set(re.findall(r"^lane ([a-z-]+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
    assert targets - {"test-fast"} <= lanes, "test-fast is a part of test"


@pytest.mark.slow
def test_the_wheel_ships_the_package_alone(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("modeling_rbi-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        folders = {name.split("/")[0] for name in archive.namelist()}
    assert folders == {"modeling_rbi", next(folder for folder in folders if folder.endswith(".dist-info"))}
