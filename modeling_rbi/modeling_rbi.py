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
import inspect
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, can_return_tuple, logging

from .backbone_rbi import build_backbone, check_images, measure_feature_size, pool, unreadable_weights
from .bank_rbi import NO_LABEL, ReferenceBank
from .configuration_rbi import RBIConfig
from .errors_rbi import MismatchedWeightsError, UserError
from .pretrained_rbi import load_backbone, load_classifier
from .references_rbi import AddedClassesMixin, ReferenceBankMixin, ReferencesMixin
from .relations_rbi import Neighborhood, RelationshipPositionEncoding, ResidualRelationshipAttention


logger = logging.get_logger(__name__)

# Both sides of these branches are in use: any value of these fields can be trained.
# trf-ignore: TRF041 config.feature_size, config.head_initialization, config.references
# trf-ignore: TRF041 config.relation_position_encoding


@auto_docstring(
    custom_intro="""
    Output of [`RBIModel`].
    """
)
@dataclass
class RBIModelOutput(BaseModelOutputWithPooling):
    r"""
    last_hidden_state (`torch.FloatTensor`, *optional*):
        The backbone's last hidden state, in the backbone's own shape. `None` if `image_features` were given.
    pooler_output (`torch.FloatTensor` of shape `(batch_size, feature_size)`):
        Features of each image after relationship batch integration, which the classifier reads.
    relation_attentions (`torch.FloatTensor`, *optional*, returned when `output_relations=True`):
        Attention of image i (first axis) to image j (last axis), after dropout, of shape `(batch_size,
        num_attention_heads, num_neighbors)`. Rows sum to 1 without dropout. `num_neighbors` is the batch size, or with
        `gather_across_processes` the number of images on all processes, in order of rank. With
        `relation_scope="reference"` it is 1 + the number of references, the image itself first.
    relation_similarities (`torch.FloatTensor`, *optional*, returned when `output_relations=True`):
        The relations p in [0, 1], PSNR over its ceiling, of shape `(batch_size, num_neighbors)`. `None` with
        `relation_position_encoding="none"`.
    self_pooler_output (`torch.FloatTensor` of shape `(batch_size, feature_size)`, *optional*):
        What `pooler_output` is with `relation_scope="self"`. Returned in training with `self_loss_weight` above 0.
    reference_votes (`torch.FloatTensor` of shape `(batch_size, num_labels)`, *optional*):
        Votes of the references' labels. Rows sum to 1, or are 0 if no reference has a label. Returned with
        `relation_scope="reference"`.
    """

    relation_attentions: torch.Tensor | None = None
    relation_similarities: torch.Tensor | None = None
    self_pooler_output: torch.Tensor | None = None
    reference_votes: torch.Tensor | None = None


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
    relation_attentions (`torch.FloatTensor`, *optional*, returned when `output_relations=True`):
        Attention of image i (first axis) to image j (last axis), after dropout, of shape `(batch_size,
        num_attention_heads, num_neighbors)`. Rows sum to 1 without dropout. `num_neighbors` is the batch size, or with
        `gather_across_processes` the number of images on all processes, in order of rank. With
        `relation_scope="reference"` it is 1 + the number of references, the image itself first.
    relation_similarities (`torch.FloatTensor`, *optional*, returned when `output_relations=True`):
        The relations p in [0, 1], PSNR over its ceiling, of shape `(batch_size, num_neighbors)`. `None` with
        `relation_position_encoding="none"`.
    self_logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`, *optional*):
        What `logits` are with `relation_scope="self"`, for the second loss. Returned in training with
        `self_loss_weight` above 0.
    """

    relation_attentions: torch.Tensor | None = None
    relation_similarities: torch.Tensor | None = None
    self_logits: torch.Tensor | None = None


@auto_docstring
class RBIPreTrainedModel(PreTrainedModel, ReferencesMixin):
    config: RBIConfig
    base_model_prefix = "rbi"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["ResidualRelationshipAttention"]
    # Whether these are supported depends on the backbone, which checks them itself when it is built.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    accepts_loss_kwargs = False
    # A model can be loaded without its references.
    _keys_to_ignore_on_load_unexpected = [r"references\."]

    def post_init(self):
        self.supports_gradient_checkpointing = self.base_model.backbone.supports_gradient_checkpointing
        super().post_init()

    def _activation_checkpointing_enable(self, *args, **kwargs):
        if not self.supports_gradient_checkpointing:
            raise UserError(
                f"{type(self.base_model.backbone).__name__}, the backbone, does not support activation (gradient) "
                "checkpointing: leave it off, or choose another backbone."
            )
        super()._activation_checkpointing_enable(*args, **kwargs)

    def _set_gradient_checkpointing(self, *args, **kwargs):
        self.base_model.backbone._set_gradient_checkpointing(*args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # Only the backbone has several implementations, and it checks for itself.
        return True

    def get_input_embeddings(self):
        return self.base_model.backbone.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.base_model.backbone.set_input_embeddings(value)

    @torch.no_grad()
    def _init_weights(self, module):
        """Initialize the weights"""
        super()._init_weights(module)
        # Layer by layer: transformers skips modules of custom code that have no parameters of their own.
        rra = self.base_model.rra
        name = next((name for name, child in rra.named_children() if child is module), None)
        if name is not None and self.config.head_initialization == "standard":
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
        elif name in ("query", "key", "value", "residual"):
            init.eye_(module.weight)
        elif name is not None:
            init.zeros_(module.weight)
        if isinstance(module, ReferenceBank):
            for buffer in module.buffers():
                init.zeros_(buffer)
            init.constant_(module.labels, NO_LABEL)
        if module is rra and module.relation_gain is not None:
            init.constant_(module.relation_gain, float(self.config.relation_gain))
        if module is rra and module.logit_scale is not None:
            init.constant_(module.logit_scale, -math.log(self.config.attention_temperature))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        r"""
        As `PreTrainedModel.from_pretrained`, but refuses a checkpoint without the weights of the config's backbone:
        transformers would initialize them at random, with only a warning. If the model is loaded with other classes
        than it was saved with (`id2label`), the labels of its references follow the names of their classes; those
        that fit none are dropped, with a warning.

        Raises:
            UserError: if weights of the backbone or the references are missing, the references were computed by
                another backbone, or a model with added classes is loaded with other classes.
            MismatchedWeightsError: if weights have other shapes than the config describes, unless
                `ignore_mismatched_sizes=True`. It is also a `RuntimeError`.
            OSError: if a weights file is truncated or is no safetensors file.
        """
        # Always ignored at first, since the error of transformers names no weight.
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
            raise unreadable_weights(pretrained_model_name_or_path, error) from error
        is_from_file = pretrained_model_name_or_path is not None
        if is_from_file and any("references." in name for name in info["missing_keys"]):
            raise UserError(
                f"The config of {pretrained_model_name_or_path} names {model.config.references['num_references']} "
                "references, but its weights hold none: save the model again, or load it without references by "
                '`references=None, relation_scope="self"`.'
            )
        missing = sorted(name for name in info["missing_keys"] if "backbone." in f".{name}")
        if missing and is_from_file:
            raise UserError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights of the "
                f"{model.config.backbone_config.model_type} backbone that its config describes, for instance "
                f"`{missing[0]}`: the checkpoint belongs to another backbone, or it is a bare backbone, which "
                f"`{cls.__name__}.from_backbone_pretrained` takes."
            )
        mismatched = sorted(info["mismatched_keys"])
        # References cannot be initialized at random.
        if mismatched and not (ignore_mismatched_sizes and all("references." not in name for name, *_ in mismatched)):
            name, saved_shape, shape = mismatched[0]
            raise MismatchedWeightsError(
                f"{len(mismatched)} weights of {pretrained_model_name_or_path} have other shapes than its config "
                f"describes, for instance `{name}` {tuple(saved_shape)} instead of {tuple(shape)}: the checkpoint "
                "belongs to another model. Give the config that it was saved with, or `ignore_mismatched_sizes=True` "
                "to initialize these weights at random (for another number of classes, say)."
            )
        if is_from_file and model.config.references is not None:
            model.base_model.match_reference_labels(cls._saved_names(pretrained_model_name_or_path, kwargs))
        model.base_model.prepare_references()
        if is_from_file and not model.base_model.has_own_references():
            raise UserError(
                f"The references of {pretrained_model_name_or_path} were computed by another backbone than its own, "
                "or before the backbone was trained further: load the model without them by `references=None, "
                'relation_scope="self"`, and set them again with `set_references`.'
            )
        return (model, info) if output_loading_info else model

    @staticmethod
    def _saved_names(name_or_path: str, kwargs: dict[str, Any]) -> dict[int, str]:
        """Names of the classes that a model was saved with, whatever it is loaded with."""
        names = ("cache_dir", "local_files_only", "token", "revision", "subfolder")
        hub_kwargs = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        config_dict, _ = RBIConfig.get_config_dict(name_or_path, **hub_kwargs)
        # transformers leaves out its default.
        saved = config_dict.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}
        return {int(label): name for label, name in saved.items()}

    def save_pretrained(self, save_directory, *args, **kwargs):
        r"""
        As `PreTrainedModel.save_pretrained`. The config names the code of both models, so that both `AutoModel` and
        `AutoModelForImageClassification` load the saved model where this package is not installed.
        """
        if not self.base_model.has_own_references():
            logger.warning(
                "The backbone has been trained since the references were set, so they no longer fit it, and the saved "
                "model will not load with them: set them again with `set_references`, and save the model again."
            )
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
        As `nn.Module.load_state_dict`, but also accepts weights by the names that `save_pretrained` writes. For ViT,
        Swin and others they differ from the names of the modules, and `Trainer` passes the content of a checkpoint's
        file unchanged, to resume a run or to load the best model.
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
            # transformers does not report references as unexpected, see `_keys_to_ignore_on_load_unexpected`.
            unexpected = {*info["unexpected_keys"], *(name for name in state_dict if "references." in name)}
            state_dict = read | {name: state_dict[name] for name in unexpected - read.keys() if name in state_dict}
        loaded = super().load_state_dict(state_dict, strict, assign)
        self.base_model.prepare_references()
        return loaded

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
                Folder or Hub repository of a vision model, or of a model with a vision tower (CLIP, SigLIP).
            preset (`str`, *optional*, defaults to `"paper"`):
                `"paper"` or `"kernel"`, see [`RBIConfig.paper`].
            image_processor (`BaseImageProcessor`, *optional*):
                The processor that the images will go through, which gives `image_mean` and `image_std`. `None`: the
                one saved with the backbone.
            kwargs:
                Fields of [`RBIConfig`] (`num_labels`, `id2label`, `pooling`, ...) go to the config, other arguments
                (`revision`, `token`, `dtype`, ...) to the backbone's `from_pretrained`.

        Raises:
            UserError: if it is no vision model, lacks weights of the backbone, or a field of the config is wrong.
            OSError: if a weights file is truncated or is no safetensors file.
        """
        config, backbone = load_backbone(pretrained_model_name_or_path, preset, image_processor, kwargs)
        return cls._with_backbone(config, backbone)

    @classmethod
    def _with_backbone(cls, config: RBIConfig, backbone: PreTrainedModel):
        """A model with a new head and the weights of the given backbone, except for an unused pooler."""
        model = cls(config).to(device=backbone.device, dtype=backbone.dtype)
        missing, _ = model.base_model.backbone.load_state_dict(backbone.state_dict(), strict=False)
        if missing:
            raise UserError(
                f"The given {type(backbone).__name__} lacks weights of the backbone, for instance `{missing[0]}`."
            )
        config.dtype = backbone.dtype
        return model.eval()


@auto_docstring(
    custom_intro="""
    The backbone and the RBI head, without a classifier. A training run can set two attributes, which are not saved:

    - `gather_across_processes` (`bool`): whether the neighborhoods of `relation_scope="batch"` span the images of all
      processes. Features and the images for PSNR are gathered, with gradient, so all processes must call the model
      together.
    - `self_loss_weight` (`float`, in [0, 1)): share of the training loss that is computed without neighbors, from the
      same features and with the same classifier, so that answers with and without neighbors are both good.
    """
)
class RBIModel(RBIPreTrainedModel, ReferenceBankMixin):
    def __init__(self, config: RBIConfig):
        super().__init__(config)
        # Only the types of fields are checked when they are set on a config, as `from_pretrained` does.
        config.validate()
        if config.feature_size is None:
            config.feature_size = measure_feature_size(config)
            config.validate()
        self.backbone = build_backbone(config)
        self.backbone_arguments = set(inspect.signature(self.backbone.forward).parameters)
        self.rpe = RelationshipPositionEncoding(config)
        self.rra = ResidualRelationshipAttention(config)
        self.references = None if config.references is None else ReferenceBank(config)
        self.gather_across_processes = False
        self.self_loss_weight = 0.0

        # Initialize weights and apply final processing
        self.post_init()

    def extract_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, ModelOutput]:
        r"""
        The backbone's pooled features, which `forward` takes as `image_features`.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                Images from the image processor.

        Returns:
            Features, `torch.FloatTensor` of shape `(batch_size, feature_size)`, and the backbone's whole output.
        """
        outputs = self.backbone(pixel_values, return_dict=True, **self._select_backbone_kwargs(kwargs))
        features = pool(outputs, self.config, pixel_values.shape[-2:])
        if features.shape[1] != self.config.feature_size:
            raise UserError(
                f"`feature_size` is {self.config.feature_size}, but the backbone gives {features.shape[1]} features: "
                "leave it `None` in a new config to have it measured."
            )
        return features, outputs

    def train(self, mode: bool = True):
        """As `nn.Module.train`. Entering evaluation mode computes the keys and values of the references."""
        super().train(mode)
        if not mode:
            self.prepare_references()
        return self

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
        reference_mask: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        output_relations: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RBIModelOutput:
        r"""
        relation_mask (`torch.BoolTensor` of shape `(batch_size,)` or `(batch_size, batch_size)`, *optional*):
            `False` (or 0) for images that are no neighbors of the others, such as padding. They still get an answer.
            With two axes: whether the image of the row may attend to the image of the column; the diagonal then says
            whether an image is a neighbor of images on other processes.
        relation_scope (`str`, *optional*):
            `"batch"`: each image attends to every image of the batch; `"self"`: only to itself; `"reference"`: to
            itself and the model's references. By default `"batch"` in training and `config.relation_scope` in
            evaluation.
        relation_batch_size (`int`, *optional*):
            Splits the batch, in its order, into equal neighborhoods of at most this many images.
        reference_mask (`torch.BoolTensor` of shape `(batch_size, num_references)`, *optional*):
            `False` where an image must not attend to a reference, for instance to itself in training.
        image_features (`torch.FloatTensor` of shape `(batch_size, feature_size)`, *optional*):
            Features of the images, if they are already computed (see `extract_features`): the backbone is skipped,
            and `pixel_values` are used only for PSNR.
        output_relations (`bool`, *optional*):
            Whether to return `relation_attentions` and `relation_similarities`.
        """
        relation_scope = self._resolve_scope(relation_scope)
        check_images(pixel_values, image_features, self.config)
        outputs = RBIModelOutput()
        if image_features is None:
            image_features, backbone_outputs = self.extract_features(pixel_values, **kwargs)
            outputs.last_hidden_state = backbone_outputs.last_hidden_state
            outputs.hidden_states = backbone_outputs.get("hidden_states")
            outputs.attentions = backbone_outputs.get("attentions")

        attentions, similarities = [], []
        if relation_scope == "self":
            outputs.pooler_output = self._integrate_alone(image_features)
        elif relation_scope == "reference":
            outputs.pooler_output, attention, similarity, outputs.reference_votes = self._integrate_references(
                image_features, pixel_values, reference_mask
            )
            attentions.append(attention)
            similarities.append(similarity)
        else:
            relation_mask = self._check_relation_mask(relation_mask, image_features)
            integrated = []
            for rows in self._split_batch(image_features.shape[0], relation_batch_size):
                mask = relation_mask if relation_mask is None else relation_mask[(rows,) * relation_mask.ndim]
                pixels = pixel_values if pixel_values is None else pixel_values[rows]
                features, attention, similarity = self._integrate_batch(image_features[rows], pixels, mask)
                integrated.append(features)
                attentions.append(attention)
                similarities.append(similarity)
            outputs.pooler_output = torch.cat(integrated)
        if self.training and self.self_loss_weight and relation_scope != "self":
            outputs.self_pooler_output = self._integrate_alone(image_features)
        if output_relations:
            self._add_relations(outputs, attentions, similarities)
        return outputs

    @staticmethod
    def _check_relation_mask(relation_mask: torch.Tensor | None, image_features: torch.Tensor) -> torch.Tensor | None:
        if relation_mask is None:
            return None
        batch_size = image_features.shape[0]
        relation_mask = torch.as_tensor(relation_mask, device=image_features.device)
        if tuple(relation_mask.shape) not in ((batch_size,), (batch_size, batch_size)):
            raise UserError(
                f"`relation_mask` must have the shape ({batch_size},), one value for each image, or ({batch_size}, "
                f"{batch_size}), one for each pair, got {tuple(relation_mask.shape)}."
            )
        return relation_mask.bool()

    def _split_batch(self, batch_size: int, relation_batch_size: int | None) -> list[slice]:
        if relation_batch_size is None:
            return [slice(0, batch_size)]
        if relation_batch_size < 1:
            raise UserError(f"`relation_batch_size` must be at least 1, got {relation_batch_size}.")
        if self.gather_across_processes:
            raise UserError(
                "`relation_batch_size` splits the batch of one process, but `gather_across_processes` joins the "
                "batches of all processes: use one of them."
            )
        num_groups = math.ceil(batch_size / relation_batch_size)
        bounds = [group * batch_size // num_groups for group in range(num_groups + 1)]
        return [slice(first, last) for first, last in itertools.pairwise(bounds)]

    def _integrate_alone(self, image_features: torch.Tensor) -> torch.Tensor:
        is_finite = image_features.detach().isfinite().all(-1)
        features = self.rra(torch.where(is_finite[:, None], image_features, 0.0)).features
        return torch.where(is_finite[:, None], features, math.nan)

    def _integrate_references(
        self, image_features: torch.Tensor, pixel_values: torch.Tensor | None, reference_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """
        With N references: integrated features, (B, d); attention, (B, heads, 1 + N); relations, (B, 1 + N); and votes,
        (B, num_labels).
        """
        batch_size, size = image_features.shape[0], len(self.references)
        if self.references.num_classes > self.config.num_labels:
            raise UserError(
                f"The references have labels up to {self.references.num_classes - 1}, but the model has "
                f"{self.config.num_labels} classes: set them again with `set_references`."
            )
        if reference_mask is not None:
            reference_mask = torch.as_tensor(reference_mask, device=image_features.device).bool()
            if reference_mask.shape != (batch_size, size):
                raise UserError(
                    f"`reference_mask` must have the shape ({batch_size}, {size}), one value for each image and "
                    f"reference, got {tuple(reference_mask.shape)}."
                )
        is_finite = image_features.detach().isfinite().all(-1)
        similarities = None
        if self.config.relation_position_encoding != "none":
            if pixel_values is None and self.references.images is not None:
                raise UserError('`pixel_values` are needed for PSNR with `relation_scope="reference"`: pass them too.')
            similarities, has_finite_pixels = self.rpe.relate_to_references(
                pixel_values, self.references, batch_size, reference_mask
            )
            is_finite = is_finite & has_finite_pixels
        features = torch.where(is_finite[:, None], image_features, 0.0)
        outputs = self.rra(features, similarities, reference_mask, references=self.references)
        features = torch.where(is_finite[:, None], outputs.features, math.nan)
        votes = self.references.count_votes(outputs.vote_logits, self.config.num_labels)
        return features, outputs.attention, similarities, votes

    def _integrate_batch(
        self, image_features: torch.Tensor, pixel_values: torch.Tensor | None, relation_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """With N neighbors: integrated features, (B, d); attention, (B, heads, N); and relations, (B, N)."""
        neighborhood = Neighborhood(image_features.shape[0], image_features.device, self.gather_across_processes)
        own = neighborhood.own
        is_finite = neighborhood.gather(image_features.detach().isfinite().all(-1))
        is_neighbor = is_finite
        if relation_mask is None and neighborhood.is_gathered:
            # Other processes may have a mask, and gathering is collective.
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
                raise UserError('`pixel_values` are needed for PSNR with `relation_scope="batch"`: pass them too.')
            similarities, has_finite_pixels = self.rpe(pixel_values, is_neighbor, neighborhood)
            is_finite, is_neighbor = is_finite & has_finite_pixels, is_neighbor & has_finite_pixels
        # A row that is not finite must not reach other answers or gradients, not even times 0.
        is_finite = is_finite[own, None]
        features = torch.where(is_finite, image_features, 0.0)
        outputs = self.rra(features, similarities, is_neighbor, neighborhood)
        return torch.where(is_finite, outputs.features, math.nan), outputs.attention, similarities

    def _add_relations(
        self,
        outputs: RBIModelOutput,
        attentions: list[torch.Tensor],
        similarities: list[torch.Tensor | None],
    ):
        """Sets the relations of the whole batch. They are 0 between images of different neighborhoods."""
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
        if relation_scope not in ("batch", "self", "reference"):
            raise UserError(f'`relation_scope` must be "batch", "self" or "reference", got {relation_scope!r}.')
        if relation_scope == "reference":
            self.require_references("attend to")
        return relation_scope


@auto_docstring(
    custom_intro="""
    RBI Model with an image classification head on top: a linear layer on each image's features after relationship
    batch integration.
    """
)
class RBIForImageClassification(RBIPreTrainedModel, AddedClassesMixin):
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
        reference_mask: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        output_relations: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RBIImageClassifierOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Labels for computing the classification loss, in `[0, ..., config.num_labels - 1]`, or -100 for images
            that the loss leaves out. If `config.num_labels == 1` a regression loss is computed (mean square loss).
            With `problem_type="multi_label_classification"`, values in [0, 1] of shape `(batch_size, num_labels)`.
        relation_mask (`torch.BoolTensor` of shape `(batch_size,)` or `(batch_size, batch_size)`, *optional*):
            `False` (or 0) for images that are no neighbors of the others, such as padding. They still get an answer.
            With two axes: whether the image of the row may attend to the image of the column; the diagonal then says
            whether an image is a neighbor of images on other processes.
        relation_scope (`str`, *optional*):
            `"batch"`: each image attends to every image of the batch; `"self"`: only to itself; `"reference"`: to
            itself and the model's references. By default `"batch"` in training and `config.relation_scope` in
            evaluation.
        relation_batch_size (`int`, *optional*):
            Splits the batch, in its order, into equal neighborhoods of at most this many images.
        reference_mask (`torch.BoolTensor` of shape `(batch_size, num_references)`, *optional*):
            `False` where an image must not attend to a reference, for instance to itself in training.
        image_features (`torch.FloatTensor` of shape `(batch_size, feature_size)`, *optional*):
            Features of the images, if they are already computed (see `RBIModel.extract_features`): the backbone is
            skipped, and `pixel_values` are used only for PSNR.
        output_relations (`bool`, *optional*):
            Whether to return `relation_attentions` and `relation_similarities`.
        """
        outputs = self.rbi(
            pixel_values,
            relation_mask=relation_mask,
            relation_scope=relation_scope,
            relation_batch_size=relation_batch_size,
            reference_mask=reference_mask,
            image_features=image_features,
            output_relations=output_relations,
            **kwargs,
        )
        logits, self_logits = self._classify(outputs.pooler_output), None
        if outputs.reference_votes is not None:
            logits = self.with_votes(logits, outputs.reference_votes)
        if outputs.self_pooler_output is not None:
            self_logits = self._classify(outputs.self_pooler_output)

        loss = None
        if labels is not None:
            labels = self._prepare_labels(labels, logits)
            loss = self.loss_function(labels, logits, self.config)
            if self_logits is not None:
                weight = self.rbi.self_loss_weight
                loss = (1 - weight) * loss + weight * self.loss_function(labels, self_logits, self.config)

        return RBIImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            relation_attentions=outputs.relation_attentions,
            relation_similarities=outputs.relation_similarities,
            self_logits=self_logits,
        )

    def _prepare_labels(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Labels in the shape and type that the loss of this kind of problem takes."""
        batch_size, num_labels = logits.shape
        labels = torch.as_tensor(labels, device=logits.device)
        if labels.ndim and labels.shape[0] != batch_size:
            raise UserError(f"`labels` are for {labels.shape[0]} images, but the batch holds {batch_size}.")
        is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        problem = self.config.problem_type
        if problem is None and num_labels == 1:
            problem = "regression"
        elif problem is None:
            problem = "single_label_classification" if is_integer else "multi_label_classification"
        given = f"`labels` are {labels.dtype} of shape {tuple(labels.shape)}"
        if problem == "single_label_classification":
            if not is_integer or tuple(labels.shape) not in ((batch_size,), (batch_size, 1)):
                raise UserError(
                    f"{given}, but must be one class number for each of the {batch_size} images: take `argmax(-1)` of "
                    'one-hot labels, or set `problem_type="multi_label_classification"` for images with several '
                    "classes."
                )
            labels = labels.long().flatten()
        else:
            shapes = ((batch_size, num_labels), (batch_size,)) if num_labels == 1 else ((batch_size, num_labels),)
            if labels.is_complex() or tuple(labels.shape) not in shapes:
                raise UserError(
                    f"{given}, but must have the shape ({batch_size}, {num_labels}), one value for each image and "
                    "class: for images with one class each, give whole numbers of shape "
                    f'({batch_size},), or set `problem_type="single_label_classification"`.'
                )
            labels = labels.to(logits.dtype).view(logits.shape)
        if torch.compiler.is_compiling() or problem == "regression":
            return labels
        if problem == "single_label_classification":
            wrong, valid = ((labels < 0) & (labels != NO_LABEL)) | (labels >= num_labels), f"in 0..{num_labels - 1}"
            hint = " (or -100, to leave an image out of the loss): set `num_labels` to the number of classes."
        else:
            wrong, valid, hint = ~((labels >= 0) & (labels <= 1)), "in [0, 1]", "."
        if wrong.any():
            raise UserError(f"`labels` hold {labels[wrong][0].item()}, but must be {valid}{hint}")
        return labels

    def _classify(self, features: torch.Tensor) -> torch.Tensor:
        # NaN bypasses the classifier: 0 * NaN in its gradient would be NaN for all images.
        is_finite = features.isfinite().all(-1, keepdim=True)
        logits = self.classifier(self.dropout(torch.where(is_finite, features, 0.0)))
        return torch.where(is_finite, logits, math.nan)

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
        `head_initialization="identity"`, as in the kernel preset, `relation_scope="self"` gives the classifier's own
        logits, and `"batch"` is useful without training.

        Args:
            model_or_path (`PreTrainedModel` or `str`):
                An image classifier of transformers, or its folder or Hub repository. A model is copied, not changed.
            preset (`str`, *optional*, defaults to `"kernel"`):
                `"paper"` or `"kernel"`, see [`RBIConfig.paper`].
            image_processor (`BaseImageProcessor`, *optional*):
                The processor that the images will go through, which gives `image_mean` and `image_std`. `None`: the
                one saved with the model.
            kwargs:
                Fields of [`RBIConfig`] go to the config, other arguments (`revision`, `dtype`, ...) to the
                classifier's `from_pretrained`.

        Raises:
            UserError: if the classifier is not a linear layer on features that a pooling of [`RBIConfig`] gives
                (PoolFormer has a normalization in between, distilled DeiT has two classifiers).
        """
        config, backbone, linear = load_classifier(model_or_path, preset, image_processor, kwargs)
        model = cls._with_backbone(config, backbone)
        with torch.no_grad():
            model.classifier.weight.copy_(linear.weight)
            model.classifier.bias.copy_(torch.zeros(()) if linear.bias is None else linear.bias)
        return model


__all__ = [
    "RBIForImageClassification",
    "RBIImageClassifierOutput",
    "RBIModel",
    "RBIModelOutput",
    "RBIPreTrainedModel",
]
