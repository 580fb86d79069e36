"""The protocols on predictors whose answers are known."""

import pytest
import torch
from transformers import EvalPrediction

from training.evaluation.metrics import compute_metrics
from training.evaluation.protocols import (
    Condition,
    Predictions,
    conditions_of,
    count_orders,
    evaluate_protocols,
    in_batches,
    measure,
)


LABELS = torch.arange(4).repeat(15)[torch.randperm(60, generator=torch.Generator().manual_seed(1))]
ROWS = torch.arange(60) + 100


def _label_of(rows: torch.Tensor) -> torch.Tensor:
    return LABELS[rows - 100]


def _majority(rows, scope):
    """Gives the whole batch its commonest label; alone, it says class 0."""
    counts = _label_of(rows).bincount(minlength=4).float()
    return counts.expand(len(rows), 4) if scope == "batch" else torch.eye(4)[:1].expand(len(rows), 4)


def test_a_predictor_without_relations_has_the_same_accuracy_everywhere():
    right_on_even_rows = lambda rows, scope: torch.eye(4)[(_label_of(rows) + rows % 2) % 4]  # noqa: E731
    result = evaluate_protocols(right_on_even_rows, ROWS, LABELS, batch_size=8)
    assert (result.single, result.shuffled, result.sorted) == (50, 50, 50)
    assert (result.shuffled_std, result.leak) == (0, 0)


def test_reading_labels_off_the_neighbors_is_a_leak():
    result = evaluate_protocols(_majority, ROWS, LABELS, batch_size=15)
    assert result.single == 25
    assert result.sorted == 100
    assert result.shuffled < 60
    assert result.leak == result.sorted - result.shuffled


def test_scopes_batches_and_orders():
    calls = []

    def predict(rows, scope):
        calls.append((scope, rows))
        return torch.zeros(len(rows), 4)

    evaluate_protocols(predict, ROWS, LABELS, batch_size=16, num_shuffles=3, seed=5)
    sizes = {len(rows) for _, rows in calls}
    assert sizes == {15}, "60 images in about 16 are 4 equal batches, not one of 12"
    assert [scope for scope, _ in calls] == ["batch"] * 12 + ["self"] * 4 + ["batch"] * 4
    orders = [torch.cat([rows for _, rows in calls[start : start + 4]]) for start in range(0, 20, 4)]
    assert all(torch.equal(order.sort().values, ROWS) for order in orders)
    assert torch.equal(_label_of(orders[-1]), LABELS.sort().values)
    assert len({tuple(order.tolist()) for order in orders}) == 5


def test_bad_input():
    predict = lambda rows, scope: torch.zeros(len(rows), 4)  # noqa: E731
    with pytest.raises(ValueError, match="no images"):
        evaluate_protocols(predict, ROWS[:0], LABELS[:0], batch_size=8)
    with pytest.raises(ValueError, match="num_shuffles"):
        evaluate_protocols(predict, ROWS, LABELS, batch_size=8, num_shuffles=1)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        evaluate_protocols(predict, ROWS, LABELS, batch_size=1)
    with pytest.raises(ValueError, match="batch size 61 is more than the 60 images"):
        measure(predict, LABELS, ["sorted"], [30, 61])


def test_batches_are_equal_give_or_take_one():
    for num_images in range(2, 40):
        for batch_size in range(2, num_images + 1):
            sizes = [len(batch) for batch in in_batches(torch.arange(num_images), batch_size)]
            assert sum(sizes) == num_images and max(sizes) - min(sizes) <= 1


class TestMeasure:
    def test_each_protocol_in_its_scope_at_each_size(self):
        scopes = {}

        def predict(rows, scope):
            scopes.setdefault(scope, set()).add(len(rows))
            return torch.eye(4)[LABELS[rows]]

        steps = []
        protocols, sizes = ["sorted", "single", "reference", "shuffled"], [10, 30]
        measured = measure(predict, LABELS, protocols, sizes, num_shuffles=3, on_order=lambda: steps.append(1))
        assert list(measured) == [
            Condition("single"),
            Condition("reference"),
            *(Condition(protocol, size) for protocol in ("shuffled", "sorted") for size in sizes),
        ]
        assert list(measured) == conditions_of(protocols, sizes)
        assert scopes == {"self": {60}, "reference": {60}, "batch": {10, 30}}
        assert len(steps) == count_orders(protocols, sizes, 3) == 10
        assert [len(each.metrics) for each in measured.values()] == [1, 1, 3, 3, 1, 1]
        assert all(metrics["accuracy"] == 1 for each in measured.values() for metrics in each.metrics)

    def test_answers_are_by_row_whatever_the_order(self):
        scores = torch.randn(60, 4)
        measured = measure(lambda rows, scope: scores[rows], LABELS, ["single", "shuffled", "sorted"], [7, 20])
        expected = compute_metrics(EvalPrediction(scores, LABELS))
        for predictions in measured.values():
            assert all(torch.equal(row, scores.argmax(-1)) for row in predictions.classes)
            # The rows of each order lie elsewhere in memory, so that softmax may round otherwise.
            assert all(metrics == pytest.approx(expected, abs=1e-6) for metrics in predictions.metrics)

    def test_agrees_with_the_accuracies_alone(self):
        predict = lambda rows, scope: _majority(rows + 100, scope)  # noqa: E731
        measured = measure(predict, LABELS, ["single", "shuffled", "sorted"], [15], num_shuffles=4, seed=3)
        expected = evaluate_protocols(_majority, ROWS, LABELS, 15, num_shuffles=4, seed=3)
        accuracies = {
            condition.protocol: 100 * sum(each["accuracy"] for each in predictions.metrics) / len(predictions.metrics)
            for condition, predictions in measured.items()
        }
        assert accuracies == pytest.approx(
            {"single": expected.single, "shuffled": expected.shuffled, "sorted": expected.sorted}
        )


def test_scores_that_are_not_finite_are_no_answer():
    scores = torch.randn(6, 8)
    scores[1, 3], scores[4] = torch.nan, torch.inf
    predictions = Predictions.from_scores(scores, torch.arange(6))
    assert predictions.classes[0, [1, 4]].tolist() == [8, 8]
    assert not predictions.in_top_k[0, [1, 4]].any()
    assert predictions.confidences[0, [1, 4]].tolist() == [1, 1]
    assert predictions.confidences.isfinite().all()
