"""The bare loop trains what `Trainer` trains, on any number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from training import accelerate_loop, train


ROOT = Path(__file__).parents[2]


@pytest.fixture
def loop_arguments(arguments):
    """As `arguments`, without what the loop has no use for."""

    def make(output_dir, **more):
        line = arguments(output_dir, **more)
        place = line.index("--disable_tqdm")
        return line[:place] + line[place + 2 :]

    return make


def history_of(folder):
    return json.loads((folder / "all_results.json").read_text())


def test_it_reaches_the_loss_of_the_trainer(arguments, loop_arguments, tmp_path):
    options = {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2, "rand_augment_num_ops": 1}
    assert train.main(arguments(tmp_path / "trainer", optim="adamw_torch", **options)) == 0
    accelerate_loop.main(loop_arguments(tmp_path / "loop", **options))
    epochs = json.loads((tmp_path / "trainer" / "run.json").read_text())["metrics_by_epoch"]
    for ours, theirs in zip(history_of(tmp_path / "loop"), epochs, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        for name in ("accuracy", "macro_f1", "calibration_error"):
            assert ours[name] == pytest.approx(theirs[f"eval_{name}"], abs=1e-4)
    expected = load_file(tmp_path / "trainer" / "model.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "loop" / "model.safetensors"), expected, atol=1e-4, rtol=1e-3)


def test_it_mixes_images_as_the_trainer_does(arguments, loop_arguments, tmp_path):
    options = {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}
    assert train.main(arguments(tmp_path / "trainer", optim="adamw_torch", **options)) == 0
    accelerate_loop.main(loop_arguments(tmp_path / "loop", **options))
    accelerate_loop.main(loop_arguments(tmp_path / "unmixed"))
    expected = [
        entry["loss"] for entry in json.loads((tmp_path / "trainer" / "run.json").read_text())["metrics_by_epoch"]
    ]
    losses, unmixed = ([entry["train_loss"] for entry in history_of(tmp_path / name)] for name in ("loop", "unmixed"))
    assert losses == pytest.approx(expected, abs=1e-4)
    assert unmixed != pytest.approx(expected, abs=1e-2)


def test_it_has_the_self_loss_of_the_trainer(arguments, loop_arguments, tmp_path):
    def losses(name):
        return [entry["train_loss"] for entry in history_of(tmp_path / name)]

    options = {"preset": "kernel", "self_loss_weight": 0.7}
    assert train.main(arguments(tmp_path / "trainer", optim="adamw_torch", **options)) == 0
    accelerate_loop.main(loop_arguments(tmp_path / "loop", **options))
    accelerate_loop.main(loop_arguments(tmp_path / "without", preset="kernel"))
    record = json.loads((tmp_path / "trainer" / "run.json").read_text())
    expected = [entry["loss"] for entry in record["metrics_by_epoch"]]
    assert losses("loop") == pytest.approx(expected, abs=1e-4)
    assert losses("without") != pytest.approx(expected, abs=1e-4)


def test_it_leaves_a_model_that_loads(loop_arguments, tmp_path):
    accelerate_loop.main(loop_arguments(tmp_path / "out", num_train_epochs=1))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.num_labels == 4
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
    assert not list((tmp_path / "out").glob(".*"))


def test_a_folder_that_is_not_empty_is_left_alone(loop_arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match="is not empty"):
        accelerate_loop.main(loop_arguments(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_without_validation_there_is_nothing_to_choose_by(loop_arguments, tmp_path):
    with pytest.raises(ValueError, match="--train_val_split"):
        accelerate_loop.main(loop_arguments(tmp_path / "out", train_val_split=0))


@pytest.mark.slow
def test_two_processes_are_one(loop_arguments, tmp_path):
    """Launched as users do; 32 training images in batches of 6, of 3 on each process."""
    accelerate_loop.main(loop_arguments(tmp_path / "one", per_device_train_batch_size=6))
    line = loop_arguments(tmp_path / "two", per_device_train_batch_size=3, gather_across_processes=True)
    config = ROOT / "training" / "accelerate" / "multi_cpu.yaml"
    result = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)),
            *("-m", "training.accelerate_loop", *line),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for ours, theirs in zip(history_of(tmp_path / "two"), history_of(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
