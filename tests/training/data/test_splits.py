"""Few-shot draws."""

import pytest
import torch

from training.data.splits import draw_few_shots


@pytest.fixture
def labels():
    return torch.arange(4).repeat_interleave(torch.tensor([5, 6, 7, 8]))[torch.randperm(26)]


def test_each_picture_is_in_one_part_and_each_class_evenly_drawn(labels):
    split = draw_few_shots(labels, 2, 1, seed=3)
    parts = [split.train, split.validation, split.test]
    assert torch.cat(parts).sort().values.tolist() == list(range(26))
    assert [labels[part].bincount().tolist() for part in parts] == [[2] * 4, [1] * 4, [2, 3, 4, 5]]


def test_the_seed_decides(labels):
    first, again, other = (draw_few_shots(labels, 2, 1, seed) for seed in (3, 3, 4))
    assert torch.equal(first.train, again.train)
    assert not torch.equal(first.train, other.train)


def test_too_few_pictures(labels):
    with pytest.raises(ValueError, match="Class 0 has 5 pictures: too few for 3 to train, 2 to validate"):
        draw_few_shots(labels, 3, 2, seed=0)
