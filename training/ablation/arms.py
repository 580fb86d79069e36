# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The arms of an ablation: training and evaluation setups, each with a control that differs only in the relations."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from modeling_rbi import RBIConfig, UserError


@dataclass(frozen=True)
class Arm:
    r"""
    One training and evaluation setup.

    Args:
        name (`str`):
            Name on the command line and of the arm's folder.
        description (`str`):
            The setup in words.
        control (`str`, *optional*):
            The arm that differs from this one only in the relations.
        preset (`str`, *optional*, defaults to `"kernel"`):
            Preset of `RBIConfig`: `"paper"` or `"kernel"`.
        rbi_fields (`dict[str, Any]`, *optional*):
            Fields of `RBIConfig` that differ from the preset.
        train_scope (`str`, *optional*, defaults to `"self"`):
            Relation scope in training.
        self_loss_weight (`float`, *optional*, defaults to 0.0):
            Share of the training loss that is computed without neighbors, at least 0 and less than 1.
        scopes (`tuple[str, ...]`, *optional*, defaults to `("self",)`):
            Relation scopes in which the arm is compared with its control. `("self",)` means no relations.
        trains_attention (`bool`, *optional*, defaults to `True`):
            Whether RRA is trained. `False`: it keeps its initial weights.
        weights_of (`str`, *optional*):
            Arm from which this one takes the trained backbone and classifier. This arm itself is not trained.
        is_batchformer (`bool`, *optional*, defaults to `False`):
            Whether BatchFormer's encoder is added in training.
    """

    name: str
    description: str
    control: str | None = None
    preset: str = "kernel"
    rbi_fields: dict[str, Any] = field(default_factory=dict)
    train_scope: str = "self"
    self_loss_weight: float = 0.0
    scopes: tuple[str, ...] = ("self",)
    trains_attention: bool = True
    weights_of: str | None = None
    is_batchformer: bool = False

    @property
    def has_bank(self) -> bool:
        """Whether the arm is evaluated with a reference bank."""
        return "reference" in self.scopes

    @property
    def gives_weights(self) -> bool:
        """Whether another arm takes this arm's weights."""
        return any(arm.weights_of == self.name for arm in ARMS.values())

    @property
    def needs(self) -> set[str]:
        """Names of the arms without which this one can be neither trained nor compared."""
        return {name for name in (self.control, self.weights_of, "plain") if name is not None} - {self.name}

    def config(self, base: RBIConfig, **fields: Any) -> RBIConfig:
        r"""
        The config of this arm for the backbone and the classes of another config.

        Args:
            base (`RBIConfig`):
                Config whose backbone, pixel statistics and class names are taken.
            fields (`dict[str, Any]`, *optional*):
                Further fields of `RBIConfig`. The arm's own fields take precedence.
        """
        names = ("backbone_config", "feature_size", "pooling", "image_mean", "image_std", "id2label", "label2id")
        shared = {name: getattr(base, name) for name in names}
        return getattr(RBIConfig, self.preset)(**shared | fields | self.rbi_fields)


# An arm that gives its weights to others stands before them.
ARMS = {
    arm.name: arm
    for arm in (
        Arm("plain", "backbone and linear classifier", trains_attention=False),
        Arm("self", "the head of `rbi`, each image independently", preset="paper"),
        Arm("self-kernel", "the head of `rbi-kernel`, each image independently"),
        Arm(
            "rra",
            "the paper's head without RPE",
            control="self",
            preset="paper",
            rbi_fields={"relation_position_encoding": "none"},
            train_scope="batch",
            scopes=("self", "batch"),
        ),
        Arm(
            "rbi",
            "the paper's head",
            control="self",
            preset="paper",
            train_scope="batch",
            scopes=("self", "batch"),
        ),
        Arm(
            "rbi-kernel",
            "the kernel head",
            control="self-kernel",
            train_scope="batch",
            scopes=("self", "batch"),
        ),
        Arm(
            "rbi-kernel+single",
            "`rbi-kernel`, with half of the loss computed without neighbors",
            control="self-kernel",
            train_scope="batch",
            self_loss_weight=0.5,
            scopes=("self", "batch"),
        ),
        Arm(
            "rbi-kernel-untrained",
            "`plain` with an untrained kernel head",
            control="plain",
            scopes=("self", "batch"),
            weights_of="plain",
        ),
        Arm(
            "batchformer",
            "BatchFormer (Hou et al., CVPR 2022): an encoder over the batch, in training only",
            control="plain",
            trains_attention=False,
            is_batchformer=True,
        ),
        Arm(
            "bank-untrained",
            "`plain` with an untrained kernel head and a bank",
            control="plain",
            scopes=("self", "reference"),
            weights_of="plain",
        ),
        Arm(
            "bank-votes",
            "`bank-untrained`, with half of the prediction from the labels in the bank",
            control="plain",
            rbi_fields={"reference_vote_weight": 0.5},
            scopes=("self", "reference"),
            weights_of="plain",
        ),
        Arm(
            "bank-trained",
            "untrained kernel head, classifier trained through the bank",
            control="plain",
            train_scope="reference",
            scopes=("self", "reference"),
            trains_attention=False,
        ),
        Arm(
            "bank-trained+single",
            "`bank-trained`, with half of the loss computed without neighbors",
            control="plain",
            train_scope="reference",
            self_loss_weight=0.5,
            scopes=("self", "reference"),
            trains_attention=False,
        ),
        Arm(
            "bank-trained-head",
            "the kernel head, trained with the classifier through the bank",
            control="self-kernel",
            train_scope="reference",
            scopes=("self", "reference"),
        ),
    )
}


def choose_arms(names: Sequence[str] | None) -> list[Arm]:
    r"""
    The named arms and all arms that they need, in the order of `ARMS`.

    Args:
        names (`Sequence[str]`, *optional*):
            Names of arms. `None`: all arms.

    Raises:
        UserError: for an unknown name; the message suggests the closest one.
    """
    chosen = set(ARMS if names is None else names)
    for name in sorted(chosen - ARMS.keys()):
        close = difflib.get_close_matches(name, ARMS, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"choose from {', '.join(ARMS)}."
        raise UserError(f"There is no arm `{name}`: {hint}")
    while missing := {needed for name in chosen for needed in ARMS[name].needs} - chosen:
        chosen |= missing
    return [arm for arm in ARMS.values() if arm.name in chosen]
