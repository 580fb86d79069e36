# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`python -m training.export` as a command: what it prints and returns."""

import json

import pytest

from training.export import main


def test_as_a_command(model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(["--model", str(model_folder), "--format", "onnx", "--relation_scope", "self", "--output_dir", str(out)])
        == 0
    )
    printed = capsys.readouterr()
    text = " ".join(printed.out.split())
    content = json.loads((out / "config.json").read_text())
    difference = content["rbi_export"]["files"]["onnx/model.onnx"]["max_logit_difference"]
    for part in ("Relation scope self", "onnx/model.onnx", f"{difference:.1e}", "largest difference of logits"):
        assert part in text, part
    assert difference <= 1e-4 and not printed.err
    assert "Written:" in text and "reference images" not in text  # none are in a file of this scope


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
