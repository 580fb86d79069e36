# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""BatchFormer, a related method to compare with: an encoder over the batch that is used only in training."""

import torch
from torch import nn

from modeling_rbi import RBIConfig, RBIForImageClassification, RBIImageClassifierOutput, UserError

from ..fine_tuning.trainer import RBITrainer


class BatchFormer(nn.Module):
    r"""
    BatchFormer (Hou, Yu and Tao, "BatchFormer: Learning to Explore Sample Relationships for Robust Representation
    Learning", CVPR 2022, https://huggingface.co/papers/2203.01522). One transformer layer over the features x of the
    batch, without positions:

        h = LayerNorm(x + Dropout(MultiHead(x, x, x)))
        e = LayerNorm(h + Dropout(W_2 Dropout(relu(W_1 h))))

    with 4 heads, W_1 and W_2 of shape C x C, and dropout 0.5. One shared classifier is trained on both:
    loss = cross_entropy(W_c [x; e] + b_c, [y; y]). In evaluation the layer is dropped, so that each image is predicted
    from its own features.

    Args:
        size (`int`):
            Number of features C. Must be a multiple of `num_heads`.
        num_heads (`int`, *optional*, defaults to 4):
            Number of attention heads.
        dropout (`float`, *optional*, defaults to 0.5):
            Dropout rate of the layer.

    Raises:
        UserError: if `num_heads` does not divide `size`.
    """

    def __init__(self, size: int, num_heads: int = 4, dropout: float = 0.5):
        super().__init__()
        if size % num_heads:
            raise UserError(
                f"BatchFormer has {num_heads} attention heads, which must divide the {size} features: choose another "
                "backbone, or leave the arm out."
            )
        self.encoder = nn.TransformerEncoderLayer(size, num_heads, dim_feedforward=size, dropout=dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features, (B, C) -> (2B, C), x before e, in training. In evaluation (B, C), unchanged."""
        if not self.training:
            return features
        # The batch is the sequence, (B, 1, C).
        return torch.cat([features, self.encoder(features[:, None]).squeeze(1)])


class BatchFormerForImageClassification(RBIForImageClassification):
    r"""
    A backbone and a linear classifier with [`BatchFormer`] between them in training. RBI's head is not trained: it
    starts as identity, is called with `relation_scope="self"` and so returns the features unchanged.

    Args:
        config (`RBIConfig`):
            Config with `head_initialization="identity"`.
    """

    # Saved checkpoints are loaded by RBI's own class, without the encoder.
    _auto_class = None

    def __init__(self, config: RBIConfig):
        super().__init__(config)
        self.batchformer = BatchFormer(self.classifier.in_features)

    @classmethod
    def from_model(cls, model: RBIForImageClassification) -> "BatchFormerForImageClassification":
        """Returns a model with the weights of `model` and a new encoder."""
        peer = cls(model.config)
        peer.load_state_dict(model.state_dict(), strict=False)
        return peer.train(model.training)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        relation_scope: str | None = None,
        **kwargs,
    ) -> RBIImageClassifierOutput:
        r"""
        Classifies as a linear classifier does; `relation_scope` is ignored. In training `logits` have the shape
        (2B, num_labels): first from the images' features, then from the encoder's output for the same images.
        """
        features = self.rbi(pixel_values, image_features=image_features, relation_scope="self").pooler_output
        logits = self.classifier(self.dropout(self.batchformer(features)))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels.repeat(len(logits) // len(labels)), logits, self.config)
        return RBIImageClassifierOutput(loss=loss, logits=logits)


class BatchFormerTrainer(RBITrainer):
    """An `RBITrainer` whose loss is the mean over both predictions of [`BatchFormerForImageClassification`]."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Forward and backward pass of one batch, with the labels repeated."""
        twice = {name: torch.cat([inputs[name]] * 2) for name in ("labels", "targets") if name in inputs}
        num_items = None if num_items_in_batch is None else 2 * num_items_in_batch
        return super().training_step(model, inputs | twice, num_items)


__all__ = ["BatchFormer", "BatchFormerForImageClassification", "BatchFormerTrainer"]
