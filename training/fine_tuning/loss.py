# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The training loss, and the backward pass of a neighborhood that does not fit into memory at once."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from modeling_rbi import NO_LABEL, RBIForImageClassification, RBIImageClassifierOutput


def count_targets(batch: dict[str, torch.Tensor], class_weights: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    The divisor that makes the summed loss of a batch a mean: its number of labeled images, weighted by class.

    Args:
        batch (`dict[str, torch.Tensor]`):
            A batch with `labels`, (B,), -100 for padding and unlabeled images; and, if images are mixed, the soft
            `targets`, (B, num_labels).
        class_weights (`torch.FloatTensor` of shape `(num_labels,)`, *optional*):
            Weight of each class.

    Returns:
        `torch.FloatTensor` of shape `()`.
    """
    labels = batch["labels"]
    is_real = labels != NO_LABEL
    if class_weights is None:
        return is_real.sum().float()
    class_weights = class_weights.to(labels.device)
    if "targets" in batch:
        return (batch["targets"][is_real] @ class_weights).sum()
    return class_weights[labels[is_real]].sum()


def classification_loss(
    logits: torch.Tensor,
    batch: dict[str, torch.Tensor],
    num_targets: torch.Tensor,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    r"""
    Cross entropy, summed over the batch and divided by `num_targets`. With the `num_targets` of one batch, this is its
    mean loss. With the sum over all batches of an optimizer step, on all processes, the losses of the batches add up
    to the mean over the step.

    Args:
        logits (`torch.FloatTensor` of shape `(B, num_labels)`):
            Logits of the model.
        batch (`dict[str, torch.Tensor]`):
            As in [`count_targets`].
        num_targets (`torch.Tensor` of shape `()`):
            See [`count_targets`].
        class_weights (`torch.FloatTensor` of shape `(num_labels,)`, *optional*):
            Weight of each class.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Share of a target, in [0, 1], that is spread over all classes.

    Returns:
        `torch.FloatTensor` of shape `()`.
    """
    is_real = batch["labels"] != NO_LABEL
    targets = batch["targets" if "targets" in batch else "labels"][is_real]
    loss = nn.functional.cross_entropy(
        logits[is_real].float(),
        targets,
        weight=None if class_weights is None else class_weights.to(logits.device),
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return loss / num_targets


def training_loss(
    outputs: RBIImageClassifierOutput,
    batch: dict[str, torch.Tensor],
    num_targets: torch.Tensor,
    self_loss_weight: float,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    r"""
    The loss of the logits or, if the model has also computed logits without neighbors, the weighted mean of both.

    Args:
        outputs (`RBIImageClassifierOutput`):
            Output with `logits` and, optionally, `self_logits`, both (B, num_labels).
        self_loss_weight (`float`):
            Share of the loss without neighbors, in [0, 1); see `RBIModel.self_loss_weight`.
        batch, num_targets, class_weights, label_smoothing:
            As in [`classification_loss`].
    """
    options = (batch, num_targets, class_weights, label_smoothing)
    loss = classification_loss(outputs.logits, *options)
    if outputs.self_logits is None:
        return loss
    return torch.lerp(loss, classification_loss(outputs.self_logits, *options), self_loss_weight)


def backward_in_two_passes(
    model: RBIForImageClassification,
    pixel_values: torch.Tensor,
    relation_mask: torch.Tensor | None,
    micro_batch_size: int,
    loss_of: Callable[[RBIImageClassifierOutput], torch.Tensor],
    backward: Callable[[torch.Tensor], None],
) -> torch.Tensor:
    r"""
    Computes the gradients of a loss over a whole neighborhood with the memory of a small batch, as GradCache (Gao et
    al. 2021) does for contrastive losses. First, the backbone runs over small batches without gradients. Then the head
    and the loss, over all features, give the gradient of each feature. Finally, the backbone runs again, one small
    batch at a time, and propagates these gradients. Only images and features are kept for the whole neighborhood. The
    cost is one more forward pass of the backbone.

    The gradients equal the gradients of the whole batch up to rounding; dropout draws the same numbers in both passes.
    Batch normalization is the exception, as in any gradient accumulation: it normalizes each small batch separately.

    Args:
        model (`RBIForImageClassification`):
            The model, not wrapped, in training mode.
        pixel_values (`torch.FloatTensor` of shape `(B, C, H, W)`):
            The neighborhood's images.
        relation_mask (`torch.BoolTensor` of shape `(B,)` or `(B, B)`, *optional*):
            Mask of neighbors, as in the model's forward.
        micro_batch_size (`int`):
            Largest number of images that the backbone processes at a time.
        loss_of (`Callable`):
            Computes the loss from the model's output.
        backward (`Callable`):
            Runs the backward pass of the loss, which it may scale, as `accelerator.backward` does.

    Returns:
        `torch.FloatTensor` of shape `()`: the loss, detached.
    """
    # Sizes differ by at most one: a last part with a single image would have no batch statistics.
    num_parts = math.ceil(len(pixel_values) / micro_batch_size)
    parts = pixel_values.tensor_split(num_parts)
    states, features = [], []
    with torch.no_grad(), _batch_norm_statistics_kept(model):
        for part in parts:
            states.append(_get_rng_state(part.device))
            features.append(model.base_model.extract_features(part)[0])
    torch.clear_autocast_cache()  # torch 2.10 keeps the casted weights, which were made without gradients
    leaf = torch.cat(features).float().requires_grad_()
    loss = loss_of(model(pixel_values=pixel_values, image_features=leaf, relation_mask=relation_mask))
    backward(loss)

    if not any(parameter.requires_grad for parameter in model.base_model.backbone.parameters()):
        return loss.detach()
    after = _get_rng_state(pixel_values.device)
    gradients = leaf.grad.tensor_split(num_parts)  # type: ignore[union-attr]
    for part, state, gradient in zip(parts, states, gradients, strict=True):
        _set_rng_state(state, part.device)
        part_features = model.base_model.extract_features(part)[0]
        # If mixed precision scales the loss, these gradients are already scaled.
        torch.autograd.backward(part_features, gradient.to(part_features.dtype))
    _set_rng_state(after, pixel_values.device)
    return loss.detach()


def _get_rng_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()
    return torch.get_rng_state(), on_device


def _set_rng_state(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device):
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1])


@contextmanager
def _batch_norm_statistics_kept(model: nn.Module) -> Iterator[None]:
    """The first pass must not update batch-norm statistics."""
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    kept = [[buffer.clone() for buffer in layer.buffers()] for layer in layers]
    try:
        yield
    finally:
        for layer, buffers in zip(layers, kept, strict=True):
            for buffer, value in zip(layer.buffers(), buffers, strict=True):
                buffer.copy_(value)
