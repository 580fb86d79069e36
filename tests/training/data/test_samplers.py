"""Batches by their properties: who comes, how often, together with whom, on which process."""

import itertools
from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DataLoader

from training.data.samplers import BalancedSampler, Draw, NeighborhoodSampler, ShuffledSampler, _rounds


SIZES = [(1, 1), (7, 3), (10, 10), (11, 10), (20, 10), (21, 10), (64, 16), (65, 16), (100, 32), (5, 100)]


def rows_of(sampler, epoch=0):
    """Rows of each batch of an epoch, padding left out."""
    sampler.set_epoch(epoch)
    return [[draw.row for draw in batch if not draw.is_padding] for batch in sampler]


def uneven_labels(seed=0, num_classes=6):
    """Classes of 1 to 9 images, with gaps between their numbers, in any order."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes) * 3, rng.integers(1, 10, num_classes))
    return rng.permutation(labels)


@pytest.mark.parametrize(("num_rows", "batch_size"), SIZES)
def test_every_image_once_an_epoch_in_batches_of_one_size(num_rows, batch_size):
    sampler = ShuffledSampler(num_rows, batch_size)
    for epoch in range(3):
        batches = rows_of(sampler, epoch)
        assert len(batches) == len(sampler) == -(-num_rows // batch_size)
        assert sorted(itertools.chain(*batches)) == list(range(num_rows))
        sizes = [len(batch) for batch in batches]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= batch_size


@pytest.mark.parametrize(("num_rows", "batch_size"), SIZES[:-1])
def test_drop_last_keeps_the_batch_size(num_rows, batch_size):
    sampler = ShuffledSampler(num_rows, batch_size, drop_last=True)
    left_out = set()
    for epoch in range(30):
        batches = rows_of(sampler, epoch)
        assert (
            [len(batch) for batch in batches] == [batch_size] * len(sampler) == [batch_size] * (num_rows // batch_size)
        )
        rows = list(itertools.chain(*batches))
        assert len(set(rows)) == len(rows)
        left_out |= set(range(num_rows)) - set(rows)
    if num_rows % batch_size:
        assert len(left_out) > num_rows % batch_size, "others each epoch"


def make(kind, **kwargs):
    if kind == "shuffled":
        return ShuffledSampler(37, 10, **kwargs)
    if kind == "dropped":
        return ShuffledSampler(37, 10, drop_last=True, **kwargs)
    return BalancedSampler(uneven_labels(), 10, images_per_class=2 if kind == "pk" else 1, **kwargs)


KINDS = ["shuffled", "dropped", "balanced", "pk"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_processes", [1, 2, 3, 4, 5])
def test_processes_share_the_batches_of_one(kind, num_processes):
    whole = make(kind, seed=3)
    whole.set_epoch(2)
    shares = [make(kind, seed=3, num_processes=num_processes, process_index=n) for n in range(num_processes)]
    for share in shares:
        share.set_epoch(2)
        assert len(share) == len(whole)
    for batch, *parts in zip(whole, *shares, strict=True):
        assert not any(draw.is_padding for draw in batch)
        drawn = list(itertools.chain(*parts))
        assert [draw for draw in drawn if not draw.is_padding] == batch, "the same draws, in order"
        assert len({len(part) for part in parts}) == 1, "each process as many"
        for part in parts:
            is_padding = [draw.is_padding for draw in part]
            assert is_padding == sorted(is_padding), "padding comes last"
            assert sum(is_padding) <= 1
            assert not is_padding[0]
        assert {draw.row for draw in drawn} == {draw.row for draw in batch}, "padding repeats an image"
        assert len(parts[0]) <= -(-10 // num_processes)


# 23 images without labels, 7 of which come to each batch.
UNLABELED = {"num_unlabeled": 23, "unlabeled_per_batch": 7}


def is_unlabeled(sampler, draw):
    return draw.row >= sampler.num_rows


@pytest.mark.parametrize("kind", KINDS)
def test_unlabeled_images_come_to_each_batch_besides(kind):
    plain, sampler = make(kind, seed=3), make(kind, seed=3, **UNLABELED)
    assert len(sampler) == len(plain)
    seen = Counter()
    for epoch in range(40):
        for expected, batch in zip(rows_of(plain, epoch), rows_of(sampler, epoch), strict=True):
            labeled, others = batch[: len(expected)], batch[len(expected) :]
            assert labeled == expected, "those with labels are as without the others"
            assert len(set(others)) == 7, "each at most once in a batch"
            seen.update(others)
    assert set(seen) == set(range(sampler.num_rows, sampler.num_rows + 23)), "no row that is not there"
    mean = seen.total() / 23
    assert all(abs(count - mean) < 5 * mean**0.5 for count in seen.values()), "none is preferred"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_processes", [1, 2, 3, 4, 5])
def test_processes_share_both_kinds_of_images(kind, num_processes):
    """Of 10 images with labels and 7 without, each process has its share of both, in order."""
    whole = make(kind, seed=3, **UNLABELED)
    shares = [
        make(kind, seed=3, num_processes=num_processes, process_index=n, **UNLABELED) for n in range(num_processes)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert not any(draw.is_padding for draw in batch)
        for kept in (True, False):
            expected = [draw for draw in batch if is_unlabeled(whole, draw) == kept]
            own = [[draw for draw in part if is_unlabeled(whole, draw) == kept] for part in parts]
            assert [draw for part in own for draw in part if not draw.is_padding] == expected, "the same draws"
            assert {len(part) for part in own} == {-(-len(expected) // num_processes)}, "each process as many"
            assert max(sum(draw.is_padding for draw in part) for part in own) <= 1
        assert all(not is_unlabeled(whole, part[0]) and not part[0].is_padding for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_seed_and_epoch_decide_which_unlabeled_images_come(kind):
    def unlabeled(seed, epoch):
        sampler = make(kind, seed=seed, **UNLABELED)
        sampler.set_epoch(epoch)
        return [[draw for draw in batch if is_unlabeled(sampler, draw)] for batch in sampler]

    drawn = {key: unlabeled(*key) for key in itertools.product((0, 1), (0, 1))}
    assert all(unlabeled(*key) == batches for key, batches in drawn.items()), "again"
    for one, other in itertools.combinations(drawn.values(), 2):
        assert [[draw.row for draw in batch] for batch in one] != [[draw.row for draw in batch] for batch in other]
    seeds = [draw.seed for batches in drawn.values() for batch in batches for draw in batch]
    assert len(set(seeds)) == len(seeds), "each looks otherwise each time"


@pytest.mark.parametrize("kind", KINDS)
def test_seed_and_epoch_decide(kind):
    np.random.seed(0)
    state = np.random.get_state()[1].tolist()
    epochs = {}
    for seed, epoch in itertools.product((0, 1), (0, 1, 2)):
        sampler = make(kind, seed=seed)
        sampler.set_epoch(epoch)
        epochs[seed, epoch] = list(sampler)
        assert list(sampler) == epochs[seed, epoch], "again"
        other = make(kind, seed=seed)
        list(other)  # an epoch that was drawn before has no say
        other.set_epoch(epoch)
        assert list(other) == epochs[seed, epoch]
    for one, other in itertools.combinations(epochs.values(), 2):
        assert [[draw.row for draw in batch] for batch in one] != [[draw.row for draw in batch] for batch in other]
        assert not {draw.seed for batch in one for draw in batch} & {draw.seed for batch in other for draw in batch}
    assert np.random.get_state()[1].tolist() == state


@pytest.mark.parametrize("kind", KINDS)
def test_each_draw_has_a_seed_of_its_own(kind):
    draws = list(itertools.chain(*make(kind)))
    assert len({draw.seed for draw in draws}) == len(draws)
    assert all(0 <= draw.seed < 2**63 for draw in draws)
    assert {type(draw.row) for draw in draws} == {type(draw.seed) for draw in draws} == {int}


def test_the_order_is_uniform():
    """Where an image comes is as likely everywhere: chi-squared over 3000 epochs of 6 images."""
    counts = np.zeros((6, 6))
    sampler = ShuffledSampler(6, 2)
    for epoch in range(3000):
        counts[np.arange(6), list(itertools.chain(*rows_of(sampler, epoch)))] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 60, "25 degrees of freedom: 60 is 1 in 10,000"


def test_works_as_the_batch_sampler_of_a_loader():
    sampler = ShuffledSampler(11, 4)
    loader = DataLoader([10 * n for n in range(11)], batch_sampler=_Rows(sampler))
    assert sorted(itertools.chain(*(batch.tolist() for batch in loader))) == [10 * n for n in range(11)]
    assert len(loader) == 3


class _Rows:
    """The rows of a sampler alone, for a data set that knows nothing of draws."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __iter__(self):
        return iter(rows_of(self.sampler))

    def __len__(self):
        return len(self.sampler)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("batch_size", [1, 3, 6, 8, 20])
def test_classes_are_balanced(seed, batch_size):
    labels = uneven_labels(seed)
    sampler = BalancedSampler(labels, batch_size, seed=seed)
    batches = rows_of(sampler)
    assert [len(batch) for batch in batches] == [batch_size] * -(-len(labels) // batch_size)
    drawn = labels[np.array(list(itertools.chain(*batches)))]
    for start in range(0, len(drawn) - 5, 6):
        assert len(set(drawn[start : start + 6].tolist())) == 6, "a round has each class once"
    counts = Counter(drawn.tolist())
    assert max(counts.values()) - min(counts[label] for label in set(labels)) <= 1
    for batch in batches:
        counts = Counter(labels[batch].tolist())
        assert max(counts.values()) - min(counts[label] for label in set(labels)) <= 1


@pytest.mark.parametrize(("batch_size", "images_per_class"), [(4, 1), (20, 1), (12, 2), (20, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_no_image_comes_again_while_its_class_has_others(seed, batch_size, images_per_class):
    labels = uneven_labels(seed)
    sizes = Counter(labels.tolist())
    sampler = BalancedSampler(labels, batch_size, images_per_class=images_per_class, seed=seed)
    drawn = {label: [] for label in sizes}
    for batch in rows_of(sampler):
        of_class = {}
        for row in batch:
            of_class.setdefault(int(labels[row]), []).append(row)
        for label, rows in of_class.items():
            times = Counter(rows)
            assert max(times.values()) == -(-len(rows) // sizes[label]), "twice in a batch only if there are no others"
            drawn[label] += rows
    for label, rows in drawn.items():
        for start in range(0, len(rows) - sizes[label] + 1, sizes[label]):
            assert len(set(rows[start : start + sizes[label]])) == sizes[label], "all of a class, then again"


@pytest.mark.parametrize(("batch_size", "images_per_class"), [(4, 2), (12, 2), (12, 3), (12, 4), (12, 12), (6, 1)])
def test_p_times_k(batch_size, images_per_class):
    labels = uneven_labels(1)
    batches = rows_of(BalancedSampler(labels, batch_size, images_per_class=images_per_class))
    for batch in batches:
        counts = Counter(labels[batch].tolist())
        assert len(counts) == batch_size // images_per_class
        assert set(counts.values()) == {images_per_class}
    classes = Counter(label for batch in batches for label in set(labels[batch].tolist()))
    assert max(classes.values()) - min(classes[label] for label in set(labels)) <= 1


def test_over_epochs_every_image_of_a_class_comes_as_often():
    labels = np.repeat([0, 1], [4, 40])
    sampler = BalancedSampler(labels, 8)
    counts = Counter(row for epoch in range(400) for batch in rows_of(sampler, epoch) for row in batch)
    for label in (0, 1):
        times = [counts[row] for row in np.flatnonzero(labels == label).tolist()]
        mean = sum(times) / len(times)
        assert all(abs(each - mean) < 5 * mean**0.5 for each in times)
    assert sum(counts[row] for row in range(4)) == sum(counts[row] for row in range(4, 44))


@pytest.mark.parametrize("seed", range(10))
def test_rounds(seed):
    """By brute force: permutations in turn; in a run, none comes again before all have come."""
    rng = np.random.default_rng(seed)
    for trial in range(50):
        number = int(rng.integers(1, 9))
        lengths = rng.integers(0, 14, rng.integers(0, 12)).tolist()
        if trial % 3 == 0:
            lengths = [int(rng.integers(1, 14))] * len(lengths)
        order = _rounds(number, lengths, np.random.default_rng([seed, trial])).tolist()
        assert len(order) == sum(lengths)
        assert set(order) <= set(range(number))
        for start in range(0, len(order), number):
            part = order[start : start + number]
            assert len(set(part)) == len(part)
        ends = itertools.accumulate(lengths)
        for length, end in zip(lengths, ends, strict=True):
            times = np.bincount(np.array(order[end - length : end], dtype=int), minlength=number)
            assert times.max() - times.min() <= 1
        assert order == _rounds(number, lengths, np.random.default_rng([seed, trial])).tolist()


def test_rounds_are_random():
    """All permutations come, about as often."""
    generator = np.random.default_rng(0)
    orders = [tuple(_rounds(3, [2, 2, 2], generator).tolist()) for _ in range(3000)]
    firsts, seconds = Counter(order[:3] for order in orders), Counter(order[3:] for order in orders)
    for counts in (firsts, seconds):
        assert len(counts) == 6
        assert all(abs(each - 500) < 110 for each in counts.values()), "5 standard deviations"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: ShuffledSampler(10, 2, num_processes=3),
            "A batch of 2 images .* 3 processes: raise the batch size",
        ),
        (lambda: ShuffledSampler(0, 4), "There are 0 training images"),
        (
            lambda: ShuffledSampler(3, 4, drop_last=True),
            "3 training images, fewer than a batch of 4: lower the batch",
        ),
        (lambda: ShuffledSampler(2, 8, num_processes=4), "2 training images .* over 4 processes: raise the batch"),
        (
            lambda: ShuffledSampler(9, 8, num_processes=8),
            "9 training images make 2 batches of 4.*raise the batch size",
        ),
        (
            lambda: ShuffledSampler(9, 3, num_unlabeled=4, unlabeled_per_batch=5),
            "cannot have 5 of 4 unlabeled images: lower",
        ),
        (lambda: BalancedSampler([0, 1], 2, unlabeled_per_batch=1), "cannot have 1 of 0 unlabeled"),
        (lambda: BalancedSampler([0, 1], 5, images_per_class=2), "multiple of `images_per_class`"),
        (lambda: BalancedSampler([0, 1], 4, images_per_class=0), "cannot hold 0 of each class"),
        (lambda: BalancedSampler([0, 1], 6, images_per_class=2), "need 3 classes, but there are 2: raise"),
    ],
)
def test_what_cannot_be(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_every_kind_of_batches_is_drawn_by_its_sampler():
    class Ordered(NeighborhoodSampler):
        def draw_batches(self, generator):
            return [np.array([4, 5, 6]), np.array([1, 2])]

    first, second = (list(Ordered(3, num_processes=2, process_index=n)) for n in range(2))
    assert [[(draw.row, draw.is_padding) for draw in batch] for batch in first] == [
        [(4, False), (5, False)],
        [(1, False)],
    ]
    assert [[(draw.row, draw.is_padding) for draw in batch] for batch in second] == [
        [(6, False), (4, True)],
        [(2, False)],
    ]
    assert isinstance(first[0][0], Draw)
