"""From a split to batches: the same items on any number of workers, boxes, broken files, padding, mixing."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ConvNextConfig, Trainer, TrainingArguments
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_rbi import RBIConfig, RBIForImageClassification
from training.data.decode import UnreadableImageError
from training.data.image_dataset import Collator, ImageDataset, WithUnlabeled
from training.data.mixing import Mixing
from training.data.samplers import Draw, ShuffledSampler
from training.data.transforms import AugmentationArguments, EvalTransform, TrainTransform


NAMES = ["ant", "bee", "cat"]
BOX = [10.0, 5.0, 30.0, 35.0]
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
# Images computed twice, in processes or batches of their own: kernels may round otherwise.
SAME = {"rtol": 0, "atol": 1e-5}
AUGMENTATION = AugmentationArguments(rotation_degrees=15, random_erasing=0.5, color_jitter=0.3)


@pytest.fixture
def make_split(tmp_path):
    """A split in the canonical form, of files of different sizes."""

    def make(size=8, with_boxes=True):
        rng = np.random.default_rng(0)
        columns = {"image": [], "label": [], "box": []}
        for number in range(size):
            path = tmp_path / f"{number}.png"
            pixels = rng.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
            columns["image"].append({"path": str(path), "bytes": None})
            columns["label"].append(number % 3)
            columns["box"].append(BOX)
        features = {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=NAMES)}
        if with_boxes:
            features["box"] = datasets.Sequence(datasets.Value("float32"), length=4)
        else:
            del columns["box"]
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

    return make


def training_images(split, **options):
    return ImageDataset(split, TrainTransform(PROCESSOR, AUGMENTATION), augment=True, **options)


def evaluation_images(split, **options):
    return ImageDataset(split, EvalTransform(PROCESSOR), **options)


def are_same(first, second):
    """Whether two tensors of images are the same but for rounding."""
    return torch.allclose(first, second, **SAME)


def assert_same_batches(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], **SAME)


def test_items(make_split):
    images = evaluation_images(make_split())
    assert len(images) == 8
    assert images.labels == [0, 1, 2, 0, 1, 2, 0, 1]
    item = images[4]
    assert item.keys() == {"pixel_values", "labels"}
    assert item["labels"] == 1
    stored = Image.open(images.split[4]["image"]["path"])
    torch.testing.assert_close(item["pixel_values"], PROCESSOR(stored, return_tensors="pt")["pixel_values"][0])
    draw = Draw(4, seed=3)
    assert images[draw]["draw"] == draw
    assert are_same(images[draw]["pixel_values"], item["pixel_values"]), "nothing is random"


def test_a_row_is_read_once(make_split, monkeypatch):
    images, reads = training_images(make_split()), []
    read = datasets.Dataset.__getitem__
    monkeypatch.setattr(datasets.Dataset, "__getitem__", lambda split, key: reads.append(key) or read(split, key))
    assert images[Draw(5, 0)]["labels"] == 2
    assert reads == [5]


def test_a_draw_decides_what_its_item_looks_like(make_split):
    images = training_images(make_split())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = images[Draw(2, seed=7)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, padding = images[Draw(2, seed=7)], images[Draw(2, seed=7, is_padding=True)]
    assert are_same(first["pixel_values"], again["pixel_values"])
    assert are_same(first["pixel_values"], padding["pixel_values"])
    assert not are_same(first["pixel_values"], images[Draw(2, seed=8)]["pixel_values"])


@pytest.mark.parametrize("mixing", [None, Mixing(AugmentationArguments(mixup_alpha=0.8), 3)])
def test_workers_change_nothing(make_split, mixing):
    images = training_images(make_split(), crop_to_boxes=True)
    batches = {}
    for num_workers in (0, 1, 2):
        torch.manual_seed(num_workers)
        sampler = ShuffledSampler(len(images), 3, seed=5)
        loader = DataLoader(images, batch_sampler=sampler, collate_fn=Collator(mixing), num_workers=num_workers)
        batches[num_workers] = list(loader)
    assert_same_batches(batches[0], batches[1])
    assert_same_batches(batches[0], batches[2])
    assert sum(len(batch["labels"]) for batch in batches[0]) == 8


def test_plain_numbers_draw_from_torchs_generator(make_split):
    images = training_images(make_split())

    def epoch(seed):
        torch.manual_seed(seed)
        return list(DataLoader(images, batch_size=3, shuffle=True))

    first, again, other = epoch(0), epoch(0), epoch(1)
    assert all(batch.keys() == {"pixel_values", "labels"} for batch in first)
    assert_same_batches(first, again)
    assert not are_same(first[0]["pixel_values"], other[0]["pixel_values"])
    assert not are_same(images[0]["pixel_values"], images[0]["pixel_values"])
    assert images[np.int64(3)]["labels"] == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_plain_loader_with_the_collator(make_split, num_workers):
    images = training_images(make_split())
    loader = DataLoader(images, batch_size=5, collate_fn=Collator(), num_workers=num_workers)
    batches = list(loader)
    assert [batch["pixel_values"].shape for batch in batches] == [(5, 3, 32, 32), (3, 3, 32, 32)]
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1, 2, 0, 1], [2, 0, 1]]
    assert all(batch["relation_mask"].all() for batch in batches)


@pytest.mark.slow
@pytest.mark.parametrize("collator", [None, Collator()])
def test_a_plain_trainer_takes_them(make_split, collator, tmp_path):
    split = make_split()
    backbone_config = ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], image_size=32)
    model = RBIForImageClassification(RBIConfig.kernel(backbone_config=backbone_config, num_labels=3))
    before = model.classifier.weight.detach().clone()
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=training_images(split),
        eval_dataset=evaluation_images(split),
        data_collator=collator,
    )
    assert np.isfinite(trainer.train().training_loss)
    assert not torch.equal(model.classifier.weight, before)
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_boxes(make_split):
    split = make_split()
    whole, cropped = evaluation_images(split), evaluation_images(split, crop_to_boxes=True)
    stored = Image.open(split[1]["image"]["path"])
    expected = PROCESSOR(stored.crop(tuple(map(int, BOX))), return_tensors="pt")["pixel_values"][0]
    assert are_same(cropped[1]["pixel_values"], expected)
    assert not are_same(whole[1]["pixel_values"], expected)


def test_boxes_that_are_not_there(make_split):
    with pytest.raises(ValueError, match="`crop_to_boxes` is on, but the data set has no boxes: leave it off"):
        evaluation_images(make_split(with_boxes=False), crop_to_boxes=True)


def test_an_image_with_too_many_pixels(make_split):
    split = make_split()
    assert evaluation_images(split, max_pixels=40 * 50)[0]
    with pytest.raises(UnreadableImageError, match=r"1\.png has 50 x 41 = 2050 pixels, more than the limit of 2000"):
        evaluation_images(split, max_pixels=40 * 50)[1]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fault", ["cut", "gone"])
def test_a_broken_file_is_named_from_any_process(make_split, tmp_path, fault, num_workers):
    split = make_split()
    path = tmp_path / "6.png"
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:500])
    else:
        path.unlink()
    batches = iter(
        DataLoader(
            training_images(split),
            batch_sampler=ShuffledSampler(8, 3),
            collate_fn=Collator(),
            num_workers=num_workers,
        )
    )
    with pytest.raises(UnreadableImageError) as raised:
        list(batches)
    assert f"{path} {'is broken' if fault == 'cut' else 'does not exist'}" in str(raised.value)
    if num_workers:
        batches._shutdown_workers()  # or they wait for a time-out, as the error keeps the loader


def items(labels, paddings=(), draws=True):
    made = []
    for number, label in enumerate(labels):
        item = {"pixel_values": torch.full((3, 4, 4), float(number)), "labels": label}
        if draws:
            item["draw"] = Draw(number, 100 + number, number in paddings)
        made.append(item)
    return made


def test_padding_is_no_neighbor_and_has_no_label():
    batch = Collator()(items([2, 0, 1, 2], paddings=(3,)))
    assert batch.keys() == {"pixel_values", "labels", "relation_mask"}
    assert batch["labels"].tolist() == [2, 0, 1, -100]
    assert batch["labels"].dtype == torch.int64
    assert batch["relation_mask"].tolist() == [True, True, True, False]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_mixing_makes_targets_and_a_mask_of_pairs():
    mixing = Mixing(AugmentationArguments(mixup_alpha=0.5), 3)
    labels = [0, 1, 2, 0, 1, 0]
    batch = Collator(mixing)(items(labels, paddings=(5,)))
    assert batch["labels"].tolist() == [0, 1, 2, 0, 1, -100]
    assert batch["targets"].shape == (6, 3)
    torch.testing.assert_close(batch["targets"].sum(-1), torch.tensor([1.0] * 5 + [0.0]))
    mask = batch["relation_mask"]
    assert not mask[:, 5].any(), "padding is no neighbor, not of itself either"
    plain = torch.stack([item["pixel_values"] for item in items(labels)])
    assert are_same(batch["pixel_values"][5], plain[5])
    # As the mixing has it, by the seed of the first draw.
    pixel_values, targets, relation_mask = mixing(plain, batch["labels"], 100)
    assert are_same(batch["pixel_values"], pixel_values)
    assert are_same(batch["targets"], targets)
    assert torch.equal(mask[:, :5], relation_mask[:, :5])
    assert mask[range(5), range(5)].all()


@pytest.fixture
def with_unlabeled(make_split):
    """The first 5 images with labels, the other 3 without."""
    split = make_split(with_boxes=False)
    others = split.select([5, 6, 7]).remove_columns("label").add_column("label", [-100] * 3)
    return WithUnlabeled(training_images(split.select(range(5))), training_images(others))


def test_unlabeled_images_follow_the_others(with_unlabeled, make_split):
    whole = training_images(make_split(with_boxes=False))
    assert len(with_unlabeled) == 8
    assert with_unlabeled.labels == whole.labels[:5]
    for row in range(8):
        draw = Draw(row, seed=row)
        item, expected = with_unlabeled[draw], whole[draw]
        assert are_same(item["pixel_values"], expected["pixel_values"])
        assert item["labels"] == (expected["labels"] if row < 5 else -100)
        assert (item["draw"].seed, item["draw"].is_padding) == (row, False)
        assert with_unlabeled[row]["labels"] == item["labels"], "by a plain number, too"
    assert with_unlabeled[Draw(6, 1, is_padding=True)]["draw"].is_padding


def test_unlabeled_images_are_neighbors_without_a_label(with_unlabeled):
    sampler = ShuffledSampler(5, 5, num_unlabeled=3, unlabeled_per_batch=2)
    (batch,) = DataLoader(with_unlabeled, batch_sampler=sampler, collate_fn=Collator())
    assert sorted(batch["labels"][:5].tolist()) == [0, 0, 1, 1, 2]
    assert batch["labels"][5:].tolist() == [-100] * 2
    assert batch["relation_mask"].all()
    shares = [
        ShuffledSampler(5, 5, num_unlabeled=3, unlabeled_per_batch=2, num_processes=3, process_index=n)
        for n in range(3)
    ]
    parts = [next(iter(DataLoader(with_unlabeled, batch_sampler=each, collate_fn=Collator()))) for each in shares]
    masks = [part["relation_mask"].tolist() for part in parts]
    assert masks == [[True, True, True], [True, True, True], [True, False, False]], "5 and 2 over 3 processes"
    whole = torch.cat([part["pixel_values"][part["relation_mask"]] for part in parts])
    order = [0, 1, 5, 2, 3, 6, 4]
    assert are_same(whole, batch["pixel_values"][order])


def test_unlabeled_images_are_not_mixed():
    """The others are, among themselves, as without them; and each may attend to those without labels."""
    collate = Collator(Mixing(AugmentationArguments(mixup_alpha=0.5), 3))
    alone, batch = collate(items([0, 1, 2, 0])), collate(items([0, 1, 2, 0, -100, -100, -100], paddings=(6,)))
    plain = torch.stack([item["pixel_values"] for item in items([0] * 7)])
    assert are_same(batch["pixel_values"][:4], alone["pixel_values"])
    assert not are_same(batch["pixel_values"][:4], plain[:4])
    assert are_same(batch["pixel_values"][4:], plain[4:])
    assert are_same(batch["targets"][:4], alone["targets"])
    assert not batch["targets"][4:].any()
    mask = batch["relation_mask"]
    assert torch.equal(mask[:4, :4], alone["relation_mask"])
    assert mask[:, 4:6].all() and mask[4:6, :6].all() and not mask[:, 6].any()


def test_mixing_without_draws_draws_from_torchs_generator():
    collator = Collator(Mixing(AugmentationArguments(mixup_alpha=0.5), 3))
    made = items([0, 1, 2, 0, 1, 0], draws=False)
    batches = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        batches.append(collator(made))
    assert_same_batches(batches[:1], batches[1:2])
    assert not are_same(batches[0]["targets"], batches[2]["targets"])


def test_padding_changes_nothing_for_the_others(make_split):
    """On one process, a padded batch has the same logits as the batch without padding."""
    backbone_config = ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], image_size=32)
    images = training_images(make_split())
    draws = [Draw(0, 1), Draw(1, 2), Draw(5, 3)]
    whole = Collator()([images[draw] for draw in draws])
    padded = Collator()([images[draw] for draw in [*draws, Draw(0, 1, is_padding=True)]])
    for preset in ("paper", "kernel"):
        model = RBIForImageClassification(getattr(RBIConfig, preset)(backbone_config=backbone_config, num_labels=3))
        model.train()
        expected, actual = model(**whole), model(**padded)
        torch.testing.assert_close(actual.logits[:3], expected.logits)
        torch.testing.assert_close(actual.loss, expected.loss)
