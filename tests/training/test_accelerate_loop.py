"""The bare loop trains what `Trainer` trains, on any number of processes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from training import accelerate_loop, train


@pytest.fixture(scope="module")
def loop_command_line(command_line):
    """As `command_line`, without what the loop does not have."""

    def make(output_dir, **more):
        line = command_line(output_dir, **more)
        place = line.index("--disable_tqdm")
        return line[:place] + line[place + 2 :]

    return make


@pytest.fixture
def loop_arguments(arguments, loop_command_line):
    return loop_command_line


def history_of(folder):
    return json.loads((folder / "all_results.json").read_text())


@pytest.mark.slow  # all of them together
@pytest.mark.parametrize(
    ("options", "without"),
    [
        ({"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2, "rand_augment_num_ops": 1}, None),
        ({"mixup_alpha": 0.4, "cutmix_alpha": 1.0}, {}),
        ({"preset": "kernel", "self_loss_weight": 0.7}, {"preset": "kernel"}),
    ],
    ids=["schedule", "mixing", "self loss"],
)
def test_it_trains_as_the_trainer_does(arguments, loop_arguments, tmp_path, options, without):
    """The same losses, metrics and weights, which differ `without` the options."""
    assert train.main(arguments(tmp_path / "trainer", optim="adamw_torch", **options)) == 0
    assert accelerate_loop.main(loop_arguments(tmp_path / "loop", **options)) == 0
    epochs = json.loads((tmp_path / "trainer" / "run.json").read_text())["metrics_by_epoch"]
    for ours, theirs in zip(history_of(tmp_path / "loop"), epochs, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        for name in ("accuracy", "macro_f1", "calibration_error"):
            assert ours[name] == pytest.approx(theirs[f"eval_{name}"], abs=1e-4)
    expected = load_file(tmp_path / "trainer" / "model.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "loop" / "model.safetensors"), expected, atol=1e-4, rtol=1e-3)
    if without is not None:
        assert accelerate_loop.main(loop_arguments(tmp_path / "without", **without)) == 0
        losses = [entry["train_loss"] for entry in history_of(tmp_path / "without")]
        assert losses != pytest.approx([entry["loss"] for entry in epochs], abs=1e-3)


def test_it_leaves_a_model_that_loads(loop_arguments, tmp_path):
    assert accelerate_loop.main(loop_arguments(tmp_path / "out", num_train_epochs=1)) == 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.num_labels == 4
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
    assert not list((tmp_path / "out").glob(".*"))


def test_a_folder_that_is_not_empty_is_left_alone(loop_arguments, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("all of it")
    assert accelerate_loop.main(loop_arguments(tmp_path / "out")) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("left", [None, "checkpoint-4/optimizer.pt", "checkpoint-old/progress.txt", "thesis.tex"])
def test_there_must_be_a_checkpoint_to_go_on_with(loop_arguments, tmp_path, capsys, left):
    """One of `training.train` is none."""
    if left is not None:
        (tmp_path / "out" / left).parent.mkdir(parents=True)
        (tmp_path / "out" / left).write_text("mine")
    assert accelerate_loop.main(loop_arguments(tmp_path / "out", resume_from_checkpoint=True)) == 1
    assert "holds no checkpoint of this loop: leave --resume_from_checkpoint out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("out/*")] == ([] if left is None else [left.split("/")[0]])


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"train_val_split": 0}, 1, "leave --train_val_split above 0"),
        ({"self_loss_weight": 1}, 2, "--self_loss_weight must be at least 0 and less than 1"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau"},
            2,
            "invalid choice: 'reduce_lr_on_plateau' (choose from",
        ),
        ({"learning_rate": -1}, 2, "--learning_rate must be at least 0, got -1.0"),
        ({"per_device_eval_batch_size": 0}, 2, "--per_device_eval_batch_size must be at least 1, got 0"),
        ({"num_train_epochs": 0}, 2, "--num_train_epochs must be at least 1, got 0"),
        ({"checkpointing_steps": 0}, 2, "--checkpointing_steps must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(loop_arguments, tmp_path, capsys, options, code, message):
    assert accelerate_loop.main(loop_arguments(tmp_path / "out", **options)) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_training_that_diverges_says_at_which_step(loop_arguments, tmp_path, capsys):
    line = loop_arguments(tmp_path / "out", learning_rate=1e10, checkpointing_steps=1)
    assert accelerate_loop.main(line) == 1
    error = capsys.readouterr().err
    assert "The training diverged: the loss of step 2 is nan. Start again: lower --learning_rate" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("flaw", "message"),
    [("weight", "logits of validation images after step 4"), ("unused", "the weights after step 4 are not finite")],
)
def test_a_model_that_is_not_finite_is_not_kept(loop_arguments, tmp_path, capsys, monkeypatch, flaw, message):
    def step(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.num_steps = getattr(self, "num_steps", 0) + 1
        if self.num_steps == 4:  # the last of the epoch
            weight = self.param_groups[0]["params"][0] if flaw == "weight" else unused
            weight.data.view(-1)[0] = torch.nan

    def load(*args, **kwargs):
        model, processor = load_model(*args, **kwargs)
        model.rbi.register_buffer("unused", unused)
        return model, processor

    unused, load_model = torch.zeros(3), accelerate_loop.load_model
    original = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(accelerate_loop, "load_model", load)
    assert accelerate_loop.main(loop_arguments(tmp_path / "out")) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/checkpoint-*"))


@pytest.mark.slow
def test_two_processes_are_one(loop_arguments, tmp_path, run_processes):
    """32 training images in batches of 6, of 3 on each process."""
    assert accelerate_loop.main(loop_arguments(tmp_path / "one", per_device_train_batch_size=6)) == 0
    line = loop_arguments(tmp_path / "two", per_device_train_batch_size=3, gather_across_processes=True)
    script = "from training import accelerate_loop\nif accelerate_loop.main(words) != 0: raise SystemExit(1)"
    run_processes(script, 2, words=line)
    for ours, theirs in zip(history_of(tmp_path / "two"), history_of(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
