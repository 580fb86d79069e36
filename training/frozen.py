# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Training and comparing heads on cached features of a frozen backbone, the same budget for each."""

import copy
import time
from dataclasses import dataclass

import torch
from torch import nn

from modeling_rbi import RBIConfig, RBIForImageClassification, RBIModel

from .protocols import Predict


@dataclass(frozen=True)
class CachedPictures:
    """Pictures of a data set with their features, row by row."""

    pixel_values: torch.Tensor  # (n, num_channels, height, width), as the image processor gives them
    features: torch.Tensor  # (n, feature_size)
    labels: torch.Tensor  # (n,)

    @classmethod
    def from_backbone(cls, model: RBIModel, pixel_values: torch.Tensor, labels: torch.Tensor, batch_size: int = 50):
        """Runs the backbone once over all pictures."""
        with torch.no_grad():
            features = [model.extract_features(batch)[0] for batch in pixel_values.split(batch_size)]
        return cls(pixel_values, torch.cat(features), labels)


@dataclass(frozen=True)
class Budget:
    """What every head is trained with: AdamW, cosine schedule to 0."""

    steps: int = 100
    batch_size: int = 40
    learning_rate: float = 1e-3  # of the classifier
    head_learning_rate: float = 1e-4  # of the attention
    weight_decay: float = 0.01


@dataclass(frozen=True)
class TrainedHead:
    """A trained head, the number of its parameters and the seconds that training took."""

    model: nn.Module
    predict: Predict
    num_parameters: int
    seconds: float


def train_plain(
    pictures: CachedPictures, rows: torch.Tensor, num_labels: int, budget: Budget, seed: int
) -> TrainedHead:
    """The control `plain`: a linear classifier on the features. Relation scopes mean nothing to it."""
    torch.manual_seed(seed)
    model = nn.Linear(pictures.features.shape[1], num_labels)
    seconds = _train(
        [{"params": model.parameters(), "lr": budget.learning_rate}],
        lambda batch: nn.functional.cross_entropy(model(pictures.features[batch]), pictures.labels[batch]),
        rows,
        budget,
        seed,
    )
    return TrainedHead(
        model, lambda batch, relation_scope: model(pictures.features[batch]).detach(), _count(model), seconds
    )


def train_head(
    pictures: CachedPictures,
    rows: torch.Tensor,
    config: RBIConfig,
    budget: Budget,
    seed: int,
    relation_scope: str = "batch",
) -> TrainedHead:
    r"""
    Trains RRA and the classifier of an RBI model.

    Args:
        pictures (`CachedPictures`):
            The data set.
        rows (`torch.LongTensor` of shape `(n,)`):
            Row numbers of the training pictures.
        config (`RBIConfig`):
            Of the model, with its `feature_size`.
        budget (`Budget`):
            Steps, batch size and rates.
        seed (`int`):
            Of the start and of the order.
        relation_scope (`str`, *optional*, defaults to `"batch"`):
            `"self"` is the control of the same name: the same parameters, in training and evaluation no relations.
    """
    torch.manual_seed(seed)
    model = RBIForImageClassification(copy.deepcopy(config)).train()
    seconds = _train(
        [
            {"params": model.classifier.parameters(), "lr": budget.learning_rate},
            {"params": model.rbi.rra.parameters(), "lr": budget.head_learning_rate},
        ],
        lambda batch: model(
            pixel_values=pictures.pixel_values[batch],
            image_features=pictures.features[batch],
            labels=pictures.labels[batch],
            relation_scope=relation_scope,
        ).loss,
        rows,
        budget,
        seed,
    )
    predict = predict_with(model, pictures, only_scope="self" if relation_scope == "self" else None)
    return TrainedHead(model.eval(), predict, _count(model.rbi.rra) + _count(model.classifier), seconds)


def untrained_head(pictures: CachedPictures, classifier: TrainedHead, config: RBIConfig) -> TrainedHead:
    """Puts a head that starts as identity before a trained plain classifier, and trains nothing."""
    model = RBIForImageClassification(copy.deepcopy(config)).eval()
    model.classifier.load_state_dict(classifier.model.state_dict())
    return TrainedHead(
        model, predict_with(model, pictures), _count(model.rbi.rra) + _count(model.classifier), classifier.seconds
    )


def predict_with(model: RBIForImageClassification, pictures: CachedPictures, only_scope: str | None = None) -> Predict:
    """Logits of rows of the cached pictures; `only_scope` overrides the scope that is asked for."""

    @torch.no_grad()
    def predict(batch: torch.Tensor, relation_scope: str) -> torch.Tensor:
        return model(
            pixel_values=pictures.pixel_values[batch],
            image_features=pictures.features[batch],
            relation_scope=only_scope or relation_scope,
        ).logits

    return predict


def _train(parameter_groups, loss_of, rows: torch.Tensor, budget: Budget, seed: int) -> float:
    optimizer = torch.optim.AdamW(parameter_groups, weight_decay=budget.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    batches: list[torch.Tensor] = []
    for _ in range(budget.steps):
        if not batches:
            order = rows[torch.randperm(len(rows), generator=generator)]
            batches = list(order.tensor_split(max(1, round(len(rows) / budget.batch_size))))
        optimizer.zero_grad()
        loss_of(batches.pop()).backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
