"""`python -m training.publish` with the real client and a local Hub, and the code in the cards."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from training.assess import main as assess
from training.deployment import publication
from training.publish import main


ROOT = Path(__file__).parents[2]
CARD = ROOT / "tests" / "training" / "pets.yaml"
# Python without this project's packages.
OUTSIDER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_rbi", "training", "model_cards"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
"""


@pytest.fixture(scope="module")
def assessed(model_folder, image_files, tmp_path_factory):
    """The model's images in class folders, and its assessment on them."""
    folder = tmp_path_factory.mktemp("assessed")
    for path in image_files:
        class_folder = folder / "images" / path.stem.split("_")[0]
        class_folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, class_folder)
    data = ["--train_dir", str(folder / "images"), "--split", "train", "--output_dir", str(folder / "assessment")]
    more = ["--batch_sizes", "4", "--resamples", "100", "--use_cpu", "--disable_tqdm"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RBI_CACHE", str(folder / "cache"))
        assert assess(["--model", str(model_folder), *data, *more]) == 0
    return folder


@pytest.fixture
def command(model_folder, assessed, image_files):
    """Gives a function that makes the command line of a publication."""

    def make(repo_id="alice/pets", *more):
        facts = ["--config", str(CARD), "--assessment", str(assessed / "assessment"), "--share_images"]
        examples = ["--examples", *(str(path) for path in image_files[2::3])]
        return ["--model", str(model_folder), "--repo_id", repo_id, *facts, *examples, *more]

    return make


@pytest.fixture
def run(hub, monkeypatch, tmp_path, capsys):
    """Runs a command line against the Hub in this process: exit code, output and errors."""
    hub.connect(monkeypatch, tmp_path / "home")

    def run(words, token=None):
        with monkeypatch.context() as patch:
            if token is not None:
                patch.setenv("HF_TOKEN", token)
            code = main(words)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def reloaded(monkeypatch):
    """The folders that would be reloaded in a fresh process. `test_checks.py` and one test here really reload."""
    folders = []
    monkeypatch.setattr(publication, "check_loads_back", lambda folder, *_: folders.append(folder))
    return folders


@pytest.mark.slow
def test_publications_and_the_code_of_their_card(hub, hub_module, run, reloaded, command, tmp_path):
    draft, sharded = tmp_path / "draft", command("zoo/pets", "--private", "--max_shard_size", "15kB")
    # The connection breaks when one of the large files has arrived, and the client's next attempt is refused.
    hub.fail("^PUT", skip=1)
    hub.fail("^PUT", status=403, skip=1)
    cut = run(sharded)
    repo = hub.repo("zoo/pets")
    assert cut[0] == 1 and "The upload was interrupted" in cut[2] and "403" in cut[2]
    assert repo.history() == [] and repo.private
    arrived = set(repo.objects)

    again = run(sharded)
    # Files of others stay, even if their names resemble files of a publication.
    others = ["scripts/prepare_rbi.py", "examples/mine/cat.png", "onnx/model.safetensors", "notes.md"]
    commit = repo.commit()
    files = commit.files | {name: hub_module.File(b"mine", False) for name in others}
    repo.add("main", "mine", "", "alice", files)

    whole = run(command("zoo/pets", "--private"))
    assert len(reloaded) == 3
    # The one dry run in a process of its own, which reloads the folder in another.
    dry = subprocess.run(
        [
            *(sys.executable, "-m", "training.publish"),
            *command("zoo/pets", "--private", "--dry_run", "--output_dir", str(draft)),
        ],
        env=hub.env(tmp_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert again[0] == whole[0] == dry.returncode == 0, again[2] + whole[2] + dry.stderr
    assert "Reloaded in a fresh process" in dry.stdout
    first, mine, second = repo.history()
    assert set(others) < set(mine.files) and set(others) < set(second.files)
    assert first.id in again[1] and second.id in whole[1]
    large = [path for path, file in first.files.items() if file.is_lfs]
    assert 0 < len(arrived) < len(large)
    assert hub.count("^PUT") == len(large) + 1, "a large file that has arrived is not sent again"
    # No file of the earlier publication is left, and the dry run writes what the upload sends.
    sent = {path: content for path, content in repo.files().items() if path not in (".gitattributes", *others)}
    assert sent == {
        path.relative_to(draft).as_posix(): path.read_bytes() for path in draft.rglob("*") if path.is_file()
    }

    blocks = re.findall(r"```python\n(.*?)```", (draft / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    outside = tmp_path / "outside"
    outside.mkdir()
    code = OUTSIDER + "".join(f"exec(compile({block!r}, 'README.md', 'exec'), {{}})\n" for block in blocks)
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=hub.env(outside),
        cwd=outside,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "'label': 'cat'" in result.stdout and "\ncat\n" in result.stdout


@pytest.mark.slow
def test_what_is_refused_touches_nothing(hub, hub_module, run, reloaded, command, tmp_path):
    hub.add_user("bob")
    reader = hub.add_user("carol", can_write=False)
    # Files that a plain Trainer leaves.
    old = hub.repos["model", "alice/old"] = hub_module.Repo("model", "alice/old", False, "alice")
    names = ("training_args.bin", "processor_config.json", ".env", "notes.md", "other/adapter_config.json")
    old.add("main", "mine", "", "alice", {name: hub_module.File(b"{}", False) for name in names})
    results = [
        run(command("bob/pets")),
        run(command("alice/pets", "--license", "no-such-license")),
        run(command("alice/pets", "--description", "hf_" + "x" * 34)),
        run(command("alice/pets", "--assessment", str(tmp_path))),
        run(command("alice/pets", "--revision", "v2")),
        run(command("alice/old", "--revision", "v2")),
        run(command("alice/old")),
        run(command("carol/pets"), token=reader),
        run(command(), token="hf_wrong"),
        run(command(), token=""),
    ]
    other, license, secret, assessment, no_repo, no_branch, unfit, may_read, wrong, none = results
    assert [code for code, *_ in results] == [1] * 10
    assert "the token belongs to alice and cannot write to bob" in other[2]
    assert "The Hub does not accept the card" in license[2] and "license" in license[2]
    assert "does not exist yet" in no_repo[2] and "has no such branch" in no_branch[2]
    for name in names:
        assert (name in unfit[2]) == (name not in names[3:])
    assert "hf repos delete-files alice/old" in unfit[2] and "read-only" in may_read[2]
    assert "README.md holds a token of Hugging Face" in secret[2]
    assert "not an output folder of training.assess" in assessment[2]
    assert "does not know the token" in wrong[2]
    assert "hf auth login" in none[2] and "HF_TOKEN" in none[2]
    assert len(reloaded) == 1  # only the Hub knows which licenses there are
    assert hub.count("/commit/") == 0 and set(hub.repos) == {("model", "alice/old")}


@pytest.mark.slow
def test_a_dry_run_that_would_be_refused_says_why(reloaded, command, tmp_path, capsys):
    words = command("alice/pets", "--dry_run", "--output_dir", str(tmp_path / "draft"))
    words[words.index("--config") + 1] = str(tmp_path / "empty.yaml")
    (tmp_path / "empty.yaml").write_text("license: mit\n")
    assert main(words) == 1
    printed = capsys.readouterr()
    assert "it would be refused" in printed.err and "--data_bias" in printed.err and "Ready to be" not in printed.out
    card = ModelCard.load(tmp_path / "draft" / "README.md")
    assert card.data.license == "mit" and card.text.count("**Missing") > 3
    # The corrected folder replaces it, but a folder with other files is not replaced.
    words[words.index("--config") + 1] = str(CARD)
    assert main(words) == 0
    assert "Ready to be published" in capsys.readouterr().out
    assert "**Missing" not in (tmp_path / "draft" / "README.md").read_text()
    assert len(reloaded) == 2
    assert main(["--model", str(tmp_path / "draft"), *words[2:]]) == 1
    assert "is the model's own folder" in capsys.readouterr().err
    (tmp_path / "draft" / "mine.txt").touch()
    before = (tmp_path / "draft" / "README.md").read_bytes()
    assert main(words) == 1
    assert "holds other files than a publication" in capsys.readouterr().err
    assert (tmp_path / "draft" / "README.md").read_bytes() == before


def test_wrong_arguments_end_with_2(command, capsys):
    assert main([*command(), "--licens", "mit"]) == 2
    assert "--license" in capsys.readouterr().err
    assert main(command("pets")) == 2
    assert "user/name" in capsys.readouterr().err


def test_the_committed_cards_say_what_was_measured():
    """Tables and metadata have the same figures, nothing is missing, and no local path appears."""
    cards = [ROOT / "model_cards" / name for name in ("orl_faces.md", "emoji.md")]
    for path in cards:
        card = ModelCard.load(path)
        assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "transformers"
        assert card.data.license and "Missing" not in str(card)
        assert not re.search(r"(?<![\w:/])/(?:tmp|home|root|work)/", str(card))
        results = {
            (result.metric_config, str(result.metric_args.get("batch_size") or "")): result
            for result in card.data.eval_results
            if result.metric_type == "accuracy"
        }
        rows = re.findall(
            r"^\| (single|reference|shuffled|sorted) \| (\d*) \| ([\d.]+) \[([\d.]+), ([\d.]+)\]", card.text, re.M
        )
        assert len(rows) == len(results) > 3
        for protocol, batch_size, *figures in rows:
            result = results[protocol, batch_size]
            expected = [result.metric_value, *result.metric_args["interval"]]
            assert [float(figure) / 100 for figure in figures] == pytest.approx(expected, abs=6e-4)
