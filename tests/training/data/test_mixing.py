"""Mixup and CutMix by their properties: shares, rectangles, targets, and who is related to whom."""

import random

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest

from training.data.mixing import Mixing
from training.data.transforms import AugmentationArguments


METHODS = [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.3, "cutmix_alpha": 0.6}]


def mix(pixel_values, labels, seed, num_labels=9, **alphas):
    return Mixing(AugmentationArguments(**alphas), num_labels)(pixel_values, labels, seed)


def batch(size=6, height=20, width=30):
    """Images in which each pixel has a value of its own. Each has its own label, so that targets are contents."""
    pixel_values = torch.arange(size * 3 * height * width, dtype=torch.float32).view(size, 3, height, width)
    return pixel_values, torch.arange(size)


def sources(pixel_values, mixed):
    """For CutMix: the original that each pixel is from, (batch_size, height, width)."""
    is_from = (mixed[:, None] == pixel_values[None]).all(2)
    assert (is_from.sum(1) == 1).all()
    return is_from.int().argmax(1)


@pytest.mark.parametrize("seed", range(8))
def test_mixup_is_a_convex_combination_in_pixels_and_targets(seed):
    pixel_values, labels = batch()
    mixed, targets, _ = mix(pixel_values, labels, seed, mixup_alpha=0.8)
    shares = targets[:, :6]
    combined = torch.einsum("ij,jchw->ichw", shares.double(), pixel_values.double())
    torch.testing.assert_close(mixed.double(), combined, rtol=1e-6, atol=1e-2)
    assert ((shares > 0).sum(0) <= 2).all(), "a partner of one"
    assert ((shares > 0).sum(1) <= 2).all(), "with one partner"
    torch.testing.assert_close(shares.sum(0), torch.ones(6))
    own = shares.diagonal()[shares.diagonal() < 1]
    assert len(own)
    assert (own == own[0]).all(), "one share for the batch"


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_pastes_one_rectangle_whose_area_is_the_share(seed):
    pixel_values, labels = batch()
    mixed, targets, _ = mix(pixel_values, labels, seed, cutmix_alpha=1.0)
    boxes = set()
    for number, origin in enumerate(sources(pixel_values, mixed)):
        torch.testing.assert_close(targets[number], origin.flatten().bincount(minlength=9) / origin.numel())
        pasted = (origin != number).nonzero()
        if len(pasted):
            (top, left), (bottom, right) = pasted.amin(0).tolist(), pasted.amax(0).tolist()
            assert len(pasted) == (bottom - top + 1) * (right - left + 1)
            assert len(origin[top : bottom + 1, left : right + 1].unique()) == 1
            boxes.add((top, left, bottom, right))
    assert len(boxes) <= 1, "the same place for the batch"


@pytest.mark.slow
def test_cutmix_reaches_every_pixel():
    pixel_values, labels = batch(2, 20, 20)
    pasted = [
        sources(pixel_values, mix(pixel_values, labels, seed, cutmix_alpha=1.0).pixel_values)[0] == 1
        for seed in range(1000)
    ]
    coverage = torch.stack(pasted).float().mean(0)
    assert (coverage > 0).all()
    for axis in (0, 1):
        first, second = (half.mean().item() for half in coverage.chunk(2, axis))
        assert first == pytest.approx(second, rel=0.1), "as often at one end as at the other"


def _own_shares(num_seeds, **alphas):
    """Of images in `num_seeds` batches; those that are their own partner are left out."""
    pixel_values, labels = batch(5, 64, 64)
    for seed in range(num_seeds):
        own = mix(pixel_values, labels, seed, **alphas).targets.diagonal()
        yield from own[own < 1][:1].tolist()


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_the_share_of_mixup_is_from_the_beta_distribution(alpha):
    shares = list(_own_shares(400, mixup_alpha=alpha))
    assert len(shares) > 380
    assert kstest(shares, beta(alpha, alpha).cdf).pvalue > 1e-3


def test_the_drawn_share_of_cutmix_is_a_lower_bound_for_what_is_left():
    # Beta(1000, 1000) is 1/2 but for 4 %; what lies over the edge isn't pasted, in most places some.
    shares = list(_own_shares(200, cutmix_alpha=1000.0))
    assert min(shares) > 0.44
    assert max(shares) > 0.7
    assert max(shares) < 1 - 0.5 / 4 + 0.03, "around a corner, a quarter of the rectangle is left"


def test_of_two_methods_each_batch_takes_one():
    pixel_values, labels = batch()
    num_cutmix, num_changed = 0, 0
    for seed in range(300):
        mixed, targets, _ = mix(pixel_values, labels, seed, mixup_alpha=1.0, cutmix_alpha=1.0)
        if (targets > 0).sum() > 6:
            num_changed += 1
            num_cutmix += int((mixed[:, None] == pixel_values[None]).all(2).any(1).all())
    assert num_changed > 280
    assert 0.4 < num_cutmix / num_changed < 0.6


@pytest.mark.parametrize("alphas", METHODS)
@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_images_with_an_original_in_common_are_not_related(alphas, size):
    pixel_values, labels = batch(size)
    for seed in range(10):
        _, targets, relation_mask = mix(pixel_values, labels, seed, **alphas)
        assert relation_mask.dtype == torch.bool
        for one in range(size):
            for other in range(size):
                shared = set(targets[one].nonzero().flatten().tolist()) & set(
                    targets[other].nonzero().flatten().tolist()
                )
                assert relation_mask[one, other] == (one == other or not shared)
        assert torch.equal(relation_mask, relation_mask.T)


@pytest.mark.parametrize(("share", "contains"), [(0.0, "partner"), (1.0, "own")])
def test_originals_of_which_nothing_is_left_do_not_count(monkeypatch, share, contains):
    monkeypatch.setattr(np.random, "default_rng", lambda seed: _Draws(share))
    pixel_values, labels = batch(4)
    for alphas in METHODS[:2]:
        mixed, targets, relation_mask = mix(pixel_values, labels, 0, **alphas)
        rows = torch.tensor([1, 2, 3, 0]) if contains == "partner" else torch.arange(4)
        torch.testing.assert_close(mixed, pixel_values[rows])
        assert torch.equal(targets[:, :4], torch.eye(4)[rows])
        assert relation_mask.all()


class _Draws:
    """A generator that draws the share it was made with, the middle, and the next one as the partner."""

    def __init__(self, share):
        self.share = share

    def permutation(self, size):
        return np.roll(np.arange(size), -1)

    def integers(self, size):
        return size // 2

    def random(self):
        return 0.5

    def beta(self, a, b):
        return self.share


@pytest.mark.parametrize("alphas", METHODS)
def test_labels_that_two_images_share_add_up(alphas):
    pixel_values, _ = batch(9)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3])
    for seed in range(10):
        _, contents, _ = mix(pixel_values, torch.arange(9), seed, **alphas)
        _, targets, _ = mix(pixel_values, labels, seed, num_labels=4, **alphas)
        torch.testing.assert_close(targets, contents @ torch.eye(4)[labels])
        torch.testing.assert_close(targets.sum(-1), torch.ones(9))


@pytest.mark.parametrize("alphas", METHODS)
def test_padding_mixes_with_nobody(alphas):
    pixel_values, labels = batch(8)
    padding = torch.tensor([2, 5, 7])
    labels[padding] = -100
    pixel_values[padding] = torch.nan
    for seed in range(10):
        mixed, targets, relation_mask = mix(pixel_values, labels, seed, **alphas)
        assert mixed[padding].isnan().all()
        assert mixed[labels >= 0].isfinite().all()
        assert torch.equal(targets.sum(-1) > 0, labels >= 0)
        assert relation_mask[padding].all()
    alone = torch.full((8,), -100)
    alone[3] = 4
    mixed, targets, relation_mask = mix(pixel_values, alone, 0, **alphas)
    torch.testing.assert_close(mixed, pixel_values, equal_nan=True)
    assert targets.sum() == targets[3, 4] == 1
    assert relation_mask.all()


@pytest.mark.parametrize("alphas", [*METHODS, {}])
def test_a_batch_of_one_and_no_method_change_nothing(alphas):
    pixel_values, labels = batch(5 if not alphas else 1)
    mixed, targets, relation_mask = mix(pixel_values, labels, 0, **alphas)
    assert torch.equal(mixed, pixel_values)
    assert torch.equal(targets, torch.eye(9)[labels])
    assert relation_mask.all()


@pytest.mark.parametrize("alphas", METHODS)
def test_the_seed_alone_decides(alphas):
    pixel_values, labels = batch()
    given = pixel_values.clone()
    random.seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = mix(pixel_values, labels, 12, **alphas)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert torch.equal(pixel_values, given)
    torch.manual_seed(5)
    for other, is_same in ((12, True), ([12], True), ([12, 3], False), (13, False)):
        again = mix(pixel_values, labels, other, **alphas)
        # Pixels go up to 10,800, where float32 has steps of 1e-3: the same draw, computed twice.
        assert all(torch.allclose(a, b, rtol=0, atol=0.01) for a, b in zip(first, again, strict=True)) == is_same


@pytest.mark.parametrize("alphas", METHODS)
def test_half_precision_stays(alphas):
    pixel_values, labels = batch()
    for dtype in (torch.float16, torch.bfloat16):
        mixed, targets, _ = mix((pixel_values / pixel_values.max()).to(dtype), labels, 0, **alphas)
        assert (mixed.dtype, targets.dtype) == (dtype, torch.float32)


def test_bad_input():
    pixel_values, labels = batch()
    with pytest.raises(ValueError, match=r"got \(6, 3, 20, 30\) and \(5,\)"):
        mix(pixel_values, labels[1:], 0, mixup_alpha=1.0)
    with pytest.raises(ValueError, match="labels go from 0 to 5; with 5 classes they are 0 to 4, or -100"):
        mix(pixel_values, labels, 0, num_labels=5, mixup_alpha=1.0)
    with pytest.raises(ValueError, match="labels go from -1"):
        mix(pixel_values, labels - 1, 0, mixup_alpha=1.0)
