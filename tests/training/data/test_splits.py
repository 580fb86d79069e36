"""Draws: each image is in one part, each class has its share, and the seed decides."""

import pytest
import torch

from training.data.splits import (
    draw_few_shots,
    draw_per_class,
    draw_subset,
    rows_by_class,
    stratified_folds,
    stratified_split,
)


@pytest.fixture
def labels():
    return torch.arange(4).repeat_interleave(torch.tensor([5, 6, 7, 8]))[torch.randperm(26)]


def test_each_image_is_in_one_part_and_each_class_evenly_drawn(labels):
    split = draw_few_shots(labels, 2, 1, seed=3)
    parts = [split.train, split.validation, split.test]
    assert torch.cat(parts).sort().values.tolist() == list(range(26))
    assert [labels[part].bincount().tolist() for part in parts] == [[2] * 4, [1] * 4, [2, 3, 4, 5]]


def test_the_seed_decides(labels):
    first, again, other = (draw_few_shots(labels, 2, 1, seed) for seed in (3, 3, 4))
    assert torch.equal(first.train, again.train)
    assert not torch.equal(first.train, other.train)


def test_too_few_images(labels):
    with pytest.raises(ValueError, match="Class 0 has 5 images: too few for 3 to train, 2 to validate"):
        draw_few_shots(labels, 3, 2, seed=0)


def _random_labels(seed: int, least: int = 1) -> torch.Tensor:
    """Classes with gaps between their numbers, `least` to 40 images each, in any order."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(least, 41, (8,), generator=generator)
    labels = (3 * torch.arange(8)).repeat_interleave(sizes)
    return labels[torch.randperm(len(labels), generator=generator)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.01, 0.15, 0.5, 0.99])
def test_each_class_is_held_out_in_its_share_and_kept(seed, fraction):
    labels = _random_labels(seed)
    train, held_out = stratified_split(labels, fraction, seed)
    assert torch.cat([train, held_out]).sort().values.tolist() == list(range(len(labels)))
    assert torch.equal(train, train.sort().values)
    assert torch.equal(held_out, held_out.sort().values)
    for label in labels.unique():
        size, num_held_out = int((labels == label).sum()), int((labels[held_out] == label).sum())
        assert abs(num_held_out - fraction * size) <= 0.5 or num_held_out in (1, size - 1)
        assert (1 <= num_held_out < size) if size > 1 else num_held_out == 0


def test_halves_are_rounded_up():
    labels = torch.tensor([0] * 10 + [1] * 30)
    assert labels[stratified_split(labels, 0.25, seed=0)[1]].bincount().tolist() == [3, 8]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_shares_out_of_range(labels, fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        stratified_split(labels, fraction, seed=0)


@pytest.mark.parametrize("seed", range(5))
def test_each_image_is_held_out_in_one_fold_and_classes_are_spread_evenly(seed):
    labels = _random_labels(seed, least=4)
    folds = stratified_folds(labels, 4, seed)
    assert torch.cat([held_out for _, held_out in folds]).sort().values.tolist() == list(range(len(labels)))
    for train, held_out in folds:
        assert torch.cat([train, held_out]).sort().values.tolist() == list(range(len(labels)))
    held = torch.stack([labels[held_out].bincount(minlength=22) for _, held_out in folds])
    assert (held.amax(0) - held.amin(0)).max() <= 1


def test_folds_that_can_not_be(labels):
    with pytest.raises(ValueError, match="Class 0 has 5 images: too few for 6 folds"):
        stratified_folds(labels, 6, seed=0)
    with pytest.raises(ValueError, match="at least 2 folds"):
        stratified_folds(labels, 1, seed=0)


def test_draws_per_class(labels):
    rows = draw_per_class(labels, 3, seed=0)
    assert labels[rows].bincount().tolist() == [3] * 4
    assert len(rows.unique()) == 12
    with pytest.raises(ValueError, match="Class 0 has 5 images, fewer than the 6 per class"):
        draw_per_class(labels, 6, seed=0)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 26, 100])
@pytest.mark.parametrize("seed", range(3))
def test_a_subset_covers_as_many_classes_as_it_can(labels, size, seed):
    rows = draw_subset(labels, size, seed)
    assert len(rows.unique()) == len(rows) == min(size, 26)
    assert len(labels[rows].unique()) == min(size, 4)


def test_a_subset_of_ordered_images_is_drawn_from_all_over():
    labels = torch.arange(2).repeat_interleave(500)
    rows = draw_subset(labels, 200, seed=0)
    # Binomial, 100 with a standard deviation of 7.
    assert labels[rows].sum().item() == pytest.approx(100, abs=35)
    assert rows.float().mean().item() == pytest.approx(499.5, abs=100)


@pytest.mark.parametrize(
    "draw",
    [
        lambda labels, seed: stratified_split(labels, 0.3, seed)[1],
        lambda labels, seed: stratified_folds(labels, 3, seed)[0][1],
        lambda labels, seed: draw_per_class(labels, 2, seed),
        lambda labels, seed: draw_subset(labels, 9, seed),
    ],
)
def test_the_seed_decides_all_draws(labels, draw):
    state = torch.get_rng_state()
    assert torch.equal(draw(labels, 3), draw(labels, 3))
    assert not torch.equal(draw(labels, 3), draw(labels, 4))
    assert torch.equal(state, torch.get_rng_state())


def test_rows_by_class(labels):
    groups = rows_by_class(labels)
    assert [labels[rows].unique().tolist() for rows in groups] == [[0], [1], [2], [3]]
    assert [len(rows) for rows in groups] == [5, 6, 7, 8]
    assert rows_by_class(labels[:0]) == []
