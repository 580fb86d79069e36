# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`python -m training.export` as a command: what it prints and returns."""

import json

import onnxruntime
import pytest
import torch
from transformers import ResNetConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_rbi import RBIConfig, RBIForImageClassification
from training.export import main


@pytest.mark.slow
def test_as_a_command(start_command, tmp_path):
    """The one export in a process of its own, with the `paper` preset and scope `self`."""
    out = tmp_path / "out"
    backbone_config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    model = RBIForImageClassification(RBIConfig.paper(backbone_config=backbone_config, num_labels=3)).eval()
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--relation_scope", "self", "--output_dir", str(out)]
    result = start_command("training.export", [*words, "--format", "onnx"])
    assert result.wait() == 0, result.stderr
    text = " ".join(result.stdout.split())
    facts = json.loads((out / "config.json").read_text())["rbi_export"]
    difference = facts["files"]["onnx/model.onnx"]["max_logit_difference"]
    for part in ("Relation scope self", "onnx/model.onnx", f"{difference:.1e}", "largest difference of logits"):
        assert part in text, part
    assert difference <= 1e-4 and facts["image_size"] == "dynamic"
    # Files of this scope hold no references.
    assert "Written:" in text and "reference images" not in text

    onnx_session = onnxruntime.InferenceSession(out / "onnx" / "model.onnx")
    for number, size in ((5, (32, 32)), (1, (32, 32)), (2, (48, 40))):
        pixel_values = torch.randn(number, 3, *size)
        with torch.no_grad():
            expected = model(pixel_values=pixel_values, relation_scope="self").logits
        got = torch.from_numpy(onnx_session.run(None, {"pixel_values": pixel_values.numpy()})[0])
        # Another runtime fuses operations and sums in another order.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--model", "/nowhere"], 1, "--model /nowhere: there is no such folder"),
        (["--dtype", "int8"], 1, "--dtype int8 needs images"),
        (["--split", "validation"], 1, "--split validation needs a data set"),
        (["--relation_scope", "all"], 2, "invalid choice: 'all'"),
        (["--format", "tflite"], 2, "invalid choice: 'tflite'"),
        (["--format", "torch_export", "--dtype", "float16"], 2, "goes with --format onnx"),
        (["--split", "train"], 2, "invalid choice: 'train'"),
        (["--test_dir", "x"], 2, "exactly one way"),
        (["--relation_scop", "self"], 2, "did you mean `--relation_scope`"),
        (["--per_device_eval_batch_size", "0"], 2, "--per_device_eval_batch_size must be at least 1"),
    ],
)
def test_errors(model_folder, more, code, message, tmp_path, capsys):
    assert main(["--model", str(model_folder), "--output_dir", str(tmp_path / "out"), *more]) == code
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and message in printed.err
    assert not printed.out and not (tmp_path / "out").exists()


def test_packages_that_are_not_installed(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.deployment.exporters.importlib.util.find_spec", lambda name: None)
    assert main(["--model", str(model_folder), "--output_dir", str(tmp_path / "out")]) == 1
    assert 'pip install -e ".[export]"' in capsys.readouterr().err
