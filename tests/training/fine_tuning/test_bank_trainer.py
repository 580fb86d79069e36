"""Training through a reference bank, from the command line's arguments to the saved model."""

import json

import pytest
import torch

from modeling_rbi import RBIForImageClassification
from training.fine_tuning import bank_trainer
from training.train import main


@pytest.fixture
def options(arguments, tmp_path):
    return arguments(tmp_path / "output", preset="kernel", train_relation_scope="reference")


@pytest.mark.slow
def test_the_model_carries_the_training_images_as_its_backbone_sees_them(options, unlabeled_dir, tmp_path, capsys):
    assert main([*options, "--unlabeled_dir", str(unlabeled_dir), "--unlabeled_per_batch", "2"]) == 0, (
        capsys.readouterr().err
    )
    # Loading compares the bank's backbone with the model's.
    model = RBIForImageClassification.from_pretrained(tmp_path / "output")
    bank = model.describe_references()
    num_unlabeled = len(list(unlabeled_dir.rglob("*.png")))
    assert num_unlabeled and bank["num_references"] - bank["num_labeled"] == num_unlabeled
    assert model.config.relation_scope == "reference"


@pytest.mark.slow
def test_no_training_image_attends_to_itself(options, monkeypatch):
    weights_of_itself = []

    class Watched(bank_trainer.BankTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            rows = inputs["rows"]

            def watch(module, args, output):
                if module.training:
                    # Column 0 is the image's own, the training images come next.
                    weights_of_itself.append(output.attention[torch.arange(len(rows)), :, 1 + rows].detach())

            handle = model.rbi.rra.register_forward_hook(watch)
            try:
                return super().training_step(model, inputs, num_items_in_batch)
            finally:
                handle.remove()

    monkeypatch.setattr("training.fine_tuning.run.BankTrainer", Watched)
    assert main(options) == 0
    assert weights_of_itself and all((weights == 0).all() for weights in weights_of_itself)


@pytest.mark.slow
def test_stopped_within_an_epoch_it_goes_on_with_the_bank_of_that_epoch(arguments, tmp_path, stop_at):
    options = {"train_relation_scope": "reference", "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    options |= {"load_best_model_at_end": False, "optim": "sgd", "preset": "kernel", "rand_augment_num_ops": 0}
    assert main(arguments(tmp_path / "whole", **options)) == 0
    go_on = stop_at(7, KeyboardInterrupt())  # 4 steps an epoch
    assert main(arguments(tmp_path / "out", **options)) == 130
    go_on()
    assert main(arguments(tmp_path / "out", resume_from_checkpoint="last", **options)) == 0
    losses = [
        [entry["loss"] for entry in json.loads((tmp_path / name / "run.json").read_text())["metrics_by_epoch"]]
        for name in ("whole", "out")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mixup_alpha", "0.2"], "--mixup_alpha"),
        (["--ema_decay", "0.9"], "--ema_decay"),
        (["--lora_rank", "2"], "--lora_rank"),
        (["--relation_batch_size", "2"], "leave --relation_batch_size"),
    ],
)
def test_what_does_not_go_with_a_bank_is_refused(options, more, message, capsys):
    assert main([*options, *more]) in (1, 2)
    assert message in capsys.readouterr().err


def test_too_large_a_bank_is_refused(options, monkeypatch, capsys):
    monkeypatch.setattr(bank_trainer, "MAX_REFERENCES", 3)
    assert main(options) == 1
    assert "larger than a model's bank can be (3)" in capsys.readouterr().err
