# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Heads trained on cached features of a frozen backbone, each with the same budget."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from modeling_rbi import RBIConfig, RBIForImageClassification, RBIImageClassifierOutput

from ..data.samplers import BalancedSampler
from ..evaluation.classifiers import predict_from
from ..evaluation.features import CachedImages
from ..evaluation.protocols import Predict
from ..fine_tuning.divergence import DivergedError
from ..fine_tuning.loss import count_targets, training_loss


FROZEN_ADVICE = "lower --frozen_learning_rate or --frozen_head_learning_rate"


@dataclass(frozen=True)
class Budget:
    """Training options that all heads share. The optimizer is AdamW, with a cosine schedule to 0."""

    steps: int = 100
    batch_size: int = 40
    learning_rate: float = 1e-3  # of the classifier
    head_learning_rate: float = 1e-4  # of RRA
    weight_decay: float = 0.01
    images_per_class: int | None = None  # K of class-balanced P x K batches; None: random batches
    class_weights: torch.Tensor | None = None  # (num_labels,), weights of the loss
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class TrainedHead:
    """A head, its number of trained parameters and the seconds that the training took."""

    model: nn.Module
    predict: Predict
    num_parameters: int
    seconds: float


def train_plain(images: CachedImages, rows: torch.Tensor, num_labels: int, budget: Budget, seed: int) -> TrainedHead:
    """Trains a linear classifier on the features. Its predictions ignore the relation scope."""
    torch.manual_seed(seed)
    model = nn.Linear(images.features.shape[1], num_labels)
    seconds = _train(
        [{"params": model.parameters(), "lr": budget.learning_rate}],
        lambda batch: _loss(
            RBIImageClassifierOutput(logits=model(images.features[batch])), images.labels[batch], budget
        ),
        images,
        rows,
        budget,
        seed,
    )
    return TrainedHead(
        model, lambda batch, relation_scope: model(images.features[batch]).detach(), _count(model), seconds
    )


def train_head(
    images: CachedImages,
    rows: torch.Tensor,
    config: RBIConfig,
    budget: Budget,
    seed: int,
    relation_scope: str = "batch",
    *,
    bank: torch.Tensor | None = None,
    trains_attention: bool = True,
    self_loss_weight: float = 0.0,
    model_class: Callable[[RBIConfig], RBIForImageClassification] = RBIForImageClassification,
) -> TrainedHead:
    r"""
    Trains RRA and the classifier of an RBI model.

    Args:
        images (`CachedImages`):
            Images of the data set.
        rows (`torch.LongTensor` of shape `(n,)`):
            Row numbers of the training images.
        config (`RBIConfig`):
            Config of the model, with its `feature_size`. It is not changed.
        budget (`Budget`):
            Steps, batch size and learning rates.
        seed (`int`):
            Seed of the initialization and of the batch order.
        relation_scope (`str`, *optional*, defaults to `"batch"`):
            Scope in training. `"self"`: no relations, in evaluation neither. `"reference"`: each image attends to
            the whole bank except itself.
        bank (`torch.LongTensor` of shape `(N,)`, *optional*):
            Row numbers of the references. Unlabeled ones have the label -100.
        trains_attention (`bool`, *optional*, defaults to `True`):
            Whether RRA is trained. `False`: only the classifier is.
        self_loss_weight (`float`, *optional*, defaults to 0.0):
            Share of the loss that is computed without neighbors, at least 0 and less than 1.
        model_class (`Callable`, *optional*):
            Builds the model from the config.
    """
    torch.manual_seed(seed)
    model = model_class(copy.deepcopy(config)).train()
    model.rbi.self_loss_weight = self_loss_weight
    model.rbi.backbone.requires_grad_(False)
    model.rbi.rra.requires_grad_(trains_attention)
    _set_bank(model, images, bank)
    classifier = list(model.classifier.parameters())
    others = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith("classifier.")
    ]
    groups = [
        {"params": classifier, "lr": budget.learning_rate},
        {"params": others, "lr": budget.head_learning_rate},
    ]

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        outputs = model(
            pixel_values=images.pixel_values[batch],
            image_features=images.features[batch],
            relation_scope=relation_scope,
            reference_mask=batch[:, None] != bank if relation_scope == "reference" else None,
        )
        return _loss(outputs, images.labels[batch], budget, self_loss_weight)

    seconds = _train([group for group in groups if group["params"]], loss_of, images, rows, budget, seed)
    only_scope = "self" if relation_scope == "self" else None
    predict = predict_from(model, images, exclude_self=False, only_scope=only_scope)
    num_parameters = sum(parameter.numel() for parameter in [*classifier, *others])
    return TrainedHead(model.eval(), predict, num_parameters, seconds)


def untrained_head(
    images: CachedImages, classifier: TrainedHead, config: RBIConfig, bank: torch.Tensor | None = None
) -> TrainedHead:
    """Puts an untrained head, which starts as identity, before a trained plain classifier."""
    model = RBIForImageClassification(copy.deepcopy(config)).eval()
    model.classifier.load_state_dict(getattr(classifier.model, "classifier", classifier.model).state_dict())
    _set_bank(model, images, bank)
    num_parameters = _count(model.rbi.rra) + _count(model.classifier)
    return TrainedHead(model, predict_from(model, images, exclude_self=False), num_parameters, classifier.seconds)


def _set_bank(model: RBIForImageClassification, images: CachedImages, bank: torch.Tensor | None):
    if bank is not None:
        model.set_reference_features(images.features[bank], images.pixel_values[bank], images.labels[bank])


def _loss(
    outputs: RBIImageClassifierOutput, labels: torch.Tensor, budget: Budget, self_loss_weight: float = 0.0
) -> torch.Tensor:
    # BatchFormer predicts each image twice.
    batch = {"labels": labels.repeat(len(outputs.logits) // len(labels))}
    num_targets = count_targets(batch, budget.class_weights)
    return training_loss(outputs, batch, num_targets, self_loss_weight, budget.class_weights, budget.label_smoothing)


def _train(parameter_groups, loss_of, images: CachedImages, rows: torch.Tensor, budget: Budget, seed: int) -> float:
    optimizer = torch.optim.AdamW(parameter_groups, weight_decay=budget.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)
    batches = random_batches(rows, budget.batch_size, seed)
    if budget.images_per_class is not None:
        batches = _balanced_batches(rows, images.labels[rows], budget.batch_size, budget.images_per_class, seed)
    start = time.perf_counter()
    for step in range(1, budget.steps + 1):
        optimizer.zero_grad()
        loss = loss_of(next(batches))
        if not loss.isfinite():
            raise DivergedError(f"the loss of a head at step {step} is {loss.item()}", FROZEN_ADVICE)
        loss.backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


def random_batches(rows: torch.Tensor, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches: each image once per epoch, in batches whose sizes differ by at most one."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = rows[torch.randperm(len(rows), generator=generator)]
        yield from reversed(order.tensor_split(max(1, round(len(rows) / batch_size))))


def _balanced_batches(
    rows: torch.Tensor, labels: torch.Tensor, batch_size: int, images_per_class: int, seed: int
) -> Iterator[torch.Tensor]:
    sampler = BalancedSampler(labels.tolist(), batch_size, images_per_class=images_per_class, seed=seed)
    while True:
        for draws in sampler:
            yield rows[[draw.row for draw in draws]]
        sampler.set_epoch(sampler.epoch + 1)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
