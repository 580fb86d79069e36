# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Checks before a publication: secrets, local paths, pickles, and reloading in a fresh process."""

import copy
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from modeling_rbi import RBIForImageClassification
from training.deployment import checks
from training.deployment.checks import (
    RefusedError,
    check_loads_back,
    compare_logits,
    find_local_paths,
    find_pickles,
    find_secrets,
    without_local_paths,
)


@pytest.mark.parametrize(
    "secret",
    [
        *("ghp_" + "a" * 36, "AKIA" + "A" * 16, "AIza" + "b" * 35, "xoxb-" + "1" * 12, "sk-" + "c" * 40),
        "-----BEGIN RSA " + "PRIVATE KEY-----",
    ],
)
def test_secrets_of_many_kinds(tmp_path, secret):
    (tmp_path / "notes.md").write_text(f"the key: {secret}")
    (tmp_path / "fine.md").write_text(
        "hf_hub_download, sk-learn, AKIA and a commit 5503434ddd753f426f4b38109466949a1217c2bb"
    )
    (found,) = find_secrets(tmp_path)
    assert found.startswith("notes.md")


def test_pickles_are_found_by_name_and_by_content(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"anything")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "cat.png").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"a": torch.ones(1)}, tmp_path / "notes.txt")
    Image.new("RGB", (4, 4)).save(tmp_path / "fine.png")
    (tmp_path / "fine.json").write_text("{}")
    # The first bytes of this file are a length that equals the first bytes of a pickle.
    for number in range(600):
        save_file({"x" * number: torch.ones(1)}, tmp_path / "model.safetensors")
        if (tmp_path / "model.safetensors").read_bytes()[:2] == b"\x80\x02":
            break
    else:
        pytest.fail("no such length")
    assert [found.split(" is ")[0] for found in find_pickles(tmp_path)] == [
        "examples/cat.png",
        "notes.txt",
        "weights.bin",
    ]


def test_local_paths_are_cut_to_their_last_part():
    local_paths = ["/home/me/x.json", "~/y", "C:\\data\\z", "file:///home/me/v", "../../me/w"]
    others = ["user/name", "2/3", 5, None]
    content = {"a": local_paths + others, "b": {"c": "/"}}
    assert without_local_paths(content) == {"a": ["x.json", "y", "z", "v", "w", *others], "b": {"c": ""}}


def test_local_paths_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/alice")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "fine.json").write_text('["/home/alicette/x", "https://host/home/alice/x", "home/alice"]')
    assert find_local_paths(folder, Path("/data/models")) == []
    told = {"home.json": "/home/alice/x", "here.md": f"see {tmp_path}.", "source.txt": "file:///data/models/x"}
    for name, text in told.items():
        (folder / name).write_text(text)
    assert {found.split(" ")[0] for found in find_local_paths(folder, Path("/data/models"))} == set(told)


@pytest.mark.slow
def test_code_that_needs_the_package_is_refused(made, tmp_path):
    folder = shutil.copytree(made.folder, tmp_path / "folder")
    code = (folder / "modeling_rbi.py").read_text()
    (folder / "modeling_rbi.py").write_text(
        code.replace("from .references_rbi", "from modeling_rbi.references_rbi", 1)
    )
    with pytest.raises(RefusedError, match="does not load or run without this package installed"):
        check_loads_back(folder, made.model, made.image_processor)


@pytest.mark.slow
def test_a_publication_in_half_precision_and_shards_loads_back(made_in_half, monkeypatch):
    """`test_publish.py` reloads a publication in float32."""
    run, written = subprocess.run, []

    def run_once(words, **options):
        """Starts the process once, and afterwards only repeats its output."""
        if written:
            Path(words[-1]).write_bytes(written[0])
            return subprocess.CompletedProcess(words, 0)
        result = run(words, **options)
        written.append(Path(words[-1]).read_bytes())
        return result

    monkeypatch.setattr(checks.subprocess, "run", run_once)
    # On the random images of this function. The published examples are used in `test_publish.py`.
    check_loads_back(made_in_half.folder, made_in_half.model, made_in_half.image_processor)
    assert written
    other = copy.deepcopy(made_in_half.model)
    other.classifier.bias.data[0] += 0.5
    with pytest.raises(RefusedError, match=r"reloaded model differs .* differ by 0\.(49|5)"):
        check_loads_back(made_in_half.folder, other, made_in_half.image_processor)


# Noise as kernels of another machine cause it: a few unit roundoffs of the dtype.
@pytest.mark.parametrize(
    ("dtype", "rounding", "error"),
    [(torch.float32, 1e-5, 1e-3), (torch.float16, 2e-3, 0.05), (torch.bfloat16, 0.02, 0.2)],
)
def test_rounding_is_tolerated_and_another_model_is_not(model_folder, dtype, rounding, error):
    model = RBIForImageClassification.from_pretrained(model_folder, dtype=dtype).eval()
    pixel_values = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        logits = {
            scope: model(pixel_values.to(dtype), relation_scope=scope).logits.float()
            for scope in ("self", "batch", "reference")
        }

    def change(by):
        return {scope: each + by * each.abs().max().clamp(min=1) for scope, each in logits.items()}

    compare_logits(change(rounding * (2 * torch.rand(3, 3) - 1)), model, pixel_values)
    wrong = torch.zeros(3, 3)
    for value in (error, torch.nan):
        wrong[1, 2] = value
        with pytest.raises(RefusedError, match="reloaded model differs from the model"):
            compare_logits(change(wrong), model, pixel_values)
