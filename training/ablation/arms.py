# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Arms of an ablation: ways to train and to ask a model, each beside one that differs in nothing but the relations."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from modeling_rbi import UserError


@dataclass(frozen=True)
class Arm:
    r"""
    One way to train and to ask a model.

    Args:
        name (`str`):
            On the command line, and its folder.
        description (`str`):
            What it is.
        control (`str`, *optional*):
            The arm that differs from it in nothing but the relations.
        preset (`str`, *optional*, defaults to `"kernel"`):
            Form of the head.
        rbi_fields (`dict[str, Any]`, *optional*):
            Fields of `RBIConfig` that differ from the preset's.
        self_loss_weight (`float`, *optional*, defaults to 0.0):
            Share of the training loss that is computed without neighbors.
        train_scope (`str`, *optional*, defaults to `"self"`):
            Relation scope in training.
        scopes (`tuple[str, ...]`, *optional*, defaults to `("self",)`):
            Relation scopes in which its gain is told. With `"self"` alone it has no relations at all.
        trains_attention (`bool`, *optional*, defaults to `True`):
            `False`: RRA stays as it starts.
        weights_of (`str`, *optional*):
            Arm whose trained backbone and classifier it takes. Nothing of its own is trained.
        is_batchformer (`bool`, *optional*, defaults to `False`):
            Whether BatchFormer's encoder is there in training.
    """

    name: str
    description: str
    control: str | None = None
    preset: str = "kernel"
    rbi_fields: dict[str, Any] = field(default_factory=dict)
    self_loss_weight: float = 0.0
    train_scope: str = "self"
    scopes: tuple[str, ...] = ("self",)
    trains_attention: bool = True
    weights_of: str | None = None
    is_batchformer: bool = False

    @property
    def has_bank(self) -> bool:
        """Whether it has a reference bank."""
        return "reference" in self.scopes

    @property
    def gives_weights(self) -> bool:
        """Whether another arm takes its weights."""
        return any(arm.weights_of == self.name for arm in ARMS.values())

    @property
    def needs(self) -> set[str]:
        """Arms that must be there for it to be trained and compared."""
        return {name for name in (self.control, self.weights_of, "plain") if name is not None} - {self.name}


# Those that others take their weights from come first.
ARMS = {
    arm.name: arm
    for arm in (
        Arm("plain", "backbone and linear classifier", trains_attention=False),
        Arm("self", "the head of `rbi`, each image on its own", preset="paper"),
        Arm("self-kernel", "the head of `rbi-kernel`, each image on its own"),
        Arm(
            "rra",
            "the paper's form without RPE",
            control="self",
            preset="paper",
            rbi_fields={"relation_position_encoding": "none"},
            train_scope="batch",
            scopes=("self", "batch"),
        ),
        Arm(
            "rbi",
            "the paper's form",
            control="self",
            preset="paper",
            train_scope="batch",
            scopes=("self", "batch"),
        ),
        Arm(
            "rbi-kernel",
            "the kernel form",
            control="self-kernel",
            train_scope="batch",
            scopes=("self", "batch"),
        ),
        Arm(
            "rbi-kernel+single",
            "as `rbi-kernel`, and half of the loss is that of each image on its own",
            control="self-kernel",
            self_loss_weight=0.5,
            train_scope="batch",
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
            "BatchFormer (Hou et al., CVPR 2022): an encoder over the batch, in training alone",
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
            "as `bank-untrained`, and the labels in the bank have half of the say",
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
            "as `bank-trained`, and on each image on its own, with equal shares of the loss",
            control="plain",
            self_loss_weight=0.5,
            train_scope="reference",
            scopes=("self", "reference"),
            trains_attention=False,
        ),
        Arm(
            "bank-trained-head",
            "the kernel form, head and classifier trained through the bank",
            control="self-kernel",
            train_scope="reference",
            scopes=("self", "reference"),
        ),
    )
}


def choose_arms(names: Sequence[str] | None) -> list[Arm]:
    r"""
    The arms of these names, all if it is `None`, and those that they need, in the order of `ARMS`.

    Raises:
        UserError: for an unknown name; tells the nearest one.
    """
    chosen = set(ARMS if names is None else names)
    for name in sorted(chosen - ARMS.keys()):
        close = difflib.get_close_matches(name, ARMS, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"choose from {', '.join(ARMS)}."
        raise UserError(f"There is no arm `{name}`: {hint}")
    while missing := {needed for name in chosen for needed in ARMS[name].needs} - chosen:
        chosen |= missing
    return [arm for arm in ARMS.values() if arm.name in chosen]
