# Copyright 2026 The RBI authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The head of RBI: who attends to whom (Neighborhood), how images are related (RPE), and the attention (RRA)."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils.generic import maybe_autocast

from .bank_rbi import ReferenceBank, quantized
from .configuration_rbi import RBIConfig


# Height and width of a reference's image where PSNR is that of full-size images, whose ranks it keeps (0.997).
_FULL_SIZE_REFERENCES = 32
# The largest scale of cosine attention, 1 / temperature, as in SwinV2.
_MAX_LOGIT_SCALE = 100.0


class _AllGather(torch.autograd.Function):
    """Rows of all processes, (B, ...) -> (processes, B, ...). Gradients are summed over the processes."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        gathered = [
            torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())
        ]
        dist.all_gather(gathered, rows.contiguous())
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).contiguous()
        dist.all_reduce(total)
        return total[dist.get_rank()].to(gradient.dtype)


class Neighborhood:
    r"""
    The images that those of a batch can attend to: the batch itself, or the batches of all processes, one after the
    other. Gathering is collective: all processes make their neighborhoods, and gather, in the same order.

    Args:
        batch_size (`int`):
            Images of this process. Processes can have different numbers.
        device (`torch.device`):
            Where the images are.
        gather_across_processes (`bool`, *optional*, defaults to `False`):
            Whether the images of all processes belong to it. Without `torch.distributed`, or with one process, they
            do anyway.
    """

    def __init__(self, batch_size: int, device: torch.device, gather_across_processes: bool = False):
        self.is_gathered = (
            gather_across_processes and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        )
        self.batch_size = batch_size
        # Where the batch stands in the neighborhood; itself[i, j]: whether its image i is image j there.
        self.own = slice(0, batch_size)
        self.itself = torch.eye(batch_size, dtype=torch.bool, device=device)
        if self.is_gathered:
            self.sizes = _AllGather.apply(torch.tensor([batch_size], device=device)).flatten().tolist()
            before, after = sum(self.sizes[: dist.get_rank()]), sum(self.sizes[dist.get_rank() + 1 :])
            self.own = slice(before, before + batch_size)
            self.itself = nn.functional.pad(self.itself, (before, after))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of this batch, (batch_size, ...) -> those of the neighborhood, (num_neighbors, ...), with gradient."""
        if not self.is_gathered:
            return rows
        sent = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
        padding = sent.new_zeros(max(self.sizes) - self.batch_size, *sent.shape[1:])
        gathered = _AllGather.apply(torch.cat([sent, padding]))
        return torch.cat([part[:size] for part, size in zip(gathered, self.sizes, strict=True)]).to(rows.dtype)


def pairwise_mean_squared_error(images: torch.Tensor, neighbors: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    Mean squared error between all pairs of images, as one matrix product: (|x|^2 + |y|^2 - 2 x y) / n on centered
    images.

    Centering leaves the differences as they are and keeps the cancellation small. The product is in float64 where the
    device has it: in float32, as on Apple's GPUs, it is off by up to 0.1 dB at 45 dB for images of high contrast, and
    tensor cores may round the factors further (TF32, or bf16 under `torch.set_float32_matmul_precision`). It is small:
    2 B^2 n operations, 0.4 GFLOP for 256 images at 32 px, 20 GFLOP at 224 px.

    Args:
        images (`torch.FloatTensor` of shape `(batch_size, n)`):
            Flattened images, float32.
        neighbors (`torch.FloatTensor` of shape `(num_neighbors, n)`, *optional*):
            The images to compare them with. `None`: themselves.

    Returns:
        `torch.FloatTensor` of shape `(batch_size, num_neighbors)`: not negative, and without `neighbors` symmetric and
        exactly 0 on the diagonal.
    """
    precise = images.double() if images.device.type in ("cpu", "cuda") else images
    if neighbors is None:
        gram = precise @ precise.T
        norms = gram.diagonal()
        error = norms[:, None] + norms[None, :] - 2 * gram
        error = (error + error.T) / 2
    else:
        others = neighbors.to(precise.dtype)
        error = precise.square().sum(1)[:, None] + others.square().sum(1)[None, :] - 2 * precise @ others.T
    return (error / images.shape[1]).clamp(min=0).to(images.dtype)


class RelationshipPositionEncoding(nn.Module):
    r"""
    Relationship Position Encoding (RPE): the relation of each pair of images of a batch, from the PSNR of the images
    themselves, p_ij = min(PSNR_ij, psnr_max) / psnr_max. PSNR of images is the paper's; the ceiling as normalizer is
    a reconstruction. It has no parameters, and no gradient goes through it.
    """

    def __init__(self, config: RBIConfig):
        super().__init__()
        self.image_mean = config.image_mean
        self.image_std = config.image_std
        self.image_size = config.psnr_image_size
        self.psnr_max = float(config.psnr_max)
        self.self_relation = config.self_relation

    @torch.no_grad()
    def forward(
        self,
        pixel_values: torch.Tensor,
        relation_mask: torch.Tensor | None = None,
        neighborhood: Neighborhood | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                Images as the image processor gives them, of any float dtype.
            relation_mask (`torch.BoolTensor` of shape `(num_neighbors,)` or `(batch_size, num_neighbors)`):
                Optional. `False` where an image is no neighbor, of anyone or of the image of the row.
            neighborhood (`Neighborhood`, *optional*):
                The images to relate those of the batch to. `None`: the batch itself.

        Returns:
            The relations, `torch.FloatTensor` of shape `(batch_size, num_neighbors)`, float32 in [0, 1]; and which
            neighbors are finite, `torch.BoolTensor` of shape `(num_neighbors,)`. Those that are not have the
            relation 0.
        """
        if neighborhood is None:
            neighborhood = Neighborhood(pixel_values.shape[0], pixel_values.device)
        with maybe_autocast(device_type=pixel_values.device.type, enabled=False):
            images = neighborhood.gather(self._unit_range_images(pixel_values))
            is_finite = images.isfinite().all(-1)
            is_neighbor = is_finite if relation_mask is None else is_finite & relation_mask
            images = torch.where(is_finite[:, None], images, 0.0)
            images = images - _neighbors_mean(images, is_neighbor)

            own = neighborhood.own
            similarities = self._similarities(images[own], images if neighborhood.is_gathered else None)
            similarities = torch.where(is_finite[own, None] & is_finite[None, :], similarities, 0.0)
            return self._set_self_relation(similarities, is_neighbor, neighborhood.itself), is_finite

    @torch.no_grad()
    def relate_to_references(
        self,
        pixel_values: torch.Tensor | None,
        references: ReferenceBank,
        batch_size: int,
        reference_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`, *optional*):
                Images as the image processor gives them; not needed for a bank without images.
            references (`ReferenceBank`):
                The bank of N references. Without images, all relations are the mean relation of its images.
            batch_size (`int`):
                Number of images.
            reference_mask (`torch.BoolTensor` of shape `(batch_size, N)`, *optional*):
                `False` where a reference is no neighbor of the image.

        Returns:
            The relations, `torch.FloatTensor` of shape `(batch_size, 1 + N)`, to the image itself and to each
            reference, float32 in [0, 1]; and which images are finite, `torch.BoolTensor` of shape `(batch_size,)`.
        """
        if references.images is None:
            device = references.features.device
            similarities = torch.full((batch_size, len(references)), references.mean_similarity, device=device)
            is_finite = torch.ones(batch_size, dtype=torch.bool, device=device)
        else:
            with maybe_autocast(device_type=pixel_values.device.type, enabled=False):
                images = self._unit_range_images(pixel_values, references.images.shape[-2:])
                is_finite = images.isfinite().all(-1)
                images = torch.where(is_finite[:, None], images, 0.0)
                neighbors = references.unit_range_images()
                mean = neighbors.mean(0)
                similarities = self._similarities(images - mean, neighbors - mean)
        own = torch.ones_like(similarities[:, :1])
        if self.self_relation == "nearest":
            near = similarities if reference_mask is None else torch.where(reference_mask, similarities, 0.0)
            nearest = near.amax(-1, keepdim=True)
            own = nearest if reference_mask is None else torch.where(reference_mask.any(-1, True), nearest, own)
        return torch.cat([own, similarities], dim=-1), is_finite

    def _similarities(self, images: torch.Tensor, neighbors: torch.Tensor | None) -> torch.Tensor:
        """PSNR over its ceiling, (B, n) and (N, n) -> (B, N); without `neighbors`, among the images themselves."""
        error = pairwise_mean_squared_error(images, neighbors)
        psnr = -10 * error.clamp(min=10.0 ** (-self.psnr_max / 10)).log10()
        return (psnr / self.psnr_max).clamp(0, 1)

    def small_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The images that a bank keeps, (B, C, H, W) -> (B, C, size, size), 8 bits. PSNR on full size keeps 32 px."""
        limit = self.image_size or _FULL_SIZE_REFERENCES
        size = [min(limit, length) for length in pixel_values.shape[-2:]]
        return quantized(self._unit_range_images(pixel_values, size)).view(len(pixel_values), -1, *size)

    def _unit_range_images(self, pixel_values: torch.Tensor, size: Sequence[int] | None = None) -> torch.Tensor:
        """Undoes the normalization, (B, C, H, W) -> (B, C * height * width) in float32."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=pixel_values.device)[:, None, None]
            for values in (self.image_mean, self.image_std)
        )
        images = pixel_values.float() * std + mean
        if size is None and self.image_size is not None:
            size = [min(self.image_size, length) for length in images.shape[-2:]]
        if size is not None:
            images = nn.functional.adaptive_avg_pool2d(images, size)
        return images.flatten(1)

    def _set_self_relation(
        self, similarities: torch.Tensor, is_neighbor: torch.Tensor, itself: torch.Tensor
    ) -> torch.Tensor:
        diagonal = torch.ones_like(similarities)
        if self.self_relation == "nearest":
            others = is_neighbor & ~itself
            nearest = torch.where(others, similarities, 0.0).amax(-1, keepdim=True)
            diagonal = torch.where(others.any(-1, keepdim=True), nearest, diagonal)
        return torch.where(itself, diagonal, similarities)


def _neighbors_mean(rows: torch.Tensor, is_neighbor: torch.Tensor) -> torch.Tensor:
    """Mean row of those that are neighbors, of anyone where `is_neighbor` is pairwise, (N, ...) -> (...)."""
    weights = (is_neighbor if is_neighbor.ndim == 1 else is_neighbor.any(0)).float()[:, None]
    return ((rows * weights).sum(0) / weights.sum().clamp(min=1)).to(rows.dtype)


class ResidualRelationshipAttention(nn.Module):
    r"""
    Residual Relationship Attention (RRA): attention between the images of a batch, modulated by their relations p,
    beside a residual path that keeps each image's own features.

        A_ij = softmax_j(q_i (k_j + p_ij w) / sqrt(d_head)),  m_i = sum_j A_ij (v_j + p_ij w)
        beta_i = sigmoid(w_beta [m_i; r_i; m_i - r_i]),       z_i = beta_i r_i + (1 - beta_i) m_i

    This is the operator of `torch_geometric.nn.TransformerConv(beta=True, edge_dim=1)` on the complete graph, the
    head of the authors' earlier code; that the paper's head is the same with p as edge attribute is a reconstruction.
    The relation p_ij w has rank one, so no tensor of shape (B, B, d) is built: q_i (p_ij w) = p_ij (q_i w), and
    sum_j A_ij p_ij w = (sum_j A_ij p_ij) w.
    """

    def __init__(self, config: RBIConfig):
        super().__init__()
        size = config.feature_size
        self.num_heads = config.num_attention_heads
        self.head_size = size // self.num_heads
        self.attention_dropout = config.attention_dropout
        self.psnr_max = float(config.psnr_max)
        self.relation_position_encoding = config.relation_position_encoding
        self.is_cosine = config.attention_type == "cosine"
        # What attention to references is like can be changed after the model was built.
        self.config = config

        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.residual = nn.Linear(size, size) if config.residual_gate != "none" else None
        self.gate = nn.Linear(3 * size, 1, bias=False) if config.residual_gate == "learned" else None
        self.relation = None
        if config.relation_position_encoding in ("key", "key_value"):
            self.relation = nn.Linear(1, size, bias=False)
        self.relation_gain = None
        if config.relation_position_encoding == "bias":
            self.relation_gain = nn.Parameter(torch.full((self.num_heads,), float(config.relation_gain)))
        self.logit_scale = None
        if self.is_cosine:
            self.logit_scale = nn.Parameter(torch.full((self.num_heads,), -math.log(config.attention_temperature)))

    def forward(
        self,
        features: torch.Tensor,
        similarities: torch.Tensor | None = None,
        is_neighbor: torch.Tensor | None = None,
        neighborhood: Neighborhood | None = None,
        references: ReferenceBank | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None] | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        r"""
        Args:
            features (`torch.FloatTensor` of shape `(batch_size, feature_size)`):
                Features of the images, finite.
            similarities (`torch.FloatTensor` of shape `(batch_size, num_neighbors)`, *optional*):
                The relations p in [0, 1]; needed with neighbors unless RPE enters nowhere. With `references`,
                `(batch_size, 1 + N)`, that to the image itself first.
            is_neighbor (`torch.BoolTensor` of shape `(num_neighbors,)` or `(batch_size, num_neighbors)`, *optional*):
                Whether an image is a neighbor, of all or of the image of the row; each attends to itself besides.
                `None`: each image attends to itself alone, and nothing is computed across images; with `references`,
                to itself and to all of these.
            neighborhood (`Neighborhood`, *optional*):
                The images that can be attended to. `None`: the batch itself.
            references (`ReferenceBank`, *optional*):
                The N images to attend to in place of the batch's; `is_neighbor` is then `(batch_size, N)`.

        Returns:
            Integrated features, `(batch_size, feature_size)`, and attention, `(batch_size, num_heads, num_neighbors)`
            (`None` without neighbors). With `references` the attention is `(batch_size, num_heads, 1 + N)`, and
            there is a third: the logits of the references' votes, `(batch_size, num_heads, N)`.
        """
        if references is not None:
            message, shares, votes = self._attend_to_references(features, similarities, is_neighbor, references)
            return self._with_residual(message, features), shares, votes
        attention = None
        if is_neighbor is None:
            message = self.value(features)
            if self.relation_position_encoding == "key_value":
                message = message + self._relation_vector(features).flatten()
        else:
            if neighborhood is None:
                neighborhood = Neighborhood(features.shape[0], features.device)
            message, attention = self._attend(features, similarities, is_neighbor, neighborhood)

        return self._with_residual(message, features), attention

    def _with_residual(self, message: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if self.residual is None:
            return message
        residual = self.residual(features)
        if self.gate is None:
            return residual + message
        beta = self.gate(torch.cat([message, residual, message - residual], dim=-1)).sigmoid()
        return beta * residual + (1 - beta) * message

    def _attend(
        self,
        features: torch.Tensor,
        similarities: torch.Tensor | None,
        is_neighbor: torch.Tensor,
        neighborhood: Neighborhood,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        neighbors = neighborhood.gather(features)
        # Pooled features of one network all point much the same way: what tells images apart is off their mean.
        compared = neighbors - _neighbors_mean(neighbors, is_neighbor) if self.is_cosine else neighbors
        query = self._by_head(self.query(compared[neighborhood.own]))
        key, value = self._by_head(self.key(compared)), self._by_head(self.value(neighbors))
        relation = None if self.relation is None else self._relation_vector(features)
        with maybe_autocast(device_type=features.device.type, enabled=False):
            query, key = self._comparable(query), self._comparable(key)
            scores = self._scores(query @ key.transpose(1, 2), query, relation, similarities)
            attention = scores.masked_fill(~(is_neighbor | neighborhood.itself), -math.inf).softmax(dim=-1)
        attention = nn.functional.dropout(attention, p=self.attention_dropout, training=self.training)
        message = self._with_relations(attention.to(value.dtype) @ value, attention, similarities, relation)
        return message.to(value.dtype), attention.transpose(0, 1)

    def _attend_to_references(
        self,
        features: torch.Tensor,
        similarities: torch.Tensor | None,
        is_neighbor: torch.Tensor | None,
        references: ReferenceBank,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, keys, values = references.mean, references.keys, references.values
        if self.training or not references.is_prepared:
            mean, keys, values = self.project_references(references)
        compared = features - mean.to(features.dtype)
        query, own_key = self._by_head(self.query(compared)), self._by_head(self.key(compared))
        own_value = self._by_head(self.value(features))
        key, value = self._by_head(keys), self._by_head(values).to(own_value.dtype)
        relation = None if self.relation is None else self._relation_vector(features)
        with maybe_autocast(device_type=features.device.type, enabled=False):
            query, own_key, key = (self._comparable(each) for each in (query, own_key, key))
            # Of the batch, each image meets itself alone.
            products = torch.cat([(query * own_key).sum(-1, keepdim=True), query @ key.transpose(1, 2)], dim=-1)
            votes = self._scores(products, query, relation, similarities)
            scores = self._scores(
                products, query, relation, similarities, self.config.reference_temperature, self.config.reference_gain
            )
            if is_neighbor is not None:
                allowed = nn.functional.pad(is_neighbor, (1, 0), value=True)
                scores, votes = (each.masked_fill(~allowed, -math.inf) for each in (scores, votes))
            attention = self._share_out(scores[..., :1], scores[..., 1:])
        attention = nn.functional.dropout(attention, p=self.attention_dropout, training=self.training)
        weights = attention.to(own_value.dtype)
        message = weights[..., :1] * own_value + weights[..., 1:] @ value
        message = self._with_relations(message, attention, similarities, relation)
        return message.to(own_value.dtype), attention.transpose(0, 1), votes[..., 1:].transpose(0, 1)

    def _share_out(self, own: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Attention to itself and to the references, from the logits of both, (heads, B, 1) and (heads, B, N)."""
        num_neighbors, share = self.config.num_reference_neighbors, self.config.reference_share
        if num_neighbors is not None and num_neighbors < others.shape[-1]:
            least = others.topk(num_neighbors, dim=-1).values[..., -1:]
            others = others.masked_fill(others < least, -math.inf)
        if share is None:
            return torch.cat([own, others], dim=-1).softmax(dim=-1)
        # Where no reference is allowed, all of it stays with the image.
        has_any = others.isfinite().any(-1, keepdim=True)
        given = share * has_any.to(others.dtype)
        others = torch.where(has_any, others, 0.0).softmax(dim=-1)
        return torch.cat([1 - given, given * others], dim=-1)

    def project_references(self, references: ReferenceBank) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What attention reads of a bank: the mean that features are compared off, (d,); keys and values, (N, d)."""
        features = references.features.to(self.key.weight.dtype)
        mean = features.mean(0) if self.is_cosine else torch.zeros_like(features[0])
        return mean, self.key(features - mean), self.value(features)

    def _by_head(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, d) -> (heads, rows, d_head)"""
        return rows.view(-1, self.num_heads, self.head_size).transpose(0, 1)

    def _comparable(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(rows.float(), dim=-1) if self.is_cosine else rows.float()

    def _with_relations(
        self,
        message: torch.Tensor,
        attention: torch.Tensor,
        similarities: torch.Tensor | None,
        relation: torch.Tensor | None,
    ) -> torch.Tensor:
        """The messages with what the relations add to the values, (heads, B, d_head) -> (B, d)."""
        if self.relation_position_encoding == "key_value":
            message = message + (attention * similarities).sum(-1, keepdim=True).to(relation.dtype) * relation
        return message.transpose(0, 1).flatten(1)

    def _relation_vector(self, features: torch.Tensor) -> torch.Tensor:
        """The vector w, (heads, 1, d_head), from a call of its layer: weights that are offloaded come with a call."""
        return self.relation(features.new_ones(1, 1)).view(self.num_heads, 1, self.head_size)

    def _scores(
        self,
        products: torch.Tensor,
        query: torch.Tensor,
        relation: torch.Tensor | None,
        similarities: torch.Tensor | None,
        temperature: float | None = None,
        gain: float | None = None,
    ) -> torch.Tensor:
        """Attention logits, (heads, B, N), from the products of queries and keys, in float32."""
        scores = products
        if relation is not None:
            scores = scores + (query @ relation.float().transpose(1, 2)) * similarities
        if self.is_cosine and temperature is not None:
            scores = scores / temperature
        elif self.is_cosine:
            scores = scores * self.logit_scale.float().clamp(max=math.log(_MAX_LOGIT_SCALE)).exp()[:, None, None]
        else:
            scores = scores * self.head_size**-0.5
        if self.relation_gain is not None:
            gains = self.relation_gain.float()[:, None, None] if gain is None else gain
            scores = scores + gains * (similarities * self.psnr_max)
        return scores
