# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Metrics of image classification, for `Trainer` and as modules of `evaluate` that need no network and write no files.

All take scores of shape `(n, num_classes)`, logits or probabilities, with labels of shape `(n,)`. [`Accuracy`] and
[`MacroF1`] take class numbers of shape `(n,)` as well, as `evaluate.evaluator` passes them. All return
fractions in [0, 1]. In all of them:

- Rows with the label -100 are ignored.
- A row with a score that is not finite has no prediction and counts as wrong: as a miss in accuracy and top-k
  accuracy, as a false negative of its class in F1, and as wrong with confidence 1 in the calibration error.
- The order of equal scores is undefined.
"""

import datasets
import evaluate
import numpy as np
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_f1_score,
)
from transformers import EvalPrediction

from modeling_rbi import NO_LABEL, UserError


# Metrics in the order of the reports, and their titles.
METRIC_TITLES = {
    "accuracy": "accuracy",
    "top5_accuracy": "top-5",
    "macro_f1": "macro-F1",
    "calibration_error": "calibration error",
}
NUM_CALIBRATION_BINS = 15
# How far from 1 the sum of a row of probabilities may be: bfloat16 rounds each of them to 3 digits.
_SUM_TOLERANCE = 1e-2
# Rows per step: torchmetrics makes several one-hot tables of them.
_TOP_K_ROWS = 1024

_SCORES = datasets.Features(
    {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
)
_CLASS_NUMBERS = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})


def compute_metrics(eval_prediction: EvalPrediction) -> dict[str, float]:
    r"""
    Metrics for `Trainer(compute_metrics=...)`.

    Args:
        eval_prediction (`EvalPrediction`):
            `predictions` are the scores, `(n, num_classes)`, or a tuple of arrays with the scores first; `label_ids`
            the classes, `(n,)`.

    Returns:
        `dict[str, float]`: `accuracy`, `top5_accuracy`, `macro_f1` and `calibration_error`; see [`Accuracy`],
        [`TopKAccuracy`], [`MacroF1`] and [`CalibrationError`].

    Raises:
        UserError: if the shapes don't match, a label is not a class, or no row has a label.
    """
    predictions = eval_prediction.predictions
    return combined_metrics().compute(
        predictions=torch.as_tensor(predictions[0] if isinstance(predictions, tuple) else predictions),
        references=torch.as_tensor(eval_prediction.label_ids),
    )


def combined_metrics() -> evaluate.CombinedEvaluations:
    """All metrics of training and assessment, in the order of the reports."""
    return evaluate.combine([Accuracy(), TopKAccuracy(), MacroF1(), CalibrationError()])


class _ClassificationMetric(evaluate.Metric):
    r"""
    Base class of the metrics. All rows are kept in memory, so one process gathers the rows of all, as Trainer does.

    [`compute`] measures arrays of scores directly. `evaluate` would first write them to an Arrow table, row by row and
    once per metric, which takes 5.2 s instead of 0.2 s for all four metrics of 10,000 x 200 scores on one core, with
    equal results. Rows that were added earlier, lists and class numbers go through `evaluate`.
    """

    _description: str
    _citation = ""
    _accepts_class_numbers = False

    def __init__(self, **kwargs):
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self._description,
            citation=self._citation,
            inputs_description=__doc__,
            features=[_SCORES, _CLASS_NUMBERS] if self._accepts_class_numbers else _SCORES,
        )

    def compute(self, *, predictions=None, references=None, **kwargs) -> dict[str, float] | None:
        """Computes the metric of these rows or, without arguments, of rows added before."""
        are_arrays = all(isinstance(each, np.ndarray | torch.Tensor) for each in (predictions, references))
        if are_arrays and predictions.ndim != 1 and self.num_process == 1 and self.writer is None:
            return self._compute(predictions=predictions, references=references, **kwargs)
        # `evaluate` copies this function for each instance, without what `super()` needs.
        return evaluate.Metric.compute(self, predictions=predictions, references=references, **kwargs)

    def _build_data_dir(self) -> str:
        # The base class creates this folder even if it never writes to it.
        return self._data_dir_root


class Accuracy(_ClassificationMetric):
    """`accuracy`: the share of rows whose best class is the label."""

    _description = __doc__
    _accepts_class_numbers = True

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"accuracy": _accuracy(*_labeled_rows(predictions, references))}


class TopKAccuracy(_ClassificationMetric):
    r"""
    `top{k}_accuracy`: the share of rows whose label is among the best k classes. With k classes or fewer, that is
    every row with finite scores.

    Args:
        k (`int`, *optional*, defaults to 5):
            Number of classes that count.
        kwargs:
            Passed to `evaluate.Metric`.

    Raises:
        UserError: if `k` is less than 1.
    """

    _description = "`top{k}_accuracy`: the share of rows whose label is among the best k classes."

    def __init__(self, k: int = 5, **kwargs):
        if k < 1:
            raise UserError(f"`k` must be at least 1, got {k}.")
        super().__init__(**kwargs)
        self.k = k

    def _compute(self, predictions, references) -> dict[str, float]:
        return {f"top{self.k}_accuracy": _top_k_accuracy(*_labeled_rows(predictions, references), self.k)}


class MacroF1(_ClassificationMetric):
    """`macro_f1`: the mean of F1 over the classes that occur as a label or a prediction, as in scikit-learn. A class
    that is predicted but never a label counts as 0; one that is neither does not count."""

    _description = __doc__
    _accepts_class_numbers = True

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"macro_f1": _macro_f1(*_labeled_rows(predictions, references))}


class CalibrationError(_ClassificationMetric):
    r"""
    `calibration_error`: the expected calibration error of [Guo et al. (2017)](https://huggingface.co/papers/1706.04599).
    The rows are sorted into bins of equal width by the probability of their best class. The error is the mean over
    bins, weighted by rows, of the distance between accuracy and mean probability. Bins include their lower edge, the
    last one also 1.

    Scores are read as probabilities if all finite rows are non-negative and sum to 1, otherwise as logits.

    Args:
        num_bins (`int`, *optional*, defaults to 15):
            Number of bins.
        kwargs:
            Passed to `evaluate.Metric`.

    Raises:
        UserError: if `num_bins` is less than 1.
    """

    _description = "`calibration_error`: the expected calibration error of the best class's probability."
    _citation = """@inproceedings{guo2017calibration,
  title     = {On Calibration of Modern Neural Networks},
  author    = {Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle = {International Conference on Machine Learning},
  year      = {2017}
}"""

    def __init__(self, num_bins: int = NUM_CALIBRATION_BINS, **kwargs):
        if num_bins < 1:
            raise UserError(f"`num_bins` must be at least 1, got {num_bins}.")
        super().__init__(**kwargs)
        self.num_bins = num_bins

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"calibration_error": _calibration_error(*_labeled_rows(predictions, references), self.num_bins)}


def _labeled_rows(predictions, references) -> tuple[torch.Tensor, torch.Tensor]:
    """Labeled rows: their scores, `(n, num_classes)`, or class numbers, `(n,)`, and their labels, `(n,)`."""
    predictions, labels = torch.as_tensor(predictions), torch.as_tensor(references).long()
    if predictions.ndim not in (1, 2) or labels.shape != predictions.shape[:1]:
        raise UserError(
            "Metrics take scores of shape (n, num_classes) or class numbers of shape (n,), with labels of shape (n,); "
            f"got {tuple(predictions.shape)} and {tuple(labels.shape)}."
        )
    has_label = labels != NO_LABEL
    predictions, labels = predictions[has_label], labels[has_label]
    if not len(labels):
        raise UserError(f"No row has a label (there are no rows, or all labels are {NO_LABEL}).")
    if predictions.ndim == 2:
        num_classes = predictions.shape[1]
        if num_classes < 2:
            raise UserError(f"Classification metrics need scores of at least 2 classes, got {num_classes}.")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise UserError(
                f"The labels go from {labels.min()} to {labels.max()}, but there are scores of {num_classes} classes, "
                f"0 to {num_classes - 1}."
            )
        return predictions.float(), labels
    if predictions.is_floating_point() or min(predictions.min(), labels.min()) < 0:
        raise UserError("Class numbers must be integers that are not negative.")
    return predictions, labels


def _predicted_classes(predictions: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Predicted class of each row, `(n,)`, and the number of classes, which stands for no prediction."""
    if predictions.ndim == 1:
        return predictions, int(torch.cat([predictions, labels]).max()) + 1
    num_classes = predictions.shape[1]
    return predictions.argmax(-1).where(predictions.isfinite().all(-1), num_classes), num_classes


def _accuracy(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    classes, num_classes = _predicted_classes(predictions, labels)
    return multiclass_accuracy(classes, labels, num_classes=num_classes + 1, average="micro").item()


def _top_k_accuracy(scores: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    is_valid, num_classes = scores.isfinite().all(-1), scores.shape[1]
    parts = zip(scores[is_valid].split(_TOP_K_ROWS), labels[is_valid].split(_TOP_K_ROWS), strict=True)
    hits = sum(
        len(rows)
        * multiclass_accuracy(rows, own, num_classes=num_classes, average="micro", top_k=min(k, num_classes)).item()
        for rows, own in parts
        if len(rows)
    )
    return hits / len(labels)


def _macro_f1(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    classes, num_classes = _predicted_classes(predictions, labels)
    scores = multiclass_f1_score(classes, labels, num_classes=num_classes + 1, average="none")[:num_classes]
    occurs = torch.cat([classes, labels]).bincount(minlength=num_classes)[:num_classes] > 0
    return scores[occurs].mean().item()


def _calibration_error(scores: torch.Tensor, labels: torch.Tensor, num_bins: int) -> float:
    is_valid = scores.isfinite().all(-1, keepdim=True)
    scores = scores.where(is_valid, 1 / scores.shape[1])
    is_probability = scores.min() >= 0 and (scores.sum(-1) - 1).abs().max() <= _SUM_TOLERANCE
    probabilities = scores if is_probability else scores.softmax(-1)
    # One more class, which is never the label, stands for no prediction.
    no_prediction = (~is_valid).to(probabilities.dtype)
    probabilities = torch.cat([probabilities * is_valid, no_prediction], dim=-1)
    # torchmetrics puts a confidence of exactly 1, which softmax often rounds to, into a bin of its own.
    below_one = torch.nextafter(torch.ones(()), torch.zeros(())).item()
    error = multiclass_calibration_error(
        probabilities.clamp(max=below_one), labels, num_classes=probabilities.shape[1], n_bins=num_bins, norm="l1"
    )
    return error.item()


__all__ = ["Accuracy", "CalibrationError", "MacroF1", "TopKAccuracy", "combined_metrics", "compute_metrics"]
