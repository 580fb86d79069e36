"""The protocols on predictors whose answers are known."""

import pytest
import torch

from training.protocols import evaluate_protocols


LABELS = torch.arange(4).repeat(15)[torch.randperm(60, generator=torch.Generator().manual_seed(1))]
ROWS = torch.arange(60) + 100


def _label_of(rows: torch.Tensor) -> torch.Tensor:
    return LABELS[rows - 100]


def test_a_predictor_without_relations_has_the_same_accuracy_everywhere():
    right_on_even_rows = lambda rows, scope: torch.eye(4)[(_label_of(rows) + rows % 2) % 4]  # noqa: E731
    result = evaluate_protocols(right_on_even_rows, ROWS, LABELS, batch_size=8)
    assert (result.single, result.shuffled, result.sorted) == (50, 50, 50)
    assert (result.shuffled_std, result.leak) == (0, 0)


def test_reading_labels_off_the_neighbours_is_a_leak():
    def majority(rows, scope):
        """Gives the whole batch its commonest label; alone, it says class 0."""
        counts = _label_of(rows).bincount(minlength=4).float()
        return counts.expand(len(rows), 4) if scope == "batch" else torch.eye(4)[:1].expand(len(rows), 4)

    result = evaluate_protocols(majority, ROWS, LABELS, batch_size=15)
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
    assert sizes == {15}, "60 pictures in about 16 are 4 equal batches, not one of 12"
    assert [scope for scope, _ in calls] == ["batch"] * 12 + ["self"] * 4 + ["batch"] * 4
    orders = [torch.cat([rows for _, rows in calls[start : start + 4]]) for start in range(0, 20, 4)]
    assert all(torch.equal(order.sort().values, ROWS) for order in orders)
    assert torch.equal(_label_of(orders[-1]), LABELS.sort().values)
    assert len({tuple(order.tolist()) for order in orders}) == 5


def test_bad_input():
    predict = lambda rows, scope: torch.zeros(len(rows), 4)  # noqa: E731
    with pytest.raises(ValueError, match="no pictures"):
        evaluate_protocols(predict, ROWS[:0], LABELS[:0], batch_size=8)
    with pytest.raises(ValueError, match="num_shuffles"):
        evaluate_protocols(predict, ROWS, LABELS, batch_size=8, num_shuffles=1)
    with pytest.raises(ValueError, match="batch_size"):
        evaluate_protocols(predict, ROWS, LABELS, batch_size=1)
