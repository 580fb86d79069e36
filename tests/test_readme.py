"""The README is true: its Python, commands and JavaScript run in their order."""

import importlib.util
import json
import re
import shlex
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
PUBLISH, OTHERS = README.split("## Publish and deploy")[1].split("\n## ")[0], README.split("## Publish and deploy")[0]
SMALL_IMAGE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
ADDRESS = "https://your-endpoint.endpoints.huggingface.cloud"

# What is added to a command so that it is quick; three held-out images are too few to show that references help.
MORE = {
    "training.train": ["--num_train_epochs", "1", "--use_cpu", "True", "--disable_tqdm", "True"],
    "training.references": ["--force", "--use_cpu", "--disable_tqdm"],
    "training.assess": ["--use_cpu", "--batch_sizes", "4", "--resamples", "100"],
}

# Calls commands in one process, [module, [argument, ...]] each, since importing torch takes longer than most of them.
RUN_COMMANDS = """
import importlib, json, sys, threading, urllib.request
from training.deployment import publication

# Reloads the folder in a process of its own, which test_publish.py and test_checks.py do.
publication.check_loads_back = lambda *args: None
for module, arguments in json.load(sys.stdin):
    main = importlib.import_module(module).main
    if module == "training.space":  # serves until it is stopped
        arguments += ["--port", "7999"]
        threading.Thread(target=main, args=(arguments,), daemon=True).start()
        for _ in range(600):
            try:
                assert b"gradio" in urllib.request.urlopen("http://127.0.0.1:7999", timeout=5).read()
                break
            except OSError:
                threading.Event().wait(0.1)
        else:
            sys.exit("The Space does not answer.")
    elif code := main(arguments):
        sys.exit(f"{module} {arguments}: exit code {code}")
"""


def _blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def _save_checkpoints(folder: Path):
    """Small random checkpoints under the names that the README loads from the Hub."""
    dinov2 = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 12], depths=[1, 1, 1, 1], layer_type="basic")
    for name, model in (
        ("facebook/dinov2-small", Dinov2Model(dinov2)),
        ("microsoft/resnet-50", ResNetForImageClassification(resnet)),
    ):
        model.save_pretrained(folder / name)
        BitImageProcessorPil(**SMALL_IMAGE).save_pretrained(folder / name)


@pytest.mark.slow
def test_python_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # Without torchvision, transformers 5.17 has a placeholder under this name, although the class works without.
    monkeypatch.setattr(transformers, "AutoImageProcessor", AutoImageProcessor)
    _save_checkpoints(tmp_path)
    for name, color in (("a.jpg", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (40, 50), color).save(name)
    blocks = _blocks("python", README.replace(PUBLISH, ""))
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "torch.Size([2, 1, 2])" in printed and "'num_references': 2" in printed


@pytest.fixture
def workplace(tmp_path):
    """A folder with what the commands name: images, a backbone, facts for the card, and the project's folders."""
    for name in ("training", "model_cards"):
        (tmp_path / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    for folder, number in (("images/cat", 20), ("images/dog", 20), ("images/fox", 20), ("camera", 4)):
        (tmp_path / folder).mkdir(parents=True)
        for index in range(number):
            image = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((40, 48))
            image.save(tmp_path / folder / f"{index}.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "images" / "cat" / "1.jpg").read_bytes())
    _save_checkpoints(tmp_path)
    (card,) = _blocks("yaml", PUBLISH)
    # The backbone is in a folder, and the data set has no name.
    more = ["base_model: facebook/dinov2-small", "dataset_title: Noise"]
    (tmp_path / "card.yaml").write_text("\n".join([card, *more]))
    return tmp_path


def _python_commands(text: str, number: int) -> list[tuple[str, list[str]]]:
    """The modules and arguments of the `python -m training...` commands of a text, exactly `number`."""
    lines = [line.split("#")[0] for line in "".join(_blocks("bash", text)).splitlines()]
    words = [shlex.split(line) for line in lines if line.startswith("python -m ")]
    assert len(words) == number
    return [(module, [*arguments, *MORE.get(module, [])]) for _, _, module, *arguments in words]


@pytest.mark.slow
def test_commands_run_in_their_order(hub, workplace, node):
    """Training, references, publication, Space and exports; then the clients of an endpoint, and ONNX in Node.js."""
    environment = hub.env(workplace / "home", token=hub.add_user("user"))
    environment |= {"PYTHONPATH": str(ROOT), "RBI_CACHE": str(workplace / "cache")}

    def run(*command: str, **options) -> str:
        result = subprocess.run(
            command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=600, **options
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    references, *training = _python_commands(OTHERS, 3)  # the README tells of references before training
    commands = [*training, references, *_python_commands(PUBLISH, 6)]
    run(sys.executable, "-c", RUN_COMMANDS, input=json.dumps(commands))
    assert (workplace / "outputs" / "with-references" / "references.json").exists()
    assert "model.safetensors" in hub.repo("user/name").files()

    hf_commands = [line for line in "".join(_blocks("bash", PUBLISH)).splitlines() if line.startswith("hf ")]
    assert len(hf_commands) == 2
    for line in hf_commands:
        run(str(Path(sys.executable).with_name("hf")), *shlex.split(line)[1:])
    space = hub.repo("user/space", "space")
    assert "app.py" in space.files() and space.variables == {"MODEL_ID": "user/name"}

    spec = importlib.util.spec_from_file_location("endpoint", ROOT / "tests" / "model_cards" / "endpoint.py")
    endpoint = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(endpoint)
    (python,) = _blocks("python", PUBLISH)
    (in_node,) = _blocks("js", PUBLISH)
    (client,) = _blocks("js", (ROOT / "model_cards" / "README.md").read_text(encoding="utf-8"))
    (workplace / "node_modules").symlink_to(ROOT / "tests" / "node" / "node_modules")
    handler = endpoint.load_handler(workplace / "outputs" / "publish" / "name")
    with endpoint.serve(endpoint.create_app(handler)) as address:
        printed = [
            run(sys.executable, "-c", python.replace(ADDRESS, address)),
            run(node, "--input-type=module", "-e", client.replace(ADDRESS, address)),
            run(node, "--input-type=module", "-e", in_node),
        ]
    answers = [re.findall(r"label['\"]?[:=] ?'(\w+)'", text) for text in printed]
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
def test_the_wheel_ships_only_the_package(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("modeling_rbi-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        folders = {name.split("/")[0] for name in archive.namelist()}
    assert folders == {"modeling_rbi", next(folder for folder in folders if folder.endswith(".dist-info"))}
