# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Training and comparing heads on cached features of a frozen backbone, the same budget for each."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from modeling_rbi import RBIConfig, RBIForImageClassification

from ..data.samplers import BalancedSampler
from ..evaluation.features import CachedImages
from ..evaluation.protocols import Predict


@dataclass(frozen=True)
class Budget:
    """What every head is trained with: AdamW, cosine schedule to 0."""

    steps: int = 100
    batch_size: int = 40
    learning_rate: float = 1e-3  # of the classifier
    head_learning_rate: float = 1e-4  # of the attention
    weight_decay: float = 0.01
    images_per_class: int | None = None  # K of P x K batches, in which classes come equally often; None: random ones
    class_weights: torch.Tensor | None = None  # (num_labels,), of the loss
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class TrainedHead:
    """A trained head, the number of its parameters and the seconds that training took."""

    model: nn.Module
    predict: Predict
    num_parameters: int
    seconds: float


def train_plain(images: CachedImages, rows: torch.Tensor, num_labels: int, budget: Budget, seed: int) -> TrainedHead:
    """The control `plain`: a linear classifier on the features. Relation scopes mean nothing to it."""
    torch.manual_seed(seed)
    model = nn.Linear(images.features.shape[1], num_labels)
    seconds = _train(
        [{"params": model.parameters(), "lr": budget.learning_rate}],
        lambda batch: _loss(model(images.features[batch]), images.labels[batch], budget),
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
            The data set.
        rows (`torch.LongTensor` of shape `(n,)`):
            Row numbers of the training images.
        config (`RBIConfig`):
            Of the model, with its `feature_size`.
        budget (`Budget`):
            Steps, batch size and rates.
        seed (`int`):
            Of the start and of the order.
        relation_scope (`str`, *optional*, defaults to `"batch"`):
            `"self"` is the control of the same name: the same parameters, in training and evaluation no relations.
            `"reference"`: images attend to the bank, each to all of it but itself.
        bank (`torch.LongTensor` of shape `(N,)`, *optional*):
            Row numbers of the references, -100 being the label of those without one.
        trains_attention (`bool`, *optional*, defaults to `True`):
            `False`: RRA stays as it starts, and the classifier alone is trained.
        self_loss_weight (`float`, *optional*, defaults to 0.0):
            Share of the loss that is computed without neighbors.
        model_class (`Callable`, *optional*):
            Makes the model of the config.
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
        labels = images.labels[batch]
        outputs = model(
            pixel_values=images.pixel_values[batch],
            image_features=images.features[batch],
            relation_scope=relation_scope,
            reference_mask=batch[:, None] != bank if relation_scope == "reference" else None,
        )
        loss = _loss(outputs.logits, labels, budget)
        if outputs.self_logits is not None:
            loss = torch.lerp(loss, _loss(outputs.self_logits, labels, budget), self_loss_weight)
        return loss

    seconds = _train(
        [group for group in groups if group["params"]],
        loss_of,
        images,
        rows,
        budget,
        seed,
    )
    predict = predict_with(model, images, only_scope="self" if relation_scope == "self" else None)
    num_parameters = sum(parameter.numel() for parameter in [*classifier, *others])
    return TrainedHead(model.eval(), predict, num_parameters, seconds)


def untrained_head(
    images: CachedImages, classifier: TrainedHead, config: RBIConfig, bank: torch.Tensor | None = None
) -> TrainedHead:
    """Puts a head that starts as identity before a trained plain classifier, and trains nothing."""
    model = RBIForImageClassification(copy.deepcopy(config)).eval()
    model.classifier.load_state_dict(getattr(classifier.model, "classifier", classifier.model).state_dict())
    _set_bank(model, images, bank)
    return TrainedHead(
        model, predict_with(model, images), _count(model.rbi.rra) + _count(model.classifier), classifier.seconds
    )


def predict_with(model: RBIForImageClassification, images: CachedImages, only_scope: str | None = None) -> Predict:
    """Logits of rows of the cached images; `only_scope` overrides the scope that is asked for."""

    @torch.no_grad()
    def predict(batch: torch.Tensor, relation_scope: str) -> torch.Tensor:
        return model(
            pixel_values=images.pixel_values[batch],
            image_features=images.features[batch],
            relation_scope=only_scope or relation_scope,
        ).logits

    return predict


def _set_bank(model: RBIForImageClassification, images: CachedImages, bank: torch.Tensor | None):
    if bank is not None:
        model.set_reference_features(images.features[bank], images.pixel_values[bank], images.labels[bank])


def _loss(logits: torch.Tensor, labels: torch.Tensor, budget: Budget) -> torch.Tensor:
    """Cross entropy of a batch; the labels are repeated for heads that answer more than once."""
    return nn.functional.cross_entropy(
        logits,
        labels.repeat(len(logits) // len(labels)),
        weight=budget.class_weights,
        label_smoothing=budget.label_smoothing,
    )


def _train(parameter_groups, loss_of, images: CachedImages, rows: torch.Tensor, budget: Budget, seed: int) -> float:
    optimizer = torch.optim.AdamW(parameter_groups, weight_decay=budget.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)
    batches = _random_batches(rows, budget.batch_size, seed)
    if budget.images_per_class is not None:
        batches = _balanced_batches(rows, images.labels[rows], budget.batch_size, budget.images_per_class, seed)
    start = time.perf_counter()
    for _ in range(budget.steps):
        optimizer.zero_grad()
        loss_of(next(batches)).backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


def _random_batches(rows: torch.Tensor, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Epoch after epoch, each image once, in batches of equal size, give or take one."""
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
