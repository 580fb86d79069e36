"""The demo, small: all of it runs, what it prints and writes is what was measured, and faults cost nothing."""

import io
import json
import socket
import statistics

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from training import demo
from training.data.packaged.orl import load_orl_faces
from training.demo import ArmResult, DemoArguments, choose_preset, mean_and_error, results_table
from training.evaluation.protocols import ProtocolAccuracies


ARMS = ["plain", "rbi-kernel, untrained", "self", "rbi", "self-kernel", "rbi-kernel"]


def _small(output_dir, **kwargs) -> DemoArguments:
    sizes = {"num_draws": 2, "image_size": 32, "max_steps": 3, "num_shuffles": 2, "num_train_epochs": 1}
    return DemoArguments(output_dir=str(output_dir), **(sizes | kwargs))


def _result(single, shuffled, validation_accuracy=50.0, validation_loss=1.0):
    return ArmResult(
        ProtocolAccuracies(single, shuffled, 0.5, shuffled + 1), validation_accuracy, validation_loss, 9, 1
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with images and weights in the cache and no network: the arguments, the folder and what was printed."""
    load_orl_faces()
    demo.load_mobilenet_v2()
    output_dir = tmp_path_factory.mktemp("demo") / "out"
    console = Console(file=io.StringIO(), width=120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _refuse)
        demo.main(_small(output_dir), console)
    return output_dir, console.file.getvalue()


def _refuse(*args, **kwargs):
    raise AssertionError("a connection was tried")


@pytest.mark.slow
class TestRun:
    def test_folder_holds_model_processor_code_and_figures_alone(self, run):
        names = {path.name for path in run[0].iterdir()}
        assert {"config.json", "model.safetensors", "preprocessor_config.json", "demo_results.json"} <= names
        assert {"modeling_rbi.py", "configuration_rbi.py"} <= names
        assert "checkpoints" not in names
        assert [path.name for path in run[0].parent.iterdir()] == ["out"]

    def test_saved_model_classifies(self, run):
        faces = load_orl_faces()
        image_processor = AutoImageProcessor.from_pretrained(run[0])
        model = AutoModelForImageClassification.from_pretrained(run[0])
        pixel_values = image_processor(list(faces.select(range(4))["image"]), return_tensors="pt")["pixel_values"]
        assert pixel_values.shape == (4, 3, 32, 32)
        with torch.no_grad():
            assert model(pixel_values).logits.isfinite().all()
        assert model.config.id2label[0] == "person_01"

    def test_table_shows_the_figures_of_the_file(self, run):
        results = json.loads((run[0] / "demo_results.json").read_text())
        assert list(results["frozen"]) == ARMS
        for arm, draws in results["frozen"].items():
            assert len(draws) == 2
            cells = next(line for line in run[1].splitlines() if line.split("│")[1:2] == [f" {arm:<21} "]).split("│")
            assert float(cells[2]) == pytest.approx(
                statistics.mean(draw["test"]["single"] for draw in draws), abs=0.01
            )
            assert float(cells[4]) == pytest.approx(
                statistics.mean(draw["test"]["sorted"] for draw in draws), abs=0.01
            )

    def test_controls_see_no_relations(self, run):
        results = json.loads((run[0] / "demo_results.json").read_text())["frozen"]
        for arm in ("plain", "self", "self-kernel"):
            for draw in results[arm]:
                assert draw["test"]["single"] == draw["test"]["shuffled"] == draw["test"]["sorted"]

    def test_says_where_everything_is(self, run):
        output_dir, text = run
        assert f"Model, image processor and code: {output_dir.resolve()}" in text.replace("\n/", " /")

    def test_an_earlier_demo_is_replaced(self, run):
        before = (run[0] / "demo_results.json").read_text()
        demo.main(_small(run[0], seed=7), Console(file=io.StringIO()))
        after = json.loads((run[0] / "demo_results.json").read_text())
        assert after["arguments"]["seed"] == 7
        assert json.loads(before)["arguments"]["seed"] == 0
        assert [path.name for path in run[0].parent.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_failure_leaves_the_earlier_folder_and_no_draft(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo_results.json").write_text("{}")
    monkeypatch.setattr(demo, "fine_tune", _refuse)
    with pytest.raises(AssertionError, match="was tried"):
        demo.main(_small(tmp_path / "out"), Console(file=io.StringIO()))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "demo_results.json").read_text() == "{}"


def test_refuses_a_folder_that_holds_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load_images", _refuse)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no earlier demo"):
        demo.main(_small(tmp_path))
    with pytest.raises(ValueError, match="is a file"):
        demo.main(_small(tmp_path / "thesis.txt"))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "value"), [("num_draws", 1), ("num_shuffles", 1), ("batch_size", 1), ("max_steps", 0), ("image_size", 31)]
)
def test_arguments_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"--{name} must be at least {value + 1}, got {value}"):
        DemoArguments(**{name: value})


def test_gains_are_paired_by_draw_over_the_same_head_without_relations():
    results = {arm: [_result(80, 80), _result(90, 90)] for arm in ARMS}
    results["rbi"] = [_result(80, 81), _result(90, 93)]
    table = Console(width=120, file=io.StringIO())
    table.print(results_table(results))
    row = next(line for line in table.file.getvalue().splitlines() if "│ rbi  " in line)
    assert "+2.00 ± 1.00" in row


def test_mean_and_error():
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / 3**0.5))


def test_the_preset_is_chosen_on_validation_never_on_test():
    better_on_test = [_result(99, 99, validation_accuracy=60)]
    assert (
        choose_preset({"rbi": better_on_test, "rbi-kernel": [_result(50, 50, validation_accuracy=61)]}) == "rbi-kernel"
    )
    equal_but_lower_loss = [_result(50, 50, validation_accuracy=60, validation_loss=0.5)]
    assert choose_preset({"rbi": better_on_test, "rbi-kernel": equal_but_lower_loss}) == "rbi-kernel"
    assert choose_preset({"rbi": better_on_test, "rbi-kernel": [_result(50, 50, validation_accuracy=59)]}) == "rbi"
