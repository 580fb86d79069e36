"""RBITrainer: the same training on any number of processes and in any parts, and a plain Trainer trains RBI too."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, ViTConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.trainer_callback import ExportableState

from modeling_rbi import RBIConfig, RBIForImageClassification, UserError
from training.data.image_dataset import Collator, ImageDataset, WithUnlabeled
from training.data.layouts import LAYOUTS
from training.data.mixing import Mixing
from training.data.transforms import AugmentationArguments, EvalTransform, TrainTransform
from training.evaluation.metrics import compute_metrics
from training.fine_tuning.arguments import FineTuningArguments
from training.fine_tuning.divergence import DivergedError
from training.fine_tuning.trainer import (
    MOVING_AVERAGE_FILE,
    RBITrainer,
    balanced_class_weights,
    last_complete_checkpoint,
    missing_parts,
    plan_neighborhoods,
)


# Without Adam's normalization, which blows rounding up where a gradient is 0 by nature, as that of the keys' bias.
SGD = {"optim": "sgd", "learning_rate": 0.1}
VIT = ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)


@pytest.fixture
def make_trainer(published, tmp_path, backbone_config):
    """
    Gives a trainer of a tiny model on 20 training images, and others without labels if asked for; keywords go to
    where they are known.
    """

    def make(trainer_class=RBITrainer, preset="paper", rows=20, unlabeled=0, backbone=backbone_config, **kwargs):
        torch.manual_seed(0)
        model = RBIForImageClassification(getattr(RBIConfig, preset)(backbone_config=backbone, num_labels=4))
        processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
        images = LAYOUTS["cub_200_2011"](published)
        options = {name: kwargs.pop(name) for name in list(kwargs) if name in FineTuningArguments.__dataclass_fields__}
        more = {name: kwargs.pop(name) for name in ("callbacks", "data_collator") if name in kwargs}
        args = TrainingArguments(
            **{
                "output_dir": str(tmp_path / "out"),
                "per_device_train_batch_size": 6,
                "max_steps": 3,
                "learning_rate": 1e-3,
                "use_cpu": True,
                "disable_tqdm": True,
                "remove_unused_columns": False,
                "report_to": "none",
                "logging_steps": 1,
                "save_strategy": "no",
            }
            | kwargs,
        )
        if trainer_class is RBITrainer:
            more["fine_tuning"] = FineTuningArguments(**options)
        more.setdefault("data_collator", Collator())
        shuffled, transform = images["train"].shuffle(seed=0), TrainTransform(processor, AugmentationArguments())
        train_dataset = ImageDataset(shuffled.select(range(rows)), transform, augment=True)
        if unlabeled:
            others = shuffled.select(range(rows, rows + unlabeled)).remove_columns("label")
            others = others.add_column("label", [-100] * unlabeled)
            train_dataset = WithUnlabeled(train_dataset, ImageDataset(others, transform, augment=True))
        return trainer_class(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=ImageDataset(images["test"], EvalTransform(processor)),
            compute_metrics=compute_metrics,
            processing_class=processor,
            **more,
        )

    return make


def weights_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def losses_of(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.slow
def test_a_plain_trainer_trains_rbi(make_trainer):
    trainer = make_trainer(Trainer, max_steps=24, learning_rate=1e-2, eval_strategy="no", logging_steps=6)
    before = weights_of(trainer)
    trainer.train()
    changed = [name for name, value in weights_of(trainer).items() if not torch.equal(value, before[name])]
    assert {"classifier.weight", "rbi.rra.query.weight"} <= set(changed)
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]
    assert trainer.evaluate()["eval_accuracy"] > 0.5  # 4 classes by color


@pytest.mark.slow
def test_it_learns_what_a_plain_trainer_learns_from_the_same_batches(make_trainer):
    """With one full batch an epoch, both see the same images in another order."""
    results = []
    for trainer_class in (Trainer, RBITrainer):
        trainer = make_trainer(trainer_class, rows=8, per_device_train_batch_size=8, max_steps=3, **SGD)
        trainer.train_dataset.augment = False
        trainer.train_dataset.transform = trainer.eval_dataset.transform
        trainer.train()
        results.append(weights_of(trainer))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_batches_are_equal_neighborhoods(make_trainer):
    sizes = []
    trainer = make_trainer(rows=20)
    for batch in trainer.get_train_dataloader():
        sizes.append(len(batch["labels"]))
        assert batch["relation_mask"].all()
    assert sizes == [5, 5, 5, 5]
    dropped = make_trainer(rows=20, dataloader_drop_last=True).get_train_dataloader()
    assert [len(batch["labels"]) for batch in dropped] == [6, 6, 6]


def test_images_are_mixed_in_training_only(make_trainer):
    options = AugmentationArguments(mixup_alpha=0.5, cutmix_alpha=1.0)
    trainer = make_trainer(data_collator=Collator(Mixing(options, 4)))
    assert all("targets" in batch for batch in trainer.get_train_dataloader())
    plain = make_trainer()
    for loader, expected in (
        (trainer.get_eval_dataloader(), plain.get_eval_dataloader()),
        (trainer.get_test_dataloader(trainer.eval_dataset), plain.get_test_dataloader(plain.eval_dataset)),
    ):
        for batch, other in zip(loader, expected, strict=True):
            torch.testing.assert_close(dict(batch), dict(other))


def test_drop_last_is_of_the_training_alone(make_trainer):
    trainer = make_trainer(dataloader_drop_last=True, per_device_eval_batch_size=7)
    assert len(trainer.predict(trainer.eval_dataset).predictions) == len(trainer.eval_dataset) == 40
    assert sum(len(batch["labels"]) for batch in trainer.get_eval_dataloader()) == 40


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 9},
        {"per_device_train_batch_size": 18, "relation_batch_size": 9},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "relation_batch_size": 9},
        {"per_device_train_batch_size": 6, "unlabeled": 5, "unlabeled_per_batch": 3},
    ],
    ids=["the batch", "smaller", "larger", "with unlabeled images"],
)
def test_shuffled_evaluation_is_in_equal_neighborhoods(make_trainer, options):
    trainer = make_trainer(**options)
    sizes = []
    trainer.model.register_forward_hook(lambda model, args, output: sizes.append(len(output["logits"])))
    metrics = trainer.evaluate_shuffled(trainer.eval_dataset, "test")
    assert sizes == [8] * 5  # 40 images in batches of at most 9
    assert {"test_accuracy", "test_loss"} <= metrics.keys()
    assert trainer.model.config.relation_scope == "self"
    alone = trainer.evaluate()
    assert abs(alone["eval_loss"] - metrics["test_loss"]) > 1e-6


def test_epochs_differ_and_are_those_of_the_seed(make_trainer):
    def draws(**kwargs):
        trainer = make_trainer(**kwargs)
        trainer.get_train_dataloader()
        orders = []
        for epoch in (0, 1):
            trainer._train_sampler.set_epoch(epoch)
            orders.append([draw for batch in trainer._train_sampler for draw in batch])
        return orders

    assert draws() == draws()
    assert draws()[0] != draws()[1]
    assert draws()[0] != draws(seed=1)[0]


# --- Neighborhoods of other sizes than the device's batch -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "kernel"])
def test_two_passes_are_the_large_batch(make_trainer, preset):
    large = make_trainer(preset=preset, per_device_train_batch_size=6, **SGD)
    small = make_trainer(
        preset=preset, per_device_train_batch_size=2, gradient_accumulation_steps=3, relation_batch_size=6, **SGD
    )
    for trainer in (large, small):
        trainer.train()
    torch.testing.assert_close(losses_of(small), losses_of(large), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights_of(small), weights_of(large), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_two_passes_in_mixed_precision(make_trainer):
    options = {"backbone": VIT, "bf16": True, "max_steps": 1} | SGD
    large = make_trainer(per_device_train_batch_size=6, **options)
    small = make_trainer(
        per_device_train_batch_size=2, gradient_accumulation_steps=3, relation_batch_size=6, **options
    )
    before = weights_of(small)
    for trainer in (large, small):
        trainer.train()
    after, expected = weights_of(small), weights_of(large)
    for name in before:
        if "backbone" in name and before[name].ndim > 1:  # the same step, but for the rounding of bf16
            assert (after[name] - expected[name]).norm() < 0.2 * (expected[name] - before[name]).norm(), name


@pytest.mark.slow
def test_two_passes_go_with_accumulation(make_trainer):
    """Two neighborhoods of 6 in a step: as two batches of 6."""
    large = make_trainer(per_device_train_batch_size=6, gradient_accumulation_steps=2, **SGD)
    small = make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=6, relation_batch_size=6, **SGD)
    for trainer in (large, small):
        trainer.train()
    torch.testing.assert_close(weights_of(small), weights_of(large), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_split_batch_is_accumulation(make_trainer):
    """A batch of 6 in neighborhoods of 3 gives the gradients of two batches of 3."""
    whole = make_trainer(rows=18, per_device_train_batch_size=6, relation_batch_size=3, **SGD)
    parts = make_trainer(rows=18, per_device_train_batch_size=3, gradient_accumulation_steps=2, **SGD)
    for trainer in (whole, parts):
        trainer.train()
    torch.testing.assert_close(weights_of(whole), weights_of(parts), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relation_batch_size": 9}, r"9 must be a multiple of the batch of a device \(6\)"),
        ({"relation_batch_size": 12}, r"divisor of --gradient_accumulation_steps \(1\)"),
        ({"relation_batch_size": 3, "gather_across_processes": True}, "leave --gather_across_processes out"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        plan_neighborhoods(
            TrainingArguments("out", per_device_train_batch_size=6, use_cpu=True), FineTuningArguments(**options)
        )


def test_what_cannot_be_sharded_is_refused(make_trainer, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    options = {"references_per_class": 2, "num_references": 2, "ema_decay": 0.9}
    trainer = make_trainer()
    for name, value in options.items():
        trainer.fine_tuning = FineTuningArguments(**{name: value, "unlabeled_dir": "a"})
        with pytest.raises(UserError, match=f"^--{name} cannot be used with FSDP"):
            trainer._refuse_what_cannot_be_sharded()
    with pytest.raises(UserError, match="--ema_decay cannot be used with FSDP"):
        make_trainer(ema_decay=0.9)


# --- A second loss, and neighbors without labels --------------------------------------------------------------------


def first_loss(trainer):
    trainer.train()
    return losses_of(trainer)[0]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "kernel"])
def test_the_self_loss_is_that_of_training_without_relations(make_trainer, preset):
    """From the same start and images, the loss of a step is the mean of both."""
    options = {"preset": preset, "max_steps": 1, "label_smoothing_factor": 0.1, "class_weights": "balanced"}
    together = first_loss(make_trainer(self_loss_weight=0.0, **options))
    alone = first_loss(make_trainer(train_relation_scope="self", **options))
    both = first_loss(make_trainer(self_loss_weight=0.3, **options))
    assert abs(together - alone) > 1e-4
    assert both == pytest.approx(0.7 * together + 0.3 * alone, abs=1e-5)


@pytest.mark.slow
def test_the_self_loss_is_off_unless_it_is_asked_for(make_trainer):
    options = {"preset": "kernel", "max_steps": 1}
    losses = [
        first_loss(make_trainer(**more, **options))
        for more in ({}, {"self_loss_weight": 0.5}, {"self_loss_weight": 0.0}, {"self_loss_weight": 0.9})
    ]
    assert losses[0] == pytest.approx(losses[2]) and abs(losses[1] - losses[0]) > 1e-4
    assert abs(losses[3] - losses[1]) > 1e-4
    trainer = make_trainer(self_loss_weight=0.9, **options)
    assert trainer.model.rbi.self_loss_weight == 0.9


def cross_entropy_by_hand(trainer, batch):
    """Of the images with labels alone, with all of the batch as neighbors, from one plain forward."""
    trainer.model.train()
    logits = trainer.model(pixel_values=batch["pixel_values"], relation_mask=batch["relation_mask"]).logits
    targets = batch.get("targets", batch["labels"])[batch["labels"] >= 0]
    return torch.nn.functional.cross_entropy(logits[batch["labels"] >= 0], targets), logits


@pytest.mark.parametrize("batch_sampler", ["shuffled", "balanced"])
@pytest.mark.parametrize("mixup_alpha", [0.0, 0.5])
def test_unlabeled_images_are_neighbors_and_have_no_loss(make_trainer, batch_sampler, mixup_alpha):
    mixing = Mixing(AugmentationArguments(mixup_alpha=mixup_alpha), 4) if mixup_alpha else None
    options = {"unlabeled": 12, "unlabeled_per_batch": 4, "batch_sampler": batch_sampler}
    trainer = make_trainer(**options, data_collator=Collator(mixing))
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == 4
    for batch in batches:
        is_labeled = batch["labels"] >= 0
        size = len(is_labeled) - 4
        assert size in (5, 6) and is_labeled.tolist() == [True] * size + [False] * 4
        loss, logits = cross_entropy_by_hand(trainer, batch)
        torch.testing.assert_close(trainer.training_step(trainer.model, batch), loss.detach())
        part = {name: value[:size] for name, value in batch.items()}
        part["relation_mask"] = part["relation_mask"][..., :size]
        _, without = cross_entropy_by_hand(trainer, part)
        assert (logits[:size] - without).abs().max() > 1e-4, "they change the others' answers"


def test_unlabeled_images_learn_through_the_others_alone(make_trainer):
    trainer = make_trainer(unlabeled=6, unlabeled_per_batch=3)
    batch = next(iter(trainer.get_train_dataloader()))
    for scope, has_gradient in (("batch", True), ("self", False)):
        trainer.fine_tuning.train_relation_scope = scope
        batch["pixel_values"] = batch["pixel_values"].detach().requires_grad_()
        trainer.training_step(trainer.model, batch)
        gradients = batch["pixel_values"].grad.abs().amax((1, 2, 3))
        assert (gradients[:5] > 0).all() and (gradients[5:] > 0).tolist() == [has_gradient] * 3


@pytest.mark.slow
def test_unlabeled_images_never_come_into_evaluation(make_trainer):
    trainer = make_trainer(unlabeled=12, unlabeled_per_batch=4, max_steps=2, eval_strategy="steps", eval_steps=1)
    seen = {True: [], False: []}
    trainer.model.register_forward_pre_hook(
        lambda model, args, kwargs: seen[model.training].append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    trainer.train()
    assert seen[True] == [9, 9]
    assert sum(seen[False]) == 2 * len(trainer.eval_dataset)
    seen[False].clear()
    trainer.evaluate_shuffled(trainer.eval_dataset)
    assert sum(seen[False]) == len(trainer.eval_dataset)


def test_unlabeled_images_count_for_no_class_and_no_speed(make_trainer):
    plain, trainer = (
        make_trainer(class_weights="balanced", unlabeled=number, unlabeled_per_batch=2) for number in (0, 12)
    )
    torch.testing.assert_close(trainer.class_weights, plain.class_weights)
    loaders = [each.get_train_dataloader() for each in (plain, trainer)]
    assert [trainer.num_examples(loader) for loader in (*loaders, trainer.get_eval_dataloader())] == [20, 20, 40]


def test_there_must_be_as_many_unlabeled_images_as_a_batch_takes(make_trainer):
    with pytest.raises(ValueError, match="cannot have 5 of 4 unlabeled images"):
        make_trainer(unlabeled=4, unlabeled_per_batch=5).get_train_dataloader()


# --- Several processes -----------------------------------------------------------------------------------------------


# Run by each process: `trainings` are folders and the words of their command lines.
DISTRIBUTED = """
import os

from safetensors.torch import save_file
from transformers import TrainerCallback

from training import train
from training.fine_tuning.trainer import RBITrainer


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == 0 and args.process_index == 0:
            gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
            save_file(gradients, os.path.join(folder, "gradients.safetensors"))


original = RBITrainer.__init__


def init(self, *args, callbacks, **kwargs):
    original(self, *args, callbacks=[*callbacks, Gradients()], **kwargs)


RBITrainer.__init__ = init
try:
    for folder, words in trainings:
        if train.main(words) != 0:
            raise SystemExit(1)
finally:
    RBITrainer.__init__ = original
"""
BATCH_NORM_BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16, 24],
    "depths": [1, 1, 1, 1],
}


@pytest.fixture(scope="module")
def distributed(command_line, unlabeled_dir, run_processes, tmp_path_factory):
    """Runs trainings on several processes, and those that they are compared with on one; gives their folders."""
    root = tmp_path_factory.mktemp("distributed")
    common = SGD | {"max_steps": 5, "logging_strategy": "steps", "logging_steps": 1, "eval_strategy": "no"}
    common |= {"load_best_model_at_end": False, "save_strategy": "no", "max_train_samples": 20}
    gather = common | {"gather_across_processes": True}
    paper, kernel = gather | {"preset": "paper"}, gather | {"preset": "kernel"}
    with_others = kernel | {"unlabeled_dir": unlabeled_dir, "references_per_class": 2, "num_references": 5}
    with_others["max_train_samples"] = 21
    batch_norm = common | {"backbone_config": json.dumps(BATCH_NORM_BACKBONE), "references_per_class": 1}
    two_passes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "relation_batch_size": 12}
    runs = {
        1: {
            "paper on one": paper | {"per_device_train_batch_size": 6},
            "kernel on one": kernel | {"per_device_train_batch_size": 6},
            "large batch on one": gather | {"per_device_train_batch_size": 12},
            "others on one": with_others | {"per_device_train_batch_size": 9, "unlabeled_per_batch": 6},
        },
        2: {
            "kernel on two": kernel | {"per_device_train_batch_size": 3},
            "two passes on two": gather | two_passes,
            "batch norm on two": batch_norm | {"per_device_train_batch_size": 5, "train_val_split": 0},
        },
        3: {
            "paper on three": paper | {"per_device_train_batch_size": 2},
            "others on three": with_others | {"per_device_train_batch_size": 3, "unlabeled_per_batch": 2},
        },
    }
    for number, options in runs.items():
        trainings = []
        for name, values in options.items():
            (root / name).mkdir()
            trainings.append((str(root / name), command_line(root / name / "out", **values)))
        run_processes(DISTRIBUTED, number, trainings=trainings)
    return root


def results_of(folder):
    """Losses and metrics, first gradients, and weights."""
    record = json.loads((folder / "out" / "run.json").read_text())
    losses = [entry["loss"] for entry in record["metrics_by_epoch"] if "loss" in entry]
    results = record["results"]
    parts = [part for part in ("validation", "test_single", "test_reference") if part in results]
    losses += [results[part][name] for part in parts for name in ("loss", "macro_f1")]
    return losses, load_file(folder / "gradients.safetensors"), load_file(folder / "out" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("many", "one", "number_of_values"),
    [
        # 20 images in 4 batches of 5: 3 + 2 on two processes, 2 + 2 + 1 on three.
        ("paper on three", "paper on one", 5 + 4),
        ("kernel on two", "kernel on one", 5 + 4),
        ("two passes on two", "large batch on one", 5 + 4),
        # 7 images with labels and 6 without in each batch: 2 + 2 + 2 of the latter on three processes.
        ("others on three", "others on one", 5 + 6),
    ],
)
def test_any_number_of_processes_is_one_process(distributed, many, one, number_of_values):
    actual, expected = results_of(distributed / many), results_of(distributed / one)
    assert len(expected[0]) == number_of_values
    for value, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_references_of_several_processes(distributed):
    labels = results_of(distributed / "others on three")[2]["rbi.references.labels"]
    assert labels.sort().values.tolist() == [-100] * 5 + [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.slow
def test_the_bank_is_of_the_batch_statistics_that_are_saved(distributed):
    """Each process has seen other images, and what is saved is the mean of their statistics."""
    model = RBIForImageClassification.from_pretrained(distributed / "batch norm on two" / "out")
    bank = model.rbi.references
    torch.testing.assert_close(bank.probe, model.rbi.probe_features().detach(), atol=1e-5, rtol=1e-4)


# --- What is trained, and what is kept -------------------------------------------------------------------------------


def test_the_learning_rates_are_those_asked_for(make_trainer):
    trainer = make_trainer(
        optimizer="radam", head_learning_rate=1e-2, layer_decay=0.5, weight_decay=0.1, lr_scheduler_type="constant"
    )
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.RAdam)
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    # 4 blocks, what comes before and what comes after.
    assert rates == {1e-2, *(1e-3 * 0.5**depth for depth in range(6))}
    names = {id(value): name for name, value in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        assert {value.ndim > 1 for value in group["params"]} == {group["weight_decay"] > 0}
        is_head = {not names[id(value)].startswith("rbi.backbone.") for value in group["params"]}
        assert is_head == {group["lr"] == 1e-2}


@pytest.mark.slow
def test_in_scope_self_the_batch_has_no_influence(make_trainer):
    """Batches of one and accumulated batches give the same weights; with relations they do not."""
    weights = {}
    for scope in ("self", "batch"):
        for batch_size in (5, 1):
            trainer = make_trainer(
                train_relation_scope=scope,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=5 // batch_size,
                **SGD,
            )
            trainer.train()
            weights[scope, batch_size] = trainer.model.classifier.weight.detach()
    torch.testing.assert_close(weights["self", 5], weights["self", 1], atol=1e-5, rtol=1e-4)
    assert (weights["batch", 5] - weights["batch", 1]).abs().max() > 1e-3


def test_class_weights_make_classes_count_alike():
    labels = [0] * 6 + [1] * 2 + [2]
    weights = balanced_class_weights(labels, 3)
    assert weights.dtype == torch.float32 and weights[labels].mean().item() == pytest.approx(1)
    per_class = weights * torch.bincount(torch.tensor(labels))
    torch.testing.assert_close(per_class, per_class[0].expand(3))
    assert balanced_class_weights([0, 0, 2], 4).tolist() == pytest.approx([0.75, 1, 1.5, 1])  # 1 and 3 have no images


def test_label_smoothing_smooths_the_training_alone(make_trainer):
    trainer = make_trainer(label_smoothing_factor=0.5, max_steps=1)
    trainer.train()
    metrics = trainer.evaluate()
    output = trainer.predict(trainer.eval_dataset)
    expected = torch.nn.functional.cross_entropy(torch.tensor(output.predictions), torch.tensor(output.label_ids))
    assert metrics["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.slow
def test_the_moving_average_is_what_is_evaluated_and_kept(make_trainer):
    trainer = make_trainer(
        ema_decay=0.9, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, learning_rate=1e-2
    )
    trainer.train()
    final = weights_of(trainer)
    folders = sorted(Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert [folder.name for folder in folders] == [f"checkpoint-{step}" for step in range(1, 4)]
    trained = [name for name, value in trainer.model.named_parameters() if value.requires_grad]
    last = load_file(folders[-1] / MOVING_AVERAGE_FILE)
    raw = load_file(folders[-1] / "model.safetensors")
    for number, name in enumerate(trained):
        assert torch.equal(last[f"average.{number}"], final[name])
    assert any(not torch.equal(raw[name], final[name]) for name in trained)
    logged = [log for log in trainer.state.log_history if "eval_loss" in log][-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logged["eval_loss"], abs=1e-6)


@pytest.mark.slow
def test_the_best_moving_average_is_taken_back(make_trainer):
    trainer = make_trainer(
        ema_decay=0.5,
        learning_rate=3e-2,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)


def test_checkpoints_hold_no_pickled_arguments(make_trainer):
    trainer = make_trainer(save_strategy="steps", save_steps=3)
    trainer.train()
    names = {path.name for path in Path(trainer.args.output_dir, "checkpoint-3").iterdir()}
    assert "model.safetensors" in names and "training_args.bin" not in names


def test_a_checkpoint_that_was_cut_off_is_passed_over(make_trainer):
    trainer = make_trainer(save_strategy="steps", save_steps=1)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert last_complete_checkpoint(folder).name == "checkpoint-3"
    (folder / "checkpoint-3" / "trainer_state.json").unlink()
    assert last_complete_checkpoint(folder).name == "checkpoint-2"
    (folder / "checkpoint-2" / "trainer_state.json").write_text('{"epoch": 1.')
    assert last_complete_checkpoint(folder).name == "checkpoint-1"
    assert last_complete_checkpoint(folder / "nothing") is None


# --- Numbers that are not finite -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logging_nan_inf_filter": False},
        {"ema_decay": 0.9, "self_loss_weight": 0.5},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "relation_batch_size": 6},
    ],
    ids=["plain", "unfiltered", "moving average", "two passes"],
)
def test_a_loss_that_is_not_finite_stops_the_training(make_trainer, options):
    trainer = make_trainer(learning_rate=1e10, **options)
    with pytest.raises(DivergedError, match=r"the loss of step 2 is not finite.*lower --learning_rate"):
        trainer.train()
    assert all(value.isfinite().all() for value in trainer.model.parameters())


def test_numbers_that_json_lacks_are_not_logged(make_trainer):
    trainer = make_trainer()
    trainer.log({"loss": 0.5, "grad_norm": torch.inf, "learning_rate": 0.0, "other": torch.nan})
    assert trainer.state.log_history[-1] == {"loss": 0.5, "learning_rate": 0.0, "epoch": 0, "step": 0}


BROKEN_ON_ONE = """
import torch

from training import train
from training.fine_tuning.trainer import RBITrainer

original = RBITrainer.training_step


def training_step(self, *args, **kwargs):
    loss = original(self, *args, **kwargs)
    return loss * torch.nan if self.args.process_index == 1 and self.state.global_step == 1 else loss


RBITrainer.training_step = training_step
try:
    code = train.main(words)
finally:
    RBITrainer.training_step = original
if code != 1:
    raise SystemExit(1)
"""


@pytest.mark.slow
def test_a_loss_of_one_process_that_is_not_finite_stops_all(command_line, run_processes, tmp_path):
    run_processes(BROKEN_ON_ONE, 2, words=command_line(tmp_path / "out", per_device_train_batch_size=4))
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "failed" and "the loss of step 2 is not finite" in record["error"]


class Break(TrainerCallback):
    """Breaks a weight after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            model.classifier.weight.data[0, 0] = torch.nan


def test_weights_that_are_not_finite_are_not_saved(make_trainer):
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 4}
    trainer = make_trainer(callbacks=[Break(step=3)], **options)
    with pytest.raises(DivergedError, match=r"weights after step 3 .*checkpoint-2 was saved before and stays"):
        trainer.train()
    checkpoint = last_complete_checkpoint(Path(trainer.args.output_dir))
    assert checkpoint.name == "checkpoint-2"
    assert all(value.isfinite().all() for value in load_file(checkpoint / "model.safetensors").values())


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_model_that_gives_no_numbers_is_never_the_best(make_trainer, metric, ema_decay):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": metric, "ema_decay": ema_decay}
    trainer = make_trainer(callbacks=[Break(step=2)], **options)
    with pytest.raises(DivergedError, match="eval_loss of the evaluation after step 2 is nan"):
        trainer.train()
    assert trainer.state.best_metric is None
    assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))


@pytest.mark.slow
def test_the_last_step_is_looked_at_too(make_trainer):
    trainer = make_trainer(callbacks=[Break(step=3)], max_steps=3)
    trainer.train()
    with pytest.raises(DivergedError, match="weights after step 3"):
        trainer.check_weights()
    for evaluate in (trainer.evaluate, lambda: trainer.evaluate_shuffled(trainer.eval_dataset)):
        with pytest.raises(DivergedError, match="eval_loss"):
            evaluate()


# --- Resumed ---------------------------------------------------------------------------------------------------------


class Halt(TrainerCallback):
    """Ends the process at a step, as a kill does."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def resumed(make_trainer, step, callbacks=lambda: [], resume=None, **options):
    """Steps of the evaluations, and the trainer, of a training that was stopped at a step and resumed."""
    trainer = make_trainer(callbacks=[*callbacks(), Halt(step)], **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer = make_trainer(callbacks=callbacks(), **options)
    trainer.train(resume_from_checkpoint=resume or last_complete_checkpoint(Path(trainer.args.output_dir)))
    return trainer


def evaluations_of(trainer):
    return [log["step"] for log in trainer.state.log_history if "eval_loss" in log]


EACH_STEP = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 9,
}
# The first evaluation is the best: nothing is learned.
NO_GAIN = EACH_STEP | {"learning_rate": 0.0, "load_best_model_at_end": True, "metric_for_best_model": "accuracy"}


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("resume", [None, True])
def test_early_stopping_goes_on_counting(make_trainer, step, resume):
    def callbacks():
        return [EarlyStoppingCallback(4)]

    whole = make_trainer(callbacks=callbacks(), max_steps=9, **NO_GAIN)
    whole.train()
    assert evaluations_of(whole) == [1, 2, 3, 4, 5]
    trainer = resumed(make_trainer, step, callbacks, resume, max_steps=9, **NO_GAIN)
    assert evaluations_of(trainer) == evaluations_of(whole)
    assert trainer.state.best_model_checkpoint == whole.state.best_model_checkpoint


class Counter(TrainerCallback, ExportableState):
    """A user's own callback with a state."""

    def __init__(self, start=0):
        self.count = self.start = start

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self):
        return {"args": {"start": self.start}, "attributes": {"count": self.count}}


@pytest.mark.slow
def test_callbacks_of_others_get_their_state_back(make_trainer):
    trainer = resumed(make_trainer, 2, lambda: [Counter(10), EarlyStoppingCallback(9)], max_steps=5, **NO_GAIN)
    (counter,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, Counter)]
    assert counter.count == 15


@pytest.mark.slow
def test_a_training_that_had_stopped_early_does_not_go_on(make_trainer):
    """Killed between its last checkpoint and its end."""
    options = {"max_steps": 9} | NO_GAIN
    make_trainer(callbacks=[EarlyStoppingCallback(2)], **options).train()
    trainer = make_trainer(callbacks=[EarlyStoppingCallback(2)], **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3 and evaluations_of(trainer) == [1, 2, 3]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")


@pytest.mark.slow
def test_the_evaluation_at_the_start_is_not_repeated(make_trainer):
    def callbacks():
        return [EarlyStoppingCallback(2)]

    trainer = resumed(make_trainer, 1, callbacks, max_steps=9, eval_on_start=True, **NO_GAIN)
    assert evaluations_of(trainer) == [0, 1, 2, 3]


@pytest.mark.slow
def test_the_moving_average_goes_on_too(make_trainer):
    """Also where the checkpoint is not named."""
    options = EACH_STEP | {"ema_decay": 0.9, "max_steps": 4} | SGD
    whole = make_trainer(**options)
    whole.train()
    trainer = resumed(make_trainer, 2, resume=True, **options)
    torch.testing.assert_close(weights_of(trainer), weights_of(whole), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_best_checkpoint_is_found_where_the_folder_was_moved(make_trainer, tmp_path):
    options = {"max_steps": 3, "output_dir": str(tmp_path / "before")} | NO_GAIN
    make_trainer(**options).train()
    (tmp_path / "before").rename(tmp_path / "after")
    trainer = make_trainer(**options | {"output_dir": str(tmp_path / "after")})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "after" / "checkpoint-1")
    shutil.rmtree(tmp_path / "after" / "checkpoint-1")
    with pytest.raises(UserError, match=r"checkpoint-1, the best checkpoint so far, is missing in .*: restore it"):
        trainer.train(resume_from_checkpoint=True)


def test_there_must_be_a_checkpoint_to_resume_from(make_trainer):
    with pytest.raises(UserError, match="out holds no complete checkpoint to resume from"):
        make_trainer().train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("options", "removed", "missing"),
    [
        ({}, [], []),
        ({"save_only_model": True}, [], ["the state of the optimizer"]),
        ({}, ["optimizer.pt"], ["the state of the optimizer"]),
        ({"ema_decay": 0.9}, ["model.safetensors"], ["the weights"]),
        ({}, ["trainer_state.json"], ["a whole trainer_state.json"]),
        ({}, ["trainer_state.json", "optimizer.pt"], ["the state of the optimizer", "a whole trainer_state.json"]),
    ],
)
def test_what_a_checkpoint_lacks(make_trainer, options, removed, missing):
    trainer = make_trainer(save_strategy="steps", save_steps=1, max_steps=1, **options)
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-1"
    for name in removed:
        (checkpoint / name).unlink()
    assert missing_parts(checkpoint) == missing
    assert (last_complete_checkpoint(checkpoint.parent) == checkpoint) == (not missing)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"bf16": True}])
def test_memory_savers(make_trainer, options):
    plain, saving = make_trainer(backbone=VIT), make_trainer(backbone=VIT, **options)
    for trainer in (plain, saving):
        trainer.train()
    tolerance = 0.05 if "bf16" in options else 1e-4
    torch.testing.assert_close(losses_of(saving), losses_of(plain), atol=tolerance, rtol=tolerance)


@pytest.mark.slow
def test_torch_compile(make_trainer):
    plain, compiled = make_trainer(), make_trainer(torch_compile=True, torch_compile_backend="aot_eager")
    for trainer in (plain, compiled):
        trainer.train()
    torch.testing.assert_close(losses_of(compiled), losses_of(plain), atol=1e-3, rtol=1e-3)
