# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Training that diverges: losses and weights that are no longer finite end it with an error."""

from pathlib import Path

import torch
from torch import nn

from modeling_rbi import UserError


class DivergedError(UserError):
    r"""
    The training diverged.

    Args:
        what (`str`):
            What is not finite, and at which step, such as "the loss of step 3 is nan".
        advice (`str`, *optional*):
            How to train instead.
        checkpoint (`Path`, *optional*):
            The last checkpoint, which was saved before.
    """

    def __init__(
        self,
        what: str,
        advice: str = "lower --learning_rate, or --max_grad_norm, raise --warmup_steps, or replace --fp16 by --bf16",
        checkpoint: Path | None = None,
    ):
        kept = "" if checkpoint is None else f" {checkpoint} was saved before and stays."
        super().__init__(f"The training diverged: {what}. Start again: {advice}.{kept}")


def weights_are_finite(model: nn.Module) -> torch.Tensor:
    r"""
    Whether all weights and running statistics on this process are finite.

    Args:
        model (`nn.Module`):
            The model. Of sharded weights, only the part of this process is looked at.

    Returns:
        `torch.FloatTensor` of shape `()`: 1 or 0, to gather from all processes.
    """
    tensors = (
        tensor.to_local() if hasattr(tensor, "to_local") else tensor  # shards of FSDP
        for tensor in (*model.parameters(), *model.buffers())
    )
    return torch.tensor(float(all(tensor.detach().isfinite().all() for tensor in tensors)))


__all__ = ["DivergedError", "weights_are_finite"]
