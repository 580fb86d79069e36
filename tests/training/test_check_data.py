"""The check as a command: what it prints, writes and returns."""

import json
import random
import subprocess
import sys

import pytest
from PIL import Image

from training.check_data import main
from training.data.reading import DataArguments, fingerprint, load_images


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A clean folder with 2 classes of 6."""
    monkeypatch.setenv("RBI_CACHE", str(tmp_path / "cache"))
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(6):
            pixels = random.Random(f"{label}{number}").randbytes(16 * 16 * 3)
            Image.frombytes("RGB", (16, 16), pixels).save(tmp_path / "data" / label / f"{number}.png")
    return tmp_path / "data"


def test_as_a_command(folder, tmp_path):
    (folder / "a" / "[bold]x.jpg").write_bytes(b"")
    (folder / ".DS_Store").write_bytes(b"")
    command = [sys.executable, "-m", "training.check_data", "--train_dir", str(folder), "--min_per_class", "2"]
    result = subprocess.run([*command, "--report", str(tmp_path / "r.json")], capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    text = result.stdout.replace("\n", "")
    for words in ("train: 11 images", "zero_size", "hidden_file", "1 findings stop a training, 1 are notes"):
        assert words in text
    assert "[bold]x" in text
    report = json.loads((tmp_path / "r.json").read_text())
    assert [finding["kind"] for finding in report["findings"]] == ["zero_size", "hidden_file"]


def test_clean(folder, tmp_path, capsys):
    words = ["--train_dir", str(folder), "--seed", "3", "--report", str(tmp_path / "r.json"), "--num_workers", "2"]
    assert main(words) == 0
    assert "0 findings stop a training" in capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["arguments"]["train_dir"] == str(folder)
    assert report["fingerprint"] == fingerprint(load_images(DataArguments(train_dir=str(folder)), 3))
    assert report["images"] == {"train": 10, "validation": 2}


def test_notes_do_not_stop(folder, capsys):
    assert main(["--train_dir", str(folder), "--min_per_class", "100"]) == 0
    assert "few_images" in capsys.readouterr().out


def test_missing_classes_are_found_beside_the_rest(folder, tmp_path, capsys):
    (folder / "a" / "x.jpg").write_bytes(b"")
    (tmp_path / "val" / "a").mkdir(parents=True)
    (folder / "a" / "0.png").rename(tmp_path / "val" / "a" / "0.png")
    words = ["--train_dir", str(folder), "--validation_dir", str(tmp_path / "val")]
    assert main(words) == 1
    text = capsys.readouterr().out
    assert "missing_class" in text and "zero_size" in text
    (folder / "a" / "x.jpg").unlink()
    assert main(words) == 1
    assert main([*words, "--allow_missing_classes"]) == 0


def test_only_the_first_files_are_printed(folder, capsys):
    for number in range(5):
        (folder / "a" / f"x{number}.jpg").write_bytes(b"")
    assert main(["--train_dir", str(folder), "--num_files", "2"]) == 1
    text = capsys.readouterr().out
    assert "x1.jpg" in text and "x2.jpg" not in text and "and 3 more" in text
    assert "--skip_bad_images would leave out" in text
    main(["--train_dir", str(folder), "--num_files", "0"])
    assert "x4.jpg" in capsys.readouterr().out


def test_data_that_can_not_be_read_at_all(folder, tmp_path, capsys):
    (tmp_path / "test" / "zebra").mkdir(parents=True)
    (folder / "a" / "0.png").rename(tmp_path / "test" / "zebra" / "0.png")
    assert main(["--train_dir", str(folder), "--test_dir", str(tmp_path / "test")]) == 1
    assert "does not have: zebra" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "exactly one way"),
        (["--train_dir", "/nowhere"], "/nowhere is not a folder"),
        (["--train_dir", "{folder}", "--num_workers", "0"], "--num_workers must be at least 1"),
        (["--train_dir", "{folder}", "--num_files", "-1"], "--num_files must be at least 0"),
        (["--train_dir", "{folder}", "--report", "/nowhere/r.json"], "there is no folder /nowhere"),
        (["--train_dir", "{folder}", "--unknown", "1"], "--unknown"),
    ],
)
def test_wrong_arguments(folder, words, message, capsys):
    assert main([word.format(folder=folder) for word in words]) == 2
    assert message in capsys.readouterr().err
