"""The check as a command: what it prints, writes and returns, and which recipes it reads."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from training import check_data
from training.check_data import CheckArguments, check, findings_table, main
from training.data.arguments import DataArguments
from training.data.checks import DataReport
from training.data.form import fingerprint
from training.data.reading import load_images
from training.fine_tuning.arguments import Arguments


RECIPES = Path(check_data.__file__).parent / "recipes"


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


@pytest.mark.slow
def test_as_a_command(folder, start_command, tmp_path):
    (folder / "a" / "[bold]x.jpg").write_bytes(b"")
    (folder / ".DS_Store").write_bytes(b"")
    words = ["--train_dir", folder, "--min_per_class", "2", "--report", tmp_path / "r.json"]
    result = start_command("training.check_data", words)
    assert result.wait() == 1, result.stderr
    text = result.stdout.replace("\n", "")
    for part in ("train: 11 images", "zero_size", "hidden_file", "1 findings prevent training, 1 are notes"):
        assert part in text
    assert "[bold]x" in text
    report = json.loads((tmp_path / "r.json").read_text())
    assert [finding["kind"] for finding in report["findings"]] == ["zero_size", "hidden_file"]


def test_clean(folder, tmp_path, capsys):
    words = ["--train_dir", str(folder), "--seed", "3", "--report", str(tmp_path / "r.json"), "--num_workers", "2"]
    assert main(words) == 0
    assert "0 findings prevent training" in capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["arguments"]["train_dir"] == str(folder)
    assert report["fingerprint"] == fingerprint(load_images(DataArguments(train_dir=str(folder)), 3))
    assert report["images"] == {"train": 10, "validation": 2}


def test_names_are_no_markup(folder, capsys):
    names = ("[red]x.jpg", "a[.jpg", ":cat:.jpg", r"\[b]x.jpg")
    for name in names:
        (folder / "a" / name).write_bytes(b"")
    (folder / "a").rename(folder / "a[")
    (folder / "b").rename(folder / "b]")  # beside each other, they look like a tag
    report = check(DataArguments(train_dir=str(folder)), CheckArguments(num_files=0), Console(quiet=True))
    console = Console(width=1000)
    console.print(findings_table(report, 0))
    printed = capsys.readouterr().out
    assert all(f"a[/{name}" in printed for name in names)


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


def test_a_class_of_files_that_cannot_be_read(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "c").mkdir()
    (folder / "c" / "0.cr2").write_bytes(b"?")
    (folder / "a" / "x.jpg").write_bytes(b"")
    assert main(["--train_dir", ".", "--report", str(tmp_path / "r.json")]) == 1
    report = (tmp_path / "r.json").read_text()
    kinds = [finding["kind"] for finding in json.loads(report)["findings"]]
    assert kinds == ["zero_size", "unread_file", "empty_class"]
    assert "no known ending" in report
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in kinds)


def test_only_the_first_files_are_printed(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)  # long paths would be folded in the table
    for number in range(5):
        (folder / "a" / f"x{number}.jpg").write_bytes(b"")
    assert main(["--train_dir", ".", "--num_files", "2"]) == 1
    text = capsys.readouterr().out
    assert "x1.jpg" in text and "x2.jpg" not in text and "and 3 more" in text
    assert "--skip_bad_images would leave out" in text
    main(["--train_dir", ".", "--num_files", "0"])
    assert "x4.jpg" in capsys.readouterr().out


def test_data_that_can_not_be_read_at_all(folder, tmp_path, capsys):
    (tmp_path / "test" / "zebra").mkdir(parents=True)
    (folder / "a" / "0.png").rename(tmp_path / "test" / "zebra" / "0.png")
    assert main(["--train_dir", str(folder), "--test_dir", str(tmp_path / "test")]) == 1
    assert "does not have: zebra" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_a_training_name_the_same_data(recipe, monkeypatch, tmp_path):
    """Whole recipes and the parts that they are made of, with flags of a training after them."""
    argv = ["--config", str(recipe), "--use_cpu", "--bf16", "False", "--model_name_or_path", "a/b", "--seed", "5"]
    if "dataset_format" not in recipe.read_text() and recipe.parent.name in ("models", "settings"):
        argv += ["--train_dir", str(tmp_path)]
    seen = []
    monkeypatch.setattr(check_data, "check", lambda *args: seen.append(args[:2]) or DataReport({}, ()))
    assert main(argv) == 0
    ((data_args, args),) = seen
    training = Arguments.parse(argv)
    assert data_args == training.data
    assert args.seed == training.training.seed == 5


def test_a_recipe_is_checked_as_flags_are(folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"train_dir: {folder}\nseed: 3\nlearning_rate: 1e-4\nmin_per_class: 6\noptimizer: radam\n")
    reports = []
    for argv in (["--config", str(recipe)], ["--train_dir", str(folder), "--seed", "3", "--min_per_class", "6"]):
        assert main([*argv, "--report", str(tmp_path / "r.json")]) == 0
        assert "few_images" in capsys.readouterr().out
        reports.append(json.loads((tmp_path / "r.json").read_text()))
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train_dri: images", "unknown key `train_dri`: did you mean `train_dir`"),
        ("learning_rte: 1", "unknown key `learning_rte`: did you mean `learning_rate`"),
        ("learning_rate: much", "--learning_rate/--learning-rate: invalid float value: 'much'"),
        ("learning_rate: [1, 2]", "a list for `learning_rate`, which takes one value"),
    ],
)
def test_a_wrong_key_or_value_in_a_recipe(folder, tmp_path, line, message, capsys):
    (tmp_path / "recipe.yaml").write_text(f"{line}\n")
    assert main(["--config", str(tmp_path / "recipe.yaml"), "--train_dir", str(folder)]) == 2
    assert message in capsys.readouterr().err


def test_help_lists_what_has_an_effect(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("train_dir", "seed", "report", "config"))
    assert "learning_rate" not in text


def test_a_folder_that_is_not_there(capsys):
    assert main(["--train_dir", "/nowhere"]) == 1
    assert capsys.readouterr().err == "error: --train_dir /nowhere is not a folder.\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "exactly one way"),
        (["--train_dir", "{folder}", "--num_workers", "0"], "--num_workers must be at least 1"),
        (["--train_dir", "{folder}", "--num_files", "-1"], "--num_files must be at least 0"),
        (["--train_dir", "{folder}", "--report", "/nowhere/r.json"], "there is no folder /nowhere"),
        (["--train_dir", "{folder}", "--unknown", "1"], "--unknown"),
    ],
)
def test_wrong_arguments(folder, words, message, capsys):
    assert main([word.format(folder=folder) for word in words]) == 2
    assert message in capsys.readouterr().err
