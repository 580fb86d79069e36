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
"""RBI (Relationship Batch Integration) for Hugging Face Transformers. Importing it registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .bank_rbi import MAX_REFERENCES, NO_LABEL, ReferenceBank
from .configuration_rbi import RBIConfig
from .errors_rbi import MismatchedWeightsError, MissingPackageError, UnreadableImageError, UserError
from .image_processing_rbi import load_image_processor, pixel_statistics, upright_rgb
from .modeling_rbi import (
    RBIForImageClassification,
    RBIImageClassifierOutput,
    RBIModel,
    RBIModelOutput,
    RBIPreTrainedModel,
)
from .reference_images_rbi import choose_references
from .relations_rbi import Neighborhood, RelationshipPositionEncoding, ResidualRelationshipAttention, RRAOutput


AutoConfig.register(RBIConfig.model_type, RBIConfig, exist_ok=True)
AutoModel.register(RBIConfig, RBIModel, exist_ok=True)
AutoModelForImageClassification.register(RBIConfig, RBIForImageClassification, exist_ok=True)

# Saved models carry this code, so that they load where the package is not installed.
RBIConfig.register_for_auto_class()
RBIModel.register_for_auto_class("AutoModel")
RBIForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "MAX_REFERENCES",
    "NO_LABEL",
    "MismatchedWeightsError",
    "MissingPackageError",
    "Neighborhood",
    "RBIConfig",
    "RBIForImageClassification",
    "RBIImageClassifierOutput",
    "RBIModel",
    "RBIModelOutput",
    "RBIPreTrainedModel",
    "RRAOutput",
    "ReferenceBank",
    "RelationshipPositionEncoding",
    "ResidualRelationshipAttention",
    "UnreadableImageError",
    "UserError",
    "choose_references",
    "load_image_processor",
    "pixel_statistics",
    "upright_rgb",
]
