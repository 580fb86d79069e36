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

from modeling_rbi import RBIConfig, UserError

from ..cli import default_output_dir, find_recipes, parse_arguments
from ..fine_tuning.arguments import DEFAULTS, Arguments
from ..record import resolved_arguments, without_secrets
from .arms import ARMS, Arm, choose_arms


@dataclass
class AblationOptions:
    """Arguments that an ablation has beyond the arguments of a training."""

    arms: list[str] | None = field(
        default=None,
        metadata={"help": f"Arms to run; their controls are added ({', '.join(ARMS)}). By default all."},
    )
    num_seeds: int = field(default=5, metadata={"help": "Number of seeds, counted up from --seed. At least 2."})
    num_unlabeled: int = field(
        default=0,
        metadata={
            "help": "Number of unlabeled images in the bank in addition to the training images. They are drawn from "
            "the images that the recipe leaves unused or, if there are none, taken out of the test images."
        },
    )
    num_shuffles: int = field(default=5, metadata={"help": "Number of random orders of the test images. At least 2."})
    frozen_steps: int = field(default=100, metadata={"help": "With --freeze_backbone: training steps of each head."})
    frozen_learning_rate: float = field(
        default=1e-3, metadata={"help": "With --freeze_backbone: learning rate of the classifier."}
    )
    frozen_head_learning_rate: float = field(
        default=1e-4, metadata={"help": "With --freeze_backbone: learning rate of RRA and of BatchFormer's encoder."}
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
    def parse(cls, argv: Sequence[str], description: str | None = None) -> "AblationArguments":
        """Parses a command line, see [`parse_arguments`]."""
        types = (*cls.TYPES, AblationOptions)
        output_dir = Path("outputs", "ablation", Path(default_output_dir(find_recipes(argv))).name)
        defaults = DEFAULTS | {"output_dir": str(output_dir)}
        *parsed, options, recipes = parse_arguments(argv, types, defaults, description)
        return cls(*parsed, recipes=recipes, argv=list(argv), options=options)  # type: ignore[misc]

    def check(self):
        r"""
        Checks the arguments before any work is done.

        Raises:
            UserError: for an argument of a training that an ablation does not support, or for arguments that exclude
                each other.
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
                f"{' and '.join(names)} cannot be used in an ablation: leave it out. (The arms set the relations, "
                "within a batch or with a bank, and a rerun of the same command keeps what is finished.)"
            )
        if self.training.world_size > 1:
            raise UserError("An ablation runs in one process: start it with `python -m training.ablate`.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self.training, name) < 2:
                raise UserError(f"--{name} must be at least 2 for relations, got {getattr(self.training, name)}.")
        if self.is_frozen and self.training.max_steps > 0:
            raise UserError("--max_steps is for training end to end: with --freeze_backbone give --frozen_steps.")
        if not self.is_frozen and any(arm.train_scope == "reference" for arm in self.arms):
            if self.fine_tuning.ema_decay is not None:
                raise UserError(
                    "--ema_decay averages the backbone, but a bank is valid for one backbone: leave it out."
                )
            if self.augmentation.mixes:
                raise UserError(
                    "Arms that are trained through the bank would find the originals of mixed images in it: leave "
                    "out --mixup_alpha and --cutmix_alpha, or these arms."
                )
        for arm in self.arms:
            try:
                arm.config(RBIConfig(), **self.model.rbi_fields)
            except StrictDataclassError as error:
                raise UserError(f"--rbi_config does not fit the arm {arm.name}: {error.__cause__}") from error

    @property
    def arms(self) -> list[Arm]:
        """Arms to run."""
        return choose_arms(self.options.arms)

    @property
    def is_frozen(self) -> bool:
        """Whether heads are trained on cached features."""
        return self.fine_tuning.freeze_backbone

    @property
    def seeds(self) -> list[int]:
        """Seeds of the splits, initializations and batch orders."""
        return [self.training.seed + number for number in range(self.options.num_seeds)]

    @property
    def command(self) -> str:
        """The command line that repeats this ablation, without tokens."""
        return shlex.join(["python", "-m", "training.ablate", *without_secrets(self.argv)])

    @property
    def resume_command(self) -> str:
        """The same command line: a rerun keeps what is finished."""
        return self.command

    def resolved(self) -> dict[str, Any]:
        """All arguments, for the record."""
        return resolved_arguments(super().resolved(), self.options)

    def of_run(self, arm: Arm, seed: int, output_dir: Path) -> "AblationArguments":
        """Arguments of the end-to-end training of one arm with one seed."""
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
