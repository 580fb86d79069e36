"""`python -m training.train`: exit codes and messages, and that it can be killed and go on."""

import errno
import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training import accelerate_loop, train
from training.fine_tuning.trainer import RBITrainer, last_complete_checkpoint


HARD = {
    "num_train_epochs": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "epoch",
    "load_best_model_at_end": False,
    "rand_augment_num_ops": 1,
    "random_erasing": 0.5,
    "mixup_alpha": 0.2,
    "ema_decay": 0.9,
    "optimizer": "radam",
    "lr_scheduler_type": "cosine",
    "save_total_limit": 2,
    "self_loss_weight": 0.3,
    "unlabeled_per_batch": 4,
    "references_per_class": 2,
    "num_references": 5,
    "rbi_config": '{"attention_dropout": 0.2, "classifier_dropout": 0.2}',
}


def metrics_of(record):
    """Metrics by epoch and results, without timings."""
    timings = ("runtime", "per_second", "train_loss", "flos")
    parts = {f"epoch {entry['epoch']}": entry for entry in record["metrics_by_epoch"]} | record["results"]
    return {
        f"{part} {name}": value
        for part, metrics in parts.items()
        for name, value in metrics.items()
        if not any(word in name for word in timings)
    }


# Weights that were trained in another process, from tensors that were saved and loaded: with other alignments of
# memory, kernels may round otherwise, and optimizers that divide by the gradient's size enlarge that.
RESUMED = {"atol": 1e-4, "rtol": 1e-3}


@pytest.mark.slow
@pytest.mark.parametrize("module", [train, accelerate_loop], ids=["training.train", "training.accelerate_loop"])
def test_killed_in_mid_epoch_it_goes_on(arguments, start_command, tmp_path, unlabeled_dir, module):
    """As if it had not been killed. The process that is killed is the one that starts as users do."""
    if module is train:
        options, resume = HARD | {"unlabeled_dir": unlabeled_dir}, ["--resume_from_checkpoint", "last"]
    else:
        options = {"num_train_epochs": 4, "checkpointing_steps": 1, "rand_augment_num_ops": 1}
        options |= {"rbi_config": HARD["rbi_config"], "self_loss_weight": 0.3}
        resume = ["--resume_from_checkpoint", "True"]

    def words(folder):
        line = arguments(folder, **options)
        if module is accelerate_loop:
            place = line.index("--disable_tqdm")
            del line[place : place + 2]
        return line

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = start_command(module.__name__, words(killed))
    deadline = time.monotonic() + 300
    # 4 steps an epoch: after step 6 it is in the second epoch.
    while not any((killed / f"checkpoint-{step}").exists() for step in (6, 7)) and time.monotonic() < deadline:
        time.sleep(0.001)
    started.process.kill()
    assert started.wait() == -signal.SIGKILL
    assert not (killed / "all_results.json").exists()
    assert module.main([*words(killed), *resume]) == 0

    assert module.main(words(whole)) == 0
    expected, weights = load_file(whole / "model.safetensors"), load_file(killed / "model.safetensors")
    torch.testing.assert_close(weights, expected, **RESUMED)
    assert ("rbi.references.features" in expected) == (module is train)
    if module is train:
        records = [json.loads((folder / "run.json").read_text()) for folder in (whole, killed)]
        assert records[1]["status"] == "finished"
        assert metrics_of(records[1]) == pytest.approx(metrics_of(records[0]), rel=1e-3, abs=1e-4)
    else:
        histories = [json.loads((folder / "all_results.json").read_text()) for folder in (whole, killed)]
        for actual, other in zip(*histories, strict=True):
            assert actual == pytest.approx(other, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_killed_before_its_first_checkpoint_it_starts_again(arguments, tmp_path, stop_at, capsys):
    go_on = stop_at(2, KeyboardInterrupt())
    train.main(arguments(tmp_path / "out", num_train_epochs=1))
    assert "There is no checkpoint yet" in capsys.readouterr().err
    go_on()
    assert train.main(arguments(tmp_path / "out", num_train_epochs=1, resume_from_checkpoint="last")) == 0


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_saved(arguments, tmp_path, monkeypatch, capsys):
    original = RBITrainer._save_optimizer_and_scheduler

    def fill(self, output_dir):
        if self.state.global_step > 4:
            Path(output_dir, "optimizer.pt").write_bytes(b"cut off")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, output_dir)

    monkeypatch.setattr(RBITrainer, "_save_optimizer_and_scheduler", fill)
    line = arguments(tmp_path / "out")
    assert train.main(line) == 1
    message = capsys.readouterr().err
    assert "the disk is full" in message and "--resume_from_checkpoint last" in message
    assert last_complete_checkpoint(tmp_path / "out").name == "checkpoint-4"
    monkeypatch.setattr(RBITrainer, "_save_optimizer_and_scheduler", original)
    assert train.main([*line, "--resume_from_checkpoint", "last"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_stopping_patience": 1, "train_val_split": 0}, "needs validation images"),
        ({"save_strategy": "best", "train_val_split": 0}, "--save_strategy best needs validation images: raise"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "train_val_split": 0}, "plateau needs validation images"),
        ({"eval_on_start": True, "train_val_split": 0}, "--eval_on_start needs validation images"),
        ({"gradient_checkpointing": True}, "--gradient_checkpointing: ConvNextModel, the backbone, does not support"),
        ({"auto_find_batch_size": True}, "set the batch size"),
        ({"backbone_config": "{}", "model_name_or_path": "./nothing"}, "there is no such folder"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, tmp_path, capsys, options, message):
    assert train.main(arguments(tmp_path / "out", **options)) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("module", [train, accelerate_loop], ids=["training.train", "training.accelerate_loop"])
@pytest.mark.parametrize("name", ["run[red]x", "a[b]c[", ":cat:"])
def test_the_name_of_a_folder_is_no_markup(arguments, tmp_path, capsys, module, name):
    line = arguments(tmp_path / name, num_train_epochs=1)
    if module is accelerate_loop:
        place = line.index("--disable_tqdm")
        del line[place : place + 2]
    assert module.main(line) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.endswith(str(tmp_path / name))]
    assert len(printed) == (2 if module is train else 1)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--learnig_rate", "did you mean `--learning_rate`?"),
        ("--train_dirs", "did you mean `--train_dir`?"),
        ("--relation_batch_sizes", "did you mean `--relation_batch_size`?"),
    ],
)
def test_unknown_flags_are_refused_with_the_nearest(arguments, tmp_path, capsys, flag, message):
    assert train.main([*arguments(tmp_path / "out"), flag, "1"]) == 2
    assert message in capsys.readouterr().err
