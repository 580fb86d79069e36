# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Arms come along with what they need, and differ from their controls only in the relations."""

import pytest

from training.ablation.arms import ARMS, choose_arms


def test_controls_and_what_arms_take_weights_from_come_along():
    names = [arm.name for arm in choose_arms(["bank-trained-head", "rbi-kernel-untrained"])]
    assert names == ["plain", "self-kernel", "rbi-kernel-untrained", "bank-trained-head"]
    assert [arm.name for arm in choose_arms(None)] == list(ARMS)


def test_unknown_arms_are_refused():
    with pytest.raises(ValueError, match="no arm `rbi-kernl`: did you mean `rbi-kernel`"):
        choose_arms(["plain", "rbi-kernl"])


@pytest.mark.parametrize("arm", [arm for arm in ARMS.values() if arm.control not in (None, "plain")])
def test_a_control_is_the_same_head_without_relations(arm):
    control = ARMS[arm.control]
    assert control.preset == arm.preset and control.trains_attention == arm.trains_attention
    assert control.scopes == ("self",) and control.train_scope == "self" != arm.train_scope


def test_every_arm_beside_plain_and_its_likes_trains_what_plain_does():
    for arm in ARMS.values():
        if arm.control == "plain":
            assert arm.preset == "kernel" and (arm.weights_of == "plain" or not arm.trains_attention)
