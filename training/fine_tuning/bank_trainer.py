# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`RBITrainer` with a reference bank in place of the batch."""

from functools import partial
from typing import Any

import datasets
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_callback import TrainerControl, TrainerState

from modeling_rbi import MAX_REFERENCES, NO_LABEL, UserError

from ..data.image_dataset import Collator, ImageDataset
from ..data.transforms import EvalTransform
from ..evaluation.features import extract
from .arguments import FineTuningArguments
from .trainer import RBITrainer


class BankTrainer(RBITrainer):
    r"""
    `RBITrainer` in which images attend to a reference bank of all training images, except themselves, and of unlabeled
    images. The features of the bank are computed without augmentation, before each epoch and each evaluation.

    Args:
        unlabeled (`datasets.Dataset`, *optional*):
            Additional references. Their labels are not used.
        train_dataset (`ImageDataset`), processing_class (`BaseImageProcessor`), kwargs:
            As for `RBITrainer`.

    Raises:
        UserError: if the bank would be too large, or an option cannot be used with a bank.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        unlabeled: datasets.Dataset | None = None,
        train_dataset: ImageDataset,
        processing_class: BaseImageProcessor,
        data_collator: Collator | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        size = len(train_dataset) + (0 if unlabeled is None else len(unlabeled))
        if size > MAX_REFERENCES:
            raise UserError(
                f"A bank of all {size} training and unlabeled images is larger than a model's bank can be "
                f"({MAX_REFERENCES}): leave --train_relation_scope reference out, and add --references_per_class."
            )
        fine_tuning = kwargs.get("fine_tuning") or FineTuningArguments()
        refused = {
            "several processes": args.world_size > 1,
            "--mixup_alpha or --cutmix_alpha": data_collator is not None and data_collator.mixing is not None,
            "--ema_decay": fine_tuning.ema_decay is not None,
            "--lora_rank": fine_tuning.lora_rank is not None,
            "--crop_to_boxes with unlabeled images, which have no boxes": train_dataset.crop_to_boxes
            and unlabeled is not None,
        }
        if names := [name for name, is_given in refused.items() if is_given]:
            raise UserError(
                f"--train_relation_scope reference cannot be used with {' and '.join(names)}: leave it out."
            )
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=_RowCollator(data_collator or Collator()),  # type: ignore[arg-type]
            callbacks=[*(callbacks or []), _BankCallback(self)],
            **kwargs,
        )
        columns = ["image", "label", *(["box"] if train_dataset.crop_to_boxes else [])]
        splits = [
            split.select_columns(columns).cast_column("label", datasets.Value("int64"))
            for split in (train_dataset.split, unlabeled)
            if split is not None
        ]
        self.num_labeled = len(train_dataset)
        self.references = ImageDataset(
            datasets.concatenate_datasets(splits),
            EvalTransform(processing_class),
            crop_to_boxes=train_dataset.crop_to_boxes,
            max_pixels=train_dataset.max_pixels,
        )
        self._step_of_bank = -1
        self.take_references()

    def take_references(self, is_stale: bool = False):
        """Computes the bank again if the backbone has been trained since, or if `is_stale`."""
        if self._step_of_bank == self.state.global_step and not is_stale:
            return
        model, scope = self.model, self.model.config.relation_scope
        is_training, had_references = model.training, model.config.references is not None
        taken = extract(model, self.references, self.args.per_device_eval_batch_size, self.args.device, progress=False)
        if not taken.features.isfinite().all():
            raise self.diverged(f"features of the bank after step {self.state.global_step} are not finite")
        labels = taken.labels.index_fill(0, torch.arange(self.num_labeled, len(taken.labels)), NO_LABEL)
        model.set_reference_features(taken.features, taken.pixel_values[:], labels)
        if had_references:  # an evaluation may have set another scope
            model.config.relation_scope = scope
        model.train(is_training)
        self._step_of_bank = self.state.global_step

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Forward and backward of one batch, whose images attend to the bank."""
        # The training images are the first references; no image attends to itself.
        mask = inputs["rows"][:, None] != torch.arange(len(self.references))
        more = {"relation_scope": "reference", "reference_mask": mask.to(self.args.device)}
        handle = model.register_forward_pre_hook(partial(_with_arguments, more=more), with_kwargs=True)
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            handle.remove()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`."""
        self.take_references()
        return super().evaluate(*args, **kwargs)


class _BankCallback(TrainerCallback):
    def __init__(self, trainer: BankTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        # Resumed within an epoch, the model has the bank of its checkpoint.
        if float(state.epoch or 0).is_integer():
            self.trainer.take_references()


class _RowCollator:
    """Adds `rows`, (B,), the row numbers of the training images, to a batch."""

    def __init__(self, collator: Collator):
        self.collator = collator

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.collator(items)
        if "draw" in items[0]:
            batch["rows"] = torch.tensor([item["draw"].row for item in items])
        return batch


def _with_arguments(module: nn.Module, args: tuple, kwargs: dict, more: dict) -> tuple[tuple, dict]:
    return args, kwargs | more


__all__ = ["BankTrainer"]
