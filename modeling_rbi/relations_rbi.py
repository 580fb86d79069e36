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
"""The head of RBI: which images attend to which (Neighborhood), their relations (RPE), and the attention (RRA)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils.generic import maybe_autocast

from .bank_rbi import ReferenceBank, quantized
from .configuration_rbi import RBIConfig


# Height and width of a thumbnail where PSNR is computed on full-size images. PSNR of such thumbnails ranks pairs of
# images almost as full-size PSNR does (Spearman correlation 0.997).
_FULL_SIZE_THUMBNAILS = 32
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
    The images that the images of a batch can attend to: the batch itself, or the batches of all processes in order of
    rank. Gathering is collective: all processes must create their neighborhoods, and gather, in the same order.

    Args:
        batch_size (`int`):
            Number of images on this process. It may differ between processes.
        device (`torch.device`):
            Device of the images.
        gather_across_processes (`bool`, *optional*, defaults to `False`):
            Whether the neighborhood spans the images of all processes. It makes no difference without
            `torch.distributed` or with one process.
    """

    def __init__(self, batch_size: int, device: torch.device, gather_across_processes: bool = False):
        self.is_gathered = (
            gather_across_processes and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        )
        self.batch_size = batch_size
        # own: the rows of this batch in the neighborhood. itself[i, j]: whether image i of the batch is image j
        # of the neighborhood.
        self.own = slice(0, batch_size)
        self.itself = torch.eye(batch_size, dtype=torch.bool, device=device)
        if self.is_gathered:
            self.sizes = _AllGather.apply(torch.tensor([batch_size], device=device)).flatten().tolist()
            before, after = sum(self.sizes[: dist.get_rank()]), sum(self.sizes[dist.get_rank() + 1 :])
            self.own = slice(before, before + batch_size)
            self.itself = nn.functional.pad(self.itself, (before, after))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of this batch, (batch_size, ...) -> rows of the neighborhood, (num_neighbors, ...), with gradient."""
        if not self.is_gathered:
            return rows
        sent = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
        padding = sent.new_zeros(max(self.sizes) - self.batch_size, *sent.shape[1:])
        gathered = _AllGather.apply(torch.cat([sent, padding]))
        return torch.cat([part[:size] for part, size in zip(gathered, self.sizes, strict=True)]).to(rows.dtype)


def pairwise_mean_squared_error(images: torch.Tensor, neighbors: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    Mean squared error between all pairs of images, as one matrix product: (|x|^2 + |y|^2 - 2 x y) / n.

    Pass centered images: centering doesn't change the differences, and it keeps the rounding error of the subtraction
    small. The product is in float64 where the
    device has it: in float32, as on Apple's GPUs, it is off by up to 0.1 dB at 45 dB for images of high contrast, and
    tensor cores may round the factors further (TF32, or bf16 under `torch.set_float32_matmul_precision`). The cost is
    small: 2 B^2 n operations, 0.4 GFLOP for 256 images at 32 px, 20 GFLOP at 224 px.

    Args:
        images (`torch.FloatTensor` of shape `(batch_size, n)`):
            Flattened images, float32.
        neighbors (`torch.FloatTensor` of shape `(num_neighbors, n)`, *optional*):
            The images to compare with. Defaults to `images` themselves.

    Returns:
        `torch.FloatTensor` of shape `(batch_size, num_neighbors)`. Non-negative; without `neighbors`, symmetric with
        an exact zero diagonal.
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


def _neighbors_mean(rows: torch.Tensor, is_neighbor: torch.Tensor) -> torch.Tensor:
    """Mean over the rows that are a neighbor of at least one image, (N, ...) -> (...)."""
    weights = (is_neighbor if is_neighbor.ndim == 1 else is_neighbor.any(0)).float()[:, None]
    return ((rows * weights).sum(0) / weights.sum().clamp(min=1)).to(rows.dtype)


class RelationshipPositionEncoding(nn.Module):
    r"""
    Relationship Position Encoding (RPE): the relation of each pair of images, computed from the PSNR of their pixels,
    p_ij = min(PSNR_ij, psnr_max) / psnr_max. The relation p_ii of an image to itself is 1 or,
    with `self_relation="nearest"`, its highest relation to a neighbor. The paper doesn't say how PSNR is normalized;
    dividing by the ceiling `psnr_max` is our choice. RPE has no parameters, and no gradient flows through it.
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
                Images from the image processor, in any float dtype.
            relation_mask (`torch.BoolTensor`, *optional*):
                `False` excludes an image as a neighbor: of all images, shape `(num_neighbors,)`, or of the image of
                that row, shape `(batch_size, num_neighbors)`.
            neighborhood (`Neighborhood`, *optional*):
                The images to relate the batch to. Defaults to the batch.

        Returns:
            The relations, `torch.FloatTensor` of shape `(batch_size, num_neighbors)`, float32 in [0, 1]; and which
            neighbors are finite, `torch.BoolTensor` of shape `(num_neighbors,)`. Relations to non-finite images are 0.
        """
        if neighborhood is None:
            neighborhood = Neighborhood(pixel_values.shape[0], pixel_values.device)
        with maybe_autocast(device_type=pixel_values.device.type, enabled=False):
            images = neighborhood.gather(self.unit_range_images(pixel_values))
            is_finite = images.isfinite().all(-1)
            is_neighbor = is_finite if relation_mask is None else is_finite & relation_mask
            images = torch.where(is_finite[:, None], images, 0.0)
            images = images - _neighbors_mean(images, is_neighbor)

            own = neighborhood.own
            similarities = self.similarities(images[own], images if neighborhood.is_gathered else None)
            similarities = torch.where(is_finite[own, None] & is_finite[None, :], similarities, 0.0)
            diagonal = self._self_similarities(similarities, is_neighbor & ~neighborhood.itself)
            return torch.where(neighborhood.itself, diagonal, similarities), is_finite

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
                Images from the image processor. Not needed for a bank without thumbnails.
            references (`ReferenceBank`):
                The bank of N references. Without thumbnails, every relation is the mean relation of the bank.
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
                images = self.unit_range_images(pixel_values, references.images.shape[-2:])
                is_finite = images.isfinite().all(-1)
                images = torch.where(is_finite[:, None], images, 0.0)
                neighbors = references.unit_range_images()
                mean = neighbors.mean(0)
                similarities = self.similarities(images - mean, neighbors - mean)
        is_neighbor = torch.ones_like(similarities, dtype=torch.bool) if reference_mask is None else reference_mask
        own = self._self_similarities(similarities, is_neighbor)
        return torch.cat([own, similarities], dim=-1), is_finite

    def similarities(self, images: torch.Tensor, neighbors: torch.Tensor | None = None) -> torch.Tensor:
        """Relations of flattened, centered images, (B, n) and (N, n) -> (B, N); without `neighbors`, to each other."""
        error = pairwise_mean_squared_error(images, neighbors)
        psnr = -10 * error.clamp(min=10.0 ** (-self.psnr_max / 10)).log10()
        return (psnr / self.psnr_max).clamp(0, 1)

    def _self_similarities(self, similarities: torch.Tensor, is_neighbor: torch.Tensor) -> torch.Tensor:
        """The relation p_ii of each image to itself, (B, 1), see `self_relation` of [`RBIConfig`]."""
        ones = torch.ones_like(similarities[:, :1])
        if self.self_relation == "one":
            return ones
        nearest = torch.where(is_neighbor, similarities, 0.0).amax(-1, keepdim=True)
        return torch.where(is_neighbor.any(-1, keepdim=True), nearest, ones)

    def thumbnails(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """8-bit thumbnails for a bank, `psnr_image_size` (`None`: 32) pixels or less, (B, C, H, W) -> (B, C, h, w)."""
        limit = self.image_size or _FULL_SIZE_THUMBNAILS
        size = [min(limit, length) for length in pixel_values.shape[-2:]]
        return quantized(self.unit_range_images(pixel_values, size)).view(len(pixel_values), -1, *size)

    def unit_range_images(self, pixel_values: torch.Tensor, size: Sequence[int] | None = None) -> torch.Tensor:
        """Undoes the normalization, averages to `size` or `psnr_image_size`, flattens: (B, C, H, W) -> (B, n)."""
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


class RRAOutput(NamedTuple):
    r"""
    Output of [`ResidualRelationshipAttention`].

    Args:
        features (`torch.FloatTensor` of shape `(batch_size, feature_size)`):
            Features of each image after integration.
        attention (`torch.FloatTensor` of shape `(batch_size, num_heads, num_neighbors)`, *optional*):
            Attention of each image to each neighbor. With references, `num_neighbors` is 1 + N, the image itself
            first. `None` without neighbors.
        vote_logits (`torch.FloatTensor` of shape `(batch_size, num_heads, N)`, *optional*):
            With references: attention logits for the votes, see [`ReferenceBank.count_votes`]. They use the learned
            temperature and gain, even where `attention` uses `reference_temperature` and `reference_gain`.
    """

    features: torch.Tensor
    attention: torch.Tensor | None = None
    vote_logits: torch.Tensor | None = None


class ResidualRelationshipAttention(nn.Module):
    r"""
    Residual Relationship Attention (RRA): attention between the images of a batch, modulated by their relations p,
    next to a residual path that keeps each image's own features. With the fields of [`RBIConfig.paper`], where q, k, v
    and r are linear projections of the features:

        A_ij = softmax_j(q_i (k_j + p_ij w) / sqrt(d_head)),  m_i = sum_j A_ij (v_j + p_ij w)
        beta_i = sigmoid(w_beta [m_i; r_i; m_i - r_i]),       z_i = beta_i r_i + (1 - beta_i) m_i

    This is the operator of `torch_geometric.nn.TransformerConv(beta=True, edge_dim=1)` on the complete graph, the
    head of the authors' earlier code. We assume that the paper uses the same head, with p as the edge attribute. Other
    values of `attention_type`, `relation_position_encoding` and `residual_gate` replace parts of it, see
    [`RBIConfig`]. The relation p_ij w has rank one, so no tensor of shape (B, B, d) is built: q_i (p_ij w) = p_ij (q_i
    w), and sum_j A_ij p_ij w = (sum_j A_ij p_ij) w.
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
        # Kept because the `reference_*` fields can change after the model is built.
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
    ) -> RRAOutput:
        r"""
        The arguments select one of three kinds of attention: to the image itself (neither `is_neighbor` nor
        `references`; then nothing is computed across images), to the batch (`is_neighbor`), or to references.

        Args:
            features (`torch.FloatTensor` of shape `(batch_size, feature_size)`):
                Features of the images, finite.
            similarities (`torch.FloatTensor` of shape `(batch_size, num_neighbors)`, *optional*):
                The relations p in [0, 1]. Needed with neighbors, unless `relation_position_encoding="none"`. With
                `references`, `(batch_size, 1 + N)`, the relation to the image itself first.
            is_neighbor (`torch.BoolTensor` of shape `(num_neighbors,)` or `(batch_size, num_neighbors)`, *optional*):
                Whether an image is a neighbor, of all images or of the image of the row. Each image attends to itself
                in any case. With `references`, of shape `(batch_size, N)`, and by default all are neighbors.
            neighborhood (`Neighborhood`, *optional*):
                The images that can be attended to. Defaults to the batch.
            references (`ReferenceBank`, *optional*):
                The N images to attend to instead of the batch.
        """
        if references is not None:
            return self._attend_to_references(features, similarities, is_neighbor, references)
        if is_neighbor is None:
            return self._attend_to_itself(features)
        if neighborhood is None:
            neighborhood = Neighborhood(features.shape[0], features.device)
        return self._attend_to_batch(features, similarities, is_neighbor, neighborhood)

    def _attend_to_itself(self, features: torch.Tensor) -> RRAOutput:
        # One neighbor, with the relation 1: the softmax is 1.
        message = self.value(features)
        if self.relation_position_encoding == "key_value":
            message = message + self._relation_vector(features).flatten()
        return RRAOutput(self._with_residual(message, features))

    def _attend_to_batch(
        self,
        features: torch.Tensor,
        similarities: torch.Tensor | None,
        is_neighbor: torch.Tensor,
        neighborhood: Neighborhood,
    ) -> RRAOutput:
        neighbors = neighborhood.gather(features)
        # Pooled features of one network are nearly parallel; subtracting the mean exposes the differences.
        compared = neighbors - _neighbors_mean(neighbors, is_neighbor) if self.is_cosine else neighbors
        query = self._by_head(self.query(compared[neighborhood.own]))
        key, value = self._by_head(self.key(compared)), self._by_head(self.value(neighbors))
        relation = self._relation_vector(features)
        with maybe_autocast(device_type=features.device.type, enabled=False):
            query, key = self._comparable(query), self._comparable(key)
            scores = self._scores(query @ key.transpose(1, 2), query, relation, similarities)
            attention = scores.masked_fill(~(is_neighbor | neighborhood.itself), -math.inf).softmax(dim=-1)
        attention = nn.functional.dropout(attention, p=self.attention_dropout, training=self.training)
        message = self._with_relations(attention.to(value.dtype) @ value, attention, similarities, relation)
        return RRAOutput(self._with_residual(message.to(value.dtype), features), attention.transpose(0, 1))

    def _attend_to_references(
        self,
        features: torch.Tensor,
        similarities: torch.Tensor | None,
        is_neighbor: torch.Tensor | None,
        references: ReferenceBank,
    ) -> RRAOutput:
        mean, keys, values = self._projected(references)
        compared = features - mean.to(features.dtype)
        query, own_key = self._by_head(self.query(compared)), self._by_head(self.key(compared))
        own_value = self._by_head(self.value(features))
        key, value = self._by_head(keys), self._by_head(values).to(own_value.dtype)
        relation = self._relation_vector(features)
        with maybe_autocast(device_type=features.device.type, enabled=False):
            query, own_key, key = (self._comparable(each) for each in (query, own_key, key))
            # Within the batch, each image attends only to itself.
            products = torch.cat([(query * own_key).sum(-1, keepdim=True), query @ key.transpose(1, 2)], dim=-1)
            vote_logits = self._scores(products, query, relation, similarities)
            scores = self._scores(
                products, query, relation, similarities, self.config.reference_temperature, self.config.reference_gain
            )
            if is_neighbor is not None:
                allowed = nn.functional.pad(is_neighbor, (1, 0), value=True)
                scores, vote_logits = (each.masked_fill(~allowed, -math.inf) for each in (scores, vote_logits))
            attention = self._share_out(scores[..., :1], scores[..., 1:])
        attention = nn.functional.dropout(attention, p=self.attention_dropout, training=self.training)
        weights = attention.to(own_value.dtype)
        message = weights[..., :1] * own_value + weights[..., 1:] @ value
        message = self._with_relations(message, attention, similarities, relation).to(own_value.dtype)
        return RRAOutput(
            self._with_residual(message, features), attention.transpose(0, 1), vote_logits[..., 1:].transpose(0, 1)
        )

    def project_references(self, references: ReferenceBank) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean to subtract before the cosine (zeros for dot products), (d,); keys and values of a bank, (N, d)."""
        features = references.features.to(self._dtype(references))
        mean = features.mean(0) if self.is_cosine else torch.zeros_like(features[0])
        return mean, self.key(features - mean), self.value(features)

    def prepare_references(self, references: ReferenceBank):
        """Computes mean, keys and values of a bank once, for a model whose weights do not change."""
        device_type = references.features.device.type
        # Tensors made in inference mode could not be used in a later forward pass with gradients.
        with torch.inference_mode(False), torch.no_grad(), maybe_autocast(device_type=device_type, enabled=False):
            references.mean, references.keys, references.values = self.project_references(references)
            references.vector = torch.arange(1.0, references.features.shape[1] + 1).sin()[None].to(references.features)
            references.response = self._response(references)
        references.is_prepared = True

    def _projected(self, references: ReferenceBank) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `project_references`, but takes what was prepared where the weights are the same and need no gradient."""
        is_exporting = torch.compiler.is_exporting()
        # A compiled graph cannot look at values, and outlives changes of the weights. An exported one does not.
        if self.training or (torch.compiler.is_compiling() and not (is_exporting and references.is_prepared)):
            return self.project_references(references)
        if not is_exporting:
            with maybe_autocast(device_type=references.features.device.type, enabled=False):
                response = self._response(references)
            if response.requires_grad or response.is_meta:
                return self.project_references(references)
            # Of the same tensors in one process. Where rounding differs all the same, they are computed again.
            if not (references.is_prepared and torch.equal(response, references.response)):
                self.prepare_references(references)
        return references.mean, references.keys, references.values

    def _response(self, references: ReferenceBank) -> torch.Tensor:
        """
        Key and value of a fixed vector, (2, d). They change with the weights, however these are changed: in place or
        not, by a hook, an adapter that is switched off, or quantization.
        """
        vector = references.vector.to(self._dtype(references))
        return torch.cat([self.key(vector), self.value(vector)])

    def _dtype(self, references: ReferenceBank) -> torch.dtype:
        """What the projections take. Quantized ones have no floating-point weights, or no parameters at all."""
        dtypes = (parameter.dtype for parameter in self.key.parameters() if parameter.is_floating_point())
        return next(dtypes, references.features.dtype)

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
        if not self.is_cosine:
            scores = scores * self.head_size**-0.5
        elif temperature is not None:
            scores = scores / temperature
        else:
            scores = scores * self.logit_scale.float().clamp(max=math.log(_MAX_LOGIT_SCALE)).exp()[:, None, None]
        if self.relation_gain is not None:
            gains = self.relation_gain.float()[:, None, None] if gain is None else gain
            scores = scores + gains * (similarities * self.psnr_max)
        return scores

    def _share_out(self, own: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """
        Softmax over the image itself, (heads, B, 1), and its `num_reference_neighbors` references with the highest
        logits (more if logits tie), (heads, B, N). With `reference_share`, the references get that share of the
        attention, and the image the rest, independently of its own logit.
        """
        num_neighbors, share = self.config.num_reference_neighbors, self.config.reference_share
        if num_neighbors is not None and num_neighbors < others.shape[-1]:
            least = others.topk(num_neighbors, dim=-1).values[..., -1:]
            others = others.masked_fill(others < least, -math.inf)
        if share is None:
            return torch.cat([own, others], dim=-1).softmax(dim=-1)
        # Where no reference is allowed, the image keeps all of its attention.
        has_any = others.isfinite().any(-1, keepdim=True)
        given = share * has_any.to(others.dtype)
        others = torch.where(has_any, others, 0.0).softmax(dim=-1)
        return torch.cat([1 - given, given * others], dim=-1)

    def _with_relations(
        self,
        message: torch.Tensor,
        attention: torch.Tensor,
        similarities: torch.Tensor | None,
        relation: torch.Tensor | None,
    ) -> torch.Tensor:
        """Messages plus the contribution of the relations to the values, (heads, B, d_head) -> (B, d)."""
        if self.relation_position_encoding == "key_value":
            message = message + (attention * similarities).sum(-1, keepdim=True).to(relation.dtype) * relation
        return message.transpose(0, 1).flatten(1)

    def _with_residual(self, message: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if self.residual is None:
            return message
        residual = self.residual(features)
        if self.gate is None:
            return residual + message
        beta = self.gate(torch.cat([message, residual, message - residual], dim=-1)).sigmoid()
        return beta * residual + (1 - beta) * message

    def _relation_vector(self, features: torch.Tensor) -> torch.Tensor | None:
        """The vector w, (heads, 1, d_head). Calls its layer: accelerate loads offloaded weights in `forward`."""
        if self.relation is None:
            return None
        return self.relation(features.new_ones(1, 1)).view(self.num_heads, 1, self.head_size)

    def _by_head(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, d) -> (heads, rows, d_head)"""
        return rows.view(-1, self.num_heads, self.head_size).transpose(0, 1)

    def _comparable(self, rows: torch.Tensor) -> torch.Tensor:
        """Queries or keys in float32, of length 1 for cosine attention."""
        return nn.functional.normalize(rows.float(), dim=-1) if self.is_cosine else rows.float()


__all__ = [
    "Neighborhood",
    "RRAOutput",
    "RelationshipPositionEncoding",
    "ResidualRelationshipAttention",
    "pairwise_mean_squared_error",
]
