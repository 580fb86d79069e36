"""`python -m training.assess` as a command: what it prints and returns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_rbi import RBIConfig, RBIForImageClassification
from training.assess import main
from training.data.arguments import DataArguments
from training.data.reading import load_images
from training.fine_tuning.models import ModelArguments, load_model


ROOT = Path(__file__).parents[2]


@pytest.fixture
def words(published, backbone_config, tmp_path, monkeypatch, tmp_path_factory):
    """The command line for an RBI model with random weights, and the small data set."""
    monkeypatch.setenv("RBI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    data = ["--dataset_format", "cub_200_2011", "--dataset_dir", str(published)]
    names = load_images(DataArguments(dataset_format=data[1], dataset_dir=data[3]), seed=0)["test"].features["label"]
    config = RBIConfig.kernel(backbone_config=backbone_config, id2label=dict(enumerate(names.names)))
    RBIForImageClassification(config).save_pretrained(tmp_path / "model")
    processor = load_model(ModelArguments(backbone_config='{"model_type": "convnext"}', image_size=32), ["a", "b"])[1]
    processor.save_pretrained(tmp_path / "model")
    return ["--model", str(tmp_path / "model"), *data, "--output_dir", str(tmp_path / "out"), "--use_cpu"]


@pytest.mark.slow
def test_as_a_command(words, tmp_path):
    command = [sys.executable, "-m", "training.assess", *words, "--batch_sizes", "8", "20", "--resamples", "100"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.split())
    for part in (
        "sorted - shuffled",
        "macro-F1",
        "Left out: reference, since the model has no reference bank",
        "40 images of 4 classes",
        "times one backbone pass",
        str(tmp_path / "out"),
    ):
        assert part in text, part
    assert max(len(line) for line in result.stdout.splitlines() if "/" not in line) <= 120
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    for finding in content["findings"].values():
        assert finding["sentence"] in text
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--protocols", "reference"], 1, "--protocols reference: the model has no reference bank"),
        (["--batch_sizes", "64"], 1, "--batch_sizes 64 is more than the 40 images"),
        (["--model", "/nowhere"], 1, "--model /nowhere: there is no such folder"),
        (["--num_shuffles", "1"], 2, "--num_shuffles must be at least 2"),
        (["--protocols", "alone"], 2, "invalid choice: 'alone'"),
        (["--split", "all"], 2, "invalid choice: 'all'"),
        (["--batch_size", "8"], 2, "did you mean `--batch_sizes`"),
        (["--train_dir", "x"], 2, "exactly one way"),
    ],
)
def test_errors(words, more, code, message, tmp_path, capsys):
    assert main([*words, *more]) == code
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and message in printed.err
    assert not printed.out and not (tmp_path / "out").exists()


def test_the_model_must_be_named(words, capsys):
    assert main(words[2:]) == 2
    assert "--model" in capsys.readouterr().err
