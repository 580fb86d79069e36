"""A fine-tuning run: what it leaves, that it goes on after a stop, and that faults cost nothing."""

import contextlib
import io
import json
import shlex
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from training import train
from training.data import checks
from training.data.folders import read_unlabeled
from training.data.image_dataset import ImageDataset
from training.data.layouts import LAYOUTS
from training.data.transforms import EvalTransform
from training.fine_tuning import run as fine_tuning
from training.fine_tuning.arguments import Arguments
from training.fine_tuning.run import dry_run, load_data
from training.fine_tuning.trainer import RBITrainer


@pytest.fixture(scope="module")
def finished(command_line, tmp_path_factory):
    """The folder of a finished run of three epochs."""
    output_dir = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RBI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert train.main(command_line(output_dir, **LEARNS)) == 0
    return output_dir


# Enough to tell the 4 classes apart, by color.
LEARNS = {"num_train_epochs": 3, "learning_rate": 1e-2}


def everything_in(folder):
    """All files below a folder with their contents."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class TestWhatARunLeaves:
    @pytest.mark.slow
    def test_a_model_that_loads_with_the_metrics_of_the_record(self, finished, published):
        record = json.loads((finished / "run.json").read_text())
        model = AutoModelForImageClassification.from_pretrained(finished)
        processor = AutoImageProcessor.from_pretrained(finished)
        test = LAYOUTS["cub_200_2011"](published)["test"]
        images = [Image.open(row["path"]).convert("RGB") for row in test["image"]]
        with torch.no_grad():
            answers = model(processor(images, return_tensors="pt")["pixel_values"]).logits.argmax(-1)
        accuracy = (answers == torch.tensor(test["label"])).float().mean().item()
        assert accuracy == pytest.approx(record["results"]["test_single"]["accuracy"])
        assert accuracy > 0.5  # 4 classes by color
        assert list(model.config.id2label.values()) == test.features["label"].names == record["data"]["label_names"]

    def test_a_record_of_all_there_is_to_know(self, finished):
        record = json.loads((finished / "run.json").read_text())
        assert record["status"] == "finished"
        assert record["arguments"]["learning_rate"] == 0.01 and record["arguments"]["image_size"] == 32
        assert record["environment"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
        assert record["environment"]["hardware"]["processes"] == 1
        assert set(record["data"]["fingerprint"]["splits"]) == {"train", "validation", "test"}
        epochs = record["metrics_by_epoch"]
        assert [entry["epoch"] for entry in epochs] == [1, 2, 3]
        assert all({"loss", "eval_loss", "eval_accuracy"} <= entry.keys() for entry in epochs)
        assert record["best"]["metric"] == max(entry["eval_accuracy"] for entry in epochs)
        assert (finished / record["best"]["checkpoint"]).is_dir()
        assert json.loads((finished / "all_results.json").read_text()) == record["results"]

    def test_the_model_is_that_of_the_best_epoch(self, finished):
        best = json.loads((finished / "run.json").read_text())["best"]["checkpoint"]
        kept = load_file(finished / "model.safetensors")
        expected = load_file(finished / best / "model.safetensors")
        assert all(torch.equal(kept[name], expected[name]) for name in expected)

    def test_nothing_half_written_and_no_pickle_beside_the_model(self, finished):
        names = {path.name for path in finished.iterdir()}
        assert not [name for name in names if name.startswith(".") or name.endswith((".bin", ".pt", ".pkl", ".pth"))]

    def test_validation_is_held_out_and_the_test_untouched(self, finished, published):
        record = json.loads((finished / "run.json").read_text())
        sizes = {name: split["images"] for name, split in record["data"]["fingerprint"]["splits"].items()}
        assert sizes["train"] + sizes["validation"] == 40 and sizes["validation"] == 8 and sizes["test"] == 40

    def test_a_finished_run_is_not_run_over(self, finished, arguments, capsys):
        before = everything_in(finished)
        assert train.main(arguments(finished, **LEARNS)) == 1
        assert "holds a finished run: name another folder" in capsys.readouterr().err
        assert everything_in(finished) == before


# --- Stopped, and resumed --------------------------------------------------------------------------------------------


# Weights trained from tensors that were saved and loaded: with other alignments of memory, kernels may round
# otherwise, and optimizers that divide by the gradient's size enlarge that.
RESUMED = {"atol": 1e-4, "rtol": 1e-3}


@pytest.fixture(scope="module")
def stopped(command_line, unlabeled_dir, tmp_path_factory, stopping_init):
    """Folder and command line of a run with unlabeled images that the user stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(unlabeled_dir, folder / "others")
    line = command_line(folder / "out", unlabeled_dir=folder / "others", unlabeled_per_batch=4)
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setenv("RBI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setattr(RBITrainer, "__init__", stopping_init(7, KeyboardInterrupt()))
        assert train.main(line) == 130
    assert (
        f"Go on with: python -m training.train {shlex.join(line)} --resume_from_checkpoint last" in errors.getvalue()
    )
    assert json.loads((folder / "out" / "run.json").read_text())["status"] == "interrupted"
    return folder / "out", line


RESUME = ["--resume_from_checkpoint", "last"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "holds an unfinished run"),
        ([*RESUME, "--learning_rate", "0.5"], "--learning_rate was 0.001, now 0.5"),
        ([*RESUME, "--self_loss_weight", "0.5"], "--self_loss_weight was 0.0, now 0.5"),
        ([*RESUME, "--gather_across_processes"], "--gather_across_processes was False, now True"),
        (["--resume_from_checkpoint", "nothing"], "nothing is not a complete checkpoint"),
    ],
)
def test_a_stopped_run_does_not_go_on_otherwise(stopped, capsys, more, message):
    folder, line = stopped
    before = everything_in(folder)
    assert train.main([*line, *more]) == 1
    assert message in capsys.readouterr().err
    assert everything_in(folder) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["data"]["fingerprint"].update(sha256="another"), "The data have changed"),
        (lambda record: record["environment"]["hardware"].update(processes=2), "started with processes 2, not 1"),
    ],
)
def test_a_stopped_run_does_not_go_on_with_other_data_or_processes(stopped, tmp_path, capsys, change, message):
    folder, line = stopped
    shutil.copytree(folder, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    change(record)
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    before = everything_in(tmp_path / "out")
    assert train.main([*line, "--output_dir", str(tmp_path / "out"), *RESUME]) == 1
    assert message in capsys.readouterr().err
    assert everything_in(tmp_path / "out") == before


def test_a_stopped_run_does_not_go_on_with_other_unlabeled_images(stopped, capsys):
    folder, line = stopped
    another = folder.parent / "others" / "another.png"
    before = everything_in(folder)
    make_image(another)
    try:
        assert train.main([*line, *RESUME]) == 1
    finally:
        another.unlink()
    assert "The data have changed" in capsys.readouterr().err
    assert everything_in(folder) == before


@pytest.mark.slow
def test_a_stopped_run_goes_on(stopped, tmp_path):
    """With other arguments, too, if they change nothing in what is trained."""
    folder, line = stopped
    shutil.copytree(folder, tmp_path / "out")
    assert train.main([*line, "--output_dir", str(tmp_path / "out"), *RESUME, "--dataloader_num_workers", "1"]) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "finished" and "error" not in record


@pytest.mark.slow
def test_stopped_after_its_last_step_it_has_the_same_bank(arguments, tmp_path, unlabeled_dir, monkeypatch):
    options = {"unlabeled_dir": unlabeled_dir, "unlabeled_per_batch": 4, "num_train_epochs": 1}
    options |= {"references_per_class": 2, "num_references": 5}
    assert train.main(arguments(tmp_path / "whole", **options)) == 0

    def fail(*args):
        raise OSError("the plug was pulled")

    with monkeypatch.context() as patch:
        patch.setattr(fine_tuning, "_save", fail)
        assert train.main(arguments(tmp_path / "out", **options)) == 1
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert train.main(arguments(tmp_path / "out", resume_from_checkpoint="last", **options)) == 0
    expected, weights = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert "rbi.references.features" in expected
    torch.testing.assert_close(weights, expected, **RESUMED)


@pytest.mark.slow
def test_no_token_is_written_down(arguments, tmp_path):
    line = arguments(tmp_path / "out", max_steps=1, token="hf_secret", hub_token="hf_secret")
    assert train.main(line) == 0
    assert not [path for path, content in everything_in(tmp_path / "out").items() if b"hf_secret" in content]


@pytest.mark.slow
def test_early_stopping_counts_the_epochs_before_a_stop(arguments, tmp_path, stop_at):
    """Without any learning, the first epoch stays the best: patience 3 ends the training after epoch 4."""
    options = {"num_train_epochs": 9, "learning_rate": 0.0, "early_stopping_patience": 3, "save_total_limit": 9}
    go_on = stop_at(11, KeyboardInterrupt())  # 4 steps an epoch
    assert train.main(arguments(tmp_path / "out", **options)) == 130
    go_on()
    line = arguments(tmp_path / "out", resume_from_checkpoint="last", **options)
    assert train.main(line) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [entry["epoch"] for entry in record["metrics_by_epoch"]] == [1, 2, 3, 4]
    assert record["best"]["checkpoint"] == "checkpoint-4"

    unfinish(tmp_path / "out")  # killed after its last checkpoint, it has nothing more to train
    assert train.main(line) == 0
    again = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [entry["epoch"] for entry in again["metrics_by_epoch"]] == [1, 2, 3, 4]
    assert again["best"] == record["best"]


@pytest.fixture(scope="module")
def models_alone(command_line, tmp_path_factory, stopping_init):
    """Folder, command line and output of a run with `--save_only_model` that was stopped in its third epoch."""
    folder, errors = tmp_path_factory.mktemp("models_alone") / "out", io.StringIO()
    line = command_line(folder, save_only_model=True, num_train_epochs=4)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setenv("RBI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setattr(RBITrainer, "__init__", stopping_init(9, KeyboardInterrupt()))
        assert train.main(line) == 130
    return folder, line, errors.getvalue()


@pytest.mark.slow
def test_checkpoints_that_hold_the_model_alone_are_named_and_kept(models_alone, capsys):
    folder, line, errors = models_alone
    assert "Stopped. With --save_only_model, the run cannot be continued." in errors
    assert "resume" not in json.loads((folder / "run.json").read_text())["next"]
    before = everything_in(folder)
    assert train.main([*line, *RESUME]) == 1
    error = capsys.readouterr().err
    assert "its checkpoints (checkpoint-8, checkpoint-4) hold the model without the state of the optimizer" in error
    assert f"--model_name_or_path {folder}/checkpoint-8 and another --output_dir" in error
    assert train.main([*line, "--resume_from_checkpoint", str(folder / "checkpoint-4")]) == 1
    assert "checkpoint-4 is not a complete checkpoint, since it lacks the state of the" in capsys.readouterr().err
    assert everything_in(folder) == before


@pytest.mark.slow
def test_such_a_model_can_be_trained_further(models_alone, arguments, tmp_path):
    options = {"model_name_or_path": models_alone[0] / "checkpoint-8", "max_steps": 1}
    assert train.main(arguments(tmp_path / "out", **options)) == 0


def test_a_fold_of_which_only_models_are_left_is_not_begun_again(models_alone, arguments, tmp_path, capsys):
    options = {"num_folds": 2, "save_only_model": True, "num_train_epochs": 4}
    args = Arguments.parse(arguments(tmp_path / "out", **options))
    facts = {"data": load_data(args)[1], "environment": fine_tuning.describe_environment(args.training)}
    fine_tuning.RunRecord(tmp_path / "out").update(status="running", arguments=args.resolved(), **facts)
    shutil.copytree(models_alone[0], tmp_path / "out" / "fold-1")
    assert train.main(arguments(tmp_path / "out", resume_from_checkpoint="last", **options)) == 1
    assert "fold-1 cannot be continued" in capsys.readouterr().err


def test_a_first_checkpoint_that_was_cut_off_is_begun_again(models_alone, arguments, tmp_path, caplog):
    shutil.copytree(models_alone[0], tmp_path / "out")
    for name in ("checkpoint-4", "checkpoint-8"):
        (tmp_path / "out" / name / "trainer_state.json").unlink()
    line = arguments(tmp_path / "out", save_only_model=True, num_train_epochs=4, resume_from_checkpoint="last")
    assert fine_tuning.prepare_output_dir(Arguments.parse(line)) is None
    expected = "was stopped before its first checkpoint (incomplete: checkpoint-8, checkpoint-4): it starts again"
    assert expected in caplog.text


def test_there_must_be_a_run_to_go_on_with(arguments, tmp_path, capsys):
    assert train.main(arguments(tmp_path / "typo", resume_from_checkpoint="last")) == 1
    assert "holds no run to resume" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


@pytest.mark.slow
def test_an_image_that_breaks_during_the_training_is_named(arguments, tmp_path, published, monkeypatch, capsys):
    """It was whole when the data were checked, and the training can go on from the last checkpoint."""
    original = checks.check_images
    broken = {}

    def check_then_break(images, **kwargs):
        report = original(images, **kwargs)
        path = Path(images["train"][3]["image"]["path"])
        broken[path] = path.read_bytes()
        path.write_bytes(broken[path][: len(broken[path]) // 2])
        return report

    monkeypatch.setattr(checks, "check_images", check_then_break)
    try:
        assert train.main(arguments(tmp_path / "out", dataloader_num_workers=1)) == 1
    finally:
        for path, content in broken.items():
            path.write_bytes(content)
    assert next(iter(broken)).name in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"


def no_number(text):
    raise AssertionError(f"{text} is no JSON")


def read_strictly(path):
    return json.loads(path.read_text(), parse_constant=no_number)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "train_val_split": 0}],
    ids=["validated", "without validation"],
)
@pytest.mark.parametrize("scope", ["batch", "reference"])
def test_a_training_that_diverges_says_at_which_step(arguments, tmp_path, capsys, options, scope):
    line = arguments(tmp_path / "out", learning_rate=1e10, train_relation_scope=scope, **options)
    assert train.main(line) == 1
    error = capsys.readouterr().err
    assert "The training diverged: the loss of step 2 is not finite. Start again: lower --learning_rate" in error
    record = read_strictly(tmp_path / "out" / "run.json")
    assert record["status"] == "failed" and "step 2" in record["error"] and record["best"] is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]


@pytest.mark.slow
def test_weights_that_break_in_the_last_step_are_no_model(arguments, tmp_path, capsys, monkeypatch):
    """Without a validation, nothing else looks at them."""

    def train_and_break(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        self.model.classifier.bias.data[0] = torch.inf
        return result

    original = RBITrainer.train
    monkeypatch.setattr(RBITrainer, "train", train_and_break)
    assert train.main(arguments(tmp_path / "out", train_val_split=0, max_steps=1)) == 1
    assert "the weights after step 1 are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


# --- Bad data, and what is done about it -----------------------------------------------------------------------------


def make_image(path, color=(1, 2, 3)):
    Image.new("RGB", (40, 40), color).save(path)


def make_folder(folder, classes=("a", "b"), number=6):
    """A folder of images that differ."""
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for count in range(number):
            make_image(folder / name / f"{count}.png", (80 * place, 5 * count, 90))
    return folder


def folder_arguments(arguments, folder, output_dir, **more):
    line = arguments(output_dir, train_dir=folder, **more)
    for flag in ("--dataset_format", "--dataset_dir"):
        place = line.index(flag)
        del line[place : place + 2]
    return line


@pytest.mark.slow
def test_bad_images_are_refused_or_skipped_and_recorded(arguments, tmp_path, capsys):
    folder = make_folder(tmp_path / "images")
    (folder / "a" / "3.png").write_bytes((folder / "a" / "3.png").read_bytes()[:60])
    line = folder_arguments(arguments, folder, tmp_path / "out")
    assert train.main(line) == 1
    assert "3.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert train.main([*line, "--skip_bad_images"]) == 0
    skipped = json.loads((tmp_path / "out" / "run.json").read_text())["data"]["skipped"]
    assert len(skipped) == 1 and skipped[0]["images"][0].endswith("3.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_dir": "nothing"}, "nothing"),
        ({"classes": ()}, "no images|No images|empty|no folder"),
        ({"classes": ("a",)}, "one class|only"),
        ({"number": 1}, "validation"),
    ],
)
def test_bad_data_are_refused_before_any_work(arguments, tmp_path, capsys, change, message):
    folder = tmp_path / "images"
    folder.mkdir()
    make_folder(folder, **{name: value for name, value in change.items() if name != "train_dir"})
    line = folder_arguments(arguments, change.get("train_dir", folder), tmp_path / "out")
    assert train.main(line) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and any(part in error for part in message.split("|"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_bad_unlabeled_images_are_refused_or_skipped(arguments, tmp_path, unlabeled_dir, capsys):
    shutil.copytree(unlabeled_dir, tmp_path / "others")
    (tmp_path / "others" / "broken.png").write_bytes(b"nothing")
    line = arguments(tmp_path / "out", unlabeled_dir=tmp_path / "others", unlabeled_per_batch=4, num_train_epochs=1)
    assert train.main(line) == 1
    assert "broken.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert train.main([*line, "--skip_bad_images"]) == 0
    assert splits_of(tmp_path / "out")["unlabeled"]["images"] == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unlabeled_dir": "nothing"}, "nothing is not a folder"),
        (
            {"unlabeled_per_batch": 16},
            "has 15 images, but --unlabeled_per_batch needs 16: lower it",
        ),
        ({"num_references": 16, "unlabeled_per_batch": 2}, "--num_references needs 16"),
        (
            {"references_per_class": 5, "num_references": 1},
            "would have 21 images, but a model holds at most 20",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_images_that_are_not_there_are_not_asked_for(
    arguments, tmp_path, unlabeled_dir, monkeypatch, capsys, options, message
):
    monkeypatch.setattr(fine_tuning, "MAX_REFERENCES", 20)
    options = {"unlabeled_dir": unlabeled_dir, "unlabeled_per_batch": 2} | options
    assert train.main(arguments(tmp_path / "out", **options)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_bank_without_training_images_of_a_class_is_refused(arguments, tmp_path):
    args = Arguments.parse(arguments(tmp_path / "out", references_per_class=2))
    images, data_record = load_data(args)
    rows = [row for row, label in enumerate(images["train"]["label"]) if label != 2]
    images["train"] = images["train"].select(rows)
    with pytest.raises(ValueError, match=f"there are none of {data_record['label_names'][2]}: add some, or leave"):
        fine_tuning.train(args, images, data_record)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_is_trained_is_not_lost_where_it_cannot_be_published(arguments, tmp_path, monkeypatch, capsys):
    said = {}

    def push(trainer, **about):
        said.update(about)
        raise RuntimeError("Error while uploading 'model.safetensors'")

    monkeypatch.setattr(fine_tuning.RBITrainer, "init_hf_repo", lambda *_: None)
    monkeypatch.setattr(fine_tuning.RBITrainer, "push_to_hub", push)
    words = arguments(tmp_path / "out", push_to_hub=True, hub_model_id="alice/birds", num_train_epochs=1)
    assert train.main(words) == 1
    printed = capsys.readouterr().err
    assert "saved, but publishing it failed (Error while uploading" in printed and "training.publish" in printed
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "finished"
    assert said == {"tasks": "image-classification", "tags": ["rbi"], "dataset": "cub_200_2011"}


def test_an_output_folder_of_something_else_is_left_alone(arguments, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("all of it")
    assert train.main(arguments(tmp_path / "out")) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


# --- Ways to train ---------------------------------------------------------------------------------------------------


def results_of(folder):
    return json.loads((folder / "all_results.json").read_text())


def unfinish(folder):
    """Makes a finished run look as if it had been killed at its end."""
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "running"}))


FOLDS = {"num_folds": 2, "num_train_epochs": 1, "references_per_class": 2, "unlabeled_per_batch": 4}


@pytest.fixture(scope="module")
def folds(command_line, unlabeled_dir, tmp_path_factory):
    """The folder of a cross-validation of models with banks, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("folds") / "out", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("RBI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert train.main(command_line(folder, unlabeled_dir=unlabeled_dir, **FOLDS)) == 0
    return folder, printed.getvalue()


@pytest.mark.slow
def test_cross_validation_gives_mean_and_spread(folds):
    folder, printed = folds
    root = json.loads((folder / "run.json").read_text())
    assert root["status"] == "finished" and root["folds"] == ["fold-1", "fold-2"]
    summary = root["results"]["validation"]["accuracy"]
    accuracies = [results_of(folder / name)["validation"]["accuracy"] for name in root["folds"]]
    assert summary["mean"] == pytest.approx(sum(accuracies) / 2)
    assert summary["std"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    assert "±" in printed
    assert [splits_of(folder / name)["validation"]["images"] for name in root["folds"]] == [20, 20]


@pytest.mark.slow
def test_each_fold_has_its_bank(folds):
    folder, _ = folds
    summary = json.loads((folder / "run.json").read_text())["results"]
    assert {"validation", "validation_reference", "test_reference"} <= summary.keys()
    banks = [load_file(folder / f"fold-{number}" / "model.safetensors") for number in (1, 2)]
    features = [bank["rbi.references.features"] for bank in banks]
    assert [len(each) for each in features] == [8, 8]
    assert (features[0] - features[1]).abs().max() > 1e-3


@pytest.mark.slow
def test_finished_folds_are_not_trained_again(arguments, folds, unlabeled_dir, tmp_path, stop_at, capsys):
    shutil.copytree(folds[0], tmp_path / "out")
    unfinish(tmp_path / "out")
    options = FOLDS | {"unlabeled_dir": unlabeled_dir, "resume_from_checkpoint": "last"}
    stop_at(1, AssertionError("trained again"))
    before = everything_in(tmp_path / "out")
    for change in ({"learning_rate": 0.5}, {"num_folds": 3}):  # folds of other arguments are not mixed
        assert train.main(arguments(tmp_path / "out", **options | change)) == 1
        assert f"--{next(iter(change))} was" in capsys.readouterr().err
        assert everything_in(tmp_path / "out") == before
    assert train.main(arguments(tmp_path / "out", **options)) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_lora_leaves_a_plain_rbi_model(arguments, tmp_path):
    assert train.main(arguments(tmp_path / "out", lora_rank=2, num_train_epochs=1)) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["model"]["trainable_parameters"] < record["model"]["parameters"]
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert not [name for name in model.state_dict() if "lora" in name]


@pytest.mark.slow
def test_without_validation_the_last_epoch_is_kept(arguments, tmp_path):
    assert train.main(arguments(tmp_path / "out", train_val_split=0, num_train_epochs=1)) == 0
    assert set(results_of(tmp_path / "out")) == {"train", "test_single", "test_shuffled"}


def splits_of(folder):
    return json.loads((folder / "run.json").read_text())["data"]["fingerprint"]["splits"]


@pytest.fixture(scope="module")
def with_bank(command_line, unlabeled_dir, tmp_path_factory):
    """The folder of a run whose model has a bank: 2 training images of each class, and 5 without labels."""
    output_dir = tmp_path_factory.mktemp("bank") / "out"
    options = {"preset": "kernel", "references_per_class": 2, "num_references": 5, "unlabeled_per_batch": 4}
    line = command_line(output_dir, unlabeled_dir=unlabeled_dir, **LEARNS | options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RBI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert train.main(line) == 0
    return output_dir


def load(folder):
    """Model and image processor, by the code that was saved with them."""
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    return model, AutoImageProcessor.from_pretrained(folder)


def pixels_and_labels(split, processor):
    items = [ImageDataset(split, EvalTransform(processor))[row] for row in range(len(split))]
    return torch.stack([item["pixel_values"] for item in items]), torch.tensor([item["labels"] for item in items])


@pytest.mark.slow
class TestBank:
    def test_the_record_says_what_is_in_it(self, with_bank):
        record = json.loads((with_bank / "run.json").read_text())
        references = record["model"]["references"]
        assert references["num_references"] == 13 and references["num_labeled"] == 8
        assert list(references["references_per_class"].values()) == [2] * 4
        assert list(references["references_per_class"]) == record["data"]["label_names"]
        assert {name: split["images"] for name, split in splits_of(with_bank).items()} == {
            "train": 32,
            "validation": 8,
            "test": 40,
            "unlabeled": 15,
        }

    def test_the_model_loads_and_answers_with_it(self, with_bank, published):
        """The record has the metrics of the saved model, with the bank and without neighbors."""
        results = results_of(with_bank)
        assert results == json.loads((with_bank / "run.json").read_text())["results"]
        expected = {"train", "validation", "validation_reference", "test_single", "test_reference", "test_shuffled"}
        assert set(results) == expected
        model, processor = load(with_bank)
        pixel_values, labels = pixels_and_labels(LAYOUTS["cub_200_2011"](published)["test"], processor)
        assert model.config.relation_scope == "reference"
        for scope, part in ((None, "test_reference"), ("self", "test_single")):
            with torch.no_grad():
                logits = model(pixel_values, relation_scope=scope).logits
                one_by_one = torch.cat([model(each[None], relation_scope=scope).logits for each in pixel_values])
            torch.testing.assert_close(one_by_one, logits, atol=1e-4, rtol=1e-4)
            loss = torch.nn.functional.cross_entropy(logits, labels).item()
            assert loss == pytest.approx(results[part]["loss"], abs=1e-4)
            accuracy = (logits.argmax(-1) == labels).float().mean().item()
            assert accuracy == pytest.approx(results[part]["accuracy"])
        assert abs(results["test_reference"]["loss"] - results["test_single"]["loss"]) > 1e-4
        assert abs(results["validation_reference"]["loss"] - results["validation"]["loss"]) > 1e-4

    def test_the_validation_is_alone_as_in_each_epoch(self, with_bank):
        record = json.loads((with_bank / "run.json").read_text())
        best = next(entry for entry in record["metrics_by_epoch"] if entry["step"] == record["best"]["step"])
        for name in ("accuracy", "loss"):
            assert record["results"]["validation"][name] == pytest.approx(best[f"eval_{name}"], abs=1e-5)

    def test_it_is_of_training_and_unlabeled_images(self, with_bank, command_line, unlabeled_dir):
        """Each reference is one of them, once, with its label; none is of the validation or the test."""
        model, processor = load(with_bank)
        args = Arguments.parse(command_line(with_bank, **LEARNS))
        images, _ = load_data(args)
        bank, rows = model.rbi.references, {}
        for name, split in (*images.items(), ("unlabeled", read_unlabeled(unlabeled_dir))):
            pixel_values, labels = pixels_and_labels(split, processor)
            with torch.no_grad():
                features = model.rbi.extract_features(pixel_values)[0]
            same = bank.images[:, None] == model.rbi.rpe.thumbnails(pixel_values)
            rows[name] = same.flatten(2).all(-1).nonzero().tolist()
            for row, column in rows[name]:
                assert bank.labels[row] == labels[column]
                torch.testing.assert_close(bank.features[row], features[column], atol=1e-5, rtol=1e-4)
        assert {name: len(found) for name, found in rows.items()} == {
            "train": 8,
            "validation": 0,
            "test": 0,
            "unlabeled": 5,
        }
        assert sorted(row for found in rows.values() for row, _ in found) == list(range(13))


@pytest.mark.slow
def test_a_bank_of_unlabeled_images_alone(arguments, tmp_path, unlabeled_dir):
    options = {"unlabeled_dir": unlabeled_dir, "unlabeled_per_batch": 1, "num_references": 6}
    assert train.main(arguments(tmp_path / "out", num_train_epochs=1, **options)) == 0
    references = json.loads((tmp_path / "out" / "run.json").read_text())["model"]["references"]
    assert (references["num_references"], references["num_labeled"]) == (6, 0)
    assert "test_reference" in results_of(tmp_path / "out")
    assert load(tmp_path / "out")[0].config.relation_scope == "reference"


@pytest.mark.slow  # all of them together
@pytest.mark.parametrize(
    "options",
    [
        {"batch_sampler": "balanced", "images_per_class": 2, "warmup_steps": 0.1, "lr_scheduler_type": "cosine"},
        {"class_weights": "balanced", "label_smoothing_factor": 0.1, "layer_decay": 0.8, "bf16": True},
        {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "color_jitter": 0.2, "rotation_degrees": 15}
        | {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        {"freeze_backbone": True, "optimizer": "sgd_nesterov", "head_learning_rate": 0.01},
        {"early_stopping_patience": 1, "num_train_epochs": 3, "self_loss_weight": 0.5},
        {"crop_to_boxes": True, "preset": "kernel"},
        {"references_per_class": 3, "lora_rank": 2},
        {"references_per_class": 1, "train_val_split": 0, "ema_decay": 0.9},
        {"train_relation_scope": "self", "references_per_class": 1, "preset": "kernel"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_people_expect_of_a_trainer(arguments, tmp_path, options):
    assert train.main(arguments(tmp_path / "out", **{"num_train_epochs": 1} | options)) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "finished"
    for name, value in options.items():
        assert record["arguments"][name] in (value, [value])
    assert record["data"]["cropped_to_boxes"] == ("crop_to_boxes" in options)


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    boards = [EventAccumulator(str(path)).Reload() for path in folder.rglob("events.out.*")]
    boards = [board for board in boards if "eval/accuracy" in board.Tags()["scalars"]]
    return [event.value for board in boards for event in board.Scalars("eval/accuracy")]


def read_trackio(folder):
    (database,) = folder.glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = [json.loads(row[0]) for row in connection.execute("SELECT metrics FROM metrics ORDER BY id")]
    return [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "place", "read"),
    [("tensorboard", "TENSORBOARD_LOGGING_DIR", read_tensorboard), ("trackio", "TRACKIO_DIR", read_trackio)],
)
def test_trackers_get_the_metrics(arguments, tmp_path, run_processes, name, place, read):
    pytest.importorskip(name)  # Trackio wants a newer huggingface_hub than the oldest that is supported
    words = arguments(tmp_path / "out", report_to=name)
    script = "from training import train\nif train.main(words) != 0: raise SystemExit(1)"
    run_processes(script, 1, {place: str(tmp_path / "logged")}, words=words)
    epochs = json.loads((tmp_path / "out" / "run.json").read_text())["metrics_by_epoch"]
    assert read(tmp_path / "logged") == pytest.approx([entry["eval_accuracy"] for entry in epochs])


@pytest.mark.slow
def test_dry_run_keeps_nothing(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([*arguments(tmp_path / "out"), "--dry_run"]) == 0
    assert "Dry run passed" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_dry_run_without_the_evaluations_that_options_need(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"early_stopping_patience": 2, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_on_start": True}
    assert train.main([*arguments(tmp_path / "out", **options), "--dry_run"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_dry_run_goes_through_unlabeled_images_and_the_bank(arguments, tmp_path, monkeypatch):
    """With made-up ones: the folder need not be there."""
    monkeypatch.chdir(tmp_path)
    options = {"unlabeled_dir": "nothing", "num_references": 50, "references_per_class": 40}
    record = dry_run(Arguments.parse([*arguments(tmp_path / "out", **options), "--dry_run"]))
    assert record["data"]["fingerprint"]["splits"]["unlabeled"]["images"] > 0
    assert record["model"]["references"]["num_references"] == record["model"]["references"]["num_labeled"] + 1
    assert "test_reference" in record["results"]
    assert list(tmp_path.iterdir()) == []


def test_a_backbone_in_a_folder_is_recorded_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facebook" / "convnext").mkdir(parents=True)
    place = str((tmp_path / "facebook" / "convnext").resolve())
    assert fine_tuning._place_or_name("facebook/convnext") == place
    for name in ("facebook/other", "packaged/mobilenet_v2", None):
        assert fine_tuning._place_or_name(name) == name
