"""The metrics beside scikit-learn and a float64 calculation, in evaluate and Trainer, and on a home without rights."""

import datasets
import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, top_k_accuracy_score
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    pipeline,
)

from training.evaluation.metrics import Accuracy, CalibrationError, MacroF1, TopKAccuracy, compute_metrics


NAMES = ["accuracy", "top5_accuracy", "macro_f1", "calibration_error"]
METRICS = {
    "accuracy": Accuracy,
    "top5_accuracy": TopKAccuracy,
    "macro_f1": MacroF1,
    "calibration_error": CalibrationError,
}

# Of float32 softmax, for rows that were stored again at another place in memory.
ROUNDING = 1e-6


def draw(num_rows=400, num_classes=9, spread=2.0, absent=(), seed=0):
    """Logits that are better than chance, and labels without the classes `absent`."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([number for number in range(num_classes) if number not in absent], num_rows)
    logits = spread * rng.normal(size=(num_rows, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    return logits.astype(np.float32), labels


def softmax(logits):
    exponentials = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def calibration_error(probabilities, labels, num_bins=15):
    """Guo et al., equations 2, 3 and 5, one bin after another."""
    confidences, is_right = probabilities.max(-1), probabilities.argmax(-1) == labels
    error = 0.0
    for number in range(num_bins):
        upper = np.inf if number == num_bins - 1 else (number + 1) / num_bins
        rows = (confidences >= number / num_bins) & (confidences < upper)
        if rows.any():
            error += rows.mean() * abs(is_right[rows].mean() - confidences[rows].mean())
    return error


@pytest.mark.parametrize("num_rows", [1, 7, 400, 3000])
@pytest.mark.parametrize("absent", [(), (0, 3, 8)])
def test_against_scikit_learn_and_float64(num_rows, absent):
    logits, labels = draw(num_rows, absent=absent, seed=num_rows)
    metrics = compute_metrics(EvalPrediction(logits, labels))
    assert list(metrics) == NAMES
    predictions = logits.argmax(-1)
    expected = {
        "accuracy": accuracy_score(labels, predictions),
        "top5_accuracy": top_k_accuracy_score(labels, logits, k=5, labels=range(9)),
        "macro_f1": f1_score(labels, predictions, average="macro"),
        "calibration_error": calibration_error(softmax(logits), labels),
    }
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_any_k(k):
    logits, labels = draw()
    result = TopKAccuracy(k=k).compute(predictions=logits, references=labels)
    assert result == {
        f"top{k}_accuracy": pytest.approx(top_k_accuracy_score(labels, logits, k=k, labels=range(9)), abs=1e-6)
    }


def test_few_classes_are_all_among_the_best_five():
    logits, labels = draw(num_classes=3)
    logits[:100] = np.nan
    assert compute_metrics(EvalPrediction(logits, labels))["top5_accuracy"] == pytest.approx(0.75)


@pytest.mark.parametrize("spread", [0.5, 40.0])
def test_logits_and_probabilities_have_the_same_calibration_error(spread):
    logits, labels = draw(spread=spread)
    probabilities = softmax(logits)
    if spread == 40:
        assert (probabilities.astype(np.float32).max(-1) == 1).mean() > 0.3
    expected = calibration_error(probabilities, labels)
    for scores in (logits, probabilities):
        result = CalibrationError().compute(predictions=scores, references=labels)
        assert result["calibration_error"] == pytest.approx(expected, abs=1e-5)


def test_logits_between_0_and_1_are_still_logits():
    rng = np.random.default_rng(0)
    logits, labels = rng.random((300, 6)).astype(np.float32), rng.integers(0, 6, 300)
    expected = calibration_error(softmax(logits), labels)
    assert abs(expected - calibration_error(logits.astype(np.float64), labels)) > 0.1
    assert compute_metrics(EvalPrediction(logits, labels))["calibration_error"] == pytest.approx(expected, abs=1e-6)


def test_full_confidence_is_in_the_last_bin():
    # 0.96, which is right, and 1, which is wrong, share the last of 15 bins and make up for each other in part.
    probabilities = np.array([[1.0, 0.0], [0.96, 0.04]])
    result = CalibrationError().compute(predictions=probabilities, references=[1, 0])
    assert result["calibration_error"] == pytest.approx(0.98 - 0.5, abs=1e-6)


def test_number_of_bins():
    logits, labels = draw()
    for num_bins in (1, 4, 30):
        result = CalibrationError(num_bins=num_bins).compute(predictions=logits, references=labels)
        expected = calibration_error(softmax(logits), labels, num_bins)
        assert result["calibration_error"] == pytest.approx(expected, abs=1e-6)


def test_rows_without_a_label_are_left_out():
    logits, labels = draw()
    rest = np.arange(len(labels)) % 3 > 0
    masked = np.where(rest, labels, -100)
    expected = compute_metrics(EvalPrediction(logits[rest], labels[rest]))
    assert compute_metrics(EvalPrediction(logits, masked)) == pytest.approx(expected, abs=ROUNDING)
    predictions = logits.argmax(-1)
    result = Accuracy().compute(predictions=predictions, references=masked)
    assert result["accuracy"] == pytest.approx(accuracy_score(labels[rest], predictions[rest]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_wrong(value):
    logits, labels = draw()
    broken = logits.copy()
    broken[:80, 4] = value
    metrics = compute_metrics(EvalPrediction(broken, labels))
    predictions = logits.argmax(-1)
    assert metrics["accuracy"] == pytest.approx(accuracy_score(labels[80:], predictions[80:]) * 0.8)
    top_5 = top_k_accuracy_score(labels[80:], logits[80:], k=5, labels=range(9))
    assert metrics["top5_accuracy"] == pytest.approx(top_5 * 0.8)
    predictions[:80] = 9
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro", labels=range(9)))
    probabilities = np.concatenate([softmax(logits), np.zeros((len(labels), 1))], -1)
    probabilities[:80] = np.eye(10)[9]
    assert metrics["calibration_error"] == pytest.approx(calibration_error(probabilities, labels), abs=1e-6)


def test_no_finite_row_at_all():
    metrics = compute_metrics(EvalPrediction(np.full((4, 6), np.nan), np.arange(4)))
    assert metrics == {"accuracy": 0, "top5_accuracy": 0, "macro_f1": 0, "calibration_error": pytest.approx(1)}


def test_a_tuple_has_the_scores_first_and_half_precision_will_do():
    logits, labels = draw()
    expected = compute_metrics(EvalPrediction(logits.astype(np.float16).astype(np.float32), labels))
    given = EvalPrediction((logits.astype(np.float16), np.zeros((400, 3))), labels)
    assert compute_metrics(given) == pytest.approx(expected, abs=ROUNDING)


def test_the_modules_give_what_compute_metrics_gives_alone_and_combined():
    logits, labels = draw()
    expected = compute_metrics(EvalPrediction(logits, labels))
    for name, metric in METRICS.items():
        result = metric().compute(predictions=logits, references=labels)
        assert result == pytest.approx({name: expected[name]}, abs=ROUNDING)
    combined = evaluate.combine([metric() for metric in METRICS.values()])
    result = combined.compute(predictions=logits, references=labels)
    assert result == pytest.approx(expected, abs=ROUNDING)
    for rows in np.array_split(np.arange(400), 7):
        combined.add_batch(predictions=logits[rows], references=labels[rows])
    assert combined.compute() == pytest.approx(expected, abs=ROUNDING)


def test_class_numbers():
    logits, labels = draw(absent=(8,))
    predictions = logits.argmax(-1)
    combined = evaluate.combine([Accuracy(), MacroF1()])
    for given in (predictions, predictions.tolist(), torch.from_numpy(predictions)):
        result = combined.compute(predictions=given, references=labels)
        assert result == pytest.approx(
            {
                "accuracy": accuracy_score(labels, predictions),
                "macro_f1": f1_score(labels, predictions, average="macro"),
            }
        )


@pytest.mark.parametrize("metric", [TopKAccuracy, CalibrationError])
def test_class_numbers_are_no_scores(metric):
    with pytest.raises(ValueError, match="format"):
        metric().compute(predictions=[0, 1], references=[0, 1])


def classifier():
    config = ConvNextConfig(
        hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], image_size=32, num_labels=4, initializer_range=1.0
    )
    return ConvNextForImageClassification(config).eval()


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    made = [Image.fromarray(image) for image in rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcd"))})
    return datasets.Dataset.from_dict({"image": made, "label": [0, 1, 2, 3] * 3}, features=features)


def test_inside_the_evaluator(images, tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size=32).save_pretrained(tmp_path)
    # evaluate 0.4.6 takes no pipeline of transformers 5, whose TensorFlow classes it looks for, but makes one itself.
    result = evaluate.evaluator("image-classification").compute(
        model_or_pipeline=str(tmp_path),
        data=images,
        metric=Accuracy(),
        label_mapping=model.config.label2id,
        device=-1,
    )
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    predictions = [model.config.label2id[answer[0]["label"]] for answer in classify(list(images["image"]))]
    assert len(set(predictions)) > 1
    assert result["accuracy"] == pytest.approx(accuracy_score(images["label"], predictions))


def test_inside_trainer(images, tmp_path):
    processor = ViTImageProcessorPil(size=32)
    rows = [
        {"pixel_values": processor(row["image"], return_tensors="pt")["pixel_values"][0], "labels": row["label"]}
        for row in images
    ]
    trainer = Trainer(
        model=classifier(),
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True),
        eval_dataset=rows,
        compute_metrics=compute_metrics,
    )
    output = trainer.predict(rows)
    expected = compute_metrics(EvalPrediction(output.predictions, output.label_ids))
    assert {name: output.metrics[f"test_{name}"] for name in NAMES} == pytest.approx(expected)
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(expected["accuracy"])


@pytest.mark.parametrize("home", ["absent", "file"])
def test_nothing_is_written(tmp_path, home, monkeypatch):
    folder = tmp_path / "home"
    if home == "file":
        folder.write_text("no folder, so that nobody, not even root, can write below it")
    # Where `evaluate` keeps what modules write.
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", folder / "metrics")
    monkeypatch.setenv("HOME", str(folder))
    combined = evaluate.combine([metric() for metric in METRICS.values()])
    combined.add_batch(predictions=[[0.0, 1.0], [3.0, 1.0]], references=[1, 1])
    assert combined.compute()["accuracy"] == 0.5
    assert not folder.is_dir()


def test_bad_input():
    logits, labels = draw()
    with pytest.raises(ValueError, match=r"scores of shape .* got \(400, 9, 1\)"):
        compute_metrics(EvalPrediction(logits[..., None], labels))
    with pytest.raises(ValueError, match=r"got \(400, 9\) and \(399,\)"):
        compute_metrics(EvalPrediction(logits, labels[1:]))
    with pytest.raises(ValueError, match="labels go from 0 to 9, but there are scores of 9 classes"):
        compute_metrics(EvalPrediction(logits, np.where(np.arange(400) == 5, 9, labels)))
    with pytest.raises(ValueError, match="labels go from -1"):
        compute_metrics(EvalPrediction(logits, np.where(np.arange(400) == 5, -1, labels)))
    with pytest.raises(ValueError, match="No row has a label"):
        compute_metrics(EvalPrediction(logits, np.full(400, -100)))
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        compute_metrics(EvalPrediction(logits[:, :1], np.zeros(400, dtype=int)))
    with pytest.raises(ValueError, match="not negative"):
        Accuracy().compute(predictions=[0, -1], references=[0, 1])
    with pytest.raises(ValueError, match="`k` must be at least 1"):
        TopKAccuracy(k=0)
    with pytest.raises(ValueError, match="`num_bins` must be at least 1"):
        CalibrationError(num_bins=0)
