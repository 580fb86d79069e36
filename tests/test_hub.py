"""RBI models on a Hugging Face Hub: the real client, against the small Hub of `hub.py` on loopback."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from training.data.tiny import make_published


ROOT = Path(__file__).resolve().parents[1]


def run(hub, folder, script, *arguments, token="", check=True, **more) -> subprocess.CompletedProcess:
    """Runs a client in a process of its own, whose home and cache are in `folder`."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=hub.env(folder, token, OMP_NUM_THREADS="1", **more),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=not check,
        text=True,
        check=check,
        timeout=300,
    )


# The round trip


PUSH = """
import json, sys
import torch
from huggingface_hub import HfApi, ModelCard, metadata_update
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from modeling_rbi import RBIForImageClassification

folder, inputs, outputs = sys.argv[1:]
model = RBIForImageClassification.from_pretrained(folder).eval()
image_processor = AutoImageProcessor.from_pretrained(folder)
model.push_to_hub("alice/pets")
image_processor.push_to_hub("alice/pets")
with torch.no_grad():
    model.classifier.weight.neg_()
model.push_to_hub("alice/pets", commit_message="Other weights")
api = HfApi()
code = api.hf_hub_download("alice/pets", "modeling_rbi.py")
with open(code, "ab") as file:
    file.write(b"raise RuntimeError('new code')")
api.upload_file(repo_id="alice/pets", path_or_fileobj=code, path_in_repo="modeling_rbi.py", commit_message="New code")

for repo_id, is_private in (("zoo/pets", False), ("alice/secret", True)):
    api.create_repo(repo_id, private=is_private)
    api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="All at once")

card = ModelCard("---\\nlicense: apache-2.0\\ntags: [rbi]\\n---\\n# Pets\\n")
card.push_to_hub("alice/secret")
card = ModelCard.load("alice/secret")
card.data.pipeline_tag = "image-classification"
card.push_to_hub("alice/secret", commit_message="The task")
metadata_update("alice/secret", {"datasets": ["zoo/animals"]})

images = torch.load(inputs)
arguments = TrainingArguments(
    "trained", max_steps=2, use_cpu=True, save_strategy="no", disable_tqdm=True, report_to="none",
    push_to_hub=True, hub_model_id="alice/trained", hub_strategy="end",
)
data = [{"pixel_values": image, "labels": number % 3} for number, image in enumerate(images)]
model.remove_references()
trainer = Trainer(model, arguments, train_dataset=data, processing_class=image_processor)
trainer.train()
trainer.push_to_hub()
with torch.no_grad():
    save_file({"trained": model.eval()(images).logits}, outputs)
"""

# Where the package is not installed.
WITHOUT_PACKAGE = """
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_rbi":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

images, outputs, *wanted = sys.argv[1:]
images = [Image.open(path) for path in json.loads(images)]
report, results = {"modules": []}, {}

def message(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except Exception as error:
        return type(error).__name__ + ": " + str(error)

@torch.no_grad()
def logits(repo_id, auto_class=AutoModelForImageClassification, **keywords):
    model = auto_class.from_pretrained(repo_id, trust_remote_code=True, **keywords).eval()
    output = model(results["pixel_values"])
    report["modules"].append(type(model).__module__)
    return output.pooler_output if auto_class is AutoModel else output.logits

results["pixel_values"] = AutoImageProcessor.from_pretrained("zoo/pets")(images, return_tensors="pt")["pixel_values"]
results["logits"], results["base"] = logits("zoo/pets"), logits("zoo/pets", AutoModel)
report["answers"] = pipeline("image-classification", model="zoo/pets", trust_remote_code=True)(images[0])
"""

LOAD = (
    WITHOUT_PACKAGE
    + """
first, second, third = wanted
results["first"] = logits("alice/pets", revision=first)
results["second"] = logits("alice/pets", revision=second, code_revision=second)
results["third"] = logits("alice/pets", code_revision=second)
results["secret"] = logits("alice/secret")
for repo_id in ("alice/trained", "alice/fine-tuned"):
    results[repo_id] = logits(repo_id)
report["new code"] = message(logits, "alice/pets", revision=third)
report["untrusted"] = message(AutoModelForImageClassification.from_pretrained, "zoo/pets")
for name, token in (("nobody", False), ("invalid", "hf_invalid")):
    report[name] = message(AutoConfig.from_pretrained, "alice/secret", token=token, cache_dir=outputs + name)
"""
)

WRITE = """
save_file(results, outputs)
with open(outputs + ".json", "w") as file:
    json.dump(report, file)
"""

TINY_BACKBONE = {"model_type": "convnext", "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "image_size": 32}


@pytest.fixture(scope="module")
def round_trip(hub_module, tmp_path_factory, model_folder, image_files):
    """Models pushed in every way, loaded in a process without the package, and once more when the Hub is gone."""
    folder = tmp_path_factory.mktemp("round_trip")
    image_processor = AutoImageProcessor.from_pretrained(model_folder)
    images = [Image.open(path) for path in image_files]
    torch.save(image_processor(images, return_tensors="pt")["pixel_values"], folder / "inputs.pt")
    arguments = [json.dumps([str(path) for path in image_files])]

    def load(script, *wanted, **more):
        outputs = folder / "loaded.safetensors"
        home = str(folder / "new")
        run(hub, folder, script + WRITE, *arguments, outputs, *wanted, HF_HOME=home, **more)
        return json.loads(Path(f"{outputs}.json").read_text()), load_file(outputs)

    with hub_module.Hub() as hub:
        run(hub, folder, PUSH, model_folder, folder / "inputs.pt", folder / "pushed.safetensors")
        # The token is given as an argument alone, and is to appear nowhere.
        published = make_published("cub_200_2011", folder / "published", num_classes=3, images_per_class=6)
        values = {
            **{"dataset_format": "cub_200_2011", "dataset_dir": published, "output_dir": folder / "fine-tuned"},
            **{"backbone_config": json.dumps(TINY_BACKBONE), "image_size": 32, "num_train_epochs": 1, "use_cpu": True},
            **{"push_to_hub": True, "hub_model_id": "alice/fine-tuned", "hub_token": hub.token, "disable_tqdm": True},
        }
        subprocess.run(
            [sys.executable, "-m", "training.train"]
            + [text for name, value in values.items() for text in (f"--{name}", str(value))],
            env=hub.env(folder, token=None, OMP_NUM_THREADS="1", RBI_CACHE=str(folder / "cache")),
            cwd=ROOT,
            check=True,
            timeout=300,
        )
        commits = [commit.id for commit in hub.repo("alice/pets").history()]
        report, results = load(LOAD, *commits[1:])
    results |= load_file(folder / "pushed.safetensors")
    offline = load(WITHOUT_PACKAGE, HF_HUB_OFFLINE="1")
    return {"hub": hub, "folder": folder, "report": report, "results": results, "offline": offline}


@pytest.fixture(scope="module")
def local(model_folder, image_files):
    """What the model answers where it was made."""
    images = [Image.open(path) for path in image_files]
    pixel_values = AutoImageProcessor.from_pretrained(model_folder)(images, return_tensors="pt")["pixel_values"]
    model = AutoModelForImageClassification.from_pretrained(model_folder)
    with torch.no_grad():
        return {
            "pixel_values": pixel_values,
            "logits": model(pixel_values).logits,
            "base": AutoModel.from_pretrained(model_folder)(pixel_values).pooler_output,
        }, pipeline("image-classification", str(model_folder))(images[0])


@pytest.mark.slow
def test_loads_from_the_hub_without_the_package(round_trip, local):
    expected, answers = local
    report, results = round_trip["report"], round_trip["results"]
    for name, value in expected.items():
        assert torch.equal(results[name], value), name
    assert torch.equal(results["secret"], expected["logits"])
    assert report["answers"] == answers
    commit = round_trip["hub"].repo("zoo/pets").commit().id
    assert all(name.startswith(f"transformers_modules.zoo.pets.{commit}.") for name in report["modules"][:2])
    assert all(name.startswith("transformers_modules.") for name in report["modules"])
    assert "trust_remote_code=True" in report["untrusted"]


@pytest.mark.slow
def test_loads_from_the_cache_when_the_hub_is_gone(round_trip, local):
    expected, answers = local
    report, results = round_trip["offline"]
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(results[name], value), name
    assert report["answers"] == answers


@pytest.mark.slow
def test_revisions_are_pinned(round_trip, local):
    """Weights are those of `revision`, and code that of `code_revision`, whatever came after."""
    expected, report, results = local[0]["logits"], round_trip["report"], round_trip["results"]
    titles = [commit.title for commit in round_trip["hub"].repo("alice/pets").history()]
    assert len(titles) == 4 and titles[2:] == ["Other weights", "New code"]
    assert torch.equal(results["first"], expected)
    assert not torch.allclose(results["second"], expected, atol=0.1)
    # Weights of the last commit with the code of the one before.
    assert torch.equal(results["third"], results["second"])
    assert report["new code"] == "RuntimeError: new code"


@pytest.mark.slow
def test_private_models_are_for_their_owners(round_trip):
    report = round_trip["report"]
    assert round_trip["hub"].repo("alice/secret").private
    for name in ("nobody", "invalid"):
        assert report[name].startswith("OSError: ") and "alice/secret" in report[name], report[name]
    assert "hf auth login" in report["nobody"] and "hf_invalid" not in report["invalid"]


@pytest.mark.slow
def test_cards_are_changed_in_place(round_trip):
    repo = round_trip["hub"].repo("alice/secret")
    upload, *changes = repo.history()
    cards = [ModelCard(commit.files["README.md"].content.decode()) for commit in changes]
    was = {"license": "apache-2.0", "tags": ["rbi"]}
    task = {"pipeline_tag": "image-classification"}
    assert [card.data.to_dict() for card in cards] == [was, was | task, was | task | {"datasets": ["zoo/animals"]}]
    assert all("# Pets" in card.text for card in cards)
    assert all(commit.files.keys() - upload.files.keys() == {"README.md"} for commit in changes)


@pytest.mark.slow
def test_trainer_pushes_what_it_trained(round_trip):
    results = round_trip["results"]
    assert torch.equal(results["alice/trained"], results["trained"])
    (commit,) = round_trip["hub"].repo("alice/trained").history()
    assert commit.title == "End of training"


@pytest.mark.slow
def test_train_pushes_what_it_trained(hub_module, round_trip):
    hub, folder = round_trip["hub"], round_trip["folder"]
    repo = hub.repo("alice/fine-tuned")
    assert len(repo.history()) == 1
    files = repo.files()
    assert not any("checkpoint" in path or path.endswith((".bin", ".pt")) for path in files)
    assert not any(hub.token.encode() in content for content in files.values())
    for name in ("model.safetensors", "config.json", "modeling_rbi.py", "preprocessor_config.json"):
        assert files[name] == (folder / "fine-tuned" / name).read_bytes()
    assert json.loads(files["run.json"])["status"] == "finished"
    assert hub_module.check_card(files["README.md"].decode()) == ([], [])
    model = AutoModelForImageClassification.from_pretrained(folder / "fine-tuned")
    with torch.no_grad():
        expected = model(round_trip["results"]["pixel_values"]).logits
    assert torch.equal(round_trip["results"]["alice/fine-tuned"], expected)


@pytest.mark.slow
def test_each_push_is_one_commit_with_the_code(round_trip, model_folder):
    hub, local = round_trip["hub"], {path.name: path.read_bytes() for path in model_folder.iterdir()}
    (commit,) = hub.repo("zoo/pets").history()
    assert commit.title == "All at once"
    files = {name: file.content for name, file in commit.files.items()}
    assert {name: content for name, content in files.items() if name != ".gitattributes"} == local
    assert [name for name, file in commit.files.items() if file.is_lfs] == ["model.safetensors"]
    # `push_to_hub` of model and image processor leave the same, and a card.
    pushed = hub.repo("alice/pets").files(hub.repo("alice/pets").history()[1].id)
    assert pushed.keys() - local.keys() == {".gitattributes", "README.md"}
    # A model that was loaded knows the type of its backbone's weights, too.
    assert [name for name in local if pushed[name] != local[name]] == ["config.json"]
    # The storage, which is no part of the Hub, answers requests without a token only.
    assert {request.status for request in hub.requests if request.path.startswith("/storage/")} == {200}


# Uploads that fail


UPLOAD = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo("alice/pets", exist_ok=True)
HfApi().upload_folder(repo_id="alice/pets", folder_path=sys.argv[1])
"""


@pytest.fixture
def two_objects(tmp_path):
    """A folder with two files that are LFS objects, and one that is not."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for number in range(2):
        (folder / f"model-{number}.safetensors").write_bytes(bytes([number]) * 300_000)
    return folder


def test_an_upload_that_was_cut_is_taken_up(hub_module, hub, tmp_path, two_objects):
    # The second object is cut, and what the client sends again is refused, as where the address has expired.
    hub.fail("^PUT", skip=1)
    hub.fail("^PUT", status=403, skip=1)
    process = run(hub, tmp_path, UPLOAD, two_objects, check=False)
    assert process.returncode != 0 and "to the Hub" in process.stderr
    repo = hub.repo("alice/pets")
    assert hub.count("^PUT", status=None) == 1
    assert repo.history() == [] and len(repo.objects) == 1 and hub.count("/commit/") == 0

    hub.recover()
    run(hub, tmp_path, UPLOAD, two_objects)
    assert len(repo.history()) == 1
    assert repo.files() == {path.name: path.read_bytes() for path in two_objects.iterdir()} | {
        ".gitattributes": hub_module.GITATTRIBUTES.encode()
    }
    # Each object was stored once: the one that was whole was not sent again.
    stored = [request.path for request in hub.requests if request.method == "PUT" and request.status == 200]
    assert len(stored) == len(set(stored)) == 2

    # Once more, and there is nothing to do.
    run(hub, tmp_path, UPLOAD, two_objects)
    assert len(repo.history()) == 1 and hub.count("^PUT") == 2


def test_the_client_itself_repeats_what_failed(hub, tmp_path, two_objects):
    hub.fail("^PUT", status=500)
    hub.fail("preupload", status=429)
    run(hub, tmp_path, UPLOAD, two_objects)
    assert hub.count("^PUT", status=500) == hub.count("preupload", status=429) == 1
    assert len(hub.repo("alice/pets").history()) == 1
    assert set(hub.repo("alice/pets").objects) == {
        hashlib.sha256(path.read_bytes()).hexdigest() for path in two_objects.glob("*.safetensors")
    }


def test_a_commit_that_fails_leaves_nothing(hub, tmp_path, two_objects):
    hub.fail("/commit/", status=500)
    process = run(hub, tmp_path, UPLOAD, two_objects, check=False)
    assert process.returncode != 0 and "The Hub is out of order" in process.stderr
    assert hub.repo("alice/pets").files().keys() == {".gitattributes"}


# What the Hub refuses


REFUSED = """
import json, sys
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

api, bob = HfApi(), HfApi(token=sys.argv[1])
reader, nobody, invalid = HfApi(token=sys.argv[2]), HfApi(token=False), HfApi(token="hf_invalid")
for repo_id, is_private in (("alice/pets", False), ("alice/secret", True)):
    api.create_repo(repo_id, private=is_private)
report = {}

def upload(api, content=b"{}", path="config.json", repo_id="alice/pets", **more):
    return api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repo_id, **more)

def refused(name, function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
        report[name] = "went well"
    except Exception as error:
        report[name] = type(error).__name__ + ": " + str(error)

refused("invalid whoami", invalid.whoami)
refused("invalid read", invalid.model_info, "alice/pets")
refused("create again", api.create_repo, "alice/pets")
refused("create nobody", nobody.create_repo, "alice/more")
refused("create elsewhere", bob.create_repo, "alice/more")
refused("create reader", reader.create_repo, "alice/more")
refused("write elsewhere", upload, bob)
refused("write reader", upload, reader)
refused("write nobody", upload, nobody)
refused("write missing", upload, api, repo_id="alice/missing")
refused("write branch", upload, api, revision="missing")
refused("write old", upload, api, parent_commit="0" * 40)
refused("write card", upload, api, b"---\\ntags: [\\n---\\n", "README.md")
for name, other in (("bob", bob), ("nobody", nobody)):
    refused("secret " + name, other.model_info, "alice/secret")
    refused("secret file " + name, other.hf_hub_download, "alice/secret", ".gitattributes")
    refused("secret write " + name, upload, other, repo_id="alice/secret")
refused("revision", api.hf_hub_download, "alice/pets", "config.json", revision="missing")
refused("file", api.hf_hub_download, "alice/pets", "missing.json")
refused("delete", api.create_commit, "alice/pets", [CommitOperationDelete("missing")], commit_message="x")
api.create_repo("zoo/pets")
upload(HfApi(token=sys.argv[3]), repo_id="zoo/pets")
print(json.dumps(report))
"""


def test_refusals(hub, tmp_path):
    bob, reader = hub.add_user("bob"), hub.add_user("alice", can_write=False)
    carol = hub.add_user("carol", organizations=("zoo",))
    process = run(hub, tmp_path, REFUSED, bob, reader, carol, check=False)
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    kinds = {name: text.partition(":")[0] for name, text in report.items()}
    assert "went well" not in kinds.values()
    missing = ("write missing", "secret bob", "secret nobody", "secret write bob", "secret write nobody")
    for name in (*missing, "secret file bob", "secret file nobody"):
        assert kinds[name] == "RepositoryNotFoundError", report[name]
    assert kinds["revision"] == kinds["write branch"] == "RevisionNotFoundError"
    assert kinds["file"] == "RemoteEntryNotFoundError" and kinds["write card"] == "ValueError"
    for name, status in {
        "invalid read": "401",
        "create nobody": "401",
        "write nobody": "401",
        "create again": "409",
        "create elsewhere": "403",
        "create reader": "403",
        "write elsewhere": "403",
        "write reader": "403",
        "write old": "412",
        "delete": "404",
    }.items():
        assert status in report[name], report[name]
    assert "Invalid user token" in report["invalid whoami"]
    assert 'under the namespace "alice"' in report["create elsewhere"]
    # Of alice's two, nothing was written; carol writes to the organization that she is in.
    assert hub.repos.keys() == {("model", name) for name in ("alice/pets", "alice/secret", "zoo/pets")}
    assert [len(hub.repo(name).history()) for name in ("alice/pets", "alice/secret", "zoo/pets")] == [0, 0, 1]
    assert hub.repo("zoo/pets").history()[0].author == "carol"


def request(hub, method, path, body=None, token="", **headers):
    """Status, headers and body of an answer, asked without the client."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if token is not None:
        headers["Authorization"] = f"Bearer {token or hub.token}"
    url = path if path.startswith("http") else hub.url + path
    call = urllib.request.Request(url, body, headers, method=method)
    with contextlib.ExitStack() as stack:
        try:
            answer = stack.enter_context(urllib.request.urlopen(call, timeout=60))
        except urllib.error.HTTPError as error:
            answer = stack.enter_context(error)
        return answer.status, answer.headers, answer.read()


def lines(*operations) -> bytes:
    return b"\n".join(json.dumps({"key": key, "value": value}).encode() for key, value in operations)


def test_a_wrong_client_is_refused(hub):
    assert request(hub, "POST", "/api/repos/create", b'{"name": "pets"}')[0] == 200
    content = b"0123456789" * 100
    oid = hashlib.sha256(content).hexdigest()
    objects = {"operation": "upload", "hash_algo": "sha256", "transfers": ["basic"]}
    objects |= {"objects": [{"oid": oid, "size": len(content)}]}

    def batch():
        answer = request(hub, "POST", "/alice/pets.git/info/lfs/objects/batch", json.dumps(objects).encode())
        return json.loads(answer[2])["objects"][0].get("actions")

    def commit(*operations, summary="Title"):
        body = lines(("header", {"summary": summary}), *operations)
        return request(hub, "POST", "/api/models/alice/pets/commit/main", body)[0]

    lfs_file = ("lfsFile", {"path": "model.safetensors", "algo": "sha256", "oid": oid, "size": len(content)})
    href = batch()["upload"]["href"]
    verify = json.dumps(objects["objects"][0]).encode()
    for body, token in ((content[:-1], None), (content[::-1], None), (content, "")):
        assert request(hub, "PUT", href, body, token)[0] == 400
    assert request(hub, "PUT", href.partition("?")[0], content, token=None)[0] == 403
    assert request(hub, "POST", batch()["verify"]["href"], verify)[0] == 404
    assert commit(lfs_file) == 400
    assert request(hub, "PUT", href, content, token=None)[0] == 200
    assert request(hub, "POST", "/api/models/alice/pets/lfs-verify", verify)[0] == 200
    assert batch() is None
    for path in ("", "/config.json", "../config.json", "a/../../b", ".git/config"):
        assert commit(("file", {"path": path, "content": "e30="})) == 400
    assert commit(("file", {"path": "config.json", "content": "no base64!"})) == 400
    assert commit(("file", {"path": "README.md", "content": "LS0tCnRhZ3M6IHgKLS0tCg=="})) == 400  # tags: x
    assert commit(lfs_file, summary="") == commit(("moved", {"path": "a"})) == 400
    assert hub.repo("alice/pets").history() == []

    assert commit(lfs_file) == 200
    address = "/alice/pets/resolve/main/model.safetensors"
    for wanted, status, expected in (
        (None, 200, content),
        ("bytes=5-", 206, content[5:]),
        ("bytes=5-9", 206, content[5:10]),
        ("bytes=-5", 206, content[-5:]),
        ("bytes=1000-", 416, b""),
    ):
        # As the client, which leaves the token behind when it is sent to the storage.
        headers = {} if wanted is None else {"Range": wanted}
        answer, about, body = request(hub, "GET", address, token=None, **headers)
        assert (answer, body) == (status, expected)
        assert about["ETag"] == f'"{oid}"'


def test_files_are_named_as_git_names_them(hub_module):
    """Known names: those of the empty blob, and of "hello world" with its line's end."""
    names = {
        b"": "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391",
        b"hello world\n": "3b18e512dba79e4c8300dd08aeb37f8e728b8dad",
    }
    for content, name in names.items():
        assert hub_module.File(content, is_lfs=False).oid == name


# What else a client does


TOUR = """
import json, sys
from huggingface_hub import HfApi

folder = sys.argv[1]
api = HfApi()
api.create_repo("alice/pets")
api.upload_folder(repo_id="alice/pets", folder_path=folder, path_in_repo="a/b")
tree = api.list_repo_tree("alice/pets", recursive=True)
report = {"sizes": {file.path: getattr(file, "size", None) for file in tree}}
report["inside"] = [file.path for file in api.list_repo_tree("alice/pets", "a/b")]
report["paths"] = [file.path for file in api.get_paths_info("alice/pets", ["a", "a/b/config.json", "missing"])]
api.create_tag("alice/pets", tag="v1")
api.create_branch("alice/pets", branch="try/it")
api.delete_folder("a", repo_id="alice/pets", revision="try/it")
refs = api.list_repo_refs("alice/pets")
report["refs"] = [ref.name for ref in refs.branches + refs.tags]
report["files"] = {name: api.list_repo_files("alice/pets", revision=name) for name in ("v1", "try/it")}
with open(api.hf_hub_download("alice/pets", "a/b/model-1.safetensors", revision="v1"), "rb") as file:
    report["downloaded"] = file.read().hex()

front = b"---\\nlicense: mit\\ntags: [rbi]\\npipeline_tag: image-classification\\ndatasets: [zoo/animals]\\n---\\n"
api.upload_file(path_or_fileobj=front, path_in_repo="README.md", repo_id="alice/pets")
info = api.model_info("alice/pets")
report["info"] = [info.pipeline_tag, info.tags, info.card_data.to_dict(), info.author, info.sha]

api.create_repo("alice/demo", repo_type="space", space_sdk="gradio")
front = b"---\\ntitle: Pets\\nsdk: gradio\\ncolorFrom: blue\\ncolorTo: red\\n---\\n"
api.upload_file(path_or_fileobj=front, path_in_repo="README.md", repo_id="alice/demo", repo_type="space")
api.upload_file(path_or_fileobj=b"\\0" * 9, path_in_repo="a.npy", repo_id="alice/demo", repo_type="space")
api.delete_tag("alice/pets", tag="v1")
api.update_repo_settings("alice/demo", repo_type="space", private=True)
report["space"] = [api.space_info("alice/demo").sdk, api.space_info("alice/demo").private]
report["user"] = [api.whoami()["name"], [each["name"] for each in api.whoami()["orgs"]]]
api.create_repo("zoo/rows", repo_type="dataset")
api.delete_repo("zoo/rows", repo_type="dataset")
print(json.dumps(report))
"""


def test_a_tour(hub_module, hub, tmp_path, two_objects):
    process = run(hub, tmp_path, TOUR, two_objects, check=False)
    assert process.returncode == 0, process.stderr
    report, repo = json.loads(process.stdout), hub.repo("alice/pets")
    inside = {f"a/b/{path.name}": path.stat().st_size for path in two_objects.iterdir()}
    attributes = {".gitattributes": len(hub_module.GITATTRIBUTES)}
    assert {path: size for path, size in report["sizes"].items() if size is not None} == inside | attributes
    assert report["sizes"].keys() - inside.keys() == {".gitattributes", "a", "a/b"}
    assert set(report["inside"]) == inside.keys() and set(report["paths"]) == {"a", "a/b/config.json"}
    assert report["refs"] == ["main", "try/it", "v1"]
    assert set(report["files"]["v1"]) == {".gitattributes", *inside} and report["files"]["try/it"] == [
        ".gitattributes"
    ]
    assert bytes.fromhex(report["downloaded"]) == (two_objects / "model-1.safetensors").read_bytes()

    pipeline_tag, tags, metadata, author, sha = report["info"]
    assert pipeline_tag == "image-classification" and author == "alice"
    assert set(tags) == {"rbi", "license:mit", "dataset:zoo/animals", "image-classification"}
    assert metadata["datasets"] == ["zoo/animals"] and metadata["license"] == "mit"
    first, second = repo.history()
    assert second.id == sha and second.parent == first.id
    assert second.files.keys() - first.files.keys() == {"README.md"}
    assert repo.tags == {} and report["user"] == ["alice", ["zoo"]]
    space = hub.repo("alice/demo", "space")
    assert report["space"] == ["gradio", True] and space.files()["a.npy"] == bytes(9) and len(space.objects) == 1
    assert ("dataset", "zoo/rows") not in hub.repos


GOOD_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
base_model: facebook/dinov2-small
datasets: [zoo/animals]
tags: [rbi]
widget: [{src: a.jpg, example_title: A}]
model-index:
- name: pets
  results:
  - task: {type: image-classification}
    dataset: {type: imagefolder, name: Pets}
    metrics: [{type: accuracy, value: 0.9}]
---
# Pets
"""


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("", "", None),
        ("apache-2.0", "my-own", '"license" must be one of'),
        ("[rbi]", "rbi", '"tags" must be an array'),
        ("[rbi]", "[rbi", "Invalid YAML"),
        ("facebook/dinov2-small", "/home/me/model", '"base_model" with value'),
        ("[zoo/animals]", "[null]", '"datasets[0]" must be a string'),
        ("[{src: a.jpg, example_title: A}]", "a.jpg", '"widget" must be an array'),
        ("name: Pets", "kind: Pets", '"model-index[0].results[0].dataset.name" is required'),
        ("[{type: accuracy, value: 0.9}]", "[]", '"model-index[0].results[0].metrics" is required'),
    ],
)
def test_cards_are_checked(hub_module, old, new, error):
    errors, warnings = hub_module.check_card(GOOD_CARD.replace(old, new, 1))
    assert warnings == []
    assert errors == [] if error is None else len(errors) == 1 and errors[0].startswith(error)


def test_a_card_without_metadata_is_warned_of(hub_module):
    assert hub_module.check_card("# Pets")[1] == ["empty or missing yaml metadata in repo card"]
    errors, _ = hub_module.check_card("---\nsdk: flask\ncolorFrom: beige\n---\n", "space")
    assert len(errors) == 2 and '"sdk"' in errors[0] and '"colorFrom"' in errors[1]


def test_the_environment_of_a_client(hub, tmp_path, monkeypatch):
    """Nothing of the user's own Hub reaches a client."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_mine")
    env = hub.env(tmp_path, RBI_CACHE="there")
    assert "HF_HUB_OFFLINE" not in env and "hf_mine" not in env.values()
    assert env["HF_ENDPOINT"] == hub.url and env["HF_TOKEN"] == hub.token and env["RBI_CACHE"] == "there"
    assert env["PATH"] == os.environ["PATH"] and "HF_TOKEN" not in hub.env(tmp_path, token=None)
