"""The demo, small: it runs as a whole, prints and writes what was measured, and errors leave nothing behind."""

import io
import json
import socket
import statistics

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_rbi import RBIForImageClassification, UserError, load_image_processor
from training import demo
from training.data.packaged.backbones import packaged_model
from training.data.packaged.orl import load_orl_faces
from training.data.splits import Split
from training.demo import ARM_NAMES, ArmResult, DemoArguments, choose_preset, main, results_table
from training.evaluation.protocols import ProtocolAccuracies


NUM_PEOPLE = 6
# Percentage points that one of the 42 test images is worth: other rounding may change one prediction.
ONE_IMAGE = 100 / (NUM_PEOPLE * 7) + 1e-6


def _words(output_dir, **more) -> list[str]:
    values = {"num_draws": 2, "image_size": 32, "max_steps": 3, "num_shuffles": 2, "num_train_epochs": 1} | more
    return ["--output_dir", str(output_dir), *(f"--{name}={value}" for name, value in values.items())]


def _result(single, shuffled, validation_accuracy=50.0, validation_loss=1.0):
    return ArmResult(
        ProtocolAccuracies(single, shuffled, 0.5, shuffled + 1), validation_accuracy, validation_loss, 9, 1
    )


def _refuse(*args, **kwargs):
    raise AssertionError("a connection was tried")


@pytest.fixture(scope="module")
def few_people():
    """Images of a few people, in place of all 40."""
    faces = load_orl_faces()
    packaged_model("packaged/mobilenet_v2")
    few = faces.select(range(10 * NUM_PEOPLE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "load_orl_faces", lambda: few)
        yield few


@pytest.fixture(scope="module")
def run(few_people, tmp_path_factory):
    """A run with images and weights in the cache and no network: its folder, its output and its heads by seed."""
    output_dir = tmp_path_factory.mktemp("demo") / "out"
    heads, compare = {}, demo.compare_heads
    console = Console(file=io.StringIO(), width=120)

    def compare_heads(images, split, base, args, seed):
        heads[seed] = compare(images, split, base, args, seed)
        return heads[seed]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _refuse)
        patch.setattr(demo, "compare_heads", compare_heads)
        demo.command(_words(output_dir), console)
    return output_dir, console.file.getvalue(), heads


@pytest.mark.slow
class TestRun:
    def test_folder_holds_model_processor_code_and_figures_only(self, run):
        names = {path.name for path in run[0].iterdir()}
        assert {"config.json", "model.safetensors", "preprocessor_config.json", "demo_results.json"} <= names
        assert {"modeling_rbi.py", "configuration_rbi.py"} <= names
        assert "checkpoints" not in names
        assert [path.name for path in run[0].parent.iterdir()] == ["out"]

    def test_saved_model_classifies(self, run, few_people):
        image_processor = AutoImageProcessor.from_pretrained(run[0])
        model = AutoModelForImageClassification.from_pretrained(run[0])
        images = list(few_people.select(range(4))["image"])
        pixel_values = image_processor(images, return_tensors="pt")["pixel_values"]
        assert pixel_values.shape == (4, 3, 32, 32)
        with torch.no_grad():
            assert model(pixel_values).logits.isfinite().all()
        assert model.config.id2label[0] == "person_01"

    def test_table_shows_the_figures_of_the_file(self, run):
        results = json.loads((run[0] / "demo_results.json").read_text())
        assert list(results["frozen"]) == list(ARM_NAMES)
        for arm, draws in results["frozen"].items():
            assert len(draws) == 2
            cells = next(line for line in run[1].splitlines() if line.split("│")[1:2] == [f" {arm:<20} "]).split("│")
            for column, name in ((2, "single"), (4, "sorted")):
                mean = statistics.mean(draw["test"][name] for draw in draws)
                assert float(cells[column]) == pytest.approx(mean, abs=0.01)

    def test_controls_see_no_relations(self, run):
        results = json.loads((run[0] / "demo_results.json").read_text())["frozen"]
        for arm in ("plain", "self", "self-kernel"):
            for draw in results[arm]:
                for name in ("shuffled", "sorted"):
                    assert draw["test"][name] == pytest.approx(draw["test"]["single"], abs=ONE_IMAGE)

    def test_output_names_the_folder_and_the_machine(self, run):
        output_dir, text, _ = run
        assert f"Model, image processor and code: {output_dir.resolve()}" in text.replace("\n/", " /")
        results = json.loads((output_dir / "demo_results.json").read_text())
        assert results["environment"]["hardware"]["processor"] in text
        assert "through pipeline(): person_" in text

    def test_a_former_demo_is_replaced_but_not_by_a_failed_one(self, run, monkeypatch, capsys):
        output_dir, _, heads = run
        former = {path: path.read_bytes() for path in output_dir.iterdir()}

        def does_not_load(*args):
            raise UserError("The folder does not load.")

        monkeypatch.setattr(demo, "compare_heads", lambda images, split, base, args, seed: heads[seed - 7])
        monkeypatch.setattr(demo, "check_loads_back", does_not_load)
        assert main(_words(output_dir, seed=7)) == 1
        assert "error: The folder does not load." in capsys.readouterr().err
        assert {path: path.read_bytes() for path in output_dir.iterdir()} == former
        monkeypatch.setattr(demo, "check_loads_back", lambda *args: None)
        assert main(_words(output_dir, seed=7)) == 0
        assert {path.name for path in output_dir.iterdir()} == {path.name for path in former}
        assert json.loads((output_dir / "demo_results.json").read_text())["arguments"]["seed"] == 7
        assert [path.name for path in output_dir.parent.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_fine_tuning_that_diverges_is_an_error(few_people, model_folder, tmp_path):
    model, processor = RBIForImageClassification.from_pretrained(model_folder), load_image_processor(model_folder)
    model.remove_references()
    split = Split(torch.arange(3), torch.arange(3, 6), torch.arange(6, 9))
    args = DemoArguments(learning_rate=1e30, num_train_epochs=1)
    with pytest.raises(UserError, match=r"The training diverged: eval_loss after step 1 is nan\. Start again: lower"):
        demo.fine_tune(model, processor, few_people, split, args, tmp_path)


def test_a_folder_with_other_files_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_orl_faces", _refuse)
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(_words(tmp_path)) == 1
    assert "holds other files than a demo (thesis.txt): name another folder" in capsys.readouterr().err
    assert main(_words(tmp_path / "thesis.txt")) == 1
    assert "is a file: name a folder" in capsys.readouterr().err
    # The files of a model, but not of a demo.
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert main(_words(tmp_path / "model")) == 1
    assert "holds other files than a demo (config.json)" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.slow
def test_as_a_process_of_its_own(start_command):
    result = start_command("training.demo", ["--num_draw", "3"])
    assert result.wait() == 2
    assert "error: There is no argument --num_draw: did you mean `--num_draws`?" in result.stderr


@pytest.mark.parametrize(
    ("name", "value"), [("num_draws", 1), ("num_shuffles", 1), ("batch_size", 1), ("max_steps", 0), ("image_size", 31)]
)
def test_arguments_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"--{name} must be at least {value + 1}, got {value}"):
        DemoArguments(**{name: value})


def test_gains_are_paired_by_draw_over_the_same_head_without_relations():
    results = {arm: [_result(80, 80), _result(90, 90)] for arm in ARM_NAMES}
    results["rbi"] = [_result(80, 81), _result(90, 93)]
    table = Console(width=120, file=io.StringIO())
    table.print(results_table(results))
    row = next(line for line in table.file.getvalue().splitlines() if "│ rbi  " in line)
    # Mean and standard error of 1 and 3: 2 ± sqrt(2) / sqrt(2).
    assert "+2.00 ± 1.00" in row


def test_the_preset_is_chosen_on_validation_never_on_test():
    better_on_test = [_result(99, 99, validation_accuracy=60)]
    assert (
        choose_preset({"rbi": better_on_test, "rbi-kernel": [_result(50, 50, validation_accuracy=61)]}) == "rbi-kernel"
    )
    equal_but_lower_loss = [_result(50, 50, validation_accuracy=60, validation_loss=0.5)]
    assert choose_preset({"rbi": better_on_test, "rbi-kernel": equal_but_lower_loss}) == "rbi-kernel"
    assert choose_preset({"rbi": better_on_test, "rbi-kernel": [_result(50, 50, validation_accuracy=59)]}) == "rbi"
