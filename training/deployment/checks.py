# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Checks of a folder before it is published: secrets, local paths, pickles, and loading it back."""

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

# Differences between the model here and the one that is loaded from the folder, of their logits.
TOLERANCE = 1e-4
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
_PLACE = re.compile(r"(?:file://|/|~|\.\.?[\\/]|[A-Za-z]:[\\/]|\\\\).*")
_TEXT = {".csv", ".json", ".md", ".py", ".txt", ".yaml", ".yml"}


class RefusedError(UserError):
    """What must not be published as it is; the message names all that is wrong and the mends."""


def without_places(content: Any) -> Any:
    """JSON with the last part alone of paths: where files lie on this machine is nobody's business."""
    if isinstance(content, dict):
        return {key: without_places(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_places(value) for value in content]
    if isinstance(content, str) and _PLACE.fullmatch(content):
        return re.split(r"[\\/]", content.rstrip("\\/"))[-1]
    return content


def find_places(folder: Path, source: Path) -> list[str]:
    """Text files of a folder that tell where files lie on this machine, such as the model's, each in words."""
    roots = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), source.resolve()}
    places = [str(root) for root in roots if root != Path(root.anchor)]
    return [
        f"{path.relative_to(folder)} names a place on this machine, {place}: take it out."
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in _TEXT
        for place in places
        if re.search(rf"(?<![\w.-]){re.escape(place)}(?![\w.-])", path.read_text(encoding="utf-8"))
    ]


def find_secrets(folder: Path) -> list[str]:
    """Tokens and keys in the text files of a folder, each in words; the secret itself is not repeated."""
    own = get_token()
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in _TEXT:
            text = path.read_text(encoding="utf-8")
            name = path.relative_to(folder)
            found += [f"{name} holds {kind}: take it out." for kind, form in _SECRETS.items() if re.search(form, text)]
            if own and own in text:
                found.append(f"{name} holds your token of the Hub: take it out.")
    return found


def find_pickles(folder: Path) -> list[str]:
    """Files that run code when they are loaded, by name or by content, each in words."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(4)
            # Protocols 2 and later begin with 0x80 and their number, as may the length in a safetensors file;
            # torch.save's archives are zip files.
            is_pickle = path.suffix != ".safetensors" and re.match(rb"\x80[\x02-\x05]|PK\x03\x04", head)
            if path.suffix in PICKLE_SUFFIXES or is_pickle:
                found.append(f"{path.relative_to(folder)} is a pickle or an archive: it is not published.")
    return found


def check_loads_back(
    folder: Path,
    model: RBIForImageClassification,
    image_processor: BaseImageProcessor,
    images: Sequence[Path] = (),
):
    r"""
    Loads the folder in a process without this project's packages and compares its answers with those of the model.

    Args:
        folder (`Path`):
            What would be published.
        model (`RBIForImageClassification`), image_processor (`BaseImageProcessor`):
            What it must be the same as.
        images (`Sequence[Path]`, *optional*):
            To compare with; by default made-up ones.

    Raises:
        RefusedError: if it does not load or run, or answers otherwise.
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
            raise RefusedError(f"The folder does not load and answer where this package is not installed ({reason}).")
        loaded = load_file(output)
        opened = [Image.open(path).convert("RGB") for path in paths]
        inputs = image_processor(opened, return_tensors="pt").to(model.dtype)
        for scope, logits in loaded.items():
            with torch.no_grad():
                expected = model(**inputs, relation_scope=scope).logits.float()
            difference = (logits - expected).abs().max().item()
            if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
                raise RefusedError(
                    f"What is loaded from the folder answers otherwise than the model: its logits differ by "
                    f'{difference:.2g} with relation_scope="{scope}".'
                )


def _make_images(folder: Path) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    paths = [folder / f"{number}.png" for number in range(3)]
    for path in paths:
        pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize((96, 128), Image.Resampling.BICUBIC).save(path)
    return paths
