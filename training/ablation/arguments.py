# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Arguments of an ablation."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import TrainingArguments

from modeling_rbi import RBIConfig, UserError

from ..cli import default_output_dir, find_recipes, parse_arguments
from ..data.arguments import DataArguments
from ..data.transforms import AugmentationArguments
from ..fine_tuning.arguments import DEFAULTS, Arguments, FineTuningArguments, RunArguments
from ..fine_tuning.models import ModelArguments
from ..record import resolved_arguments, without_secrets
from .arms import ARMS, Arm, choose_arms


@dataclass
class AblationOptions:
    """What an ablation has beside the arguments of a training."""

    arms: list[str] | None = field(
        default=None,
        metadata={"help": f"Arms to run, with their controls ({', '.join(ARMS)}); all of them by default."},
    )
    num_seeds: int = field(default=5, metadata={"help": "Number of seeds, from --seed on. At least 2."})
    num_unlabeled: int = field(
        default=0,
        metadata={
            "help": "Images of the bank beside those of the training, drawn without their labels from those that "
            "the recipe leaves unused or, where it leaves none, from the test, which is then without them."
        },
    )
    num_shuffles: int = field(default=5, metadata={"help": "Random orders of the test images. At least 2."})
    frozen_steps: int = field(default=100, metadata={"help": "With --freeze_backbone: training steps of each head."})
    frozen_learning_rate: float = field(
        default=1e-3, metadata={"help": "With --freeze_backbone: learning rate of the classifier."}
    )
    frozen_head_learning_rate: float = field(
        default=1e-4, metadata={"help": "With --freeze_backbone: learning rate of RRA, and of BatchFormer's encoder."}
    )

    def __post_init__(self):
        for name, least in (("num_seeds", 2), ("num_shuffles", 2), ("num_unlabeled", 0), ("frozen_steps", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be at least {least}, got {getattr(self, name)}.")
        choose_arms(self.arms)


@dataclass
class AblationArguments(Arguments):
    """All arguments of an ablation."""

    options: AblationOptions

    @classmethod
    def parse(cls, argv: Sequence[str]) -> "AblationArguments":
        """See [`parse_arguments`]."""
        types = (
            ModelArguments,
            DataArguments,
            AugmentationArguments,
            FineTuningArguments,
            RunArguments,
            TrainingArguments,
            AblationOptions,
        )
        output_dir = Path("outputs", "ablation", Path(default_output_dir(find_recipes(argv))).name)
        *parsed, options, recipes = parse_arguments(
            argv, types, DEFAULTS | {"output_dir": str(output_dir)}, description=__doc__
        )
        return cls(*parsed, recipes=recipes, argv=list(argv), options=options)  # type: ignore[misc]

    def check(self):
        r"""
        Sees to it that an ablation can be made with these, before any work is done.

        Raises:
            UserError: for arguments of a training that an ablation cannot have, and such as do not go together.
        """
        refused = {
            "--num_folds": self.run.num_folds is not None,
            "--dry_run": self.run.dry_run,
            "--push_to_hub": self.training.push_to_hub,
            "--resume_from_checkpoint": self.training.resume_from_checkpoint is not None,
            "--relation_batch_size": self.fine_tuning.relation_batch_size is not None,
            "--gather_across_processes": self.fine_tuning.gather_across_processes,
            "--train_relation_scope": self.fine_tuning.train_relation_scope != "batch",
            "--self_loss_weight": self.fine_tuning.self_loss_weight != 0,
            "--unlabeled_dir": self.fine_tuning.unlabeled_dir is not None,
            "--references_per_class": self.fine_tuning.references_per_class is not None,
            "--lora_rank": self.fine_tuning.lora_rank is not None,
            "--data_seed": self.training.data_seed is not None,
        }
        if names := [name for name, is_given in refused.items() if is_given]:
            raise UserError(
                f"{' and '.join(names)} cannot be used in an ablation: leave it out. (The arms say who attends to "
                "whom, in neighborhoods of a batch, and a rerun of the same command goes on with what is there.)"
            )
        if self.training.world_size > 1:
            raise UserError("An ablation runs in one process: start it with `python -m training.ablate`.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self.training, name) < 2:
                raise UserError(f"--{name} must be at least 2 for relations, got {getattr(self.training, name)}.")
        if self.is_frozen and self.training.max_steps > 0:
            raise UserError("--max_steps is of training end to end: with --freeze_backbone give --frozen_steps.")
        if not self.is_frozen and any(arm.train_scope == "reference" for arm in self.arms):
            if self.fine_tuning.ema_decay is not None:
                raise UserError("--ema_decay averages the backbone, but a bank is of one: leave it out.")
            if self.augmentation.mixes:
                raise UserError(
                    "Arms that are trained through the bank would find the originals of mixed images there: leave "
                    "--mixup_alpha and --cutmix_alpha out, or these arms."
                )
        for arm in self.arms:
            try:
                getattr(RBIConfig, arm.preset)(**self.model.rbi_fields | arm.rbi_fields)
            except StrictDataclassError as error:
                raise UserError(f"--rbi_config does not go with the arm {arm.name}: {error.__cause__}") from error

    @property
    def arms(self) -> list[Arm]:
        """Those to run."""
        return choose_arms(self.options.arms)

    @property
    def is_frozen(self) -> bool:
        """Whether heads are trained on cached features."""
        return self.fine_tuning.freeze_backbone

    @property
    def seeds(self) -> list[int]:
        """Of the draws, starts and orders."""
        return [self.training.seed + number for number in range(self.options.num_seeds)]

    @property
    def command(self) -> str:
        """The command line, to run it again, without tokens."""
        return shlex.join(["python", "-m", "training.ablate", *without_secrets(self.argv)])

    @property
    def resume_command(self) -> str:
        """The same: what is there is kept."""
        return self.command

    def resolved(self) -> dict[str, Any]:
        """For the record."""
        return resolved_arguments(super().resolved(), self.options)

    def of_run(self, arm: Arm, seed: int, output_dir: Path) -> "AblationArguments":
        """Those of one training end to end."""
        scope = "self" if arm.train_scope == "self" else "batch"
        return dataclasses.replace(
            self,
            model=dataclasses.replace(
                self.model, preset=arm.preset, rbi_config=json.dumps(self.model.rbi_fields | arm.rbi_fields)
            ),
            fine_tuning=dataclasses.replace(
                self.fine_tuning, train_relation_scope=scope, self_loss_weight=arm.self_loss_weight
            ),
            training=dataclasses.replace(self.training, output_dir=str(output_dir), seed=seed),
        )
