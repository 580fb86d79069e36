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
"""PyTorch RBI model: image classification in which the images of a batch attend to each other."""

import copy
import difflib
import inspect
import itertools
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.generic import maybe_autocast

from .configuration_rbi import RBIConfig
from .image_processing_rbi import load_image_processor, pixel_statistics


logger = logging.get_logger(__name__)

# These fields are what the presets `paper` and `kernel`, and ablations between them, differ in.
# trf-ignore: TRF041 config.feature_size, config.head_initialization, config.pooling, config.relation_position_encoding, config.residual_gate

# The largest scale of cosine attention, 1 / temperature, as in SwinV2.
_MAX_LOGIT_SCALE = 100.0

# What a family's own image classifier reads, where that is not the pooler or the mean.
_AUTO_POOLING = {
    "deit": "cls",
    "dinov2": "cls_mean",
    "dinov2_with_registers": "cls_mean",
    "ijepa": "mean",
    "vit": "cls",
    "vit_msn": "cls",
}

_UNUSABLE_BACKBONES = {
    "pvt": "its class token cannot be told from the patches' in its output",
    "sam2_hiera_det_model": "it keeps the channels last in its output",
    "sam2_vision_model": "it keeps the channels last in its output",
    "vit_mae": "it hides patches at random in evaluation too; load its weights as a ViT (`ViTModel`)",
    "yolos": "its detection tokens come after the patches'",
}


@auto_docstring(
    custom_intro="""
    Output of [`RBIModel`].
    """
)
@dataclass
class RBIModelOutput(BaseModelOutputWithPooling):
    r"""
    last_hidden_state (`torch.FloatTensor`, *optional*):
        The backbone's last hidden state, shaped as the backbone has it. `None` where `image_features` were given.
    pooler_output (`torch.FloatTensor` of shape `(batch_size, feature_size)`):
        Features of each image after relationship batch integration, what the classifier reads.
    relation_attentions (`torch.FloatTensor` of shape `(batch_size, num_attention_heads, num_neighbors)`, *optional*, returned when `output_relations=True`):
        Attention that image i (first axis) pays to image j (last axis), after dropout. Rows sum to 1 without it.
        `num_neighbors` is the batch size, or that of all processes, in their order, with `gather_across_processes`.
    relation_similarities (`torch.FloatTensor` of shape `(batch_size, num_neighbors)`, *optional*, returned when `output_relations=True`):
        The relations p in [0, 1], PSNR over its ceiling. `None` with `relation_position_encoding="none"`.
    """

    relation_attentions: torch.Tensor | None = None
    relation_similarities: torch.Tensor | None = None


@auto_docstring(
    custom_intro="""
    Output of [`RBIForImageClassification`].
    """
)
@dataclass
class RBIImageClassifierOutput(ImageClassifierOutput):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
        Classification (or regression if `config.num_labels == 1`) loss.
    logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`):
        Classification scores before softmax.
    relation_attentions (`torch.FloatTensor` of shape `(batch_size, num_attention_heads, num_neighbors)`, *optional*, returned when `output_relations=True`):
        Attention that image i (first axis) pays to image j (last axis), after dropout. Rows sum to 1 without it.
        `num_neighbors` is the batch size, or that of all processes, in their order, with `gather_across_processes`.
    relation_similarities (`torch.FloatTensor` of shape `(batch_size, num_neighbors)`, *optional*, returned when `output_relations=True`):
        The relations p in [0, 1], PSNR over its ceiling. `None` with `relation_position_encoding="none"`.
    """

    relation_attentions: torch.Tensor | None = None
    relation_similarities: torch.Tensor | None = None


class _AllGather(torch.autograd.Function):
    """Rows of all processes, (B, ...) -> (processes, B, ...). The gradient of a row is the sum of all processes' ones."""

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
    other. Gathering is collective: all processes make their neighbourhoods, and gather, in the same order.

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
        # Where the batch stands in the neighbourhood; itself[i, j]: whether its image i is image j there.
        self.own = slice(0, batch_size)
        self.itself = torch.eye(batch_size, dtype=torch.bool, device=device)
        if self.is_gathered:
            self.sizes = _AllGather.apply(torch.tensor([batch_size], device=device)).flatten().tolist()
            before, after = sum(self.sizes[: dist.get_rank()]), sum(self.sizes[dist.get_rank() + 1 :])
            self.own = slice(before, before + batch_size)
            self.itself = nn.functional.pad(self.itself, (before, after))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of this batch, (batch_size, ...) -> those of the neighbourhood, (num_neighbors, ...), with gradient."""
        if not self.is_gathered:
            return rows
        sent = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
        padding = sent.new_zeros(max(self.sizes) - self.batch_size, *sent.shape[1:])
        gathered = _AllGather.apply(torch.cat([sent, padding]))
        return torch.cat([part[:size] for part, size in zip(gathered, self.sizes, strict=True)]).to(rows.dtype)


def pairwise_mean_squared_error(images: torch.Tensor, neighbors: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    Mean squared error between all pairs of images, as one matrix product: (|x|^2 + |y|^2 - 2 x y) / n on centred
    images.

    Centring leaves the differences as they are and keeps the cancellation small. The product is in float64 where the
    device has it: in float32, as on Apple's GPUs, it is off by up to 0.1 dB at 45 dB for pictures of high contrast, and
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
    themselves, p_ij = min(PSNR_ij, psnr_max) / psnr_max. PSNR of images is the paper's; the ceiling as normaliser is
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
            relation_mask (`torch.BoolTensor` of shape `(num_neighbors,)` or `(batch_size, num_neighbors)`, *optional*):
                `False` where an image is no neighbour, of anyone or of the image of the row.
            neighborhood (`Neighborhood`, *optional*):
                The images to relate those of the batch to. `None`: the batch itself.

        Returns:
            The relations, `torch.FloatTensor` of shape `(batch_size, num_neighbors)`, float32 in [0, 1]; and which
            neighbours are finite, `torch.BoolTensor` of shape `(num_neighbors,)`. Those that are not have the
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

            floor = 10.0 ** (-self.psnr_max / 10)
            own = neighborhood.own
            error = pairwise_mean_squared_error(images[own], images if neighborhood.is_gathered else None)
            psnr = -10 * error.clamp(min=floor).log10()
            similarities = (psnr / self.psnr_max).clamp(0, 1)
            similarities = torch.where(is_finite[own, None] & is_finite[None, :], similarities, 0.0)
            return self._set_self_relation(similarities, is_neighbor, neighborhood.itself), is_finite

    def _unit_range_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Undoes the normalisation, (B, C, H, W) -> (B, C * size * size) in float32."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=pixel_values.device)[:, None, None]
            for values in (self.image_mean, self.image_std)
        )
        images = pixel_values.float() * std + mean
        if self.image_size is not None:
            size = [min(self.image_size, length) for length in images.shape[-2:]]
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
    """Mean row of those that are neighbours, of anyone where `is_neighbor` is pairwise, (N, ...) -> (...)."""
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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        Args:
            features (`torch.FloatTensor` of shape `(batch_size, feature_size)`):
                Features of the images, finite.
            similarities (`torch.FloatTensor` of shape `(batch_size, num_neighbors)`, *optional*):
                The relations p in [0, 1]; needed with `is_neighbor` unless RPE enters nowhere.
            is_neighbor (`torch.BoolTensor` of shape `(num_neighbors,)` or `(batch_size, num_neighbors)`, *optional*):
                Whether an image is a neighbour, of all or of the image of the row; each attends to itself besides.
                `None`: each image attends to itself alone, and nothing is computed across images.
            neighborhood (`Neighborhood`, *optional*):
                The images that can be attended to. `None`: the batch itself.

        Returns:
            Integrated features, `(batch_size, feature_size)`, and attention, `(batch_size, num_heads, num_neighbors)`
            (`None` without `is_neighbor`).
        """
        if is_neighbor is None:
            message, attention = self.value(features), None
            if self.relation_position_encoding == "key_value":
                message = message + self._relation_vector(features).flatten()
        else:
            if neighborhood is None:
                neighborhood = Neighborhood(features.shape[0], features.device)
            message, attention = self._attend(features, similarities, is_neighbor, neighborhood)

        if self.residual is None:
            return message, attention
        residual = self.residual(features)
        if self.gate is None:
            return residual + message, attention
        beta = self.gate(torch.cat([message, residual, message - residual], dim=-1)).sigmoid()
        return beta * residual + (1 - beta) * message, attention

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
        # (rows, d) -> (heads, rows, d_head)
        query, key, value = (
            projected.view(-1, self.num_heads, self.head_size).transpose(0, 1)
            for projected in (
                self.query(compared[neighborhood.own]),
                self.key(compared),
                self.value(neighbors),
            )
        )
        relation = None if self.relation is None else self._relation_vector(features)
        with maybe_autocast(device_type=features.device.type, enabled=False):
            attention = self._scores(query.float(), key.float(), relation, similarities)
            attention = attention.masked_fill(~(is_neighbor | neighborhood.itself), -math.inf).softmax(dim=-1)
        attention = nn.functional.dropout(attention, p=self.attention_dropout, training=self.training)

        message = attention.to(value.dtype) @ value
        if self.relation_position_encoding == "key_value":
            message = message + (attention * similarities).sum(-1, keepdim=True).to(relation.dtype) * relation
        message = message.transpose(0, 1).flatten(1)
        return message.to(value.dtype), attention.transpose(0, 1)

    def _relation_vector(self, features: torch.Tensor) -> torch.Tensor:
        """The vector w, (heads, 1, d_head), from a call of its layer: weights that are offloaded come with a call."""
        return self.relation(features.new_ones(1, 1)).view(self.num_heads, 1, self.head_size)

    def _scores(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        relation: torch.Tensor | None,
        similarities: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention logits, (heads, B, d_head) and (heads, N, d_head) -> (heads, B, N), in float32."""
        if self.is_cosine:
            query, key = nn.functional.normalize(query, dim=-1), nn.functional.normalize(key, dim=-1)
            scale = self.logit_scale.float().clamp(max=math.log(_MAX_LOGIT_SCALE)).exp()[:, None, None]
        else:
            scale = self.head_size**-0.5
        scores = query @ key.transpose(1, 2)
        if relation is not None:
            scores = scores + (query @ relation.float().transpose(1, 2)) * similarities
        scores = scores * scale
        if self.relation_gain is not None:
            scores = scores + self.relation_gain.float()[:, None, None] * (similarities * self.psnr_max)
        return scores


@auto_docstring
class RBIPreTrainedModel(PreTrainedModel):
    config: RBIConfig
    base_model_prefix = "rbi"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["ResidualRelationshipAttention"]
    # These are the backbone's to have or not: it checks them itself when it is built.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    accepts_loss_kwargs = False

    def post_init(self):
        self.supports_gradient_checkpointing = self.base_model.backbone.supports_gradient_checkpointing
        super().post_init()

    def _activation_checkpointing_enable(self, *args, **kwargs):
        if not self.supports_gradient_checkpointing:
            raise ValueError(
                f"{type(self.base_model.backbone).__name__}, the backbone, does not support activation (gradient) "
                "checkpointing: leave it off, or choose another backbone."
            )
        super()._activation_checkpointing_enable(*args, **kwargs)

    def _set_gradient_checkpointing(self, *args, **kwargs):
        self.base_model.backbone._set_gradient_checkpointing(*args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # The backbone's, again: it checks for itself. The attention between images has one implementation alone.
        return True

    def get_input_embeddings(self):
        return self.base_model.backbone.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.base_model.backbone.set_input_embeddings(value)

    @torch.no_grad()
    def _init_weights(self, module):
        """Initialize the weights"""
        super()._init_weights(module)
        # Layer by layer: transformers passes over a module of custom code that has no weights beside its children's.
        rra = self.base_model.rra
        name = next((name for name, child in rra.named_children() if child is module), None)
        if name is not None and self.config.head_initialization == "standard":
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
        elif name in ("query", "key", "value", "residual"):
            init.eye_(module.weight)
        elif name is not None:
            init.zeros_(module.weight)
        if module is rra and module.relation_gain is not None:
            init.constant_(module.relation_gain, float(self.config.relation_gain))
        if module is rra and module.logit_scale is not None:
            init.constant_(module.logit_scale, -math.log(self.config.attention_temperature))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        r"""
        As `PreTrainedModel.from_pretrained`, and it refuses a checkpoint that does not hold the weights of the
        config's backbone, which would otherwise start at random with a mere warning.

        Raises:
            ValueError: if weights of the backbone are missing.
            RuntimeError: if weights have other shapes than the config describes, unless `ignore_mismatched_sizes`.
            OSError: if a weights file is truncated or is no safetensors file.
        """
        # Asked for in any case: the error that it stands for names no weight.
        ignore_mismatched_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        except SafetensorError as error:
            raise _unreadable_weights(pretrained_model_name_or_path, error) from error
        missing = sorted(name for name in info["missing_keys"] if "backbone." in f".{name}")
        if missing and pretrained_model_name_or_path is not None:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights of the "
                f"{model.config.backbone_config.model_type} backbone that its config describes, for instance "
                f"`{missing[0]}`: the checkpoint is of another backbone, or it is a bare backbone, which "
                f"`{cls.__name__}.from_backbone_pretrained` takes."
            )
        mismatched = sorted(info["mismatched_keys"])
        if mismatched and not ignore_mismatched_sizes:
            name, saved_shape, shape = mismatched[0]
            raise RuntimeError(
                f"{len(mismatched)} weights of {pretrained_model_name_or_path} have other shapes than its config "
                f"describes, for instance `{name}` {tuple(saved_shape)} instead of {tuple(shape)}: the checkpoint is "
                "of another model. Give the config that it was saved with, or `ignore_mismatched_sizes=True` to start "
                "these weights anew (for another number of classes, say)."
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        r"""
        As `PreTrainedModel.save_pretrained`, and the config names the code of both models, so that either of
        `AutoModel` and `AutoModelForImageClassification` loads what was saved, where this package is not installed.
        """
        if self.is_remote_code() and type(self).__module__ == __name__:
            module = __name__.rpartition(".")[-1]
            auto_map = {
                "AutoModel": f"{module}.RBIModel",
                "AutoModelForImageClassification": f"{module}.RBIForImageClassification",
            }
            self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | auto_map
        return super().save_pretrained(save_directory, *args, **kwargs)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        r"""
        As `nn.Module.load_state_dict`, and it takes weights by the names that `save_pretrained` writes, too. For ViT,
        Swin and others these are not the names of the modules, and `Trainer` hands over the file of a checkpoint as
        it is, to resume or to go back to the best model.
        """
        if not state_dict.keys() <= self.state_dict().keys():
            model, info = type(self).from_pretrained(
                None,
                config=copy.deepcopy(self.config),
                state_dict=state_dict,
                dtype=self.dtype,
                output_loading_info=True,
            )
            read = {name: value for name, value in model.state_dict().items() if name not in info["missing_keys"]}
            state_dict = read | {name: state_dict[name] for name in info["unexpected_keys"] if name in state_dict}
        return super().load_state_dict(state_dict, strict, assign)

    @classmethod
    def from_backbone_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *,
        preset: str = "paper",
        image_processor: BaseImageProcessor | None = None,
        **kwargs,
    ):
        r"""
        Puts a new head on a pretrained backbone.

        Args:
            pretrained_model_name_or_path (`str`):
                Folder or Hub repository of a vision model. Of a model with several towers (CLIP, SigLIP) the vision
                tower is taken.
            preset (`str`, *optional*, defaults to `"paper"`):
                `"paper"` or `"kernel"`, see [`RBIConfig.paper`].
            image_processor (`BaseImageProcessor`, *optional*):
                The processor that the images will go through, for `image_mean` and `image_std`. Looked for beside
                the backbone if it is `None`.
            kwargs:
                Fields of [`RBIConfig`] (`num_labels`, `id2label`, `pooling`, ...) go to the config, the rest
                (`revision`, `token`, `dtype`, ...) to the backbone's `from_pretrained`.

        Raises:
            ValueError: if it is no vision model, or lacks weights of the backbone, or a field of the config is wrong.
            OSError: if a weights file is truncated or is no safetensors file.
        """
        config_kwargs, model_kwargs = _split_config_kwargs(kwargs)
        hub_kwargs = _hub_kwargs(model_kwargs)
        backbone_config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        backbone_config = getattr(backbone_config, "vision_config", backbone_config)
        config_kwargs |= _resolve_pixel_statistics(
            pretrained_model_name_or_path, image_processor, backbone_config, config_kwargs, hub_kwargs
        )
        config = _preset_config(preset, backbone_config=backbone_config, **config_kwargs)
        model_class = _backbone_class(backbone_config)
        backbone = _load_whole(
            model_class,
            pretrained_model_name_or_path,
            config=backbone_config,
            **_backbone_init_kwargs(config, model_class),
            **model_kwargs,
        )
        return cls._with_backbone(config, backbone)

    @classmethod
    def _with_backbone(cls, config: RBIConfig, backbone: PreTrainedModel):
        """A model with a new head and the given backbone's weights, those of a pooler that goes unused left out."""
        model = cls(config).to(device=backbone.device, dtype=backbone.dtype)
        missing, _ = model.base_model.backbone.load_state_dict(backbone.state_dict(), strict=False)
        if missing:
            raise ValueError(
                f"The given {type(backbone).__name__} lacks weights of the backbone, for instance `{missing[0]}`."
            )
        config.dtype = backbone.dtype
        return model.eval()


@auto_docstring
class RBIModel(RBIPreTrainedModel):
    def __init__(self, config: RBIConfig):
        super().__init__(config)
        # Fields set on a config, as `from_pretrained` sets its keyword arguments, were checked for their type alone.
        config.validate()
        if config.feature_size is None:
            config.feature_size = _measure_feature_size(config)
            config.validate()
        self.backbone = _build_backbone(config)
        self.backbone_arguments = set(inspect.signature(self.backbone.forward).parameters)
        self.rpe = RelationshipPositionEncoding(config)
        self.rra = ResidualRelationshipAttention(config)

        # Initialize weights and apply final processing
        self.post_init()

    def extract_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, ModelOutput]:
        r"""
        The backbone's pooled features, what `image_features` of the forward takes.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                Images as the image processor gives them.

        Returns:
            Features, `(batch_size, feature_size)`, and the backbone's whole output.
        """
        outputs = self.backbone(pixel_values, return_dict=True, **self._select_backbone_kwargs(kwargs))
        features = _pool(outputs, self.config, pixel_values.shape[-2:])
        if features.shape[1] != self.config.feature_size:
            raise ValueError(
                f"`feature_size` is {self.config.feature_size}, but the backbone gives {features.shape[1]} features: "
                "leave it `None` in a new config, and it is measured."
            )
        return features, outputs

    def _select_backbone_kwargs(self, kwargs):
        takes_any = "kwargs" in self.backbone_arguments and not hasattr(self.backbone, "timm_model")
        return {
            name: value
            for name, value in kwargs.items()
            if value is not None and (takes_any or name in self.backbone_arguments)
        }

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        relation_mask: torch.Tensor | None = None,
        relation_scope: str | None = None,
        relation_batch_size: int | None = None,
        image_features: torch.Tensor | None = None,
        output_relations: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RBIModelOutput:
        r"""
        relation_mask (`torch.BoolTensor` of shape `(batch_size,)` or `(batch_size, batch_size)`, *optional*):
            `False` (or 0) for images that take no part as neighbours of the others, such as padding. They get an
            answer themselves. With two axes it says of each pair whether the first image may attend to the second;
            its diagonal then says whether an image is a neighbour of other processes' images.
        relation_scope (`str`, *optional*):
            `"batch"`: each image attends to every image of the batch; `"self"`: to itself alone. By default `"batch"`
            in training and `config.relation_scope` in evaluation.
        relation_batch_size (`int`, *optional*):
            The batch is split, in its order, into equal neighbourhoods of at most this many images.
        image_features (`torch.FloatTensor` of shape `(batch_size, feature_size)`, *optional*):
            Features of the images if they are known already (see `extract_features`): the backbone is skipped, and
            `pixel_values` serve PSNR alone.
        output_relations (`bool`, *optional*):
            Whether to return `relation_attentions` and `relation_similarities`.
        """
        relation_scope = self._resolve_scope(relation_scope)
        _check_images(pixel_values, image_features, self.config)
        outputs = RBIModelOutput()
        if image_features is None:
            image_features, backbone_outputs = self.extract_features(pixel_values, **kwargs)
            outputs.last_hidden_state = backbone_outputs.last_hidden_state
            outputs.hidden_states = backbone_outputs.get("hidden_states")
            outputs.attentions = backbone_outputs.get("attentions")

        attentions, similarities = [], []
        if relation_scope == "self":
            outputs.pooler_output = self._integrate_alone(image_features)
        else:
            relation_mask = _check_relation_mask(relation_mask, image_features)
            integrated = []
            for rows in self._split_batch(image_features.shape[0], relation_batch_size):
                mask = relation_mask if relation_mask is None else relation_mask[(rows,) * relation_mask.ndim]
                pixels = pixel_values if pixel_values is None else pixel_values[rows]
                features, attention, similarity = self._integrate_batch(image_features[rows], pixels, mask)
                integrated.append(features)
                attentions.append(attention)
                similarities.append(similarity)
            outputs.pooler_output = torch.cat(integrated)
        if output_relations:
            self._add_relations(outputs, attentions, similarities)
        return outputs

    def _split_batch(self, batch_size: int, relation_batch_size: int | None) -> list[slice]:
        if relation_batch_size is None:
            return [slice(0, batch_size)]
        if relation_batch_size < 1:
            raise ValueError(f"`relation_batch_size` must be at least 1, got {relation_batch_size}.")
        if self.config.gather_across_processes:
            raise ValueError(
                "`relation_batch_size` splits the batch of one process, and `config.gather_across_processes` joins "
                "those of all: use one of them."
            )
        num_groups = math.ceil(batch_size / relation_batch_size)
        bounds = [group * batch_size // num_groups for group in range(num_groups + 1)]
        return [slice(first, last) for first, last in itertools.pairwise(bounds)]

    def _integrate_alone(self, image_features: torch.Tensor) -> torch.Tensor:
        is_finite = image_features.detach().isfinite().all(-1)
        features, _ = self.rra(torch.where(is_finite[:, None], image_features, 0.0))
        return torch.where(is_finite[:, None], features, math.nan)

    def _integrate_batch(
        self, image_features: torch.Tensor, pixel_values: torch.Tensor | None, relation_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Integrated features, (B, d), attention, (B, heads, N), and relations, (B, N), with N neighbours."""
        neighborhood = Neighborhood(
            image_features.shape[0], image_features.device, self.config.gather_across_processes
        )
        own = neighborhood.own
        is_finite = neighborhood.gather(image_features.detach().isfinite().all(-1))
        is_neighbor = is_finite
        if relation_mask is None and neighborhood.is_gathered:
            # Other processes may have one, and gathering is collective.
            relation_mask = torch.ones_like(is_finite[own])
        if relation_mask is not None:
            is_pairwise = relation_mask.ndim == 2
            is_neighbor = is_neighbor & neighborhood.gather(relation_mask.diagonal() if is_pairwise else relation_mask)
            if is_pairwise:
                is_neighbor = is_neighbor.repeat(relation_mask.shape[0], 1)
                is_neighbor[:, own] = is_finite[own] & relation_mask
        similarities = None
        if self.config.relation_position_encoding != "none":
            if pixel_values is None:
                raise ValueError('`pixel_values` are needed for PSNR with `relation_scope="batch"`: pass them too.')
            similarities, has_finite_pixels = self.rpe(pixel_values, is_neighbor, neighborhood)
            is_finite, is_neighbor = is_finite & has_finite_pixels, is_neighbor & has_finite_pixels
        # A row that is not finite must not reach the others' answers or gradients, not even times 0.
        is_finite = is_finite[own, None]
        features = torch.where(is_finite, image_features, 0.0)
        features, attention = self.rra(features, similarities, is_neighbor, neighborhood)
        return torch.where(is_finite, features, math.nan), attention, similarities

    def _add_relations(
        self,
        outputs: RBIModelOutput,
        attentions: list[torch.Tensor],
        similarities: list[torch.Tensor | None],
    ):
        """Relations of the whole batch; images of different neighbourhoods have none."""
        batch_size = outputs.pooler_output.shape[0]
        has_relations = self.config.relation_position_encoding != "none"
        if not attentions:
            itself = torch.eye(batch_size, device=outputs.pooler_output.device)
            outputs.relation_attentions = itself[:, None].expand(-1, self.rra.num_heads, -1)
            outputs.relation_similarities = itself if has_relations else None
        elif len(attentions) == 1:
            outputs.relation_attentions, outputs.relation_similarities = attentions[0], similarities[0]
        else:
            heads = [
                torch.block_diag(*blocks) for blocks in zip(*(each.unbind(1) for each in attentions), strict=True)
            ]
            outputs.relation_attentions = torch.stack(heads, dim=1)
            outputs.relation_similarities = torch.block_diag(*similarities) if has_relations else None

    def _resolve_scope(self, relation_scope: str | None) -> str:
        if relation_scope is None:
            relation_scope = "batch" if self.training else self.config.relation_scope
        if relation_scope not in ("batch", "self"):
            raise ValueError(f'`relation_scope` must be "batch" or "self", got {relation_scope!r}.')
        return relation_scope


@auto_docstring(
    custom_intro="""
    RBI Model with an image classification head on top: a linear layer on each image's features after relationship
    batch integration.
    """
)
class RBIForImageClassification(RBIPreTrainedModel):
    def __init__(self, config: RBIConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.rbi = RBIModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.feature_size, config.num_labels)

        # Initialize weights and apply final processing
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        relation_mask: torch.Tensor | None = None,
        relation_scope: str | None = None,
        relation_batch_size: int | None = None,
        image_features: torch.Tensor | None = None,
        output_relations: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RBIImageClassifierOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Labels for computing the classification loss, in `[0, ..., config.num_labels - 1]`, or -100 for images
            that the loss leaves out. If `config.num_labels == 1` a regression loss is computed (mean square loss).
        relation_mask (`torch.BoolTensor` of shape `(batch_size,)` or `(batch_size, batch_size)`, *optional*):
            `False` (or 0) for images that take no part as neighbours of the others, such as padding. They get an
            answer themselves. With two axes it says of each pair whether the first image may attend to the second;
            its diagonal then says whether an image is a neighbour of other processes' images.
        relation_scope (`str`, *optional*):
            `"batch"`: each image attends to every image of the batch; `"self"`: to itself alone. By default `"batch"`
            in training and `config.relation_scope` in evaluation.
        relation_batch_size (`int`, *optional*):
            The batch is split, in its order, into equal neighbourhoods of at most this many images.
        image_features (`torch.FloatTensor` of shape `(batch_size, feature_size)`, *optional*):
            Features of the images if they are known already (see `RBIModel.extract_features`): the backbone is
            skipped, and `pixel_values` serve PSNR alone.
        output_relations (`bool`, *optional*):
            Whether to return `relation_attentions` and `relation_similarities`.
        """
        outputs = self.rbi(
            pixel_values,
            relation_mask=relation_mask,
            relation_scope=relation_scope,
            relation_batch_size=relation_batch_size,
            image_features=image_features,
            output_relations=output_relations,
            **kwargs,
        )
        # Past the classifier and back, since 0 * NaN in its gradient would be NaN for all images.
        is_finite = outputs.pooler_output.isfinite().all(-1, keepdim=True)
        logits = self.classifier(self.dropout(torch.where(is_finite, outputs.pooler_output, 0.0)))
        logits = torch.where(is_finite, logits, math.nan)

        loss = None
        if labels is not None:
            _check_labels(labels, logits, self.config)
            loss = self.loss_function(labels, logits, self.config)

        return RBIImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            relation_attentions=outputs.relation_attentions,
            relation_similarities=outputs.relation_similarities,
        )

    @classmethod
    def from_image_classifier(
        cls,
        model_or_path: PreTrainedModel | str,
        *,
        preset: str = "kernel",
        image_processor: BaseImageProcessor | None = None,
        **kwargs,
    ):
        r"""
        Plugs the head into a fine-tuned image classifier, between its pooled features and its linear classifier. With
        `head_initialization="identity"`, which the kernel preset has, `relation_scope="self"` gives the classifier's
        own logits, and `"batch"` is of use without training.

        Args:
            model_or_path (`PreTrainedModel` or `str`):
                An image classifier of transformers, or its folder or Hub repository. A model is copied, not changed.
            preset (`str`, *optional*, defaults to `"kernel"`):
                `"paper"` or `"kernel"`, see [`RBIConfig.paper`].
            image_processor (`BaseImageProcessor`, *optional*):
                The processor that the images will go through, for `image_mean` and `image_std`. Looked for beside
                the model if it is `None`.
            kwargs:
                Fields of [`RBIConfig`] go to the config, the rest (`revision`, `dtype`, ...) to the classifier's
                `from_pretrained`.

        Raises:
            ValueError: if the classifier is not a linear layer on features that one of the poolings of [`RBIConfig`]
                gives (a normalisation between them, as in PoolFormer, or two classifiers, as in distilled DeiT).
        """
        config_kwargs, model_kwargs = _split_config_kwargs(kwargs)
        if isinstance(model_or_path, PreTrainedModel):
            if model_kwargs:
                raise ValueError(
                    f"{', '.join(sorted(model_kwargs))} can only be passed beside the path of a classifier, and are no "
                    "fields of RBIConfig."
                )
            classifier = copy.deepcopy(model_or_path).eval()
            name_or_path = model_or_path.name_or_path
        else:
            classifier = _load_whole(AutoModelForImageClassification, model_or_path, **model_kwargs).eval()
            name_or_path = model_or_path
        if isinstance(classifier, RBIPreTrainedModel):
            raise ValueError(f"{name_or_path or 'The given model'} is an RBI model already: use it as it is.")
        for name in ("pooling", "feature_size"):
            if name in config_kwargs:
                raise ValueError(f"`{name}` is the classifier's own and is found out from it: leave it out.")

        linear, probe, features = _find_classifier(classifier)
        backbone_config = getattr(classifier.config, "vision_config", classifier.config)
        config_kwargs |= _resolve_pixel_statistics(
            name_or_path, image_processor, backbone_config, config_kwargs, _hub_kwargs(model_kwargs)
        )
        for name in ("id2label", "label2id", "problem_type"):
            config_kwargs.setdefault(name, getattr(classifier.config, name))
        num_labels = config_kwargs.get("num_labels", len(config_kwargs["id2label"]))
        if {num_labels, len(config_kwargs["id2label"])} != {linear.out_features}:
            raise ValueError(
                f"The classifier has {linear.out_features} classes, so `num_labels` and `id2label` cannot be of another "
                "number: fine-tune `from_backbone_pretrained` for other classes."
            )
        backbone, config_kwargs["pooling"] = _find_backbone(classifier, backbone_config, probe, features)
        config_kwargs["feature_size"] = linear.in_features
        model = cls._with_backbone(_preset_config(preset, backbone_config=backbone_config, **config_kwargs), backbone)
        with torch.no_grad():
            model.classifier.weight.copy_(linear.weight)
            model.classifier.bias.copy_(torch.zeros(()) if linear.bias is None else linear.bias)
        return model


def _backbone_class(backbone_config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `AutoModel` takes for the config, if it is a vision model's."""
    model_class = MODEL_MAPPING.get(type(backbone_config), None)
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    if backbone_config.model_type in _UNUSABLE_BACKBONES:
        raise ValueError(
            f"`backbone_config` is a {type(backbone_config).__name__}, whose model cannot be a backbone: "
            f"{_UNUSABLE_BACKBONES[backbone_config.model_type]}."
        )
    if model_class is None or model_class.main_input_name != "pixel_values":
        raise ValueError(
            f"`backbone_config` is a {type(backbone_config).__name__}, which is not that of a vision model: RBI needs "
            "a backbone that takes `pixel_values`, such as ConvNextConfig, ViTConfig or TimmWrapperConfig."
        )
    return model_class


def _load_whole(model_class: type[PreTrainedModel], name_or_path: str, **kwargs) -> PreTrainedModel:
    """`from_pretrained` that refuses a checkpoint without some of the weights, which would start at random."""
    try:
        model, info = model_class.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise _unreadable_weights(name_or_path, error) from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name_or_path} lacks {len(missing)} weights of {type(model).__name__}, for instance `{missing[0]}`: it is "
            "the checkpoint of another kind of model. (If these are a pooler's, another `pooling` does without them.)"
        )
    return model


def _unreadable_weights(name_or_path: str, error: SafetensorError) -> OSError:
    return OSError(
        f"The weights of {name_or_path} cannot be read ({error}): a safetensors file there is truncated or was altered. "
        "Download or save it again."
    )


def _backbone_init_kwargs(config: RBIConfig, model_class: type[PreTrainedModel]) -> dict[str, bool]:
    """Leaves out a pooler that would go unused: it would have no gradient, which DDP takes for an error."""
    has_option = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    pooling = _AUTO_POOLING.get(config.backbone_config.model_type) if config.pooling == "auto" else config.pooling
    return {"add_pooling_layer": False} if has_option and pooling not in (None, "pooler") else {}


def _build_backbone(config: RBIConfig) -> PreTrainedModel:
    model_class = _backbone_class(config.backbone_config)
    return AutoModel.from_config(config.backbone_config, **_backbone_init_kwargs(config, model_class))


def _expected_image_size(backbone_config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width of the images that the backbone was made for, 224 where it does not say."""
    size = getattr(backbone_config, "image_size", None)
    if size is None and getattr(backbone_config, "pretrained_cfg", None):
        size = backbone_config.pretrained_cfg.get("input_size", (3, 224, 224))[1:]
    size = (getattr(backbone_config, "model_args", None) or {}).get("img_size", size) or 224
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def _num_channels(backbone_config: PreTrainedConfig) -> int:
    """Channels of the images that the backbone takes, 3 where it does not say."""
    model_args = getattr(backbone_config, "model_args", None) or {}  # those of timm
    return getattr(backbone_config, "num_channels", None) or model_args.get("in_chans", 3)


def _measure_feature_size(config: RBIConfig) -> int:
    """Runs the backbone on the meta device: the size stands under no common name in the backbones' configs."""
    config = copy.deepcopy(config)
    image_size = _expected_image_size(config.backbone_config)
    with torch.device("meta"), torch.no_grad():
        backbone = _build_backbone(config).eval()
        pixel_values = torch.zeros(1, len(config.image_mean), *image_size, dtype=backbone.dtype)
        try:
            outputs = backbone(pixel_values, return_dict=True)
        except Exception as error:  # a model that is made for other inputs fails in any way
            raise ValueError(
                f"The features of {type(backbone).__name__} for a picture of {image_size[0]} x {image_size[1]} pixels "
                f"could not be measured ({error}): if it is a vision model that takes such pictures, set "
                "`feature_size` in RBIConfig."
            ) from error
        return _pool(outputs, config, image_size).shape[-1]


def _pool(outputs: ModelOutput, config: RBIConfig, image_size: tuple[int, int]) -> torch.Tensor:
    """The backbone's output as one vector for each image, (batch_size, feature_size)."""
    backbone_name = config.backbone_config.model_type
    pooler_output = getattr(outputs, "pooler_output", None)
    pooling: str = config.pooling
    if backbone_name == "timm_wrapper":
        if pooling not in ("auto", "pooler"):
            raise ValueError(f'`pooling="{pooling}"`, but models of timm pool by themselves: use "pooler" or "auto".')
        if pooler_output is None or pooler_output.ndim != 2:
            raise ValueError(
                "The TimmWrapperConfig turns the pooling of its model off: leave its `do_pooling`, and `features_only` "
                "and `global_pool` of its `model_args`, at their defaults."
            )
        return pooler_output
    if pooling == "auto":
        pooling = _AUTO_POOLING.get(backbone_name, "mean" if pooler_output is None else "pooler")
    if pooling == "pooler":
        if pooler_output is None:
            raise ValueError(
                f'`pooling="pooler"`, but {backbone_name} gives no `pooler_output`: use "mean" or "auto".'
            )
        return pooler_output.flatten(1)

    hidden_state = getattr(outputs, "last_hidden_state", None)
    if hidden_state is None:
        raise ValueError(f"{backbone_name} gives no `last_hidden_state` to pool: RBI needs another backbone.")
    if hidden_state.ndim == 4:  # (N, C, H, W)
        tokens, num_prefix_tokens = hidden_state.flatten(2).transpose(1, 2), 0
    else:  # (N, L, C)
        tokens = hidden_state
        num_prefix_tokens = _count_prefix_tokens(config.backbone_config, tokens.shape[1], image_size)
    if pooling != "mean" and num_prefix_tokens == 0:
        raise ValueError(f'`pooling="{pooling}"`, but {backbone_name} has no class token: use "mean" or "auto".')
    mean = tokens[:, num_prefix_tokens:].mean(1)
    if pooling == "mean":
        return mean
    return tokens[:, 0] if pooling == "cls" else torch.cat([tokens[:, 0], mean], dim=-1)


def _count_prefix_tokens(backbone_config: PreTrainedConfig, num_tokens: int, image_size: tuple[int, int]) -> int:
    """Class, distillation and register tokens: those in front of one token for each patch."""
    patch_size = getattr(backbone_config, "patch_size", None)
    if patch_size is None:
        return 0
    height, width = patch_size if isinstance(patch_size, (list, tuple)) else (patch_size, patch_size)
    return max(num_tokens - (image_size[0] // height) * (image_size[1] // width), 0)


def _check_images(pixel_values: torch.Tensor | None, image_features: torch.Tensor | None, config: RBIConfig):
    if image_features is not None:
        if image_features.ndim != 2 or image_features.shape[1] != config.feature_size or not len(image_features):
            raise ValueError(
                f"`image_features` must have the shape (batch_size, {config.feature_size}) with a batch size of at "
                f"least 1, got {tuple(image_features.shape)}."
            )
        if pixel_values is not None and pixel_values.shape[0] != image_features.shape[0]:
            raise ValueError(
                f"`pixel_values` hold {pixel_values.shape[0]} images, but `image_features` {image_features.shape[0]}."
            )
    elif pixel_values is None:
        raise ValueError("You have to specify pixel_values")
    if pixel_values is None:
        return
    if pixel_values.ndim != 4:
        raise ValueError(
            "`pixel_values` must have the shape (batch_size, num_channels, height, width), got "
            f"{tuple(pixel_values.shape)}; a single image needs a batch axis, `pixel_values[None]`."
        )
    if pixel_values.shape[0] == 0:
        raise ValueError("`pixel_values` are an empty batch: pass at least one image.")
    if pixel_values.shape[1] != len(config.image_mean):
        raise ValueError(
            f"`pixel_values` have {pixel_values.shape[1]} channels, but the model takes {len(config.image_mean)}: "
            "convert the images (`image.convert('RGB')`), and put the channels second."
        )
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"`pixel_values` are {pixel_values.dtype}, but must be float and normalised: pass the images through the "
            "model's image processor (`AutoImageProcessor.from_pretrained`)."
        )


def _check_relation_mask(relation_mask: torch.Tensor | None, image_features: torch.Tensor) -> torch.Tensor | None:
    if relation_mask is None:
        return None
    batch_size = image_features.shape[0]
    relation_mask = torch.as_tensor(relation_mask, device=image_features.device)
    if tuple(relation_mask.shape) not in ((batch_size,), (batch_size, batch_size)):
        raise ValueError(
            f"`relation_mask` must have the shape ({batch_size},), one value for each image, or ({batch_size}, "
            f"{batch_size}), one for each pair, got {tuple(relation_mask.shape)}."
        )
    return relation_mask.bool()


def _check_labels(labels: torch.Tensor, logits: torch.Tensor, config: RBIConfig):
    if labels.shape[0] != logits.shape[0]:
        raise ValueError(f"`labels` are for {labels.shape[0]} images, but the batch holds {logits.shape[0]}.")
    is_single_label = config.problem_type in (None, "single_label_classification") and config.num_labels > 1
    if not is_single_label or labels.is_floating_point() or torch.compiler.is_compiling():
        return
    out_of_range = labels[((labels < 0) & (labels != -100)) | (labels >= config.num_labels)]
    if out_of_range.numel():
        raise ValueError(
            f"`labels` hold {out_of_range[0].item()}, but must be in 0..{config.num_labels - 1} (or -100, to leave an "
            "image out of the loss): set `num_labels` to the number of classes."
        )


def _preset_config(preset: str, **kwargs) -> RBIConfig:
    if preset not in ("paper", "kernel"):
        raise ValueError(f'`preset` must be "paper" or "kernel", got {preset!r}.')
    return getattr(RBIConfig, preset)(**kwargs)


def _split_config_kwargs(kwargs: dict) -> tuple[dict, dict]:
    """Those that are fields of RBIConfig, and the others, which are for `from_pretrained`."""
    names = {*RBIConfig.own_fields(), "num_labels", "id2label", "label2id", "problem_type"}
    for name in kwargs.keys() - names:
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.85):
            raise TypeError(f"There is no argument `{name}`: did you mean `{close[0]}`?")
    config_kwargs = {name: value for name, value in kwargs.items() if name in names}
    return config_kwargs, {name: value for name, value in kwargs.items() if name not in names}


def _hub_kwargs(kwargs: dict) -> dict:
    names = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")
    return {name: value for name, value in kwargs.items() if name in names}


def _resolve_pixel_statistics(
    name_or_path: str,
    image_processor: BaseImageProcessor | None,
    backbone_config: PreTrainedConfig,
    config_kwargs: dict,
    hub_kwargs: dict,
) -> dict[str, list[float]]:
    """`image_mean` and `image_std` for the config, from the image processor unless they are given."""
    if "image_mean" in config_kwargs and "image_std" in config_kwargs:
        return {}
    if image_processor is None and name_or_path:
        try:
            image_processor = load_image_processor(name_or_path, **hub_kwargs)
        except (OSError, ValueError, ImportError) as error:
            logger.info(f"No image processor with {name_or_path}: {error}")
    if image_processor is None:
        logger.warning(
            f"No image processor was found beside {name_or_path or 'the given model'}. PSNR takes the pixels for "
            "normalised with ImageNet's mean and std: pass `image_processor`, or `image_mean` and `image_std`, if they "
            "are not."
        )
        return {}
    mean, std = pixel_statistics(image_processor, _num_channels(backbone_config))
    return {"image_mean": mean, "image_std": std} | config_kwargs


def _find_classifier(classifier: PreTrainedModel) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """Runs the classifier on noise to see which linear layer gives the logits, from which features."""
    config = getattr(classifier.config, "vision_config", classifier.config)
    shape = (2, _num_channels(config), *_expected_image_size(config))
    generator = torch.Generator().manual_seed(0)
    probe = torch.rand(shape, generator=generator).to(classifier.device, classifier.dtype)
    calls = []
    handles = [
        module.register_forward_hook(lambda module, args, output: calls.append((module, args[0], output)))
        for module in classifier.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            logits = getattr(classifier(probe, return_dict=True), "logits", None)
    finally:
        for handle in handles:
            handle.remove()
    for module, features, output in reversed(calls):
        if logits is not None and output.shape == logits.shape and torch.equal(output, logits):
            return module, probe, features
    raise ValueError(
        f"The logits of {type(classifier).__name__} are not the output of one linear layer on pooled features, so RBI "
        "cannot be plugged in before it: take its backbone with `from_backbone_pretrained` and train a new classifier."
    )


def _find_backbone(
    classifier: PreTrainedModel, backbone_config: PreTrainedConfig, probe: torch.Tensor, features: torch.Tensor
) -> tuple[PreTrainedModel, str]:
    """The classifier's backbone, and the pooling that gives the features that its linear layer reads."""
    model_class = _backbone_class(backbone_config)
    backbone = next((module for module in classifier.modules() if isinstance(module, model_class)), None)
    if backbone is None:  # timm's classifiers hold no backbone of their own, only all its weights
        backbone = AutoModel.from_config(backbone_config).to(classifier.device, classifier.dtype).eval()
        backbone.load_state_dict(classifier.state_dict(), strict=False)
    with torch.no_grad():
        outputs = backbone(probe, return_dict=True)
    statistics = [1.0] * probe.shape[1]  # pooling does not need them, but the config checks their number
    for pooling in ("pooler", "cls", "mean", "cls_mean"):
        config = RBIConfig(
            backbone_config=backbone_config, pooling=pooling, image_mean=statistics, image_std=statistics
        )
        try:
            pooled = _pool(outputs, config, probe.shape[-2:])
        except ValueError:
            continue
        if pooled.shape == features.shape and torch.allclose(pooled, features, rtol=1e-4, atol=1e-5):
            return backbone, pooling
    raise ValueError(
        f"{type(classifier).__name__} does more than pooling between its backbone and its linear classifier (a layer "
        "of its own, such as a normalisation), which RBI's backbone would lack: take the backbone with "
        "`from_backbone_pretrained` and train a new classifier."
    )


__all__ = [
    "Neighborhood",
    "RBIForImageClassification",
    "RBIImageClassifierOutput",
    "RBIModel",
    "RBIModelOutput",
    "RBIPreTrainedModel",
    "RelationshipPositionEncoding",
    "ResidualRelationshipAttention",
]
