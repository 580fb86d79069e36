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
"""RBI model configuration"""

import difflib
import math
from dataclasses import fields
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import auto_docstring, logging

from .errors_rbi import UserError, listed, shown_names


logger = logging.get_logger(__name__)

# Keys that transformers itself may write into a `config.json` or set on a config, besides the fields of its class.
_COMMON_CONFIG_KEYS = {
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "finetuning_task",
    "fusion_config",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "task_specific_params",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_weights",
    "use_cache",
}
# Fields of older configs that are attributes of `RBIModel`: they belong to a training run, and are not saved.
_DROPPED_FIELDS = {"gather_across_processes", "self_loss_weight"}


@auto_docstring(
    custom_intro="""
    Configuration of the RBI models: a vision backbone, and the head in which the images of a batch attend to each
    other (Le et al., "Enhancing Fine-grained Image Classification through Attentive Batch Training",
    https://huggingface.co/papers/2412.19606). The defaults match [`RBIConfig.paper`], except for PSNR on reduced
    images; [`RBIConfig.kernel`] is the form that is useful without training. The paper leaves parts of the head open:
    these are fields here, whose defaults are one reading of it.
    """
)
@strict
class RBIConfig(PreTrainedConfig):
    r"""
    backbone_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a `ConvNextConfig`):
        Configuration of the vision backbone: of any vision model in transformers, or a `TimmWrapperConfig` for timm
        models.
    feature_size (`int`, *optional*):
        Number d of features per image after pooling. If `None`, it is measured when the model is built, and then
        saved.
    pooling (`str`, *optional*, defaults to `"auto"`):
        How the backbone's output becomes one vector per image. `"pooler"`: its own `pooler_output`; `"cls"`: the
        class token; `"mean"`: the mean over the patch tokens or the feature map, without class and register tokens;
        `"cls_mean"`: both, concatenated; `"auto"`: what suits the backbone (the class token for ViT and DeiT, both
        for DINOv2, otherwise the pooler if there is one, else the mean).
    num_attention_heads (`int`, *optional*, defaults to 1):
        Number of attention heads of RRA. Must divide `feature_size`.
    attention_type (`str`, *optional*, defaults to `"dot_product"`):
        `"dot_product"`: queries times keys over sqrt(d / heads). `"cosine"`: their cosine over a learned temperature
        for each head, after the mean over the neighbors is subtracted from the features. Without this centering,
        pooled features of one network are all alike (on ORL faces, 2 training images each, 6 draws, batches of 128:
        the untrained kernel loses 9 points instead of gaining 0.4). In a batch of n, it puts the cosines of different
        images around -1/(n-1), so that in batches of two or three an image attends mostly to itself.
    attention_temperature (`float`, *optional*, defaults to 0.2):
        Initial temperature of `attention_type="cosine"`. At least 0.01.
    attention_dropout (`float`, *optional*, defaults to 0.0):
        Dropout on the attention between images.
    classifier_dropout (`float`, *optional*, defaults to 0.0):
        Dropout before the classifier.
    residual_gate (`str`, *optional*, defaults to `"learned"`):
        How an image's own features r and its message m are combined. `"learned"`: beta r + (1 - beta) m
        with beta = sigmoid(w [m; r; m - r]), one number for each image; `"sum"`: r + m; `"none"`: only m.
    relation_position_encoding (`str`, *optional*, defaults to `"key_value"`):
        Where the PSNR relation enters the attention. `"key_value"`: p w is added to keys and values (the reading of
        the paper with most support); `"key"`: only to the keys; `"bias"`: PSNR in dB times a learned gain for each
        head is added to the attention logits; `"none"`: nowhere.
    relation_gain (`float`, *optional*, defaults to 0.5):
        Initial gain, per dB, of `relation_position_encoding="bias"`.
    psnr_max (`float`, *optional*, defaults to 50.0):
        PSNR, in dB, above which two images count as the same: p = min(PSNR, psnr_max) / psnr_max. One gray level of
        256 everywhere is 48.1 dB.
    psnr_image_size (`int`, *optional*, defaults to 32):
        Images are averaged down to this height and width, in pixels, for PSNR; `None` keeps the full size, as in the
        paper. Spearman's rank correlation with full size (224 px), measured over all pairs of 400 images: at 32 px
        0.997 on ORL faces and 0.997 on ELPV solar cells, at 16 px 0.990 and 0.987.
    self_relation (`str`, *optional*, defaults to `"one"`):
        The relation p_ii of an image to itself. `"one"`: 1, the PSNR of identical images over its ceiling;
        `"nearest"`: the relation to its nearest neighbor, without which a sharp attention would see only the image
        itself. Without neighbors it is 1 in either case.
    head_initialization (`str`, *optional*, defaults to `"standard"`):
        `"standard"`: uniform in +-1/sqrt(fan_in), biases zero; `"identity"`: the four projections are identities and
        the relation and the gate start at zero, so that an image without neighbors keeps its features.
    relation_scope (`str`, *optional*, defaults to `"self"`):
        What an image attends to in evaluation. `"batch"`: every image of the batch; `"self"`: only itself;
        `"reference"`: itself and the model's references. With `"self"` and `"reference"`, an answer does not depend
        on the other images of the batch. Training uses `"batch"`. The forward argument of the same name overrides
        both. [`~RBIPreTrainedModel.set_references`] sets it to `"reference"`.
    references (`dict`, *optional*):
        What the model's reference bank holds, written by [`~RBIPreTrainedModel.set_references`]: `num_references`,
        `num_labeled`, `image_shape` (channels, height, width; `None` without thumbnails), `mean_similarity`,
        and how they were chosen. `None`: the model has no bank.
    reference_share (`float`, *optional*):
        Fraction of the attention that goes to the references, in (0, 1]; the image keeps the rest. `None`: one
        softmax over the image and all references, as in a batch. A fixed fraction keeps a large bank from drowning
        out the image.
    num_reference_neighbors (`int`, *optional*):
        Attend only to this many references, those with the highest scores. `None`: all.
    reference_temperature (`float`, *optional*):
        Temperature of cosine attention to references, at least 0.01. `None`: the learned one.
    reference_gain (`float`, *optional*):
        Gain, per dB, of PSNR to references, with `relation_position_encoding="bias"`. `None`: the learned one.
    reference_vote_weight (`float`, *optional*, defaults to 0.0):
        Share, in [0, 1), of the votes of the references' labels in the answer. The vote of a class is the mean
        attention (at the learned temperature and gain) to its references, so that their number does not matter.
    num_added_classes (`int`, *optional*, defaults to 0):
        How many of the last classes were added without training, see [`~RBIForImageClassification.add_classes`].
    image_mean (`list[float]`, *optional*, defaults to `[0.485, 0.456, 0.406]`):
        Mean that the image processor subtracts from pixels in [0, 1], undone before PSNR.
    image_std (`list[float]`, *optional*, defaults to `[0.229, 0.224, 0.225]`):
        Standard deviation that the image processor divides pixels in [0, 1] by, undone before PSNR.

    Raises:
        UserError: for an unknown field, or a `backbone_config` of unknown class; the message names it.
        StrictDataclassError: for a field of the wrong type, out of its range, or in conflict with another field (see
            `huggingface_hub.errors`); the message names it.

    Example:

    ```python
    >>> from transformers import ConvNextConfig
    >>> from modeling_rbi import RBIConfig, RBIForImageClassification

    >>> config = RBIConfig.paper(backbone_config=ConvNextConfig(), num_labels=200)
    >>> model = RBIForImageClassification(config)
    >>> model.config.feature_size
    768
    ```"""

    model_type = "rbi"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None
    feature_size: int | None = None
    pooling: Literal["auto", "pooler", "cls", "mean", "cls_mean"] = "auto"
    num_attention_heads: int = 1
    attention_type: Literal["dot_product", "cosine"] = "dot_product"
    attention_temperature: float | int = 0.2
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    residual_gate: Literal["learned", "sum", "none"] = "learned"
    relation_position_encoding: Literal["key_value", "key", "bias", "none"] = "key_value"
    relation_gain: float | int = 0.5
    psnr_max: float | int = 50.0
    psnr_image_size: int | None = 32
    self_relation: Literal["one", "nearest"] = "one"
    head_initialization: Literal["standard", "identity"] = "standard"
    relation_scope: Literal["batch", "self", "reference"] = "self"
    references: dict | None = None
    reference_share: float | int | None = None
    num_reference_neighbors: int | None = None
    reference_temperature: float | int | None = None
    reference_gain: float | int | None = None
    reference_vote_weight: float | int = 0.0
    num_added_classes: int = 0
    image_mean: list[float | int] | tuple[float | int, ...] = (0.485, 0.456, 0.406)
    image_std: list[float | int] | tuple[float | int, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self, **kwargs):
        self._check_unknown_fields(kwargs)
        if self.backbone_config is None:
            self.backbone_config = CONFIG_MAPPING["convnext"]()
        elif isinstance(self.backbone_config, dict):
            self.backbone_config = self._backbone_config_from_dict(self.backbone_config)
        self.image_mean = [float(value) for value in self.image_mean]
        self.image_std = [float(value) for value in self.image_std]
        self.id2label, self.label2id = self._complete_classes(self.id2label, self.label2id, kwargs.get("num_labels"))
        super().__post_init__(**kwargs)

    @staticmethod
    def _complete_classes(
        id2label: dict | None, label2id: dict | None, num_labels: int | None
    ) -> tuple[dict[int, str] | None, dict[str, int] | None]:
        """`id2label` and `label2id`, where one of them is given, by number."""
        given = "label2id" if id2label is None else "id2label"
        if id2label is None:
            if not label2id:
                return None, label2id
            id2label = {label: name for name, label in label2id.items()}
        try:
            names = dict(sorted((int(label), name) for label, name in id2label.items()))
        except ValueError:
            raise UserError(f"The keys of `id2label` must be class numbers, got {listed(id2label)}.") from None
        if num_labels is not None and num_labels != len(names):
            raise UserError(
                f"`num_labels` is {num_labels}, but `{given}` names {len(names)} classes ({listed(names.values())}): "
                f"leave `num_labels` out, or name {num_labels} classes."
            )
        return names, label2id or {name: label for label, name in shown_names(names).items()}

    def _check_unknown_fields(self, kwargs: dict[str, Any]):
        known = {field.name for field in fields(self)}
        for name in kwargs:
            if self._is_common(name):
                continue
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.65)
            hint = f"did you mean `{close[0]}`?" if close else f"its own fields are {', '.join(self.own_fields())}."
            raise UserError(
                f"RBIConfig has no field `{name}`: {hint} If this config was written by a newer version, upgrade with "
                "`pip install -U modeling-rbi transformers`."
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        As `PreTrainedConfig.from_dict`. Refuses the config of another kind of model, and reads configs that older
        versions of RBI wrote. Class names among the keyword arguments, or another number of classes, replace all names
        of the config.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise UserError(
                f'This config is of a "{model_type}" model, not of RBI: put a head on it with '
                "`RBIForImageClassification.from_backbone_pretrained`, or, if it is a fine-tuned classifier, with "
                "`RBIForImageClassification.from_image_classifier`."
            )
        config_dict = cls._up_to_date(config_dict)
        num_labels, names = kwargs.get("num_labels"), config_dict.get("id2label")
        if kwargs.get("id2label") or kwargs.get("label2id") or (names and num_labels not in (None, len(names))):
            config_dict |= {name: kwargs.pop(name, None) for name in ("id2label", "label2id")}
        return super().from_dict(config_dict, **kwargs)

    @staticmethod
    def _up_to_date(config_dict: dict[str, Any]) -> dict[str, Any]:
        """Drops the fields that are arguments of a training, and renames what has another name in older files."""
        config_dict = {name: value for name, value in config_dict.items() if name not in _DROPPED_FIELDS}
        references = config_dict.get("references")
        if isinstance(references, dict) and "num_labelled" in references:
            references = dict(references)
            references["num_labeled"] = references.pop("num_labelled")
            config_dict["references"] = references
        return config_dict

    def to_dict(self) -> dict[str, Any]:
        """
        As `PreTrainedConfig.to_dict`, without attributes that were set on the config but are no fields of it, and
        without the path that the backbone was loaded from, which may be a private folder.
        """
        names = {field.name for field in fields(self)}
        content = {name: value for name, value in super().to_dict().items() if name in names or self._is_common(name)}
        if "_name_or_path" in content["backbone_config"]:
            content["backbone_config"]["_name_or_path"] = ""
        return content

    @staticmethod
    def _is_common(name: str) -> bool:
        return name in _COMMON_CONFIG_KEYS or name.startswith("_")

    @classmethod
    def own_fields(cls) -> list[str]:
        """Names of the fields that RBIConfig adds to `PreTrainedConfig`."""
        inherited = {field.name for field in fields(PreTrainedConfig)}
        return [field.name for field in fields(cls) if field.name not in inherited]

    @staticmethod
    def _backbone_config_from_dict(backbone_config: dict[str, Any]) -> PreTrainedConfig:
        model_type = backbone_config.get("model_type")
        if model_type is None:
            raise UserError(
                '`backbone_config` is a dict without "model_type", so its class is unknown: add it, for instance '
                '{"model_type": "convnext"}, or pass a config object.'
            )
        if model_type not in CONFIG_MAPPING:
            raise UserError(
                f'`backbone_config` has model_type "{model_type}", which this version of transformers does not know: '
                "upgrade transformers, or register the class with `AutoConfig.register`."
            )
        return CONFIG_MAPPING[model_type].from_dict(backbone_config)

    def validate_backbone(self):
        """Part of `@strict`-powered validation: the backbone is a single vision tower."""
        if hasattr(self.backbone_config, "vision_config"):
            raise UserError(
                f"`backbone_config` is a {type(self.backbone_config).__name__}, of a model with several towers: pass "
                "the config of its vision tower, `backbone_config.vision_config`."
            )
        if self.backbone_config.model_type == self.model_type:
            raise UserError("`backbone_config` is an RBIConfig itself: pass the config of the backbone.")
        model_args = getattr(self.backbone_config, "model_args", None) or {}  # arguments of timm
        num_channels = getattr(self.backbone_config, "num_channels", None) or model_args.get("in_chans")
        num_channels = num_channels or len(self.image_mean)
        for name in ("image_mean", "image_std"):
            if not all(math.isfinite(value) for value in getattr(self, name)):
                raise UserError(f"`{name}` must be finite in every channel, got {getattr(self, name)}.")
            if len(getattr(self, name)) != num_channels:
                raise UserError(
                    f"`{name}` has {len(getattr(self, name))} values, but the backbone takes {num_channels} channels: "
                    f"`image_mean` and `image_std` need one value for each channel."
                )
        if not all(value > 0 for value in self.image_std):
            raise UserError(f"`image_std` must be above 0 in every channel, got {self.image_std}.")

    def validate_classes(self):
        """Part of `@strict`-powered validation: the classes are numbered from 0."""
        if self.id2label is not None and set(self.id2label) != set(range(len(self.id2label))):
            raise UserError(
                f"`id2label` must number its {len(self.id2label)} classes from 0 to {len(self.id2label) - 1}, got "
                f"{listed(self.id2label)}."
            )

    def validate_relations(self):
        """Part of `@strict`-powered validation: ranges of the head's fields, and fields that exclude each other."""
        for name in ("num_attention_heads", "feature_size", "psnr_image_size", "num_reference_neighbors"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"`{name}` must be at least 1, got {value}.")
        for name in ("attention_dropout", "classifier_dropout", "reference_vote_weight"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        for name in ("attention_temperature", "psnr_max", "relation_gain", "reference_temperature", "reference_gain"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UserError(f"`{name}` must be finite, got {value}.")
        for name in ("attention_temperature", "reference_temperature"):
            value = getattr(self, name)
            if value is not None and value < 0.01:
                raise UserError(f"`{name}` must be at least 0.01, got {value}.")
        if self.reference_share is not None and not 0 < self.reference_share <= 1:
            raise UserError(f"`reference_share` must be above 0 and at most 1, got {self.reference_share}.")
        if self.psnr_max <= 0:
            raise UserError(f"`psnr_max` is in dB and must be above 0, got {self.psnr_max}.")
        if self.feature_size is not None and self.feature_size % self.num_attention_heads:
            raise UserError(
                f"`num_attention_heads` ({self.num_attention_heads}) must divide the backbone's feature size "
                f"({self.feature_size})."
            )
        if self.head_initialization == "identity" and self.residual_gate == "sum":
            raise UserError(
                '`head_initialization="identity"` and `residual_gate="sum"` exclude each other: the sum would double '
                'an image\'s features instead of keeping them. Use `residual_gate="learned"` or `"none"`.'
            )

    def validate_references(self):
        """Part of `@strict`-powered validation: the reference bank."""
        if (self.reference_vote_weight or self.num_added_classes) and self.problem_type not in (
            None,
            "single_label_classification",
        ):
            raise UserError(
                "`reference_vote_weight` and `num_added_classes` are for images with one label each, not for "
                f'`problem_type="{self.problem_type}"`.'
            )
        if not 0 <= self.num_added_classes < max(self.num_labels, 1):
            raise UserError(
                f"`num_added_classes` must be at least 0 and below the number of classes ({self.num_labels}), got "
                f"{self.num_added_classes}."
            )
        if self.references is None:
            if self.relation_scope == "reference":
                raise UserError(
                    '`relation_scope="reference"`, but the model has no reference bank: make one with '
                    "`model.set_references(...)`, which sets the scope, too, or load a model without its bank by "
                    '`references=None, relation_scope="self"`.'
                )
            return
        missing = {"num_references", "image_shape", "mean_similarity"} - self.references.keys()
        if missing or self.references["num_references"] < 1:
            raise UserError(
                f"`references` is written by `model.set_references(...)`, and lacks {', '.join(sorted(missing))}."
                if missing
                else "`references` must have a `num_references` of at least 1."
            )

    def validate_class_names(self):
        """Part of `@strict`-powered validation: warns of classes that their names do not tell apart."""
        shown = shown_names(self.id2label)
        if alike := [shown[number] for number, name in self.id2label.items() if shown[number] != name]:
            logger.warning_once(
                f"Several classes have the same name, or none. They are shown with their numbers ({listed(alike)}), "
                "but `label2id` and the pipeline of transformers do not tell them apart: change them in `id2label`."
            )

    @classmethod
    def paper(cls, **kwargs) -> "RBIConfig":
        r"""
        The paper's method, as far as it is published, with PSNR on full-size images. Any field can be overridden.

        | | `paper` | `kernel` |
        |---|---|---|
        | attention | dot product | cosine of centered features, learned temperature from 0.2 |
        | relation | p w on keys and values, p in [0, 1] | PSNR in dB times a learned gain from 0.5, on the logits |
        | PSNR at | full size | 16 px |
        | relation to itself | 1 | as to the nearest neighbor |
        | residual | learned gate | none: the image takes part in its own message |
        | start | uniform +-1/sqrt(fan_in) | identities |
        | references | as a batch | a quarter of the attention, to the nearest 8, at temperature 0.3 and gain 1 |
        | without training | unusable | a similarity kernel over the images |
        """
        preset = {
            "attention_type": "dot_product",
            "relation_position_encoding": "key_value",
            "psnr_image_size": None,
            "self_relation": "one",
            "residual_gate": "learned",
            "head_initialization": "standard",
        }
        return cls(**(preset | kwargs))

    @classmethod
    def kernel(cls, **kwargs) -> "RBIConfig":
        r"""
        The kernel form: the head starts as a similarity kernel over the images and is useful without training. See
        the table of [`RBIConfig.paper`]. Any field can be overridden. It has no gate, which would start at 1/2 and
        halve the effect of relations before training.
        """
        preset = {
            "attention_type": "cosine",
            "relation_position_encoding": "bias",
            "psnr_image_size": 16,
            "self_relation": "nearest",
            "residual_gate": "none",
            "head_initialization": "identity",
            "reference_share": 0.25,
            "num_reference_neighbors": 8,
            "reference_temperature": 0.3,
            "reference_gain": 1.0,
        }
        return cls(**(preset | kwargs))


__all__ = ["RBIConfig"]
