"""The README is true: its Python runs as it stands, and its commands are those that CI runs."""

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL_IMAGE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


SECTION = README.split("## Publish and deploy")[1].split("\n## ")[0]
ADDRESS = "https://your-endpoint.endpoints.huggingface.cloud"


def _blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """Small random checkpoints under the names that the README loads from the Hub, and its two images."""
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
    for name, color in (("a.jpg", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (40, 50), color).save(name)


def test_python_runs_as_it_stands(checkpoints, capsys):
    blocks = _blocks("python", README.replace(SECTION, ""))
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "torch.Size([2, 1, 2])" in printed and "'num_references': 2" in printed


@pytest.fixture
def workplace(tmp_path, model_folder, image_files):
    """A folder with what "Publish and deploy" names: a model, images of its classes, and the project's folders."""
    for name in ("training", "model_cards"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(model_folder, tmp_path / "outputs" / "mine")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "fox"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(20):
            image = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((40, 48))
            image.save(tmp_path / "images" / name / f"{number}.jpg")
    shutil.copy(tmp_path / "images" / "cat" / "1.jpg", tmp_path / "a.jpg")
    (card,) = _blocks("yaml", SECTION)
    # The model of the tests was not trained by `training.train`, so there are more facts to tell.
    more = ["base_model: facebook/convnext-tiny-224", "training_procedure: None.", "dataset_title: Noise"]
    (tmp_path / "card.yaml").write_text("\n".join([card, *more, "share_images: true"]))
    return tmp_path


@pytest.mark.slow
def test_publish_and_deploy(hub, workplace):
    """Its commands run in their order, against a Hub, an endpoint and a Node.js of this machine."""
    environment = hub.env(workplace / "home", token=hub.add_user("user"), OMP_NUM_THREADS="1")
    environment |= {"PYTHONPATH": str(ROOT), "RBI_CACHE": str(workplace / "cache")}
    commands = "".join(_blocks("bash", SECTION)).splitlines()
    assert len(commands) == 8
    for command in commands:
        line = shlex.split(command)
        line[0] = str(Path(sys.executable).with_name(line[0])) if line[0] == "hf" else sys.executable
        if "training.space" in line:  # it serves until it is stopped
            with subprocess.Popen(
                [*line, "--port", "7999"], cwd=workplace, env=environment, stdout=subprocess.PIPE, text=True
            ) as space:
                assert any("http://127.0.0.1:7999" in row for row in space.stdout)
                space.terminate()
            continue
        if "training.assess" in line:
            line += ["--use_cpu", "--batch_sizes", "4", "--resamples", "100"]
        result = subprocess.run(line, cwd=workplace, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    assert "model.safetensors" in hub.repo("user/name").files()
    space = hub.repo("user/space", "space")
    assert "app.py" in space.files() and space.variables == {"MODEL_ID": "user/name"}

    server = [sys.executable, str(ROOT / "tests" / "model_cards" / "endpoint.py"), str(workplace / "published")]
    shutil.copytree(workplace / "outputs" / "publish" / "name", workplace / "published")
    (python,) = _blocks("python", SECTION)
    (in_node,) = _blocks("js", SECTION)
    (client,) = _blocks("js", (ROOT / "model_cards" / "README.md").read_text(encoding="utf-8"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    (workplace / "node_modules").symlink_to(ROOT / "tests" / "node" / "node_modules")
    with subprocess.Popen(server, cwd=workplace, env=environment, **pipes) as endpoint:
        address = endpoint.stdout.readline().strip()
        answers = []
        for runtime, code in (
            ([sys.executable, "-c"], python.replace(ADDRESS, address)),
            (["node", "--input-type=module", "-e"], client.replace(ADDRESS, address)),
            (["node", "--input-type=module", "-e"], in_node),
        ):
            result = subprocess.run([*runtime, code], cwd=workplace, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            answers.append(re.findall(r"label['\"]?[:=] ?'(\w+)'", result.stdout))
        endpoint.stdin.close()
    assert answers[0] == answers[1] == answers[2] and len(answers[0]) == 3


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
