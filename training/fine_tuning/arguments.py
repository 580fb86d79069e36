# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Arguments of a fine-tuning run."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy, IntervalStrategy

from modeling_rbi import UserError

from ..cli import ArgumentError, default_output_dir, find_recipes, parse_arguments
from ..data.arguments import DataArguments
from ..data.transforms import AugmentationArguments
from ..record import resolved_arguments, without_secrets
from .models import ModelArguments
from .optimization import OPTIMIZERS
from .training_arguments import check_training_arguments


# Validate and save a checkpoint after each epoch, and keep the best model. `TrainingArguments` has other defaults.
DEFAULTS = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "logging_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "save_total_limit": 2,
    "remove_unused_columns": False,
    "report_to": "none",
    "hub_strategy": "end",
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
}


@dataclass
class RunArguments:
    """What to do besides a single training."""

    num_folds: int | None = field(
        default=None,
        metadata={
            "help": "Cross-validate: split the training data into this many folds, and train one model per fold, "
            "validated on that fold and trained on the others."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Build everything and train one step on a few made-up images in the published layout of the data "
            "set. Downloads and keeps nothing."
        },
    )

    def __post_init__(self):
        if self.num_folds is not None and self.num_folds < 2:
            raise UserError(f"--num_folds must be at least 2, got {self.num_folds}.")


@dataclass
class FineTuningArguments:
    """Options of the training that `TrainingArguments` does not have."""

    train_relation_scope: str = field(
        default="batch",
        metadata={
            "help": "What an image attends to in training: batch; reference, a bank of the training images and the "
            "images of --unlabeled_dir, computed again each epoch; or self, the control without relations.",
            "choices": ["batch", "reference", "self"],
        },
    )
    self_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "Share of the loss, in [0, 1), that is computed without neighbors, from the same features and "
            "with the same classifier."
        },
    )
    unlabeled_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of unlabeled images, searched recursively. They are neighbors in training batches and "
            "have no loss."
        },
    )
    unlabeled_per_batch: int = field(
        default=32,
        metadata={"help": "Images of --unlabeled_dir per batch and device, besides the labeled ones."},
    )
    references_per_class: int | None = field(
        default=None,
        metadata={
            "help": "Give the trained model a reference bank of this many training images per class. Their "
            "thumbnails are saved with the model."
        },
    )
    num_references: int | None = field(
        default=None,
        metadata={"help": "Put this many images of --unlabeled_dir, drawn at random, into the reference bank."},
    )
    relation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of images that attend to each other. Default: the batch of a device, or of all devices "
            "with --gather_across_processes. A smaller number splits the batch. A larger one must be a multiple of "
            "the batch and fit into the accumulated batch; each step then takes two passes, without more memory."
        },
    )
    gather_across_processes: bool = field(
        default=False, metadata={"help": "Images attend to the batches of all processes (GPUs), not only of one."}
    )
    batch_sampler: str = field(
        default="shuffled",
        metadata={
            "help": "shuffled: each image once per epoch; balanced: each class equally often.",
            "choices": ["shuffled", "balanced"],
        },
    )
    images_per_class: int = field(
        default=1,
        metadata={"help": "With --batch_sampler balanced: images per class in a batch, the K of P x K sampling."},
    )
    class_weights: str | None = field(
        default=None,
        metadata={
            "help": "balanced: weight each class in the loss by the inverse of its number of training images.",
            "choices": ["balanced"],
        },
    )
    optimizer: str | None = field(
        default=None,
        metadata={
            "help": "radam (used by the authors) or sgd_nesterov (momentum 0.9); takes precedence over --optim.",
            "choices": sorted(OPTIMIZERS),
        },
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of RRA and the classifier. --learning_rate is then the backbone's only."},
    )
    layer_decay: float | None = field(
        default=None,
        metadata={
            "help": "Multiply the learning rate by this factor with each block from the backbone's last to first."
        },
    )
    freeze_backbone: bool = field(default=False, metadata={"help": "Train only RRA and the classifier."})
    freeze_batch_norm: bool = field(
        default=False,
        metadata={"help": "Keep the statistics of batch normalization: for few images or small batches."},
    )
    batch_norm_momentum: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the newest batch in the running statistics of batch normalization, such as 0.1. "
            "MobileNet and EfficientNet of transformers have TensorFlow's 0.99, which in PyTorch keeps little but "
            "the last batch."
        },
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": "Train the backbone through low-rank adapters of this rank (needs peft)."}
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Scale of the adapters; by default twice the rank."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Evaluate and save a moving average of the weights with this decay, such as 0.999."},
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations in a row without improvement."}
    )

    def __post_init__(self):
        for name in (
            "relation_batch_size",
            "images_per_class",
            "lora_rank",
            "early_stopping_patience",
            "unlabeled_per_batch",
            "references_per_class",
            "num_references",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}.")
        for name in ("layer_decay", "ema_decay", "batch_norm_momentum"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise UserError(f"--{name} must be between 0 and 1, got {value}.")
        if not 0 <= self.self_loss_weight < 1:
            raise UserError(f"--self_loss_weight must be at least 0 and less than 1, got {self.self_loss_weight}.")
        for_relations = ("relation_batch_size", "gather_across_processes", "self_loss_weight", "unlabeled_dir")
        if self.train_relation_scope == "self" and (
            chosen := [f"--{name}" for name in for_relations if getattr(self, name)]
        ):
            raise UserError(f"--train_relation_scope self trains without relations: leave {' and '.join(chosen)} out.")
        if self.train_relation_scope == "reference" and (self.relation_batch_size or self.gather_across_processes):
            raise UserError(
                "With --train_relation_scope reference, images attend to the bank instead of the batch: leave "
                "--relation_batch_size and --gather_across_processes out."
            )
        if self.num_references is not None and self.unlabeled_dir is None:
            raise UserError("--num_references needs --unlabeled_dir: it counts images of that folder.")
        if self.unlabeled_dir is not None and self.relation_batch_size is not None:
            raise UserError(
                "--relation_batch_size would separate the unlabeled images from the others: leave it out, or leave "
                "--unlabeled_dir out."
            )
        if self.lora_rank is not None and self.freeze_backbone:
            raise UserError("--lora_rank trains the backbone and --freeze_backbone does not: use one of them.")
        if self.freeze_batch_norm and self.batch_norm_momentum is not None:
            raise UserError("--freeze_batch_norm keeps the statistics: leave --batch_norm_momentum out.")
        if self.images_per_class > 1 and self.batch_sampler != "balanced":
            raise UserError("--images_per_class is for --batch_sampler balanced: add it.")
        if self.class_weights is not None and self.batch_sampler == "balanced":
            raise UserError(
                "--class_weights balanced and --batch_sampler balanced would balance twice: use one of them."
            )


@dataclass
class Arguments:
    """All arguments of a training."""

    model: ModelArguments
    data: DataArguments
    augmentation: AugmentationArguments
    fine_tuning: FineTuningArguments
    run: RunArguments
    training: TrainingArguments
    recipes: list[str]
    argv: list[str]

    # The dataclasses whose fields are the flags, in the order of the fields above.
    TYPES: ClassVar[tuple[type, ...]] = (
        ModelArguments,
        DataArguments,
        AugmentationArguments,
        FineTuningArguments,
        RunArguments,
        TrainingArguments,
    )

    @classmethod
    def parse(cls, argv: Sequence[str], description: str | None = None) -> "Arguments":
        """Parses a command line; see [`parse_arguments`]."""
        defaults = DEFAULTS | {"output_dir": default_output_dir(find_recipes(argv))}
        is_dry_without_gpu = "--dry_run" in argv and not torch.cuda.is_available()
        on_cpu = ["--bf16", "False", "--fp16", "False", "--use_cpu", "True"] if is_dry_without_gpu else []
        parsed = (*parse_arguments([*argv, *on_cpu], cls.TYPES, defaults, description), list(argv))
        return cls(*parsed)

    def __post_init__(self):
        check_training_arguments(self.training, has_own_optimizer=self.fine_tuning.optimizer is not None)
        if self.fine_tuning.early_stopping_patience is not None and self.training.eval_strategy == IntervalStrategy.NO:
            raise ArgumentError("--early_stopping_patience needs evaluations: set --eval_strategy epoch.")
        if self.training.push_to_hub and self.training.hub_strategy != HubStrategy.END:
            raise ArgumentError(
                f"--hub_strategy {self.training.hub_strategy.value} would publish checkpoints, which cannot be loaded "
                "without this package: leave it at `end`."
            )
        if self.training.push_to_hub and self.run.num_folds is not None:
            raise ArgumentError("--num_folds trains several models: publish one of them with training.publish.")

    @property
    def command(self) -> str:
        """The command line that runs this training again, without tokens."""
        launcher = ["accelerate", "launch"] if self.training.world_size > 1 else ["python"]
        return shlex.join([*launcher, "-m", "training.train", *without_secrets(self.argv)])

    @property
    def resume_command(self) -> str:
        """The command line that continues this run."""
        is_there = any(argument.startswith("--resume_from_checkpoint") for argument in self.argv)
        return self.command if is_there else f"{self.command} --resume_from_checkpoint last"

    def resolved(self) -> dict[str, Any]:
        """All arguments as the record keeps them."""
        return resolved_arguments(self.model, self.data, self.augmentation, self.fine_tuning, self.run, self.training)
