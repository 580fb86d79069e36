# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Checks of a folder before publication: secrets, local paths, pickles, and whether it loads in a fresh process."""

import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token
from PIL import Image
from safetensors.torch import load_file
from transformers.image_processing_utils import BaseImageProcessor

from modeling_rbi import RBIForImageClassification, UserError


logger = logging.getLogger(__name__)

# Largest difference of logits between the model and its reloaded copy, relative to the largest logit (at least 1).
# The kernels of another process may round differently in each layer (other memory alignment, other sums). This allows
# about 1,700 unit roundoffs of float32 (6e-8), and 20 of float16 (5e-4) and 13 of bfloat16 (4e-3), whose kernels sum
# in float32 and round once per layer.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
PICKLE_SUFFIXES = {".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}
_SECRETS = {
    "a token of Hugging Face": r"\bhf_[A-Za-z0-9]{30,}",
    "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{40,})",
    "a key of AWS": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a key of Google": r"\bAIza[\w-]{35}",
    "a token of Slack": r"\bxox[abprs]-[\w-]{10,}",
    "an API key": r"\bsk-[\w-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_LOCAL_PATH = re.compile(r"(?:file://|/|~|\.\.?[\\/]|[A-Za-z]:[\\/]|\\\\).*")
_TEXT = {".csv", ".json", ".md", ".py", ".txt", ".yaml", ".yml"}


class RefusedError(UserError):
    """The model cannot be published in its current state. The message lists all problems and how to fix them."""


def without_local_paths(content: Any) -> Any:
    """JSON content in which local paths are reduced to their last part, so that it does not reveal this machine."""
    if isinstance(content, dict):
        return {key: without_local_paths(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_local_paths(value) for value in content]
    if isinstance(content, str) and _LOCAL_PATH.fullmatch(content):
        return re.split(r"[\\/]", content.rstrip("\\/"))[-1]
    return content


def find_local_paths(folder: Path, source: Path) -> list[str]:
    r"""
    Text files that name a folder of this machine: the home, current or temporary folder, or the model's.

    Args:
        folder (`Path`):
            The folder to search.
        source (`Path`):
            The model's own folder.

    Returns:
        `list[str]`: one sentence for each finding.
    """
    roots = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), source.resolve()}
    local_paths = [str(root) for root in roots if root != Path(root.anchor)]
    return [
        f"{path.relative_to(folder)} names a folder of this machine, {local_path}: remove it."
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in _TEXT
        for local_path in local_paths
        if re.search(rf"(?<![\w.-]){re.escape(local_path)}(?![\w.-])", path.read_text(encoding="utf-8"))
    ]


def find_secrets(folder: Path) -> list[str]:
    """Tokens and keys in the text files of a folder, one sentence for each, which does not repeat the secret."""
    own = get_token()
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in _TEXT:
            text = path.read_text(encoding="utf-8")
            name = path.relative_to(folder)
            found += [f"{name} holds {kind}: remove it." for kind, form in _SECRETS.items() if re.search(form, text)]
            if own and own in text:
                found.append(f"{name} holds your Hub token: remove it.")
    return found


def find_pickles(folder: Path) -> list[str]:
    """Files that can run code when loaded, recognized by name or content, one sentence for each."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(4)
            # Pickles of protocol 2 and later begin with 0x80 and the protocol's number; a safetensors file may, too,
            # since it begins with a length. Archives of torch.save are zip files.
            is_pickle = path.suffix != ".safetensors" and re.match(rb"\x80[\x02-\x05]|PK\x03\x04", head)
            if path.suffix in PICKLE_SUFFIXES or is_pickle:
                found.append(f"{path.relative_to(folder)} is a pickle or an archive, which is not published.")
    return found


def check_loads_back(
    folder: Path,
    model: RBIForImageClassification,
    image_processor: BaseImageProcessor,
    images: Sequence[Path] = (),
):
    r"""
    Loads the folder in a fresh process that cannot import this project, and compares its logits with the model's.

    Args:
        folder (`Path`):
            The folder to be published.
        model (`RBIForImageClassification`):
            The model that was saved there.
        image_processor (`BaseImageProcessor`):
            Its image processor.
        images (`Sequence[Path]`, *optional*):
            Images to compare on; random ones by default.

    Raises:
        RefusedError: if the folder does not load, or its logits differ from the model's by more than rounding.
    """
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        paths = list(images) or _make_images(scratch)
        output = scratch / "logits.safetensors"
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(scratch / "modules"),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        script = Path(__file__).with_name("reload_check.py")
        result = subprocess.run(
            [sys.executable, "-E", "-P", str(script), *(str(path.resolve()) for path in (folder, *paths, output))],
            env=environment,
            cwd=scratch,
            capture_output=True,
            text=True,
        )
        if result.returncode:
            logger.debug("The fresh process ended with:\n%s", result.stderr)
            reason = result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "no message"
            raise RefusedError(f"The folder does not load or run without this package installed ({reason}).")
        opened = [Image.open(path).convert("RGB") for path in paths]
        pixel_values = image_processor(opened, return_tensors="pt")["pixel_values"]
        compare_logits(load_file(output), model, pixel_values)


def compare_logits(loaded: dict[str, torch.Tensor], model: RBIForImageClassification, pixel_values: torch.Tensor):
    r"""
    Compares logits that a reloaded model gave with the model's own.

    Args:
        loaded (`dict[str, torch.FloatTensor]`):
            For each relation scope the logits, `(batch_size, num_labels)`, in float32.
        model (`RBIForImageClassification`):
            The model.
        pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
            The images.

    Raises:
        RefusedError: if the logits differ by more than the entry of `TOLERANCES` for the model's dtype.
    """
    for scope, logits in loaded.items():
        with torch.no_grad():
            expected = model(pixel_values.to(model.dtype), relation_scope=scope).logits.float()
        difference = (logits - expected).abs().max().item()
        limit = TOLERANCES[model.dtype] * max(1.0, expected.abs().max().item())
        if not difference <= limit:  # also where it is NaN
            raise RefusedError(
                f'The reloaded model differs from the model: with relation_scope="{scope}", its logits differ by '
                f"{difference:.2g}, more than {limit:.2g}."
            )


def _make_images(folder: Path) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    paths = [folder / f"{number}.png" for number in range(3)]
    for path in paths:
        pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize((96, 128), Image.Resampling.BICUBIC).save(path)
    return paths
