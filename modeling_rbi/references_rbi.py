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
"""Methods that set, add, remove and describe the references of a model, and that add classes from them."""

import copy
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from .backbone_rbi import check_images, expected_image_size, in_evaluation
from .bank_rbi import NO_LABEL, ReferenceBank, check_size
from .configuration_rbi import RBIConfig
from .errors_rbi import UserError, listed, normalized, shown_names
from .reference_images_rbi import (
    check_choice,
    choose_references,
    default_strategy,
    labels_before_reading,
    read_batches,
)


logger = logging.get_logger(__name__)

# Relative tolerance when the features of a fixed test pattern are compared to tell whether the current backbone built
# the bank. Half precision, and the kernels of another processor, change the features far less.
PROBE_TOLERANCE = 0.1
# The mean relation of a bank is taken over the pairs of at most this many of its images.
NUM_MEAN_REFERENCES = 1024
# Logit of a class that is never predicted, finite in half precision.
NEVER = -1e4


def _is_placeholder(label: int, name: str) -> bool:
    """Whether a class has the name that transformers gives to classes without names."""
    return name == f"LABEL_{label}"


class ReferencesMixin:
    """For all RBI models: the public methods for the reference bank of the base model."""

    config: RBIConfig
    base_model: Any

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
        Gives the model a reference bank: images, kept as features and thumbnails, that each image attends to. It sets
        `relation_scope="reference"`, so that predictions in evaluation use relations but do not depend on the batch.
        References need no labels: they may be training images, images from the place of deployment, or both (see
        [`~RBIPreTrainedModel.add_references`]).

        The bank is saved with the model. **Anyone who has the model has thumbnails of these images**
        (`psnr_image_size` x `psnr_image_size` pixels, 8 bits per channel; 32 x 32 where PSNR is on full size) and
        their features. Choose images that you are allowed to share, or leave the thumbnails out with
        `keep_images=False`.

        Memory: 4 d bytes per reference, for d features, plus its thumbnail. Compute per image: 2 d multiply-adds, plus
        one per thumbnail value, for each reference; and 3 d^2 for the image's own projections. 1,000 references with
        1,280 features take 5.9 MB and 8 million multiply-adds, next to the 300 million of MobileNetV2. The limit is
        `MAX_REFERENCES` (16,384).

        A bank is valid only for the backbone that computed it. Call [`~RBIPreTrainedModel.remove_references`] before
        training the backbone further, and set the references again afterwards.

        Args:
            images (`Dataset` or `Iterable`):
                A data set of dicts with `pixel_values` (C, H, W) from the image processor, or with a PIL `image`; and
                with `labels` or `label` where they are known (-100: unknown). Or a loader of batches, `pixel_values`
                (B, C, H, W).
            per_class (`int`, *optional*):
                Number of references for each class.
            num_references (`int`, *optional*):
                Total number of references, instead of `per_class`. With neither, all images are taken.
            strategy (`str`, *optional*):
                `"balanced"`, `"herding"` or `"random"`, see [`choose_references`]. By default `"balanced"` if all
                images have labels, else `"random"`.
            seed (`int`, *optional*, defaults to 0):
                Random seed of the selection.
            image_processor (`BaseImageProcessor`, *optional*):
                Processor for PIL images.
            keep_images (`bool`, *optional*, defaults to `True`):
                Whether the bank keeps thumbnails. Without them, the PSNR between an image and a reference is unknown:
                all relations are the mean relation of the bank, and attention depends only on features.
            batch_size (`int`, *optional*, defaults to 64):
                Number of images per forward pass.

        Raises:
            UserError: if the images or labels are malformed, a class of the model has no image (unless
                `strategy="random"`), or there are more references than `MAX_REFERENCES`. The model is then unchanged.
        """
        features, thumbnails, labels, strategy = self._choose_references(
            images, per_class, num_references, strategy, seed, image_processor, batch_size
        )
        facts = {"strategy": strategy, "per_class": per_class, "seed": seed}
        facts["mean_similarity"] = self.base_model.mean_similarity(thumbnails)
        self.base_model.set_bank(features, thumbnails if keep_images else None, labels, facts)

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
        Adds images to the reference bank, chosen as in [`~RBIPreTrainedModel.set_references`], which also describes
        the arguments. The bank keeps thumbnails of all its images or of none.

        Raises:
            UserError: as `set_references`; and if the model has no bank, or the backbone has been trained since.
        """
        self.base_model.require_own_references("add to")
        features, thumbnails, labels, _ = self._choose_references(
            images, per_class, num_references, strategy, seed, image_processor, batch_size
        )
        self._append_references(features, thumbnails, labels)

    def set_reference_features(
        self,
        features: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ):
        r"""
        Same as [`~RBIPreTrainedModel.set_references`], but takes precomputed features (see
        [`RBIModel.extract_features`]).

        Args:
            features (`torch.FloatTensor` of shape `(N, feature_size)`):
                Features of the references.
            pixel_values (`torch.FloatTensor` of shape `(N, num_channels, height, width)`, *optional*):
                Their images from the image processor, at full size or averaged down to `psnr_image_size`. `None`: the
                bank keeps no thumbnails, and all relations are 1.
            labels (`torch.LongTensor` of shape `(N,)`, *optional*):
                Their classes, -100 where unknown.

        Raises:
            UserError: if the shapes do not fit, features are not finite, or there are more references than
                `MAX_REFERENCES`.
        """
        size = self.config.feature_size
        if features.ndim != 2 or features.shape[1] != size or not len(features):
            raise UserError(
                f"`features` of references must have the shape (N, {size}), N at least 1, got {tuple(features.shape)}"
                ": they must come from the model's own backbone."
            )
        if not (is_finite := features.isfinite().all(-1)).all():
            raise UserError(
                f"The features of reference {int((~is_finite).nonzero()[0])} are not finite: remove this image."
            )
        labels = torch.full((len(features),), NO_LABEL) if labels is None else labels.cpu()
        if pixel_values is not None:
            check_images(pixel_values, features, self.config)
        if labels.shape != features.shape[:1]:
            raise UserError(f"`labels` are for {len(labels)} references, but `features` hold {len(features)}.")
        choose_references(labels, self.config.id2label, strategy="random")  # checks them
        thumbnails = None if pixel_values is None else self.base_model.rpe.thumbnails(pixel_values)
        facts = {"mean_similarity": 1.0 if thumbnails is None else self.base_model.mean_similarity(thumbnails)}
        self.base_model.set_bank(features.detach(), thumbnails, labels, facts)

    def remove_references(self):
        """Removes the reference bank. A `relation_scope` of `"reference"` becomes `"self"`."""
        # Deleted first: for a child that is set to `None`, `load_state_dict` accepts any weights without an error.
        del self.base_model.references
        self.base_model.references = None
        self.config.references = None
        if self.config.relation_scope == "reference":
            self.config.relation_scope = "self"

    def describe_references(self) -> dict[str, Any]:
        r"""
        Describes what the reference bank holds and costs.

        Returns:
            `dict[str, Any]`: the entries of `config.references`, and `has_images` (whether it keeps thumbnails),
            `references_per_class` (number of labeled references by class name, as [`shown_names`] tells equal names
            apart), `num_bytes` (bytes that the bank adds to the model's file) and `multiply_adds_per_image` (what it
            adds to the cost of an image).

        Raises:
            UserError: if the model has no bank.
        """
        bank = self.base_model.require_references("describe")
        known, names = bank.labels[bank.labels != NO_LABEL].tolist(), shown_names(self.config.id2label)
        saved = [buffer for buffer in (bank.features, bank.labels, bank.images, bank.probe) if buffer is not None]
        pixels = 0 if bank.images is None else bank.images[0].numel()
        return self.config.references | {
            "has_images": bank.images is not None,
            "references_per_class": {names[label]: known.count(label) for label in sorted(set(known))},
            "num_bytes": sum(buffer.numel() * buffer.element_size() for buffer in saved),
            # The image's own query, key and value; then scores, messages and PSNR with each reference.
            "multiply_adds_per_image": 3 * self.config.feature_size**2
            + len(bank) * (2 * self.config.feature_size + pixels),
        }

    def _append_references(self, features: torch.Tensor, thumbnails: torch.Tensor, labels: torch.Tensor):
        bank = self.base_model.references
        if bank.images is not None and bank.images.shape[1:] != thumbnails.shape[1:]:
            raise UserError(
                f"The thumbnails of the bank have the shape {tuple(bank.images.shape[1:])}, but the new ones "
                f"{tuple(thumbnails.shape[1:])}: give images of the size that the model takes."
            )
        facts = {
            name: self.config.references.get(name) for name in ("strategy", "per_class", "seed", "mean_similarity")
        }
        all_thumbnails = None if bank.images is None else torch.cat([bank.images.cpu(), thumbnails])
        if all_thumbnails is not None:
            facts["mean_similarity"] = self.base_model.mean_similarity(all_thumbnails)
        self.base_model.set_bank(
            torch.cat([bank.features.cpu(), features.to(bank.features.dtype)]),
            all_thumbnails,
            torch.cat([bank.labels.cpu(), labels]),
            facts,
        )

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
        Features, thumbnails and labels of the chosen images, and the strategy. The other images are read only if the
        choice depends on them.
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
        """Features, thumbnails and labels of these rows, or of all images, with the backbone in evaluation mode."""
        model = self.base_model
        parameter = next(model.backbone.parameters())
        parts: tuple[list[torch.Tensor], ...] = ([], [], [])
        total = len(rows) if rows is not None else None
        with (
            in_evaluation(model.backbone),
            logging.tqdm(total=total, desc="References", unit=" images", leave=False) as bar,
        ):
            for pixel_values, labels in read_batches(
                images, None if rows is None else rows.tolist(), image_processor, batch_size
            ):
                pixel_values = pixel_values.to(parameter.device)
                check_images(pixel_values, None, self.config)
                features, _ = model.extract_features(pixel_values.to(parameter.dtype))
                if not features.isfinite().all():
                    row = sum(map(len, parts[2])) + int((~features.isfinite().all(-1)).nonzero()[0])
                    raise UserError(f"Image {row} has features that are not finite: remove it.")
                for part, values in zip(
                    parts, (features.cpu(), model.rpe.thumbnails(pixel_values).cpu(), labels), strict=True
                ):
                    part.append(values)
                bar.update(len(labels))
        if not parts[0]:
            raise UserError("There are no images to use as references.")
        if len({thumbnails.shape[1:] for thumbnails in parts[1]}) > 1:
            raise UserError("The images have several sizes: pass them through the model's image processor.")
        features, thumbnails, labels = (torch.cat(part) for part in parts)
        return features, thumbnails, labels


class ReferenceBankMixin:
    """For [`RBIModel`]: builds the bank, keeps its keys and values up to date, checks which backbone computed it."""

    config: RBIConfig
    training: bool
    backbone: Any
    references: ReferenceBank | None
    rpe: Any
    rra: Any
    extract_features: Any

    def prepare_references(self):
        """Computes the keys and values of the references from the head's weights, if there is a bank."""
        bank = getattr(self, "references", None)
        if bank is None or bank.features.is_meta:
            return
        bank.is_prepared, bank.num_classes = False, max(bank.labels.tolist()) + 1
        # Offloaded (meta) weights are available only inside the `forward` of the head.
        if not any(parameter.is_meta for parameter in self.rra.parameters()):
            self.rra.prepare_references(bank)

    def require_references(self, purpose: str) -> ReferenceBank:
        r"""
        Returns the bank. `purpose` completes the error message, such as "add to".

        Raises:
            UserError: if there is none.
        """
        if self.references is None:
            raise UserError(f"The model has no reference bank to {purpose}: make one with `set_references`.")
        return self.references

    def require_own_references(self, purpose: str) -> ReferenceBank:
        r"""
        Returns the bank. `purpose` completes the error message, such as "add to".

        Raises:
            UserError: if there is none, or the backbone has been trained since it was set.
        """
        bank = self.require_references(purpose)
        if not self.has_own_references():
            raise UserError(
                "The backbone has been trained since the references were set, so they no longer fit it: set them "
                "again with `set_references`."
            )
        return bank

    def has_own_references(self) -> bool:
        """True if the current backbone built the bank, or if this cannot be checked (no bank, or meta weights)."""
        bank = self.references
        if bank is None or any(tensor.is_meta for tensor in (*self.backbone.parameters(), bank.probe)):
            return True
        saved, current = bank.probe.float(), self.probe_features().float()
        return bool((current - saved).norm() <= PROBE_TOLERANCE * saved.norm())

    @torch.no_grad()
    def probe_features(self) -> torch.Tensor:
        """The backbone's features, (d,), of a fixed test pattern: waves of several lengths, different by channel."""
        parameter = next(self.backbone.parameters())
        height, width = expected_image_size(self.config.backbone_config)
        rows, columns = torch.arange(height)[:, None] / height, torch.arange(width)[None, :] / width
        waves = [
            (math.tau * (channel + 2) * (rows + columns)).sin() + (math.tau * 7 * (rows - channel * columns)).cos()
            for channel in range(len(self.config.image_mean))
        ]
        pattern = torch.stack(waves)[None].to(parameter.device, parameter.dtype)
        with in_evaluation(self.backbone):
            return self.extract_features(pattern)[0][0]

    def match_reference_labels(self, names: dict[int, str]):
        r"""
        Makes the labels of the bank those of the model's classes, where the bank was made for other classes. A label
        stays with the name of its class. It is dropped, with a warning, where the model has no class of this name or
        the name is no clear sign: one of several equal names, or a placeholder such as "LABEL_0". The image remains a
        reference without a label.

        Args:
            names (`dict[int, str]`):
                Names of the classes that the bank was made for, by their number.

        Raises:
            UserError: if the model has added classes, which only labeled references tell apart.
        """
        bank, config = self.references, self.config
        has_labels = bank is not None and not bank.labels.is_meta
        known = sorted(set(bank.labels.tolist()) - {NO_LABEL}) if has_labels else []
        is_renamed = len(names) == config.num_labels and all(itertools.starmap(_is_placeholder, names.items()))
        if not known or names == config.id2label or is_renamed:
            return
        if config.num_added_classes:
            raise UserError(
                "The model has added classes, which only its references tell apart, so it cannot be loaded with other "
                "classes than its own: leave out `id2label` and `num_labels`, and use `add_classes`."
            )
        counts = Counter(names.values()), Counter(config.id2label.values())
        new = {
            name: label
            for label, name in config.id2label.items()
            if counts[0][name] == counts[1][name] == 1 and not _is_placeholder(label, name)
        }
        matched = {label: new.get(names[label], NO_LABEL) for label in known}
        bank.labels.copy_(torch.tensor([matched.get(label, NO_LABEL) for label in bank.labels.tolist()]))
        config.references = config.references | {"num_labeled": int((bank.labels != NO_LABEL).sum())}
        shown = shown_names(names)
        if dropped := [shown[label] for label in known if matched[label] == NO_LABEL]:
            logger.warning(
                f"The references of {len(dropped)} classes ({listed(dropped)}) have lost their labels, since the "
                "model is loaded with other classes than they were set for: set them again with `set_references`."
            )

    def set_bank(
        self, features: torch.Tensor, thumbnails: torch.Tensor | None, labels: torch.Tensor, facts: dict[str, Any]
    ):
        r"""
        Sets the bank, replacing an existing one, and sets `relation_scope="reference"`.

        Args:
            features (`torch.FloatTensor` of shape `(N, feature_size)`):
                Features of the references, from this backbone.
            thumbnails (`torch.ByteTensor` of shape `(N, num_channels, height, width)`, *optional*):
                Their thumbnails, see [`RelationshipPositionEncoding.thumbnails`].
            labels (`torch.LongTensor` of shape `(N,)`):
                Their classes, -100 where unknown.
            facts (`dict[str, Any]`):
                Entries for `config.references`, with `mean_similarity`.

        Raises:
            UserError: if there are more references than `MAX_REFERENCES`, or the model has added classes and a class
                has no labeled reference.
        """
        check_size(len(features))
        if self.config.num_added_classes and len(set(labels.tolist()) - {NO_LABEL}) < self.config.num_labels:
            raise UserError(
                "The model has added classes, which it tells apart by its references: each class needs labeled "
                "references."
            )
        references = facts | {
            "num_references": len(features),
            "num_labeled": int((labels != NO_LABEL).sum()),
            "image_shape": None if thumbnails is None else list(thumbnails.shape[1:]),
        }
        config = copy.deepcopy(self.config)
        config.references = references
        config.validate()
        bank = ReferenceBank(config)
        parameter = next(self.backbone.parameters())
        bank.to(device=parameter.device, dtype=parameter.dtype)
        bank.features.copy_(features)
        bank.labels.copy_(labels)
        if bank.images is not None:
            bank.images.copy_(thumbnails)
        bank.probe.copy_(self.probe_features())
        self.references = bank.train(self.training)
        self.config.references, self.config.relation_scope = references, "reference"
        self.prepare_references()

    def mean_similarity(self, thumbnails: torch.Tensor) -> float:
        """Mean relation between different images of a bank, from their thumbnails. 1 for a single image."""
        rows = torch.linspace(0, len(thumbnails) - 1, min(len(thumbnails), NUM_MEAN_REFERENCES)).long()
        if len(rows) < 2:
            return 1.0
        pixels = thumbnails[rows.to(thumbnails.device)].flatten(1).float() / 255
        similarities = self.rpe.similarities(pixels - pixels.mean(0))
        others = ~torch.eye(len(rows), dtype=torch.bool, device=thumbnails.device)
        return similarities[others].mean().item()


class AddedClassesMixin(ReferencesMixin):
    """For [`RBIForImageClassification`]: predictions from the labels of references."""

    num_labels: int
    classifier: nn.Linear

    @property
    def class_names(self) -> dict[int, str]:
        """Name of each class as it is shown: [`shown_names`] of `config.id2label`, all different."""
        return shown_names(self.config.id2label)

    def with_votes(self, logits: torch.Tensor, votes: torch.Tensor) -> torch.Tensor:
        r"""
        Combines the logits of the classifier with the votes of the references, if the config asks for it.

        Without added classes, p_c = (1 - w) softmax(logits)_c + w v_c with the votes v and
        w = `reference_vote_weight`, as in kNN-LM (Khandelwal et al., 2020). With added classes, the weight is not
        used, and votes decide: p_c is proportional to v_c for a new class, and to v_c sqrt(q_c / max q) with q =
        softmax(logits) for a class that the classifier knows. The classifier thus orders the known classes, and never
        favors one over a new class.

        Args:
            logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`):
                The classifier's scores.
            votes (`torch.FloatTensor` of shape `(batch_size, num_labels)`):
                See [`ReferenceBank.count_votes`].

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_labels)`: log-probabilities, or `logits` unchanged.
        """
        weight, num_added = self.config.reference_vote_weight, self.config.num_added_classes
        if not weight and not num_added:
            return logits
        votes, tiny = votes.to(torch.float32), torch.finfo(torch.float32).tiny
        known = logits[:, : self.num_labels - num_added].float()
        if not num_added:
            return torch.lerp(known.softmax(-1), votes, weight).clamp(min=tiny).log()
        order = (known - known.amax(-1, keepdim=True)) / 2
        # Without any vote, as when all labeled references are masked, only known classes are predicted.
        has_votes = votes.sum(-1, keepdim=True) > 0
        order = torch.cat([order, torch.where(has_votes, 0.0, NEVER).expand(-1, num_added)], dim=-1)
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
        Adds classes that the classifier was not trained on, from labeled images, without training. The images are
        added to the reference bank, which must also hold labeled images of the other classes.
        `relation_scope="reference"` then tells all classes apart by the votes v of the bank (`reference_votes` of
        [`RBIModelOutput`]): p_c is proportional to v_c for the new classes, and to v_c sqrt(q_c / max q) for the
        classes that the classifier knows, where q are its own probabilities. In the other scopes, a new class is never
        predicted. Replaces `classifier` with a larger layer, so create optimizers afterwards.

        Args:
            names (`Sequence[str]`):
                Names of the new classes. White space and letters are normalized (single spaces, Unicode's NFC).
            images (`Dataset` or `Iterable`):
                As in [`~RBIPreTrainedModel.set_references`], all with labels: 0 for the first new class, 1 for the
                next.
            image_processor (`BaseImageProcessor`, *optional*):
                Processor for PIL images.
            batch_size (`int`, *optional*, defaults to 64):
                Number of images per forward pass.

        Raises:
            UserError: if a name exists already, a class has no image, an image has no label, or the bank lacks labeled
                images of a class. The model is then unchanged.
        """
        bank, known = self.base_model.require_own_references("add classes to"), self.config.id2label
        names = [normalized(name) for name in names]
        taken = {normalized(name) for name in (*known.values(), *self.class_names.values())}
        if not names or not all(names) or len({*names}) < len(names) or taken & {*names}:
            raise UserError(f"The names of new classes must be new and differ from each other, got {names}.")
        if absent := sorted(set(known) - set(bank.labels.tolist())):
            raise UserError(
                f"Classes are told apart by labeled references, and {len(absent)} classes have none in the bank, for "
                f"instance {self.class_names[absent[0]]!r}: add some with `add_references`."
            )
        new = dict(enumerate(names))
        features, thumbnails, labels = self._read_images(images, None, image_processor, batch_size)
        choose_references(labels, new, strategy="balanced")  # checks them
        self._append_references(features, thumbnails, labels + len(known))
        self.config.id2label = known | {len(known) + label: name for label, name in new.items()}
        self.config.label2id = {name: label for label, name in self.class_names.items()}
        self.config.num_added_classes += len(names)
        old, self.num_labels = self.classifier, self.config.num_labels
        self.classifier = nn.Linear(old.in_features, self.num_labels, device=old.weight.device, dtype=old.weight.dtype)
        with torch.no_grad():
            self.classifier.weight.zero_()
            self.classifier.bias.fill_(NEVER)
            self.classifier.weight[: len(known)] = old.weight
            self.classifier.bias[: len(known)] = old.bias
        self.classifier.train(old.training).requires_grad_(old.weight.requires_grad)


__all__ = ["AddedClassesMixin", "ReferenceBankMixin", "ReferencesMixin"]
