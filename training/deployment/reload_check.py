# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Loads a model folder as a user without this package would, and writes its logits.

    python -E -P training/deployment/reload_check.py FOLDER IMAGE... OUTPUT.safetensors

Run it by its path, in a process of its own. It refuses to import the project's packages, so that the code in the
folder is what runs.
"""

import sys


class _Absent:
    """Import hook that makes the project's packages unavailable."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_rbi", "training", "model_cards"):
            raise ModuleNotFoundError(f"No module named {name!r} (the folder must work without it)", name=name)
        return None


def main(folder: str, images: list[str], output: str):
    """Writes the logits, `(len(images), num_labels)`, for each relation scope that the model supports to `output`."""
    sys.meta_path.insert(0, _Absent())
    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from transformers import AutoModelForImageClassification, pipeline
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    image_processor = AutoImageProcessor.from_pretrained(folder)
    opened = [Image.open(image).convert("RGB") for image in images]
    inputs = image_processor(opened, return_tensors="pt").to(model.dtype)
    scopes = ["self", "batch"] + (["reference"] if model.config.references is not None else [])
    with torch.no_grad():
        logits = {scope: model(**inputs, relation_scope=scope).logits.float() for scope in scopes}
    (answer,) = pipeline("image-classification", model=folder, trust_remote_code=True)(opened[0], top_k=1)
    if answer["label"] not in model.config.id2label.values():
        raise ValueError(f"The pipeline predicts {answer['label']!r}, which is not a class of the model.")
    save_file(logits, output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:-1], sys.argv[-1])
