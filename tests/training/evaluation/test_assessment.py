"""What an assessment says of planted data: a leak where there is one, none where there is none; in any order."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, ConvNextForImageClassification, EvalPrediction
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_rbi import RBIConfig, RBIForImageClassification, RBIModel, pixel_statistics
from training import assess as assess_command
from training.assess import AssessmentArguments, choose_protocols, run
from training.data.arguments import DataArguments
from training.data.reading import load_images
from training.evaluation.assessment import assess
from training.evaluation.bootstrap import METRICS
from training.evaluation.classifiers import class_names, in_order_of_content, match_labels, predict_from
from training.evaluation.features import CachedImages
from training.evaluation.metrics import compute_metrics
from training.evaluation.protocols import Condition, Predictions
from training.evaluation.report import FILES, confused_pairs, confusion, results_table


NUM_CLASSES = 5


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("RBI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


# --- Planted features ------------------------------------------------------------------------------------------------


def _planted_leak(backbone_config, num_images=200):
    """
    Attention averages over the batch. Four in five images tell nothing of their class, the fifth tells it clearly:
    among class-mates, all learn it.
    """
    config = RBIConfig.kernel(
        backbone_config=backbone_config,
        feature_size=24,
        num_labels=NUM_CLASSES,
        relation_position_encoding="none",
        attention_temperature=2.0,
    )
    labels = torch.arange(NUM_CLASSES).repeat(num_images // NUM_CLASSES)
    features = 0.3 * torch.randn(num_images, 24)
    is_clear = torch.rand(num_images) < 0.2
    features[is_clear, labels[is_clear]] += 3
    return _with_features(RBIForImageClassification(config), features, labels)


def _no_leak(backbone_config, num_images=200):
    """
    Each image keeps its own features, to which noise is added that is of no class, the mean of the batch's: in a
    batch there is less of it than alone, and answers change with the batch, but a class-ordered one tells no more.
    """
    config = RBIConfig.paper(
        backbone_config=backbone_config,
        feature_size=24,
        num_labels=NUM_CLASSES,
        relation_position_encoding="none",
        residual_gate="sum",
    )
    model = RBIForImageClassification(config)
    with torch.no_grad():
        for layer in (model.rbi.rra.query, model.rbi.rra.key, model.rbi.rra.value, model.rbi.rra.residual):
            layer.weight.zero_()
            layer.bias.zero_()
        model.rbi.rra.residual.weight[:10, :10] = torch.eye(10)
        model.rbi.rra.value.weight[:10, 10:20] = torch.eye(10)
    labels = torch.arange(NUM_CLASSES).repeat(num_images // NUM_CLASSES)
    features = torch.randn(num_images, 24)
    features[torch.arange(num_images), labels] += 1.5
    features[:, 10:20] *= 3
    return _with_features(model, features, labels)


def _with_features(model, features, labels):
    with torch.no_grad():
        model.classifier.weight.copy_(3 * torch.eye(NUM_CLASSES, 24))
        model.classifier.bias.zero_()
    images = CachedImages(torch.zeros(len(labels), 3, 4, 4), features, labels)
    return predict_from(model.eval(), images), labels


def test_neighbors_that_reveal_the_label_are_a_leak(backbone_config):
    result = assess(*_planted_leak(backbone_config), ["single", "shuffled", "sorted"], [10, 20], resamples=500)
    leak = result.findings["leak"]
    assert leak.accuracy.low > 0.2
    assert "reads labels off its neighbors" in leak.sentence
    assert leak.sentence.startswith(f"Class-ordered batches add +{100 * leak.accuracy.value:.1f} points [")
    for size in (10, 20):
        first, second = Condition("sorted", size), Condition("shuffled", size)
        leak = result.differences[first, second]["accuracy"]
        values = [result.metrics[condition]["accuracy"].value for condition in (first, second)]
        assert leak.low > 0.2 and leak.value == pytest.approx(values[0] - values[1])


def test_neighbors_that_tell_nothing_are_none(backbone_config):
    """In 95 of 100 data sets, whatever their noise."""
    false_alarms = changed = 0
    for seed in range(12):
        torch.manual_seed(seed)
        predict, labels = _no_leak(backbone_config)
        result = assess(predict, labels, ["single", "shuffled", "sorted"], [5, 10], resamples=300, seed=seed)
        leak = result.findings["leak"]
        false_alarms += not leak.sentence.startswith("No leak seen")
        changed += leak.images_changed > 10
        assert leak.accuracy.contains_zero == ("contains 0" in leak.sentence)
        # What any batch does for the answers is seen.
        assert result.findings["shuffled"].sentence.startswith(
            "Relations help: compared with no neighbors, random batches"
        )
    assert false_alarms <= 2
    assert changed == 12, "the batch must matter, or nothing was tested"


def test_few_changes_tell_nothing():
    """Four images of 100 gained, none lost: the interval may be above 0, but so it would by chance 1 time in 8."""
    labels = torch.arange(100) % 2

    def predict(rows, scope):
        is_right = (rows >= (8 if scope == "self" else 4)).long()
        return 5 * torch.eye(2)[(labels[rows] + 1 - is_right) % 2]

    finding = assess(predict, labels, ["single", "shuffled"], [50], resamples=500).findings["shuffled"]
    assert finding.accuracy.value == pytest.approx(0.04) and finding.images_changed == pytest.approx(4)
    assert finding.sentence.startswith("Whether relations help is open")
    assert "too few to tell" in finding.sentence or "contains 0" in finding.sentence


def test_the_choice_of_a_batch_size_widens_the_interval(backbone_config):
    predict, labels = _planted_leak(backbone_config)
    alone = assess(predict, labels, ["shuffled", "sorted"], [20], resamples=2000).findings["leak"]
    several = assess(predict, labels, ["shuffled", "sorted"], [20, 10, 5], resamples=2000)
    finding = several.findings["leak"]
    plain = several.differences[Condition("sorted", finding.batch_size), Condition("shuffled", finding.batch_size)]
    assert alone.level == 0.95 and finding.level == pytest.approx(1 - 0.05 / 3)
    assert finding.accuracy.low < plain["accuracy"].low and finding.accuracy.high > plain["accuracy"].high


def test_the_metrics_are_those_of_the_whole_scores(backbone_config):
    predict, labels = _planted_leak(backbone_config)
    result = assess(predict, labels, ["single", "shuffled"], [10], num_shuffles=3, resamples=100)
    expected = compute_metrics(EvalPrediction(predict(torch.arange(200), "self"), labels))
    for name in METRICS:
        estimate = result.metrics[Condition("single")][name]
        assert estimate.value == pytest.approx(expected[name])
        shuffles = [metrics[name] for metrics in result.predictions[Condition("shuffled", 10)].metrics]
        assert len(shuffles) == 3
        assert result.metrics[Condition("shuffled", 10)][name].value == pytest.approx(sum(shuffles) / 3)


def test_references_are_asked_for_in_their_scope():
    scopes = []

    def predict(rows, scope):
        scopes.append(scope)
        return torch.eye(2)[(rows % 2 + (scope != "reference") * (rows % 3 == 0)) % 2]

    result = assess(predict, torch.arange(90) % 2, ["single", "reference"], [], resamples=200)
    assert set(scopes) == {"self", "reference"}
    assert list(result.findings) == ["reference"]
    assert result.findings["reference"].sentence.startswith(
        "Relations help: compared with no neighbors, the references"
    )
    assert result.most_telling == Condition("reference")


# --- Whole runs ------------------------------------------------------------------------------------------------------


NAMES = [f"{number:03d}.Made_up_Bird_{number}" for number in range(1, 5)]


@pytest.fixture
def model(backbone_config):
    """An RBI model with random weights for the classes of `published`."""
    return _model(backbone_config, NAMES)


def _model(backbone_config, names, **fields):
    torch.manual_seed(0)
    mean, std = pixel_statistics(_processor())
    config = RBIConfig.kernel(
        backbone_config=backbone_config,
        image_mean=mean,
        image_std=std,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        **fields,
    )
    model = RBIForImageClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    return model


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


def test_every_file_is_written(model, data, tmp_path):
    result, content = _run(_save(model, tmp_path / "model"), tmp_path / "out", data)
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == content
    for name in FILES:
        if name.endswith(".png"):
            with Image.open(tmp_path / "out" / name) as image:
                assert min(image.size) > 300
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["protocol"], row["batch_size"]) for row in rows] == [
        ("single", ""),
        *((protocol, size) for protocol in ("shuffled", "sorted") for size in ("8", "20")),
    ]
    for row, written in zip(rows, content["results"], strict=True):
        estimate = result.metrics[Condition(row["protocol"], int(row["batch_size"] or 0) or None)]["macro_f1"]
        assert float(row["macro_f1"]) == estimate.value == written["macro_f1"]["value"]
        assert float(row["macro_f1_low"]) == estimate.low and float(row["macro_f1_high"]) == estimate.high
    with (tmp_path / "out" / "per_class.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["protocol"] == "single"]
    assert [row["class"] for row in rows] == NAMES
    recall = sum(float(row["recall"]) * int(row["images"]) for row in rows) / 40
    assert recall == pytest.approx(result.metrics[Condition("single")]["accuracy"].value)
    assert set(content["findings"]) == {"leak", "shuffled"}
    assert "set_references" in content["left_out"]["reference"]
    assert content["time_ratio"] == content["seconds"]["total"] / content["seconds"]["backbone pass"] > 1


def test_features_are_computed_once(model, data, tmp_path, monkeypatch):
    seen = []
    original = RBIModel.extract_features

    def counted(self, pixel_values, **kwargs):
        seen.append(len(pixel_values))
        return original(self, pixel_values, **kwargs)

    folder = _save(model, tmp_path / "model")
    monkeypatch.setattr(RBIModel, "extract_features", counted)
    _run(folder, tmp_path / "out", data, per_device_eval_batch_size=15)
    assert seen == [15, 15, 10]


def test_the_answers_are_those_of_the_saved_model(model, data, tmp_path):
    result, _ = _run(_save(model, tmp_path / "model"), tmp_path / "out", data, protocols=["single"])
    split = in_order_of_content(load_images(data, seed=42)["test"])
    images = [Image.open(row["path"]).convert("RGB") for row in split["image"]]
    with torch.no_grad():
        logits = model(_processor()(images, return_tensors="pt")["pixel_values"]).logits
    expected = compute_metrics(EvalPrediction(logits, torch.tensor(split["label"])))
    assert {name: each.value for name, each in result.metrics[Condition("single")].items()} == pytest.approx(expected)


def _listed_in(path, split, order):
    """A CSV file of a split, its rows in this order."""
    names = split.features["label"].names
    rows = [(split[row]["image"]["path"], names[split[row]["label"]]) for row in order]
    path.write_text("image,label\n" + "".join(f"{image},{label}\n" for image, label in rows))
    return str(path)


def test_results_do_not_depend_on_the_order_of_the_data(model, data, tmp_path):
    images = load_images(data, seed=0)
    folder, contents = _save(model, tmp_path / "model"), []
    for name, order in {"up": range(40), "down": range(39, -1, -1), "random": torch.randperm(40).tolist()}.items():
        arguments = DataArguments(
            train_file=_listed_in(tmp_path / "train.csv", images["train"], range(len(images["train"]))),
            test_file=_listed_in(tmp_path / f"{name}.csv", images["test"], order),
            train_val_split=0,
        )
        contents.append(_run(folder, tmp_path / name, arguments)[1])
    for part in ("results", "differences", "findings", "data"):
        assert contents[0][part] == contents[1][part] == contents[2][part]
    files = [(tmp_path / name / "confused_pairs.png").read_bytes() for name in ("up", "down", "random")]
    assert files[0] == files[1] == files[2]


def test_labels_in_another_order_than_the_models(model, data, backbone_config, tmp_path):
    """Numbers of classes, and classes that the data lack, change no answer to an image."""
    other = _model(backbone_config, ["Dodo", *reversed(NAMES)])
    state = model.state_dict()
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = torch.cat([torch.full_like(state[name][:1], -1e-3), state[name].flip(0)])
    state["classifier.bias"][0] = -100
    other.load_state_dict(state)
    results = [
        _run(_save(each, tmp_path / name), tmp_path / f"{name}-out", data, protocols=["single", "shuffled"])[0]
        for name, each in {"one": model, "other": other}.items()
    ]
    for condition, metrics in results[0].metrics.items():
        for name, estimate in metrics.items():
            if name != "top5_accuracy":  # of 4 classes it is 1
                assert results[1].metrics[condition][name].value == pytest.approx(estimate.value, abs=1e-5)
    rows = [list(csv.DictReader((tmp_path / name / "per_class.csv").open())) for name in ("one-out", "other-out")]
    by_class = [{(row["protocol"], row["batch_size"], row["class"]): row["recall"] for row in each} for each in rows]
    assert by_class[0] == by_class[1]


def test_with_references(model, data, tmp_path):
    model.set_reference_features(
        torch.randn(12, model.config.feature_size), torch.randn(12, 3, 16, 16), torch.arange(12) % 4
    )
    result, content = _run(_save(model, tmp_path / "model"), tmp_path / "out", data)
    assert content["left_out"] == {}
    assert content["model"]["references"]["num_references"] == 12
    assert set(result.findings) == {"leak", "shuffled", "reference"}
    assert result.most_telling == Condition("reference")


def test_any_image_classifier_is_measured_alone(data, backbone_config, tmp_path):
    backbone_config.id2label, backbone_config.label2id = dict(enumerate(NAMES)), None
    classifier = ConvNextForImageClassification(backbone_config).eval()
    result, content = _run(_save(classifier, tmp_path / "model"), tmp_path / "out", data, batch_sizes=None)
    assert list(result.metrics) == [Condition("single")]
    assert "do not depend on the batch" in content["left_out"]["sorted"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES) - {"batch_size.png"}


def test_an_earlier_assessment_is_replaced_whole(model, data, tmp_path):
    folder = _save(model, tmp_path / "model")
    _run(folder, tmp_path / "out", data)
    _run(folder, tmp_path / "out", data, protocols=["single"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES) - {"batch_size.png"}


def test_a_run_that_fails_leaves_an_earlier_one(model, data, tmp_path, monkeypatch):
    folder = _save(model, tmp_path / "model")
    _run(folder, tmp_path / "out", data)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(assess_command, "plot", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        _run(folder, tmp_path / "out", data, protocols=["single"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_default_batch_sizes_are_those_there_are_images_for(model, data, tmp_path):
    result, content = _run(_save(model, tmp_path / "model"), tmp_path / "out", data, batch_sizes=None)
    assert {condition.batch_size for condition in result.metrics} == {None, 8, 16, 32}
    assert content["left_out"]["batch sizes 64, 128"] == "there are 40 images"


# --- Bad input -------------------------------------------------------------------------------------------------------


class TestRefused:
    """Before the backbone runs, and nothing is written."""

    @pytest.fixture(autouse=True)
    def _no_backbone(self, monkeypatch):
        monkeypatch.setattr(assess_command, "extract", lambda *args, **kwargs: pytest.fail("the backbone ran"))

    def _refused(self, tmp_path, model, data, match, **more):
        folder = model if isinstance(model, str) else _save(model, tmp_path / "model")
        with pytest.raises((ValueError, OSError), match=match):
            _run(folder, tmp_path / "out", data, **more)
        assert not (tmp_path / "out").exists()

    def test_references_of_a_model_without(self, model, data, tmp_path):
        self._refused(tmp_path, model, data, "reference: the model has no reference bank", protocols=["reference"])

    def test_batches_of_a_model_without_relations(self, backbone_config, data, tmp_path):
        backbone_config.id2label = dict(enumerate(NAMES))
        classifier = ConvNextForImageClassification(backbone_config)
        self._refused(tmp_path, classifier, data, "shuffled: .* not depend on the batch", protocols=["shuffled"])

    def test_batches_larger_than_the_data(self, model, data, tmp_path):
        self._refused(tmp_path, model, data, "batch_sizes 41 is more than the 40 images", batch_sizes=[8, 41])

    def test_fewer_images_than_the_smallest_batch(self, model, data, tmp_path):
        data.max_test_samples = 7
        self._refused(tmp_path, model, data, "7 images, fewer than the smallest batch size", batch_sizes=None)

    def test_one_class(self, model, data, tmp_path):
        images = load_images(data, seed=0)
        rows = [row for row, label in enumerate(images["test"]["label"]) if label == 1]
        one = DataArguments(
            train_file=_listed_in(tmp_path / "train.csv", images["train"], range(20)),
            test_file=_listed_in(tmp_path / "test.csv", images["test"], rows),
        )
        self._refused(tmp_path, model, one, f'one class, "{NAMES[1]}"', batch_sizes=[2])

    def test_labels_that_do_not_match(self, data, backbone_config, tmp_path):
        model = _model(backbone_config, [NAMES[0], "Dodo", "Auk", NAMES[3]])
        self._refused(tmp_path, model, data, f"2 of the 4 labels .*{NAMES[1]}, {NAMES[2]}; the model has .*Dodo, Auk")

    def test_a_split_that_is_not_there(self, model, data, tmp_path):
        data.train_val_split = 0
        self._refused(tmp_path, model, data, "no validation split: choose --split train or test", split="validation")

    def test_a_folder_that_holds_other_things(self, model, data, tmp_path):
        folder = _save(model, tmp_path / "model")
        before = sorted((tmp_path / "model").iterdir())
        with pytest.raises(ValueError, match="other files than an assessment"):
            _run(folder, tmp_path / "model", data)
        assert sorted((tmp_path / "model").iterdir()) == before
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "results.json").write_text('{"program": "another"}')
        with pytest.raises(ValueError, match="other files than an assessment"):
            _run(folder, tmp_path / "other", data)
        with pytest.raises(ValueError, match="is a file"):
            _run(folder, tmp_path / "other" / "results.json", data)

    def test_a_broken_image_is_named(self, model, data, tmp_path):
        images = load_images(data, seed=0)
        broken = tmp_path / "broken.jpg"
        broken.write_bytes(Path(images["test"][0]["image"]["path"]).read_bytes()[:700])
        listed = _listed_in(tmp_path / "test.csv", images["test"], range(30))
        Path(listed).write_text(f"{Path(listed).read_text()}{broken},{NAMES[0]}\n")
        train = _listed_in(tmp_path / "train.csv", images["train"], range(32))
        arguments = DataArguments(train_file=train, test_file=listed, train_val_split=0)
        self._refused(tmp_path, model, arguments, r"broken\.jpg")

    def test_a_model_without_its_classifier(self, model, data, tmp_path):
        model.rbi.save_pretrained(tmp_path / "bare")
        _processor().save_pretrained(tmp_path / "bare")
        config = AutoConfig.from_pretrained(tmp_path / "bare")
        assert config.model_type == "rbi"
        self._refused(tmp_path, str(tmp_path / "bare"), data, "lacks .* weights .*classifier")

    def test_weights_that_cannot_be_read(self, model, data, tmp_path):
        folder = _save(model, tmp_path / "model")
        weights = tmp_path / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:2000])
        self._refused(tmp_path, folder, data, "cannot be read")

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


# --- Parts -----------------------------------------------------------------------------------------------------------


def test_labels_are_matched_by_name_with_either_table(data):
    """A config that was given one of them has the numbered names of the library in the other."""
    split = load_images(data, seed=0)["test"]
    names = ["Dodo", *reversed(NAMES)]
    named = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    numbered = {
        "id2label": {number: f"LABEL_{number}" for number in range(5)},
        "label2id": {f"LABEL_{number}": number for number in range(5)},
    }
    for tables in (named, {"id2label": named["id2label"]}, numbered | {"id2label": named["id2label"]}):
        config = RBIConfig(**tables)
        assert match_labels(split, config).tolist() == [4, 3, 2, 1]
        assert class_names(config) == names
    config = RBIConfig(**numbered | {"label2id": named["label2id"]})
    assert match_labels(split, config).tolist() == [4, 3, 2, 1]
    assert class_names(config) == names


def test_two_labels_of_one_class_are_refused(data):
    config = RBIConfig(id2label=dict(enumerate(NAMES)), label2id=dict(zip(NAMES, [0, 1, 1, 3], strict=True)))
    with pytest.raises(ValueError, match="one class of the model"):
        match_labels(load_images(data, seed=0)["test"], config)


def test_protocols_that_a_model_can_have(backbone_config):
    asked, left_out = choose_protocols(RBIConfig(), None)
    assert asked == ["single", "shuffled", "sorted"] and list(left_out) == ["reference"]
    assert choose_protocols(RBIConfig(), ["sorted", "single"])[0] == ["single", "sorted"]
    assert choose_protocols(backbone_config, ["single"])[0] == ["single"]


def test_confusion_counts_images_over_orders():
    labels = torch.tensor([0, 0, 1, 2])
    first, second = (torch.eye(3)[classes] for classes in ([0, 1, 1, 2], [0, 0, 1, 2]))
    second[3] = torch.nan
    counts = confusion(Predictions.stack([Predictions.from_scores(each, labels) for each in (first, second)]), labels)
    assert counts.tolist() == [[1.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0, 0]]


def test_confused_pairs_come_worst_first_with_their_images():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    predictions = Predictions.from_scores(torch.eye(3)[[0, 1, 1, 1, 0, 1, 0, 2]], labels)
    worst, other = confused_pairs(predictions, labels, ["a", "b", "c"], 6)
    assert (worst.first, worst.second, worst.first_as_second, worst.second_as_first) == ("a", "b", 2, 1)
    assert worst.rows == {"first": [0], "first as second": [1, 2], "second as first": [4], "second": [3, 5]}
    assert (other.first, other.second) == ("a", "c") and other.rows["second as first"] == [6]
    assert confused_pairs(Predictions.from_scores(torch.eye(3)[labels], labels), labels, ["a", "b", "c"], 6) == []


def test_the_table_has_all_and_says_what_is_left_out(backbone_config):
    result = assess(*_planted_leak(backbone_config), ["single", "shuffled", "sorted"], [10], resamples=100)
    table = results_table(result, {"reference": "[no bank]", "more": "[no bank]"})
    assert list(table.columns[0].cells) == ["single", "shuffled", "sorted", "sorted - shuffled", "shuffled - single"]
    assert table.caption == "Left out: reference, more, since \\[no bank]."
    estimate = result.metrics[Condition("single")]["accuracy"]
    cell = next(iter(table.columns[2].cells))
    assert cell == f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
