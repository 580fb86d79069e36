"""`python -m training.ablate`: exit codes, messages, and a killed run that goes on."""

import json
import signal
import time

import pytest

from training import ablate as command
from training.ablate import main


SMALL = {"freeze_backbone": True, "frozen_steps": 5, "num_seeds": 2, "num_shuffles": 2}


@pytest.fixture
def line(arguments, tmp_path):
    """Gives the command line of an ablation on the small data set."""

    def make(name="out", arms=("rbi-kernel-untrained",), **more):
        return [*arguments(tmp_path / name, **SMALL | more), "--arms", *arms]

    return make


@pytest.mark.slow
def test_it_says_what_came_out_and_where_it_is(line, tmp_path, capsys):
    assert main(line()) == 0
    output = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "ablation.json").read_text())
    accuracy = results["arms"]["plain"]["summary"]["test"]["single"]["accuracy"]["mean"]
    row = next(words for words in output.splitlines() if "plain " in words and "rbi" not in words)
    assert f"{100 * accuracy:.2f} ±" in row
    assert str((tmp_path / "out").resolve()) in output and "ablation.md" in output
    assert "rbi-kernel-untrained" in (tmp_path / "out" / "ablation.md").read_text()


@pytest.mark.slow
def test_a_recipe_sets_the_options(line, tmp_path, monkeypatch):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("num_seeds: 3\nfrozen_steps: 4\n")
    given = line(arms=["plain"])
    for name in ("--num_seeds", "--frozen_steps"):  # which would win over the recipe
        place = given.index(name)
        del given[place : place + 2]
    assert main([*given, "--config", str(recipe)]) == 0
    results = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert len(results["seeds"]) == 3 and results["arguments"]["frozen_steps"] == 4
    assert results["recipes"] == [str(recipe)]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--arms", "plain", "rbi-kernal"], 2, "There is no arm `rbi-kernal`: did you mean `rbi-kernel`?"),
        (["--num_seed", "3"], 2, "There is no argument --num_seed: did you mean `--num_seeds`?"),
        (["--recipe", "mine.yaml"], 2, "There is no argument --recipe"),
        (["--num_seeds", "1"], 2, "--num_seeds must be at least 2, got 1."),
        (["--num_unlabeled", "99"], 1, "--num_unlabeled 99: the test has 40 images"),
        (["--num_folds", "3"], 1, "--num_folds cannot be used in an ablation"),
    ],
)
def test_faults_cost_nothing_and_are_said(line, tmp_path, capsys, words, code, message):
    assert main([*line(), *words]) == code
    assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_stopped_by_hand_it_says_how_to_go_on(line, monkeypatch, capsys):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "ablate", stop)
    assert main(line()) == 130
    assert "Go on with: python -m training.ablate --dataset_format" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_it_goes_on(line, start_command, tmp_path):
    """A true kill, in a process of its own, right after the first figures."""
    folder = tmp_path / "out"
    words = line(arms=["rbi", "bank-trained"], frozen_steps=60)
    started = start_command("training.ablate", words)
    deadline = time.monotonic() + 120
    while not list(folder.glob("*/seed-42.json")) and time.monotonic() < deadline:
        time.sleep(0.001)
    started.process.kill()
    assert started.wait() == -signal.SIGKILL
    kept = {path: path.read_bytes() for path in folder.glob("*/seed-*.json")}
    assert kept and not (folder / "ablation.json").exists()
    assert main(words) == 0
    assert all(path.read_bytes() == content for path, content in kept.items())
    results = json.loads((folder / "ablation.json").read_text())
    assert list(results["arms"]) == ["plain", "self", "rbi", "bank-trained"]
    for name, arm in results["arms"].items():
        files = [json.loads((folder / name / f"seed-{seed}.json").read_text()) for seed in (42, 43)]
        assert arm["runs"] == files
