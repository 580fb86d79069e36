"""A training that diverges: what is finite, and what the user is told."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from modeling_rbi import UserError
from training.fine_tuning.divergence import DivergedError, weights_are_finite


def model():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))


def test_a_whole_model_is_finite():
    finite = weights_are_finite(model())
    assert finite.shape == () and finite == 1  # batch norm counts its batches in integers


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["0.weight", "2.bias", "1.running_var"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_is_enough(name, value, dtype):
    broken = model().to(dtype)
    broken.state_dict()[name].view(-1)[-1] = value
    assert weights_are_finite(broken) == 0


def test_the_message_names_the_step_the_way_out_and_what_is_left():
    assert issubclass(DivergedError, UserError)
    assert str(DivergedError("the loss of step 3 is nan")) == (
        "The training diverged: the loss of step 3 is nan. Start again: lower --learning_rate, or --max_grad_norm, "
        "raise --warmup_steps, or replace --fp16 by --bf16."
    )
    error = DivergedError("the loss of step 3 is nan", "lower --rate", checkpoint=Path("out/checkpoint-2"))
    assert str(error).endswith("Start again: lower --rate. out/checkpoint-2 was saved before and stays.")
