"""The commands of training/README.md run, on small data sets and a small checkpoint of the name they use."""

import importlib
import json
import re
import shlex
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
from PIL import Image
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from training.ablation.arguments import AblationArguments
from training.assess import AssessmentArguments
from training.fine_tuning.arguments import Arguments
from training.references import ReferenceArguments


ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
COMMANDS = "".join(re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)).splitlines()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the commands name: images, a checkpoint, and the project's `training`."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "training").symlink_to(ROOT / "training")
    for place, name in enumerate(("cat", "dog", "fox")):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(20):
            color = (90 * place, 10 * number, 99)
            Image.new("RGB", (40, 48), color).save(folder / "images" / name / f"{number}.png")
    (folder / "camera").mkdir()
    for number in range(4):
        Image.new("RGB", (40, 48), (9, 60 * number, 9)).save(folder / "camera" / f"{number}.png")
    config = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    Dinov2Model(config).save_pretrained(folder / "facebook" / "dinov2-small")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    BitImageProcessorPil(**size).save_pretrained(folder / "facebook" / "dinov2-small")
    return folder


# Makes a command quick.
MORE = {
    "training.train": ["--use_cpu", "--disable_tqdm", "True"],
    "training.references": ["--use_cpu", "--disable_tqdm", "True", "--force"],  # three held-out images show nothing
    "training.assess": ["--use_cpu", "--disable_tqdm", "True", "--resamples", "100"],
    "training.ablate": [
        *("--use_cpu", "--disable_tqdm", "True"),
        *("--arms", "rbi", "bank-trained", "--num_seeds", "2", "--frozen_steps", "2", "--num_shuffles", "2"),
    ],
    "training.accelerate_loop": ["--use_cpu"],
    "training.check_data": [],
}


def unfinish(output_dir):
    """Leaves a run as if it had been killed in its last epoch."""
    record = output_dir / "run.json"
    record.write_text(record.read_text().replace('"status": "finished"', '"status": "running"'))
    shutil.rmtree(max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])))


@pytest.mark.slow
def test_the_commands_run_in_their_order(workplace, start_command, monkeypatch, capsys):
    """In this process, since importing takes longer than most of them, but for the one of several processes."""
    assert len(COMMANDS) == 10
    monkeypatch.chdir(workplace)
    for command in COMMANDS:
        line = shlex.split(command)
        module = line[line.index("-m") + 1]
        line += MORE[module]
        if module == "training.train":
            line += ["--num_train_epochs", "2"]
        if "--dry_run" in line:
            line += [
                "--backbone_config",
                '{"model_type": "convnext", "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}',
            ]
        if "orl_faces" in command:
            line += ["--image_size", "32", "--max_test_samples", "40"]
        if "--resume_from_checkpoint" in line:
            unfinish(workplace / "outputs" / "mine")
        if line[0] == "accelerate":
            # There are processes where there are no GPUs.
            line[line.index("training/accelerate/multi_gpu.yaml")] = "training/accelerate/multi_cpu.yaml"
            launch = start_command("accelerate.commands.launch", line[2:], folder=workplace, PYTHONPATH=str(ROOT))
            assert launch.wait() == 0, f"{command}\n{launch.stderr}"
            record = json.loads((workplace / "outputs" / "several" / "run.json").read_text())
            assert record["environment"]["hardware"]["processes"] == 2
            continue
        code = importlib.import_module(module).main(line[line.index(module) + 1 :])
        printed = capsys.readouterr()
        is_check = module == "training.check_data"
        assert code == 0 or (is_check and "few_images" in printed.out), f"{command}\n{printed.err}"


def test_arguments_that_the_text_names_are_there():
    names = set(re.findall(r"--([a-z0-9_]+)", TEXT)) - {"help", "config_file", "config"}
    assert len(names) > 30
    known = {
        field.name
        for arguments in (Arguments, AblationArguments)
        for part in get_type_hints(arguments).values()
        if is_dataclass(part)
        for field in fields(part)
    }
    known |= {field.name for arguments in (AssessmentArguments, ReferenceArguments) for field in fields(arguments)}
    assert names <= known
