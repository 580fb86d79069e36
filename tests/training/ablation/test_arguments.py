# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What an ablation does not support is refused from the arguments, and defaults follow the recipe."""

import os
from pathlib import Path

import pytest

from training.ablation.arguments import AblationArguments


RECIPES = Path(__file__).parents[3] / "training" / "recipes"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_folds": 3}, "--num_folds cannot be used in an ablation"),
        ({"relation_batch_size": 4}, "--relation_batch_size cannot be used"),
        ({"resume_from_checkpoint": "last"}, "a rerun of the same command keeps what is finished"),
        ({"per_device_eval_batch_size": 1}, "--per_device_eval_batch_size must be at least 2"),
        ({"freeze_backbone": True, "max_steps": 9}, "give --frozen_steps"),
        ({"ema_decay": 0.9}, "--ema_decay averages the backbone"),
        ({"mixup_alpha": 0.2}, "originals of mixed images"),
        ({"rbi_config": '{"residual_gate": "sum"}'}, "does not fit the arm plain: .*exclude each other"),
    ],
)
def test_arguments_that_do_not_go(make, more, message):
    with pytest.raises(ValueError, match=message):
        make(**more).check()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_seeds": 1}, "--num_seeds must be at least 2, got 1"),
        ({"num_shuffles": 1}, "--num_shuffles must be at least 2"),
        ({"num_unlabeled": -1}, "--num_unlabeled must be at least 0"),
        ({"frozen_steps": 0}, "--frozen_steps must be at least 1"),
    ],
)
def test_numbers_out_of_range(make, more, message):
    with pytest.raises(ValueError, match=message):
        make(**more)


def test_by_default_the_output_goes_by_the_recipe():
    recipe = RECIPES / "orl_faces.yaml"
    args = AblationArguments.parse(["--config", str(recipe), "--freeze_backbone", "--use_cpu"])
    assert args.training.output_dir == os.path.join("outputs", "ablation", "orl_faces")
    assert args.data.dataset_config_name == "2-shot" and args.options.num_seeds == 5
