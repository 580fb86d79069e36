# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`python -m training.assess`: what it measures, writes, prints and refuses."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, ConvNextConfig, ConvNextForImageClassification, EvalPrediction
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_rbi import RBIConfig, RBIForImageClassification, RBIModel, pixel_statistics
from tests.training.evaluation.shared import NAMES
from training import assess as assess_command
from training.assess import AssessmentArguments, choose_protocols, main, run
from training.data.arguments import DataArguments
from training.data.reading import load_images
from training.evaluation import report
from training.evaluation.classifiers import in_order_of_content
from training.evaluation.metrics import compute_metrics
from training.evaluation.protocols import Condition
from training.evaluation.report import FILES, confused_pairs


# Features of other batches and runs are rounded otherwise, by about 1e-6, and the calibration error with them.
TOLERANCE = 1e-5
TINY = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "image_size": 32}

pytestmark = pytest.mark.usefixtures("own_cache")


def _model(names):
    """An RBI model with random weights for these classes."""
    torch.manual_seed(0)
    mean, std = pixel_statistics(_processor())
    config = RBIConfig.kernel(
        backbone_config=ConvNextConfig(**TINY),
        image_mean=mean,
        image_std=std,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    model = RBIForImageClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    return model


def _classifier():
    """A classifier without relations."""
    return ConvNextForImageClassification(ConvNextConfig(**TINY, id2label=dict(enumerate(NAMES)))).eval()


def _processor():
    return ViTImageProcessorPil(size={"height": 32, "width": 32})


def _save(model, folder):
    model.save_pretrained(folder)
    _processor().save_pretrained(folder)
    return str(folder)


def _run(model, output_dir, data, **more):
    values = {"batch_sizes": [8, 20], "resamples": 100, "use_cpu": True} | more
    return run(AssessmentArguments(model=model, output_dir=str(output_dir), **values), data)


@pytest.fixture
def data(published):
    """The small data set: 40 test images."""
    return DataArguments(dataset_format="cub_200_2011", dataset_dir=str(published))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """An RBI model with random weights for the classes of `published`."""
    return _save(_model(NAMES), tmp_path_factory.mktemp("assessed") / "model")


@pytest.fixture(scope="module")
def assessed(model_dir, published, own_cache, tmp_path_factory):
    """A whole run: its folder, what it returned, and the batch sizes that the backbone took."""
    folder, batch_sizes = tmp_path_factory.mktemp("assessed") / "out", []
    original = RBIModel.extract_features

    def counted(self, pixel_values, **kwargs):
        batch_sizes.append(len(pixel_values))
        return original(self, pixel_values, **kwargs)

    data = DataArguments(dataset_format="cub_200_2011", dataset_dir=str(published))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RBIModel, "extract_features", counted)
        result, content = _run(model_dir, folder, data, per_device_eval_batch_size=15)
    return SimpleNamespace(folder=folder, result=result, content=content, batch_sizes=batch_sizes)


@pytest.fixture
def earlier(assessed, tmp_path):
    """A copy of the folder of a whole run."""
    return shutil.copytree(assessed.folder, tmp_path / "out")


@pytest.mark.slow
def test_every_file_is_written(assessed):
    folder, result, content = assessed.folder, assessed.result, assessed.content
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert json.loads((folder / "results.json").read_text()) == content
    for name in FILES:
        if name.endswith(".png"):
            with Image.open(folder / name) as image:
                assert min(image.size) > 300
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["protocol"], row["batch_size"]) for row in rows] == [
        ("single", ""),
        *((protocol, size) for protocol in ("shuffled", "sorted") for size in ("8", "20")),
    ]
    for row, written in zip(rows, content["results"], strict=True):
        estimate = result.metrics[Condition(row["protocol"], int(row["batch_size"] or 0) or None)]["macro_f1"]
        assert float(row["macro_f1"]) == estimate.value == written["macro_f1"]["value"]
        assert float(row["macro_f1_low"]) == estimate.low and float(row["macro_f1_high"]) == estimate.high
    with (folder / "per_class.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["protocol"] == "single"]
    assert [row["class"] for row in rows] == NAMES
    recall = sum(float(row["recall"]) * int(row["images"]) for row in rows) / 40
    assert recall == pytest.approx(result.metrics[Condition("single")]["accuracy"].value)
    assert set(content["findings"]) == {"leak", "shuffled"}
    assert "set_references" in content["left_out"]["reference"]
    assert content["time_ratio"] == content["seconds"]["total"] / content["seconds"]["backbone pass"] > 1


def test_features_are_computed_once(assessed):
    assert assessed.batch_sizes == [15, 15, 10]


def test_the_predictions_are_those_of_the_saved_model(assessed, model_dir, data):
    split = in_order_of_content(load_images(data, seed=42)["test"])
    images = [Image.open(row["path"]).convert("RGB") for row in split["image"]]
    model = RBIForImageClassification.from_pretrained(model_dir)
    with torch.no_grad():
        logits = model(_processor()(images, return_tensors="pt")["pixel_values"]).logits
    expected = compute_metrics(EvalPrediction(logits, torch.tensor(split["label"])))
    metrics = assessed.result.metrics[Condition("single")]
    assert {name: each.value for name, each in metrics.items()} == pytest.approx(expected, abs=TOLERANCE)


def _listed_in(path, split, order):
    """A CSV file of a split, its rows in this order."""
    names = split.features["label"].names
    rows = [(split[row]["image"]["path"], names[split[row]["label"]]) for row in order]
    path.write_text("image,label\n" + "".join(f"{image},{label}\n" for image, label in rows))
    return str(path)


def _assert_close(one, other):
    """Equal contents of `results.json`, but for the rounding of numbers."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name, value in one.items():
            _assert_close(value, other[name])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            _assert_close(*pair)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=TOLERANCE)
    else:
        assert one == other


@pytest.mark.slow
def test_results_do_not_depend_on_the_order_of_the_data(model_dir, data, tmp_path, monkeypatch):
    images, contents, shown = load_images(data, seed=0), [], []

    def note(folder, assessment, names, load):
        """The images that the figure shows, in place of the figures."""
        pairs = confused_pairs(assessment.predictions[assessment.most_telling], assessment.labels, names, 6)
        rows = [row for pair in pairs for numbers in pair.rows.values() for row in numbers]
        shown.append([load(row).tobytes() for row in rows])

    monkeypatch.setattr(assess_command, "plot", note)
    for name, order in {"up": range(40), "down": range(39, -1, -1), "random": torch.randperm(40).tolist()}.items():
        arguments = DataArguments(
            train_file=_listed_in(tmp_path / "train.csv", images["train"], range(len(images["train"]))),
            test_file=_listed_in(tmp_path / f"{name}.csv", images["test"], order),
            train_val_split=0,
        )
        contents.append(_run(model_dir, tmp_path / name, arguments)[1])
    for part in ("results", "differences", "findings", "data"):
        for content in contents[1:]:
            _assert_close(contents[0][part], content[part])
    # Of the same files, decoded in this process.
    assert shown[0] and shown[0] == shown[1] == shown[2]


def test_labels_in_another_order_than_the_models(assessed, model_dir, data, tmp_path, monkeypatch):
    """Numbers of classes, and classes that the data lack, change no prediction."""
    other, state = _model(["Dodo", *reversed(NAMES)]), load_file(Path(model_dir) / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = torch.cat([torch.full_like(state[name][:1], -1e-3), state[name].flip(0)])
    state["classifier.bias"][0] = -100
    other.load_state_dict(state)
    monkeypatch.setattr(assess_command, "plot", lambda *args: None)
    result, _ = _run(_save(other, tmp_path / "model"), tmp_path / "out", data, protocols=["single", "shuffled"])
    for condition, metrics in result.metrics.items():
        for name, estimate in metrics.items():
            if name != "top5_accuracy":  # of 4 classes it is 1
                expected = assessed.result.metrics[condition][name].value
                assert estimate.value == pytest.approx(expected, abs=TOLERANCE)
    by_class = []
    for folder in (tmp_path / "out", assessed.folder):
        rows = csv.DictReader((folder / "per_class.csv").open())
        recalls = {(row["protocol"], row["batch_size"], row["class"]): float(row["recall"]) for row in rows}
        by_class.append({key: recall for key, recall in recalls.items() if key[0] != "sorted"})
    assert by_class[0] == pytest.approx(by_class[1], abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("is_rbi", [True, False], ids=["RBI", "another classifier"])
def test_classes_of_one_name(is_rbi, data, tmp_path, monkeypatch):
    """They are matched by the names that are shown, and each has its own row and its own name in the figures."""
    names, shown = ["crane", "dog", "crane", "owl"], ["crane (0)", "dog", "crane (2)", "owl"]
    model = _model(NAMES) if is_rbi else _classifier()
    folder = _save(model, tmp_path / "model")
    images = load_images(data, seed=0)
    plotted = []
    monkeypatch.setattr(report, "plot_confusion_matrix", lambda path, counts, names, title: plotted.append(names))
    monkeypatch.setattr(report, "plot_confused_pairs", lambda path, pairs, *_: plotted.append(pairs))
    monkeypatch.setattr(report, "plot_reliability", lambda *_: None)

    def measured(name, folder, own_names):
        """Rows of the classes, by number, of data with these names."""
        files = {}
        for part in ("train", "test"):
            split = images[part].cast_column("label", datasets.ClassLabel(names=own_names))
            files[f"{part}_file"] = _listed_in(tmp_path / f"{name}_{part}.csv", split, range(len(split)))
        arguments = DataArguments(**files, train_val_split=0)
        result, _ = _run(folder, tmp_path / name, arguments, protocols=["single"], batch_sizes=None)
        return result, list(csv.DictReader((tmp_path / name / "per_class.csv").open()))

    expected, expected_rows = measured("before", folder, NAMES)
    before = plotted.copy()
    plotted.clear()
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {"crane": 2, "dog": 1, "owl": 3}
    folder = _save(model, tmp_path / "model")
    result, rows = measured("after", folder, shown)
    condition = Condition("single")
    assert result.metrics[condition]["accuracy"].value == expected.metrics[condition]["accuracy"].value
    assert [row.pop("class") for row in rows] == shown
    assert [row.pop("class") for row in expected_rows] == NAMES
    assert rows == expected_rows
    number = {name: number for number, name in enumerate(NAMES)}
    assert plotted[0] == [shown[number[name]] for name in before[0]]
    assert [(pair.first, pair.second) for pair in plotted[1]] == [
        (shown[number[pair.first]], shown[number[pair.second]]) for pair in before[1]
    ]
    with pytest.raises(ValueError, match=r"several classes of the name crane: .*shown \(crane \(0\), crane \(2\)\)"):
        measured("refused", folder, ["crane", "dog", "heron", "owl"])
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_with_references(data, tmp_path):
    model = _model(NAMES)
    model.set_reference_features(
        torch.randn(12, model.config.feature_size), torch.randn(12, 3, 16, 16), torch.arange(12) % 4
    )
    result, content = _run(_save(model, tmp_path / "model"), tmp_path / "out", data)
    assert content["left_out"] == {}
    assert content["model"]["references"]["num_references"] == 12
    assert set(result.findings) == {"leak", "shuffled", "reference"}
    assert result.most_telling == Condition("reference")


@pytest.mark.slow
def test_any_image_classifier_is_measured_without_relations(data, earlier, tmp_path):
    """In place of an earlier assessment, which had a file more."""
    before = {path.name: path.read_bytes() for path in earlier.iterdir()}
    result, content = _run(_save(_classifier(), tmp_path / "model"), earlier, data, batch_sizes=None)
    assert list(result.metrics) == [Condition("single")]
    assert "do not depend on the batch" in content["left_out"]["sorted"]
    assert {path.name for path in earlier.iterdir()} == set(FILES) - {"batch_size.png"}
    assert all(path.read_bytes() != before[path.name] for path in earlier.iterdir())


def test_a_run_that_fails_leaves_an_earlier_one(model_dir, data, earlier, monkeypatch):
    before = {path.name: path.read_bytes() for path in earlier.iterdir()}
    monkeypatch.setattr(assess_command, "plot", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        _run(model_dir, earlier, data, protocols=["single"])
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == before


def test_default_batch_sizes_are_those_there_are_images_for(model_dir, data, tmp_path, monkeypatch):
    monkeypatch.setattr(assess_command, "plot", lambda *args: None)
    result, content = _run(model_dir, tmp_path / "out", data, batch_sizes=None)
    assert {condition.batch_size for condition in result.metrics} == {None, 8, 16, 32}
    assert content["left_out"]["batch sizes 64, 128"] == "there are 40 images"


# --- Bad input -------------------------------------------------------------------------------------------------------


class TestRefused:
    """Before the backbone runs, and nothing is written."""

    @pytest.fixture(autouse=True)
    def _no_backbone(self, monkeypatch):
        monkeypatch.setattr(assess_command, "extract", lambda *args, **kwargs: pytest.fail("the backbone ran"))

    def _refused(self, tmp_path, model, data, match, **more):
        with pytest.raises((ValueError, OSError), match=match):
            _run(model, tmp_path / "out", data, **more)
        assert not (tmp_path / "out").exists()

    def test_references_of_a_model_without(self, model_dir, data, tmp_path):
        self._refused(tmp_path, model_dir, data, "reference: the model has no reference bank", protocols=["reference"])

    def test_batches_of_a_model_without_relations(self, data, tmp_path):
        folder = _save(_classifier(), tmp_path / "model")
        self._refused(tmp_path, folder, data, "shuffled: .* not depend on the batch", protocols=["shuffled"])

    def test_batches_larger_than_the_data(self, model_dir, data, tmp_path):
        self._refused(tmp_path, model_dir, data, "batch_sizes 41 is more than the 40 images", batch_sizes=[8, 41])

    def test_fewer_images_than_the_smallest_batch(self, model_dir, data, tmp_path):
        data.max_test_samples = 7
        self._refused(tmp_path, model_dir, data, "7 images, fewer than the smallest batch size", batch_sizes=None)

    def test_one_class(self, model_dir, data, tmp_path):
        images = load_images(data, seed=0)
        rows = [row for row, label in enumerate(images["test"]["label"]) if label == 1]
        one = DataArguments(
            train_file=_listed_in(tmp_path / "train.csv", images["train"], range(20)),
            test_file=_listed_in(tmp_path / "test.csv", images["test"], rows),
        )
        self._refused(tmp_path, model_dir, one, f'one class, "{NAMES[1]}"', batch_sizes=[2])

    def test_labels_that_do_not_match(self, data, tmp_path):
        folder = _save(_model([NAMES[0], "Dodo", "Auk", NAMES[3]]), tmp_path / "model")
        self._refused(
            tmp_path, folder, data, f"lacks 2 of the 4 labels .*{NAMES[1]}, {NAMES[2]}; the model has .*Dodo, Auk"
        )

    def test_a_split_that_is_not_there(self, model_dir, data, tmp_path):
        data.train_val_split = 0
        self._refused(
            tmp_path, model_dir, data, "no validation split: choose --split train or test", split="validation"
        )

    def test_a_folder_that_holds_other_things(self, model_dir, data, tmp_path):
        before = sorted(Path(model_dir).iterdir())
        with pytest.raises(ValueError, match="other files than an assessment"):
            _run(model_dir, model_dir, data)
        assert sorted(Path(model_dir).iterdir()) == before
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "results.json").write_text('{"program": "another"}')
        with pytest.raises(ValueError, match="other files than an assessment"):
            _run(model_dir, tmp_path / "other", data)
        with pytest.raises(ValueError, match="is a file"):
            _run(model_dir, tmp_path / "other" / "results.json", data)

    def test_a_broken_image_is_named(self, model_dir, data, tmp_path):
        images = load_images(data, seed=0)
        broken = tmp_path / "broken.jpg"
        broken.write_bytes(Path(images["test"][0]["image"]["path"]).read_bytes()[:700])
        listed = _listed_in(tmp_path / "test.csv", images["test"], range(30))
        Path(listed).write_text(f"{Path(listed).read_text()}{broken},{NAMES[0]}\n")
        train = _listed_in(tmp_path / "train.csv", images["train"], range(32))
        arguments = DataArguments(train_file=train, test_file=listed, train_val_split=0)
        self._refused(tmp_path, model_dir, arguments, r"broken\.jpg")

    def test_a_model_without_its_classifier(self, model_dir, data, tmp_path):
        model = RBIForImageClassification.from_pretrained(model_dir)
        model.rbi.save_pretrained(tmp_path / "bare")
        _processor().save_pretrained(tmp_path / "bare")
        config = AutoConfig.from_pretrained(tmp_path / "bare")
        assert config.model_type == "rbi"
        self._refused(tmp_path, str(tmp_path / "bare"), data, "lacks .* weights .*classifier")

    def test_weights_that_cannot_be_read(self, model_dir, data, tmp_path):
        folder = shutil.copytree(model_dir, tmp_path / "model")
        weights = tmp_path / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:2000])
        self._refused(tmp_path, str(folder), data, "cannot be read")

    @pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "a/b/c"])
    def test_no_model(self, name, data, tmp_path):
        self._refused(tmp_path, name, data, "no such folder")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_shuffles": 1}, "--num_shuffles must be at least 2, got 1"),
        ({"resamples": 99}, "--resamples must be at least 100"),
        ({"batch_sizes": [8, 1]}, "--batch_sizes must be at least 2, got 1"),
        ({"per_device_eval_batch_size": 0}, "--per_device_eval_batch_size must be at least 1"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers must be at least 0"),
        ({"seed": -1}, "--seed must be at least 0"),
    ],
)
def test_arguments_out_of_their_range(values, message):
    with pytest.raises(ValueError, match=message):
        AssessmentArguments(model="x", **values)


def test_protocols_that_a_model_can_have(backbone_config):
    asked, left_out = choose_protocols(RBIConfig(), None)
    assert asked == ["single", "shuffled", "sorted"] and list(left_out) == ["reference"]
    assert choose_protocols(RBIConfig(), ["sorted", "single"])[0] == ["single", "sorted"]
    assert choose_protocols(backbone_config, ["single"])[0] == ["single"]


# --- The command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def words(model_dir, published, tmp_path):
    """The command line for the small data set."""
    data = ["--dataset_format", "cub_200_2011", "--dataset_dir", str(published)]
    return ["--model", model_dir, *data, "--output_dir", str(tmp_path / "out"), "--use_cpu"]


@pytest.mark.slow
def test_as_a_command(words, start_command, tmp_path):
    result = start_command("training.assess", [*words, "--batch_sizes", "8", "20", "--resamples", "100"])
    assert result.wait() == 0, result.stderr
    text = " ".join(result.stdout.split())
    for part in (
        "sorted - shuffled",
        "macro-F1",
        "Left out: reference, since the model has no reference bank",
        "40 images of 4 classes",
        "times one backbone pass",
        str(tmp_path / "out"),
    ):
        assert part in text, part
    assert max(len(line) for line in result.stdout.splitlines() if "/" not in line) <= 120
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    for finding in content["findings"].values():
        assert finding["sentence"] in text
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--protocols", "reference"], 1, "--protocols reference: the model has no reference bank"),
        (["--batch_sizes", "64"], 1, "--batch_sizes 64 is more than the 40 images"),
        (["--model", "/nowhere"], 1, "--model /nowhere: there is no such folder"),
        (["--num_shuffles", "1"], 2, "--num_shuffles must be at least 2"),
        (["--protocols", "alone"], 2, "invalid choice: 'alone'"),
        (["--split", "all"], 2, "invalid choice: 'all'"),
        (["--batch_size", "8"], 2, "did you mean `--batch_sizes`"),
        (["--train_dir", "x"], 2, "exactly one way"),
    ],
)
def test_errors(words, more, code, message, tmp_path, capsys):
    assert main([*words, *more]) == code
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and message in printed.err
    assert not printed.out and not (tmp_path / "out").exists()


def test_the_model_must_be_named(words, capsys):
    assert main(words[2:]) == 2
    assert "--model" in capsys.readouterr().err
