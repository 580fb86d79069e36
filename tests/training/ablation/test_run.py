"""Ablations on a small data set: what they write, how they go on, and that arms do what they say."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from safetensors import safe_open
from torch import nn

from modeling_rbi import RBIConfig, RBIForImageClassification, load_image_processor
from training.ablation import run as ablation
from training.ablation.arguments import AblationArguments
from training.ablation.arms import ARMS
from training.ablation.report import paired_difference
from training.ablation.run import Cached, ablate, ablation_markdown, draw_data, train_end_to_end
from training.data.image_dataset import ImageDataset
from training.data.transforms import EvalTransform
from training.evaluation.features import CachedImages, extract
from training.fine_tuning.bank_trainer import BankTrainer
from training.fine_tuning.divergence import DivergedError
from training.fine_tuning.models import load_model


FROZEN = {"freeze_backbone": True, "frozen_steps": 20, "frozen_learning_rate": 1e-2, "num_seeds": 2, "num_shuffles": 2}


def assert_alike(results, expected):
    """The same arms, seeds and parameters; the figures agree where training was repeated."""
    assert results["seeds"] == expected["seeds"] and list(results["arms"]) == list(expected["arms"])
    assert results["data"] == expected["data"]
    for name, arm in expected["arms"].items():
        for run, other in zip(results["arms"][name]["runs"], arm["runs"], strict=True):
            assert (run["seed"], run["parameters"]) == (other["seed"], other["parameters"])
            for part in ("validation", "test"):
                assert run[part].keys() == other[part].keys()
                for protocol, figures in other[part].items():
                    assert run[part][protocol] == approximately(figures, expected, part)


def approximately(figures, results, part="test"):
    """Other rounding may change the prediction of one image: accuracy by 1 / n, macro-F1 by at most 2 / n or so."""
    num_images = results["data"]["fingerprints"]["42"]["splits"][part]["images"]
    return pytest.approx(figures, abs=2 / num_images)


def refuse(*args, **kwargs):
    raise AssertionError("this was not to be done again")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RBI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def frozen(command_line, cache, tmp_path_factory):
    """An ablation of all arms on a frozen backbone: what it gave, its folder and its command line."""
    folder = tmp_path_factory.mktemp("frozen") / "out"
    line = command_line(folder, num_unlabeled=7, **FROZEN)
    return ablate(AblationArguments.parse(line)), folder, line


@pytest.fixture(scope="module")
def end_to_end(command_line, cache, tmp_path_factory):
    """An ablation with all of the backbone: what it gave, its folder and its arguments."""
    folder = tmp_path_factory.mktemp("end_to_end") / "out"
    more = {"num_seeds": 2, "num_shuffles": 2, "num_unlabeled": 5, "learning_rate": 1e-2}
    line = command_line(folder, batch_sampler="balanced", images_per_class=4, **more)
    arms = ["rbi", "rbi-kernel-untrained", "batchformer", "bank-untrained", "bank-trained+single"]
    args = AblationArguments.parse([*line, "--arms", *arms])
    return ablate(args), folder, args


@pytest.mark.slow
class TestFrozen:
    def test_every_figure_is_kept(self, frozen):
        results, folder, _ = frozen
        assert json.loads((folder / "ablation.json").read_text()) == results
        assert list(results["arms"]) == list(ARMS) and results["seeds"] == [42, 43]
        for name, arm in results["arms"].items():
            assert [run["seed"] for run in arm["runs"]] == [42, 43]
            protocols = {"single", "shuffled", "sorted"} | ({"reference"} if ARMS[name].has_bank else set())
            for run in arm["runs"]:
                assert set(run["test"]) == set(run["validation"]) == protocols
                for figures in run["test"].values():
                    assert 0 <= figures["accuracy"] <= 1 and 0 <= figures["macro_f1"] <= 1
                assert run["parameters"] > 0 and run["seconds"] > 0
        assert results["environment"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
        sizes = results["data"]["fingerprints"]["42"]["splits"]
        assert {part: split["images"] for part, split in sizes.items()} == {
            "train": 32,
            "validation": 8,
            "test": 33,
            "unlabeled": 7,
        }

    def test_arms_without_relations_answer_the_same_everywhere(self, frozen):
        for name in ("plain", "self", "self-kernel", "batchformer"):
            for run in frozen[0]["arms"][name]["runs"]:
                for figures in run["test"].values():
                    own = {metric: figures[metric] for metric in ("accuracy", "macro_f1")}
                    assert own == approximately(run["test"]["single"], frozen[0])

    def test_untrained_heads_are_plain_on_their_own(self, frozen):
        plain = frozen[0]["arms"]["plain"]["runs"]
        for name in ("rbi-kernel-untrained", "bank-untrained"):
            for run, own in zip(plain, frozen[0]["arms"][name]["runs"], strict=True):
                assert own["test"]["single"] == approximately(run["test"]["single"], frozen[0])
                assert own["parameters"] == run["parameters"] == 24 * 4 + 4

    def test_differences_are_paired_by_seed(self, frozen):
        arms = frozen[0]["arms"]
        for name, arm in arms.items():
            if arm["control"] is None:
                assert arm["over_control"] is None
                continue
            expected = {"self": "single", "batch": "shuffled", "reference": "reference"}
            assert list(arm["over_control"]) == [expected[scope] for scope in arm["scopes"]], name
            control = [run["test"]["single"]["accuracy"] for run in arms[arm["control"]]["runs"]]
            for protocol, figures in arm["over_control"].items():
                own = [run["test"][protocol]["accuracy"] for run in arm["runs"]]
                assert figures["accuracy"] == paired_difference(own, control)

    def test_the_tables_show_the_figures(self, frozen):
        results, folder, _ = frozen
        text = (folder / "ablation.md").read_text()
        assert text == ablation_markdown(results)
        table = text.split("## Test accuracy in %")[1].split("##")[0]
        rows = {cells[1].strip(" `"): cells for line in table.splitlines() if len(cells := line.split("|")) > 2}
        for name, arm in results["arms"].items():
            mean = 100 * sum(run["test"]["single"]["accuracy"] for run in arm["runs"]) / 2
            assert rows[name][2].strip().startswith(f"{mean:.2f} ±")
            assert bool(rows[name][5].strip()) == ARMS[name].has_bank
        assert "without augmentation" in text
        assert "7 unlabeled images taken from the test, not used for testing" in text

    def test_each_image_goes_through_the_backbone_once(self, frozen):
        (path,) = frozen[1].glob("features-*.safetensors")
        with safe_open(path, "pt") as file:
            assert file.get_slice("features").get_shape() == [80, 24]  # of 80 images, in all seeds

    def test_a_rerun_does_no_work_again_and_gives_the_same(self, frozen, monkeypatch):
        results, _, line = frozen
        for name in ("extract", "train_frozen", "measure_arm"):
            monkeypatch.setattr(ablation, name, refuse)
        assert ablate(AblationArguments.parse(line)) == results
        fewer = ablate(AblationArguments.parse([*line, "--arms", "rra"]))
        assert list(fewer["arms"]) == ["plain", "self", "rra"]
        assert all(fewer["arms"][name] == results["arms"][name] for name in fewer["arms"])
        ablate(AblationArguments.parse(line))

    def test_with_other_arguments_it_is_refused(self, frozen):
        before = (frozen[1] / "ablation.json").read_bytes()
        with pytest.raises(
            ValueError, match=r"has other arguments: --frozen_steps was 20, now 21\. Give the same ones"
        ):
            ablate(AblationArguments.parse([*frozen[2], "--frozen_steps", "21"]))
        assert (frozen[1] / "ablation.json").read_bytes() == before

    def test_without_plain_in_memory_it_is_trained_again_to_the_same(self, frozen, tmp_path):
        results, folder, line = frozen
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        for name in ("bank-untrained", "rbi-kernel-untrained"):
            shutil.rmtree(copy / name)
        line = [str(copy) if word == str(folder) else word for word in line]
        assert_alike(ablate(AblationArguments.parse(line)), results)


@pytest.mark.slow
class TestResuming:
    def test_stopped_between_arms_it_goes_on_to_the_same(self, make, monkeypatch):
        arms, number = ["rbi", "bank-trained", "batchformer"], 5  # with the controls
        expected = ablate(make("whole", arms, **FROZEN))
        assert len(expected["arms"]) == number
        original, calls = ablation.measure_arm, []

        def measure_arm(*args):
            calls.append(args)
            if len(calls) == number:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(ablation, "measure_arm", measure_arm)
        with pytest.raises(KeyboardInterrupt):
            ablate(make("killed", arms, **FROZEN))
        results = ablate(make("killed", arms, **FROZEN))
        assert len(calls) == 2 * number + 1  # with 2 seeds, one arm was begun twice
        assert_alike(results, expected)

    def test_other_data_are_refused(self, make, published, tmp_path):
        folder = tmp_path / "data"
        shutil.copytree(published, folder)
        arms, more = ["plain"], {**FROZEN, "dataset_dir": folder}
        ablate(make("out", arms, **more))
        image = next(folder.rglob("*.jpg"))
        image.write_bytes(image.read_bytes() + b" ")
        with pytest.raises(ValueError, match="data of seed 42 differ from the data"):
            ablate(make("out", arms, **more))


@pytest.mark.slow
class TestEndToEnd:
    def scores(self, args, model, folder):
        test = draw_data(args, 42).images["test"]
        processor = load_image_processor(str(folder))
        images = extract(model, ImageDataset(test, EvalTransform(processor)), progress=False)
        return images, nn.functional.linear(images.features, model.classifier.weight, model.classifier.bias)

    @pytest.mark.parametrize("name", ["plain", "batchformer"])
    def test_it_is_a_backbone_and_a_linear_classifier(self, end_to_end, name):
        results, folder, args = end_to_end
        model = RBIForImageClassification.from_pretrained(folder / name / "seed-42")
        for projection in (model.rbi.rra.query, model.rbi.rra.key, model.rbi.rra.value):
            assert torch.equal(projection.weight, torch.eye(24)) and not projection.bias.any()
        images, expected = self.scores(args, model, folder / name / "seed-42")
        with torch.no_grad():
            logits = model(image_features=images.features, relation_scope="self").logits
        torch.testing.assert_close(logits, expected)
        accuracy = (expected.argmax(-1) == images.labels).float().mean().item()
        assert results["arms"][name]["runs"][0]["test"]["single"]["accuracy"] == pytest.approx(accuracy)

    def test_plain_trains_the_backbone_and_the_classifier(self, end_to_end):
        results, folder, _ = end_to_end
        model = RBIForImageClassification.from_pretrained(folder / "plain" / "seed-42")
        modules = (model.rbi.backbone, model.classifier)
        expected = sum(parameter.numel() for module in modules for parameter in module.parameters())
        runs = {name: arm["runs"][0]["parameters"] for name, arm in results["arms"].items()}
        assert runs["plain"] == runs["bank-trained+single"] == runs["bank-untrained"] == expected
        assert runs["rbi"] == runs["self"] > expected and runs["batchformer"] > expected

    def test_each_arm_has_a_record_and_no_checkpoints(self, end_to_end):
        _, folder, _ = end_to_end
        for name in ("plain", "self", "rbi", "batchformer", "bank-trained+single"):
            record = json.loads((folder / name / "seed-43" / "run.json").read_text())
            assert record["status"] == "finished" and record["seed"] == 43
            assert record["command"].startswith("python -m training.ablate")
            assert not list((folder / name / "seed-43").glob("checkpoint-*"))

    def test_the_self_arm_is_trained_without_relations(self, end_to_end):
        _, folder, _ = end_to_end
        scopes = {
            name: json.loads((folder / name / "seed-42" / "run.json").read_text())["arguments"]["train_relation_scope"]
            for name in ("plain", "self", "rbi")
        }
        assert scopes == {"plain": "self", "self": "self", "rbi": "batch"}

    def test_untrained_heads_are_plain_on_their_own(self, end_to_end):
        arms = end_to_end[0]["arms"]
        for name in ("rbi-kernel-untrained", "bank-untrained"):
            for plain, run in zip(arms["plain"]["runs"], arms[name]["runs"], strict=True):
                assert run["test"]["single"] == approximately(plain["test"]["single"], end_to_end[0])

    def test_what_is_trained_is_not_trained_again(self, end_to_end, tmp_path, monkeypatch):
        results, folder, args = end_to_end
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        (copy / "ablation.json").unlink()
        # One training is finished but not measured, the other was never begun.
        (copy / "batchformer" / "seed-43.json").unlink()
        (copy / "batchformer" / "seed-42.json").unlink()
        shutil.rmtree(copy / "batchformer" / "seed-42")
        trained, original = [], ablation.train
        monkeypatch.setattr(
            ablation, "train", lambda args, *rest, **more: trained.append(args) or original(args, *rest, **more)
        )
        training = dataclasses.replace(args.training, output_dir=str(copy))
        again = ablate(dataclasses.replace(args, training=training))
        assert [Path(args.training.output_dir) for args in trained] == [copy / "batchformer" / "seed-42"]
        assert_alike(again, results)

    def test_the_bank_that_is_saved_is_of_the_trained_backbone(self, end_to_end):
        """The model loads with it, which one with a stale bank does not, and answers as it was measured."""
        results, folder, args = end_to_end
        model = RBIForImageClassification.from_pretrained(folder / "bank-trained+single" / "seed-42")
        assert model.config.relation_scope == "reference" and len(model.rbi.references) == 32 + 5
        assert (model.rbi.references.labels == -100).tolist() == [False] * 32 + [True] * 5
        images, _ = self.scores(args, model, folder / "bank-trained+single" / "seed-42")
        with torch.no_grad():
            answers = model(images.pixel_values, image_features=images.features).logits.argmax(-1)
        accuracy = (answers == images.labels).float().mean().item()
        measured = results["arms"]["bank-trained+single"]["runs"][0]["test"]["reference"]["accuracy"]
        assert accuracy == pytest.approx(measured)


@pytest.mark.slow
def test_through_the_bank_no_image_attends_to_itself_end_to_end(make, monkeypatch, tmp_path):
    asked, batches = [], []
    forward, training_step = RBIForImageClassification.forward, BankTrainer.training_step

    @functools.wraps(forward)  # `Trainer` reads its signature
    def spied_forward(self, *args, **kwargs):
        if self.training:
            asked.append(kwargs)
        return forward(self, *args, **kwargs)

    def spied_step(self, model, inputs, *args):
        labels = torch.tensor(self.train_dataset.labels)
        assert torch.equal(labels[inputs["rows"]], inputs["labels"]), "the rows belong to the images"
        batches.append(inputs["rows"])
        return training_step(self, model, inputs, *args)

    monkeypatch.setattr(RBIForImageClassification, "forward", spied_forward)
    monkeypatch.setattr(BankTrainer, "training_step", spied_step)
    args = make(num_train_epochs=2)
    train_end_to_end(args, ARMS["bank-trained"], draw_data(args, 0), tmp_path / "out", {})
    assert len(asked) == len(batches) == 2 * 4
    for kwargs, rows in zip(asked, batches, strict=True):
        itself = torch.zeros(len(rows), 32, dtype=torch.bool)
        itself[torch.arange(len(rows)), rows] = True
        assert torch.equal(kwargs["reference_mask"], ~itself) and kwargs["relation_scope"] == "reference"


def planted(num_classes=10, per_class=12, seed=0):
    """Features that hardly tell the classes apart, and images that are alike in a class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_classes).repeat(per_class)
    features = torch.randn(num_classes, 24, generator=generator)[labels]
    features += 2 * torch.randn(len(labels), 24, generator=generator)
    pixels = torch.rand(num_classes, 3, 32, 32, generator=generator)[labels]
    pixels += 0.02 * torch.randn(pixels.shape, generator=generator)
    order = torch.randperm(len(labels), generator=generator)
    rows = dict(zip(("train", "validation", "test"), order.split([40, 10, len(order) - 50]), strict=True))
    return Cached(CachedImages(pixels, features, labels), rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "protocol"),
    [("rbi-kernel-untrained", "shuffled"), ("bank-untrained", "reference"), ("bank-trained", "reference")],
)
def test_where_neighbors_help_the_difference_to_the_control_is_above_zero(make, backbone_config, name, protocol):
    args = make(
        arms=[name],
        **{
            **FROZEN,
            "per_device_train_batch_size": 20,
            "rbi_config": '{"attention_temperature": 1}',
        },
    )
    base = RBIConfig(
        backbone_config=backbone_config,
        feature_size=24,
        num_labels=10,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    )
    accuracies = {"plain": [], name: []}
    for seed in range(4):
        cached, heads = planted(seed=seed), {}
        for arm in args.arms:
            head = ablation.train_frozen(args, arm, seed, cached, base, heads)
            test = ablation.measure_arm(args, arm, head, cached, seed)["test"]
            accuracies[arm.name].append(test.get(protocol, test["single"])["accuracy"])
    difference = paired_difference(accuracies[name], accuracies["plain"])
    assert difference["mean"] > 0.1 and difference["low"] > 0


@pytest.mark.parametrize(
    ("more", "advice"), [({"freeze_backbone": True}, "lower --frozen_learning_rate"), ({}, "lower --learning_rate")]
)
@pytest.mark.parametrize("part", ["validation", "test"])
def test_logits_that_are_not_finite_are_no_figures(make, part, more, advice):
    cached = planted(seed=0)

    def predict(batch, relation_scope):
        is_broken = torch.isin(batch, cached.rows[part][:1])
        return torch.randn(len(batch), 10).masked_fill(is_broken[:, None], torch.nan)

    head = ablation.TrainedHead(None, predict, 1, 1.0)
    with pytest.raises(DivergedError, match=f"plain, seed 3, gives {part} images logits.*{advice}"):
        ablation.measure_arm(make(**more), ARMS["plain"], head, cached, 3)


def test_the_budget_is_that_of_the_arguments(make):
    labels = torch.tensor([0, 0, 0, 1])
    more = {"frozen_steps": 7, "frozen_head_learning_rate": 1e-5, "weight_decay": 0.2, "label_smoothing_factor": 0.1}
    budget = ablation._budget(make(**more, class_weights="balanced"), labels, 2)
    assert (budget.steps, budget.head_learning_rate, budget.weight_decay) == (7, 1e-5, 0.2)
    assert (budget.batch_size, budget.label_smoothing, budget.images_per_class) == (8, 0.1, None)
    assert budget.class_weights.tolist() == pytest.approx([2 / 3, 2])
    budget = ablation._budget(make(batch_sampler="balanced", images_per_class=4), labels, 2)
    assert budget.images_per_class == 4 and budget.class_weights is None


@pytest.mark.slow
def test_features_are_those_of_each_seeds_images_even_where_one_occurs_twice(make, tmp_path):
    args = make(**FROZEN, num_unlabeled=3)
    (tmp_path / "out").mkdir()
    draws = [draw_data(args, seed) for seed in (5, 6)]
    for draw in draws:
        draw.images["test"] = datasets.concatenate_datasets([draw.images["test"].select([4, 4]), draw.images["test"]])
    _, cached = ablation.cache_features(args, draws, tmp_path / "out")
    assert len(cached[0].images.features) == 80
    torch.manual_seed(42)
    model, processor = load_model(args.model, draws[0].record["label_names"])
    for draw, own in zip(draws, cached, strict=True):
        for part, split in draw.images.items():
            expected = extract(model, ImageDataset(split, EvalTransform(processor)), progress=False)
            torch.testing.assert_close(own.images.features[own.rows[part]], expected.features)
            labels = torch.full_like(expected.labels, -100) if part == "unlabeled" else expected.labels
            assert torch.equal(own.images.labels[own.rows[part]], labels)


class TestUnlabeled:
    def places(self, split):
        return {row["image"]["path"] for row in split}

    def test_from_the_test_they_are_not_tested_on(self, make):
        usual, draw = draw_data(make(), 3), draw_data(make(num_unlabeled=9), 3)
        taken, left = self.places(draw.images["unlabeled"]), self.places(draw.images["test"])
        assert len(taken) == 9 and not taken & left
        assert taken | left == self.places(usual.images["test"])
        assert draw.record["unlabeled_from"] == "test"
        assert self.places(draw_data(make(num_unlabeled=9), 4).images["unlabeled"]) != taken

    def test_from_what_the_recipe_leaves_unused(self, make):
        draw = draw_data(make(num_unlabeled=9, train_samples_per_class=3), 3)
        taken = self.places(draw.images["unlabeled"])
        assert len(taken) == 9 and len(draw.images["test"]) == 40
        assert not taken & set.union(*(self.places(draw.images[part]) for part in ("train", "validation", "test")))
        assert "the recipe leaves out" in draw.record["unlabeled_from"]

    def test_no_more_than_there_are(self, make):
        with pytest.raises(ValueError, match="--num_unlabeled 39: the test has 40 images, and must keep two of them"):
            draw_data(make(num_unlabeled=39), 0)
        with pytest.raises(ValueError, match="--num_unlabeled 21: the recipe leaves 20 images unused"):
            draw_data(make(num_unlabeled=21, train_samples_per_class=3), 0)

    def test_the_bank_is_training_and_unlabeled_images(self):
        rows = {"train": torch.tensor([4, 2]), "validation": torch.tensor([0]), "test": torch.tensor([1])}
        cached = Cached(CachedImages(torch.zeros(6, 1), torch.zeros(6, 1), torch.zeros(6)), rows)
        assert cached.bank.tolist() == [4, 2]
        assert Cached(cached.images, rows | {"unlabeled": torch.tensor([5])}).bank.tolist() == [4, 2, 5]


class TestBadInput:
    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"num_folds": 3}, "--num_folds cannot be used in an ablation"),
            (
                {"batch_sampler": "balanced", "images_per_class": 8, "per_device_train_batch_size": 40},
                "batches of 40 images are larger than the training set of 32",
            ),
            (
                {"batch_sampler": "balanced", "images_per_class": 3},
                "Batches of 8 images cannot hold 3 of each class",
            ),
        ],
    )
    def test_arguments_that_do_not_go(self, make, monkeypatch, tmp_path, more, message):
        for name in ("load_model", "train"):
            monkeypatch.setattr(ablation, name, refuse)
        with pytest.raises(ValueError, match=message):
            ablate(make(**more))
        assert not (tmp_path / "out").exists()

    def test_a_folder_with_something_else(self, make, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")
        with pytest.raises(ValueError, match="is not empty: name a new folder"):
            ablate(make())

    def test_an_rbi_model_is_no_backbone(self, make, backbone_config, tmp_path):
        RBIForImageClassification(RBIConfig.kernel(backbone_config=backbone_config)).save_pretrained(
            tmp_path / "model"
        )
        with pytest.raises(ValueError, match="is an RBI model, with its own head: name a backbone"):
            ablate(make(model_name_or_path=tmp_path / "model"))
