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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers import initialization as init
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, can_return_tuple, logging

from .backbone_rbi import (
    _backbone_class,
    _backbone_init_kwargs,
    _build_backbone,
    _check_images,
    _expected_image_size,
    _in_evaluation,
    _load_whole,
    _measure_feature_size,
    _pool,
    _unreadable_weights,
)
from .bank_rbi import NO_LABEL, ReferenceBank, check_size
from .configuration_rbi import RBIConfig
from .errors_rbi import UserError
from .pretrained_rbi import (
    _find_backbone,
    _find_classifier,
    _hub_kwargs,
    _preset_config,
    _resolve_pixel_statistics,
    _split_config_kwargs,
)
from .reference_images_rbi import (
    check_choice,
    choose_references,
    default_strategy,
    labels_before_reading,
    read_batches,
)
from .relations_rbi import Neighborhood, RelationshipPositionEncoding, ResidualRelationshipAttention


logger = logging.get_logger(__name__)

# How far, relatively, the features of a fixed pattern may lie from those that the bank's backbone gave: well above what
# half precision changes.
_PROBE_TOLERANCE = 0.1
# Logit of a class that is never answered, finite in half precision.
_NEVER = -1e4
# The mean relation of a bank's images is taken over the pairs of this many of them at most.
_NUM_MEAN_REFERENCES = 1024


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
        `num_neighbors` is the batch size, or that of all processes, in their order, with `gather_across_processes`;
        with `relation_scope="reference"` it is one, for the image itself, and the number of references.
    relation_similarities (`torch.FloatTensor` of shape `(batch_size, num_neighbors)`, *optional*, returned when `output_relations=True`):
        The relations p in [0, 1], PSNR over its ceiling. `None` with `relation_position_encoding="none"`.
    self_pooler_output (`torch.FloatTensor` of shape `(batch_size, feature_size)`, *optional*, returned in training with `self_loss_weight` above 0):
        What `relation_scope="self"` gives in place of `pooler_output`.
    reference_votes (`torch.FloatTensor` of shape `(batch_size, num_labels)`, *optional*, returned with `relation_scope="reference"`):
        The votes of the references' labels. Rows sum to 1, or are 0 where no reference has a label.
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
    relation_attentions (`torch.FloatTensor` of shape `(batch_size, num_attention_heads, num_neighbors)`, *optional*, returned when `output_relations=True`):
        Attention that image i (first axis) pays to image j (last axis), after dropout. Rows sum to 1 without it.
        `num_neighbors` is the batch size, or that of all processes, in their order, with `gather_across_processes`;
        with `relation_scope="reference"` it is one, for the image itself, and the number of references.
    relation_similarities (`torch.FloatTensor` of shape `(batch_size, num_neighbors)`, *optional*, returned when `output_relations=True`):
        The relations p in [0, 1], PSNR over its ceiling. `None` with `relation_position_encoding="none"`.
    self_logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`, *optional*, returned in training with `self_loss_weight` above 0):
        Scores of each image by itself, as `relation_scope="self"` gives them, for the second loss.
    """

    relation_attentions: torch.Tensor | None = None
    relation_similarities: torch.Tensor | None = None
    self_logits: torch.Tensor | None = None


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
    # Those of a model that is loaded without its references.
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
        As `PreTrainedModel.from_pretrained`, and it refuses a checkpoint that does not hold the weights of the
        config's backbone, which would otherwise start at random with a mere warning.

        Raises:
            UserError: if weights of the backbone are missing.
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
        is_from_file = pretrained_model_name_or_path is not None
        if is_from_file and any("references." in name for name in info["missing_keys"]):
            raise UserError(
                f"The config of {pretrained_model_name_or_path} names {model.config.references['num_references']} "
                "references, but its weights hold none: save the model again, or load it without, with "
                '`references=None, relation_scope="self"`.'
            )
        missing = sorted(name for name in info["missing_keys"] if "backbone." in f".{name}")
        if missing and is_from_file:
            raise UserError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights of the "
                f"{model.config.backbone_config.model_type} backbone that its config describes, for instance "
                f"`{missing[0]}`: the checkpoint is of another backbone, or it is a bare backbone, which "
                f"`{cls.__name__}.from_backbone_pretrained` takes."
            )
        mismatched = sorted(info["mismatched_keys"])
        # References cannot start anew.
        if mismatched and not (ignore_mismatched_sizes and all("references." not in name for name, *_ in mismatched)):
            name, saved_shape, shape = mismatched[0]
            raise RuntimeError(
                f"{len(mismatched)} weights of {pretrained_model_name_or_path} have other shapes than its config "
                f"describes, for instance `{name}` {tuple(saved_shape)} instead of {tuple(shape)}: the checkpoint is "
                "of another model. Give the config that it was saved with, or `ignore_mismatched_sizes=True` to start "
                "these weights anew (for another number of classes, say)."
            )
        model.base_model._prepare_references()
        if is_from_file and not model.base_model._has_own_references():
            raise UserError(
                f"The references of {pretrained_model_name_or_path} are of another backbone than its own, or of this one "
                "before it was trained on: make them anew, with `set_references`, on the model without them, loaded with "
                '`references=None, relation_scope="self"`.'
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        r"""
        As `PreTrainedModel.save_pretrained`, and the config names the code of both models, so that either of
        `AutoModel` and `AutoModelForImageClassification` loads what was saved, where this package is not installed.
        """
        if not self.base_model._has_own_references():
            logger.warning(
                "The backbone has been trained since the references were set, so they do not fit it any more, and the "
                "saved model will not load with them: set them again, with `set_references`, and save."
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
            # Transformers does not count the references of another model as unexpected.
            unexpected = {*info["unexpected_keys"], *(name for name in state_dict if "references." in name)}
            state_dict = read | {name: state_dict[name] for name in unexpected - read.keys() if name in state_dict}
        loaded = super().load_state_dict(state_dict, strict, assign)
        self.base_model._prepare_references()
        return loaded

    # It holds weights, no hyperparameter.
    # trf-ignore: TRF033
    def set_references(
        self,
        images: Dataset | Iterable,
        *,
        per_class: int | None = None,
        num_references: int | None = None,
        strategy: str | None = None,
        seed: int = 0,
        image_processor: BaseImageProcessor | None = None,
        keep_images: bool = True,
        batch_size: int = 64,
    ):
        r"""
        Gives the model a reference bank: images that it keeps, as features and small copies, for each image to attend
        to. From then on that is what it does in evaluation (`relation_scope="reference"`), so that an answer uses
        relations and yet depends on nothing else in the batch. References need no labels: they may be training
        images, images of the place where the model works, or both (see `add_references`).

        The bank is saved with the model. **Who gets the model gets small copies of these images**
        (`psnr_image_size` squared pixels, 8 bits; 32 x 32 where PSNR is that of full size), and features: choose
        images that may be passed on, or leave the copies out by `keep_images=False`.

        A reference takes `4 * feature_size` bytes and those of its image, and an image costs `2 * feature_size`
        multiply-adds and the image's pixels more for each, beside its own three projections: 1,000 references of
        1,280 features are 5.9 MB, and 8 million multiply-adds beside the 300 million of MobileNetV2. `MAX_REFERENCES` (16,384) is the limit. Set the bank again after the backbone
        has been trained.

        Args:
            images (`Dataset` or `Iterable`):
                A data set of dicts with `pixel_values` (C, H, W), as the image processor gives them, or with a PIL
                `image`, and `labels` or `label` where they are known (-100: not known). Or a loader of batches,
                `pixel_values` (B, C, H, W).
            per_class (`int`, *optional*):
                References of each class.
            num_references (`int`, *optional*):
                References in all, in place of `per_class`. With neither, all images are taken.
            strategy (`str`, *optional*):
                `"balanced"`, `"herding"` or `"random"`, see [`choose_references`]. By default `"balanced"` where all
                images have labels, else `"random"`.
            seed (`int`, *optional*, defaults to 0):
                Of the choice.
            image_processor (`BaseImageProcessor`, *optional*):
                For PIL images.
            keep_images (`bool`, *optional*, defaults to `True`):
                Whether the bank keeps small images. Without them nothing is known of an image's PSNR to a reference:
                all relations are then the mean one, so that attention goes by features alone.
            batch_size (`int`, *optional*, defaults to 64):
                Images at a time.

        Raises:
            UserError: if the images or labels are not of these forms, a class of the model has no image (unless
                chosen at random), or there are more references than `MAX_REFERENCES`. The model is then as it was.
        """
        features, thumbnails, labels, strategy = self._choose_references(
            images, per_class, num_references, strategy, seed, image_processor, batch_size
        )
        facts = {"strategy": strategy, "per_class": per_class, "seed": seed}
        facts["mean_similarity"] = self.base_model._mean_similarity(thumbnails)
        self.base_model._set_bank(features, thumbnails if keep_images else None, labels, facts)

    def add_references(
        self,
        images: Dataset | Iterable,
        *,
        per_class: int | None = None,
        num_references: int | None = None,
        strategy: str | None = None,
        seed: int = 0,
        image_processor: BaseImageProcessor | None = None,
        batch_size: int = 64,
    ):
        r"""
        Adds images to the reference bank, chosen as [`~RBIPreTrainedModel.set_references`] chooses them. The bank
        keeps small copies of all its images or of none.

        Raises:
            UserError: as `set_references`, and if the model has no bank, or one of another backbone's features.
        """
        self.base_model._require_own_references("add to")
        features, thumbnails, labels, _ = self._choose_references(
            images, per_class, num_references, strategy, seed, image_processor, batch_size
        )
        self._append_references(features, thumbnails, labels)

    def _append_references(self, features: torch.Tensor, images: torch.Tensor, labels: torch.Tensor):
        bank = self.base_model.references
        if bank.images is not None and bank.images.shape[1:] != images.shape[1:]:
            raise UserError(
                f"The bank's images are of {tuple(bank.images.shape[1:])}, those to be added of "
                f"{tuple(images.shape[1:])}: give images of the size that the model takes."
            )
        facts = {
            name: self.config.references.get(name) for name in ("strategy", "per_class", "seed", "mean_similarity")
        }
        all_images = None if bank.images is None else torch.cat([bank.images.cpu(), images])
        if all_images is not None:
            facts["mean_similarity"] = self.base_model._mean_similarity(all_images)
        self.base_model._set_bank(
            torch.cat([bank.features.cpu(), features.to(bank.features.dtype)]),
            all_images,
            torch.cat([bank.labels.cpu(), labels]),
            facts,
        )

    # trf-ignore: TRF033
    def set_reference_features(
        self,
        features: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ):
        r"""
        As [`~RBIPreTrainedModel.set_references`], from features that are known already (see
        [`RBIModel.extract_features`]).

        Args:
            features (`torch.FloatTensor` of shape `(N, feature_size)`):
                Features of the references.
            pixel_values (`torch.FloatTensor` of shape `(N, num_channels, height, width)`, *optional*):
                Their images, as the image processor gives them, or averaged down to `psnr_image_size` already. `None`:
                the bank keeps no images.
            labels (`torch.LongTensor` of shape `(N,)`, *optional*):
                Their classes, -100 where not known.

        Raises:
            UserError: if the shapes do not fit, features are not finite, or there are more references than
                `MAX_REFERENCES`.
        """
        size = self.config.feature_size
        if features.ndim != 2 or features.shape[1] != size or not len(features):
            raise UserError(
                f"`features` of references must have the shape (N, {size}), N at least 1, got {tuple(features.shape)}: "
                "they must come from the model's own backbone."
            )
        if not (is_finite := features.isfinite().all(-1)).all():
            raise UserError(
                f"The features of reference {int((~is_finite).nonzero()[0])} are not finite: leave it out."
            )
        labels = torch.full((len(features),), NO_LABEL) if labels is None else labels.cpu()
        if pixel_values is not None:
            _check_images(pixel_values, features, self.config)
        if labels.shape != features.shape[:1]:
            raise UserError(f"`labels` are for {len(labels)} references, but `features` hold {len(features)}.")
        choose_references(labels, self.config.id2label, strategy="random")  # checks them
        images = None if pixel_values is None else self.base_model.rpe.small_images(pixel_values)
        facts = {"mean_similarity": 1.0 if images is None else self.base_model._mean_similarity(images)}
        self.base_model._set_bank(features.detach(), images, labels, facts)

    def remove_references(self):
        """Takes the reference bank away. An image then attends to itself alone in evaluation."""
        # Deleted first, as torch takes weights for a part that is `None` without a word.
        del self.base_model.references
        self.base_model.references = None
        self.config.references = None
        if self.config.relation_scope == "reference":
            self.config.relation_scope = "self"

    def describe_references(self) -> dict[str, Any]:
        r"""
        What the reference bank holds and costs.

        Returns:
            `dict[str, Any]`: `config.references`; `references_per_class`, by name, of those with labels; `num_bytes`,
            what the bank adds to the model's file; `multiply_adds_per_image`, what it adds to an answer; and
            `has_images`.

        Raises:
            UserError: if the model has no bank.
        """
        bank = self.base_model._require_references("describe")
        known = bank.labels[bank.labels != NO_LABEL].tolist()
        saved = [buffer for buffer in (bank.features, bank.labels, bank.images, bank.probe) if buffer is not None]
        pixels = 0 if bank.images is None else bank.images[0].numel()
        return self.config.references | {
            "has_images": bank.images is not None,
            "references_per_class": {self.config.id2label[label]: known.count(label) for label in sorted(set(known))},
            "num_bytes": sum(buffer.numel() * buffer.element_size() for buffer in saved),
            # The image's own query, key and value; then scores, messages and PSNR with each reference.
            "multiply_adds_per_image": 3 * self.config.feature_size**2
            + len(bank) * (2 * self.config.feature_size + pixels),
        }

    def _choose_references(
        self,
        images: Dataset | Iterable,
        per_class: int | None,
        num_references: int | None,
        strategy: str | None,
        seed: int,
        image_processor: BaseImageProcessor | None,
        batch_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
        """
        Features, small images and labels of those chosen, and the strategy; the others are not read where that can
        be.
        """
        check_choice(per_class, num_references, strategy)
        options = (self.config.id2label, per_class, num_references)
        labels = None if strategy == "herding" else labels_before_reading(images)
        if labels is not None:
            strategy = strategy or default_strategy(labels)
            rows = choose_references(labels, *options, strategy, seed)
            return *self._read_images(images, rows, image_processor, batch_size), strategy
        features, thumbnails, labels = self._read_images(images, None, image_processor, batch_size)
        strategy = strategy or default_strategy(labels)
        rows = choose_references(labels, *options, strategy, seed, features)
        return features[rows], thumbnails[rows], labels[rows], strategy

    @torch.no_grad()
    def _read_images(
        self, images, rows: torch.Tensor | None, image_processor, batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features, small images and labels of all images, in evaluation mode."""
        model = self.base_model
        parameter = next(model.backbone.parameters())
        parts: tuple[list[torch.Tensor], ...] = ([], [], [])
        total = len(rows) if rows is not None else None
        with (
            _in_evaluation(model.backbone),
            logging.tqdm(total=total, desc="References", unit=" images", leave=False) as bar,
        ):
            for pixel_values, labels in read_batches(
                images, None if rows is None else rows.tolist(), image_processor, batch_size
            ):
                pixel_values = pixel_values.to(parameter.device)
                _check_images(pixel_values, None, self.config)
                features, _ = model.extract_features(pixel_values.to(parameter.dtype))
                if not features.isfinite().all():
                    row = sum(map(len, parts[2])) + int((~features.isfinite().all(-1)).nonzero()[0])
                    raise UserError(f"Image {row} has features that are not finite: leave it out.")
                for part, values in zip(
                    parts, (features.cpu(), model.rpe.small_images(pixel_values).cpu(), labels), strict=True
                ):
                    part.append(values)
                bar.update(len(labels))
        if not parts[0]:
            raise UserError("There are no images to make references of.")
        if len({thumbnails.shape[1:] for thumbnails in parts[1]}) > 1:
            raise UserError("The images are of several sizes: pass them through the model's image processor.")
        features, thumbnails, labels = (torch.cat(part) for part in parts)
        return features, thumbnails, labels

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
            UserError: if it is no vision model, or lacks weights of the backbone, or a field of the config is wrong.
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
            raise UserError(
                f"The given {type(backbone).__name__} lacks weights of the backbone, for instance `{missing[0]}`."
            )
        config.dtype = backbone.dtype
        return model.eval()


@auto_docstring(
    custom_intro="""
    The backbone and the RBI head, without a classifier. Two attributes are set for a training run and are not saved:
    `gather_across_processes` (`bool`), whether the neighborhood of `relation_scope="batch"` spans the images of all
    processes (features and pixels for PSNR are gathered, with gradient, so all processes must call the model
    together); and `self_loss_weight` (`float` in [0, 1)), the share of the training loss that is computed without
    neighbors, from the same features and with the same classifier, so that the model answers well with and without.
    """
)
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
        self.references = None if config.references is None else ReferenceBank(config)
        self.gather_across_processes = False
        self.self_loss_weight = 0.0

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
            raise UserError(
                f"`feature_size` is {self.config.feature_size}, but the backbone gives {features.shape[1]} features: "
                "leave it `None` in a new config, and it is measured."
            )
        return features, outputs

    def train(self, mode: bool = True):
        """As `nn.Module.train`; in evaluation, keys and values of the references are computed once."""
        super().train(mode)
        if not mode:
            self._prepare_references()
        return self

    @torch.no_grad()
    def _prepare_references(self):
        bank = getattr(self, "references", None)
        if bank is None or bank.features.is_meta:
            return
        # Weights that are offloaded come with a call of the whole head.
        bank.is_prepared = not any(parameter.is_meta for parameter in self.rra.parameters())
        if bank.is_prepared:
            bank.mean, bank.keys, bank.values = self.rra.project_references(bank)

    def _require_references(self, purpose: str) -> ReferenceBank:
        if self.references is None:
            raise UserError(f"The model has no reference bank to {purpose}: make one with `set_references`.")
        return self.references

    def _require_own_references(self, purpose: str) -> ReferenceBank:
        bank = self._require_references(purpose)
        if not self._has_own_references():
            raise UserError(
                "The backbone has been trained since the references were set, so they do not fit it any more: set them "
                "again, with `set_references`."
            )
        return bank

    def _set_bank(
        self, features: torch.Tensor, images: torch.Tensor | None, labels: torch.Tensor, facts: dict[str, Any]
    ):
        """Puts a bank in the place of the one that is there, if there is one; images are small ones."""
        check_size(len(features))
        if self.config.num_added_classes and len(set(labels.tolist()) - {NO_LABEL}) < self.config.num_labels:
            raise UserError(
                "The model has added classes, which its references tell apart: each class needs labeled references."
            )
        references = facts | {
            "num_references": len(features),
            "num_labeled": int((labels != NO_LABEL).sum()),
            "image_shape": None if images is None else list(images.shape[1:]),
        }
        config = copy.deepcopy(self.config)
        config.references = references
        config.validate()
        bank = ReferenceBank(config)
        parameter = next(self.backbone.parameters())
        bank.to(device=parameter.device, dtype=parameter.dtype)
        bank.features.copy_(features)
        bank.labels.copy_(labels)
        if images is not None:
            bank.images.copy_(images)
        bank.probe.copy_(self._probe_features())
        self.references = bank.train(self.training)
        self.config.references, self.config.relation_scope = references, "reference"
        self._prepare_references()

    def _mean_similarity(self, images: torch.Tensor) -> float:
        """Mean relation of different images of a bank, which are small ones, or 1 of a single one."""
        rows = torch.linspace(0, len(images) - 1, min(len(images), _NUM_MEAN_REFERENCES)).long()
        if len(rows) < 2:
            return 1.0
        pixels = images[rows.to(images.device)].flatten(1).float() / 255
        similarities = self.rpe._similarities(pixels - pixels.mean(0), None)
        others = ~torch.eye(len(rows), dtype=torch.bool, device=images.device)
        return similarities[others].mean().item()

    @torch.no_grad()
    def _probe_features(self) -> torch.Tensor:
        """Features, (d,), of a fixed pattern: waves of several lengths, of another one in each channel."""
        parameter = next(self.backbone.parameters())
        height, width = _expected_image_size(self.config.backbone_config)
        rows, columns = torch.arange(height)[:, None] / height, torch.arange(width)[None, :] / width
        waves = [
            (math.tau * (channel + 2) * (rows + columns)).sin() + (math.tau * 7 * (rows - channel * columns)).cos()
            for channel in range(len(self.config.image_mean))
        ]
        pattern = torch.stack(waves)[None].to(parameter.device, parameter.dtype)
        with _in_evaluation(self.backbone):
            return self.extract_features(pattern)[0][0]

    def _has_own_references(self) -> bool:
        """Whether the bank's features are those of this backbone, as it is now; also where there is none to ask."""
        bank = self.references
        if bank is None or any(tensor.is_meta for tensor in (*self.backbone.parameters(), bank.probe)):
            return True
        was, now = bank.probe.float(), self._probe_features().float()
        return bool((now - was).norm() <= _PROBE_TOLERANCE * was.norm())

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
            `False` (or 0) for images that take no part as neighbors of the others, such as padding. They get an
            answer themselves. With two axes it says of each pair whether the first image may attend to the second;
            its diagonal then says whether an image is a neighbor of other processes' images.
        relation_scope (`str`, *optional*):
            `"batch"`: each image attends to every image of the batch; `"self"`: to itself alone; `"reference"`: to
            itself and the model's references. By default `"batch"` in training and `config.relation_scope` in
            evaluation.
        relation_batch_size (`int`, *optional*):
            The batch is split, in its order, into equal neighborhoods of at most this many images.
        reference_mask (`torch.BoolTensor` of shape `(batch_size, num_references)`, *optional*):
            `False` where an image does not attend to a reference: in training, to itself.
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
        elif relation_scope == "reference":
            outputs.pooler_output, attention, similarity, outputs.reference_votes = self._integrate_references(
                image_features, pixel_values, reference_mask
            )
            attentions.append(attention)
            similarities.append(similarity)
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
        if self.training and self.self_loss_weight and relation_scope != "self":
            outputs.self_pooler_output = self._integrate_alone(image_features)
        if output_relations:
            self._add_relations(outputs, attentions, similarities)
        return outputs

    def _split_batch(self, batch_size: int, relation_batch_size: int | None) -> list[slice]:
        if relation_batch_size is None:
            return [slice(0, batch_size)]
        if relation_batch_size < 1:
            raise UserError(f"`relation_batch_size` must be at least 1, got {relation_batch_size}.")
        if self.gather_across_processes:
            raise UserError(
                "`relation_batch_size` splits the batch of one process, and `gather_across_processes` joins "
                "those of all: use one of them."
            )
        num_groups = math.ceil(batch_size / relation_batch_size)
        bounds = [group * batch_size // num_groups for group in range(num_groups + 1)]
        return [slice(first, last) for first, last in itertools.pairwise(bounds)]

    def _integrate_alone(self, image_features: torch.Tensor) -> torch.Tensor:
        is_finite = image_features.detach().isfinite().all(-1)
        features, _ = self.rra(torch.where(is_finite[:, None], image_features, 0.0))
        return torch.where(is_finite[:, None], features, math.nan)

    def _integrate_references(
        self, image_features: torch.Tensor, pixel_values: torch.Tensor | None, reference_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """
        Integrated features, (B, d), attention, (B, heads, 1 + N), relations, (B, 1 + N), and the votes of the classes,
        (B, num_labels), with N references.
        """
        batch_size, size = image_features.shape[0], len(self.references)
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
        features, attention, votes = self.rra(features, similarities, reference_mask, references=self.references)
        features = torch.where(is_finite[:, None], features, math.nan)
        return features, attention, similarities, self._count_votes(votes)

    def _count_votes(self, votes: torch.Tensor) -> torch.Tensor:
        """The mean attention to the references of each class, normalized, (B, heads, N) -> (B, num_labels)."""
        labels, num_labels = self.references.labels, self.config.num_labels
        is_labeled = labels != NO_LABEL
        rows = labels.where(is_labeled, 0)
        numbers = votes.new_zeros(num_labels).index_add(0, rows, is_labeled.to(votes.dtype))
        # Classes are compared with each other: references without a label have no say.
        votes = votes.masked_fill(~is_labeled, -math.inf)
        votes = (votes - votes.amax(-1, keepdim=True).clamp(min=torch.finfo(votes.dtype).min)).exp()
        votes = votes.new_zeros(*votes.shape[:2], num_labels).index_add(-1, rows, votes) / numbers.clamp(min=1)
        return (votes / votes.sum(-1, keepdim=True).clamp(min=torch.finfo(votes.dtype).tiny)).mean(1)

    def _integrate_batch(
        self, image_features: torch.Tensor, pixel_values: torch.Tensor | None, relation_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Integrated features, (B, d), attention, (B, heads, N), and relations, (B, N), with N neighbors."""
        neighborhood = Neighborhood(image_features.shape[0], image_features.device, self.gather_across_processes)
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
                raise UserError('`pixel_values` are needed for PSNR with `relation_scope="batch"`: pass them too.')
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
        """Relations of the whole batch; images of different neighborhoods have none."""
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
            self._require_references("attend to")
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
        reference_mask: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        output_relations: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RBIImageClassifierOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Labels for computing the classification loss, in `[0, ..., config.num_labels - 1]`, or -100 for images
            that the loss leaves out. If `config.num_labels == 1` a regression loss is computed (mean square loss).
        relation_mask (`torch.BoolTensor` of shape `(batch_size,)` or `(batch_size, batch_size)`, *optional*):
            `False` (or 0) for images that take no part as neighbors of the others, such as padding. They get an
            answer themselves. With two axes it says of each pair whether the first image may attend to the second;
            its diagonal then says whether an image is a neighbor of other processes' images.
        relation_scope (`str`, *optional*):
            `"batch"`: each image attends to every image of the batch; `"self"`: to itself alone; `"reference"`: to
            itself and the model's references. By default `"batch"` in training and `config.relation_scope` in
            evaluation.
        relation_batch_size (`int`, *optional*):
            The batch is split, in its order, into equal neighborhoods of at most this many images.
        reference_mask (`torch.BoolTensor` of shape `(batch_size, num_references)`, *optional*):
            `False` where an image does not attend to a reference: in training, to itself.
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
            reference_mask=reference_mask,
            image_features=image_features,
            output_relations=output_relations,
            **kwargs,
        )
        logits, self_logits = self._classify(outputs.pooler_output), None
        if outputs.reference_votes is not None:
            logits = self._with_votes(logits, outputs.reference_votes)
        if outputs.self_pooler_output is not None:
            self_logits = self._classify(outputs.self_pooler_output)

        loss = None
        if labels is not None:
            _check_labels(labels, logits, self.config)
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

    def _with_votes(self, logits: torch.Tensor, votes: torch.Tensor) -> torch.Tensor:
        """
        Log-probabilities in which the references' labels have their say, if they are to have one.

        Without added classes, p_c = (1 - w) softmax(logits)_c + w v_c, as in kNN-LM (Khandelwal et al., 2020), with the
        votes v. With them, votes decide, p_c ~ v_c, and the classifier orders those among which it can choose,
        p_c ~ v_c sqrt(q_c / max q) with q = softmax(logits): it never outbids a class that it does not know.
        """
        weight, num_added = self.config.reference_vote_weight, self.config.num_added_classes
        if not weight and not num_added:
            return logits
        votes, tiny = votes.to(torch.float32), torch.finfo(torch.float32).tiny
        known = logits[:, : self.num_labels - num_added].float()
        if not num_added:
            return torch.lerp(known.softmax(-1), votes, weight).clamp(min=tiny).log()
        order = (known - known.amax(-1, keepdim=True)) / 2
        # Where nothing votes, as with all labeled references masked, the classifier is left with what it knows.
        has_votes = votes.sum(-1, keepdim=True) > 0
        order = torch.cat([order, torch.where(has_votes, 0.0, _NEVER).expand(-1, num_added)], dim=-1)
        return (votes.clamp(min=tiny).log() + order).log_softmax(-1)

    def add_classes(
        self,
        names: Sequence[str],
        images: Dataset | Iterable,
        *,
        image_processor: BaseImageProcessor | None = None,
        batch_size: int = 64,
    ):
        r"""
        Adds classes that the classifier was not trained on, by labeled images of them, without training. They are
        added to the reference bank, which must hold labeled images of the other classes, too, and
        `relation_scope="reference"` tells all classes apart by the votes v of the bank (`reference_votes` of
        [`RBIModelOutput`]): p_c ~ v_c for the new classes, and p_c ~ v_c sqrt(q_c / max q) for those that the
        classifier knows, q being its own probabilities. In the other scopes the new classes are never answered.

        Args:
            names (`Sequence[str]`):
                Names of the new classes.
            images (`Dataset` or `Iterable`):
                As in [`~RBIPreTrainedModel.set_references`], labeled: the first new class is 0, the next 1.
            image_processor (`BaseImageProcessor`, *optional*):
                For PIL images.
            batch_size (`int`, *optional*, defaults to 64):
                Images at a time.

        Raises:
            UserError: if a name is there already, a class has no image, or an image no label, and if the bank
                lacks labeled images of a class. The model is then as it was.
        """
        bank, before = self.rbi._require_own_references("add classes to"), self.config.id2label
        names = list(names)
        if not names or len({*names, *before.values()}) != len(names) + len(before):
            raise UserError(f"The names of new classes must be new and differ from each other, got {names}.")
        if absent := sorted(set(before) - set(bank.labels.tolist())):
            raise UserError(
                f"Classes are told apart by labeled references, and {len(absent)} classes have none in the bank, for "
                f"instance {before[absent[0]]!r}: add some with `add_references`."
            )
        new = dict(enumerate(names))
        features, thumbnails, labels = self._read_images(images, None, image_processor, batch_size)
        choose_references(labels, new, strategy="balanced")  # checks them
        self._append_references(features, thumbnails, labels + len(before))
        self.config.id2label = before | {len(before) + label: name for label, name in new.items()}
        self.config.label2id = {name: label for label, name in self.config.id2label.items()}
        self.config.num_added_classes += len(names)
        old, self.num_labels = self.classifier, self.config.num_labels
        self.classifier = nn.Linear(old.in_features, self.num_labels, device=old.weight.device, dtype=old.weight.dtype)
        with torch.no_grad():
            self.classifier.weight.zero_()
            self.classifier.bias.fill_(_NEVER)
            self.classifier.weight[: len(before)] = old.weight
            self.classifier.bias[: len(before)] = old.bias
        self.classifier.train(old.training).requires_grad_(old.weight.requires_grad)

    def _classify(self, features: torch.Tensor) -> torch.Tensor:
        # Past the classifier and back, since 0 * NaN in its gradient would be NaN for all images.
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
            UserError: if the classifier is not a linear layer on features that one of the poolings of [`RBIConfig`]
                gives (a normalization between them, as in PoolFormer, or two classifiers, as in distilled DeiT).
        """
        config_kwargs, model_kwargs = _split_config_kwargs(kwargs)
        if isinstance(model_or_path, PreTrainedModel):
            if model_kwargs:
                raise UserError(
                    f"{', '.join(sorted(model_kwargs))} can only be passed beside the path of a classifier, and are no "
                    "fields of RBIConfig."
                )
            classifier = copy.deepcopy(model_or_path).eval()
            name_or_path = model_or_path.name_or_path
        else:
            classifier = _load_whole(AutoModelForImageClassification, model_or_path, **model_kwargs).eval()
            name_or_path = model_or_path
        if isinstance(classifier, RBIPreTrainedModel):
            raise UserError(f"{name_or_path or 'The given model'} is an RBI model already: use it as it is.")
        for name in ("pooling", "feature_size"):
            if name in config_kwargs:
                raise UserError(f"`{name}` is the classifier's own and is found out from it: leave it out.")

        linear, probe, features = _find_classifier(classifier)
        backbone_config = getattr(classifier.config, "vision_config", classifier.config)
        config_kwargs |= _resolve_pixel_statistics(
            name_or_path, image_processor, backbone_config, config_kwargs, _hub_kwargs(model_kwargs)
        )
        for name in ("id2label", "label2id", "problem_type"):
            config_kwargs.setdefault(name, getattr(classifier.config, name))
        num_labels = config_kwargs.get("num_labels", len(config_kwargs["id2label"]))
        if {num_labels, len(config_kwargs["id2label"])} != {linear.out_features}:
            raise UserError(
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


def _check_labels(labels: torch.Tensor, logits: torch.Tensor, config: RBIConfig):
    if labels.shape[0] != logits.shape[0]:
        raise UserError(f"`labels` are for {labels.shape[0]} images, but the batch holds {logits.shape[0]}.")
    is_single_label = config.problem_type in (None, "single_label_classification") and config.num_labels > 1
    if not is_single_label or labels.is_floating_point() or torch.compiler.is_compiling():
        return
    out_of_range = labels[((labels < 0) & (labels != -100)) | (labels >= config.num_labels)]
    if out_of_range.numel():
        raise UserError(
            f"`labels` hold {out_of_range[0].item()}, but must be in 0..{config.num_labels - 1} (or -100, to leave an "
            "image out of the loss): set `num_labels` to the number of classes."
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
