# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""RBI models on a Hugging Face Hub: the real client, against the small Hub of `hub.py` on the loopback interface."""

import contextlib
import hashlib
import http.client
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationDelete, HfApi, ModelCard, metadata_update
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from training import train
from training.data.tiny import make_published


# The round trip


# Executed in a fresh process in which the package cannot be imported, as if it were not installed.
WITHOUT_PACKAGE = """
import contextlib, importlib.abc, json, socket, sys, time
from urllib.parse import urlsplit

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_rbi":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

images, outputs, first, second, third = sys.argv[1:]
images = [Image.open(path) for path in json.loads(images)]

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

def load():
    image_processor = AutoImageProcessor.from_pretrained("zoo/pets")
    results["pixel_values"] = image_processor(images, return_tensors="pt")["pixel_values"]
    results["logits"], results["base"] = logits("zoo/pets"), logits("zoo/pets", AutoModel)
    report["answers"] = pipeline("image-classification", model="zoo/pets", trust_remote_code=True)(images[0])

def save(name):
    save_file(results, outputs + name + ".safetensors")
    with open(outputs + name + ".json", "w") as file:
        json.dump(report, file)

report, results = {"modules": []}, {}
load()
results["first"] = logits("alice/pets", revision=first)
results["second"] = logits("alice/pets", revision=second, code_revision=second)
results["third"] = logits("alice/pets", code_revision=second)
for repo_id in ("alice/secret", "alice/trained", "alice/fine-tuned"):
    results[repo_id] = logits(repo_id)
report["new code"] = message(logits, "alice/pets", revision=third)
report["untrusted"] = message(AutoModelForImageClassification.from_pretrained, "zoo/pets")
for name, token in (("nobody", False), ("invalid", "hf_invalid")):
    report[name] = message(AutoConfig.from_pretrained, "alice/secret", token=token, cache_dir=outputs + name)
save("online")

print("\\nThe Hub may go", flush=True)  # after the prompt for untrusted code, which ends without a newline
address = urlsplit(constants.ENDPOINT)
with contextlib.suppress(ConnectionRefusedError):
    while True:
        socket.create_connection((address.hostname, address.port)).close()
        time.sleep(0.1)
constants.HF_HUB_OFFLINE = True
for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
    del sys.modules[name]
report, results = {"modules": []}, {}
load()
save("offline")
"""

TINY_BACKBONE = {"model_type": "convnext", "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "image_size": 32}


def push(hub, model_folder, folder, pixel_values) -> torch.Tensor:
    """Pushes models in every way to the Hub that this process is connected to; the logits of the trained model."""
    api = HfApi()
    model = AutoModelForImageClassification.from_pretrained(model_folder).eval()
    image_processor = AutoImageProcessor.from_pretrained(model_folder)
    model.push_to_hub("alice/pets")
    image_processor.push_to_hub("alice/pets")
    with torch.no_grad():
        model.classifier.weight.neg_()
    model.push_to_hub("alice/pets", commit_message="Other weights")
    code = hub.repo("alice/pets").files()["modeling_rbi.py"] + b"raise RuntimeError('new code')"
    api.upload_file(
        repo_id="alice/pets", path_or_fileobj=code, path_in_repo="modeling_rbi.py", commit_message="New code"
    )

    for repo_id, is_private in (("zoo/pets", False), ("alice/secret", True)):
        api.create_repo(repo_id, private=is_private)
        api.upload_folder(repo_id=repo_id, folder_path=model_folder, commit_message="All at once")

    card = ModelCard("---\nlicense: apache-2.0\ntags: [rbi]\n---\n# Pets\n")
    card.push_to_hub("alice/secret")
    card = ModelCard.load("alice/secret")
    card.data.pipeline_tag = "image-classification"
    card.push_to_hub("alice/secret", commit_message="The task")
    metadata_update("alice/secret", {"datasets": ["zoo/animals"]})

    arguments = TrainingArguments(
        str(folder / "trained"),
        **{"max_steps": 2, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "report_to": "none"},
        **{"push_to_hub": True, "hub_model_id": "alice/trained", "hub_strategy": "end"},
    )
    data = [{"pixel_values": image, "labels": number % 3} for number, image in enumerate(pixel_values)]
    model.remove_references()
    trainer = Trainer(model, arguments, train_dataset=data, processing_class=image_processor)
    trainer.train()
    trainer.push_to_hub()
    with torch.no_grad():
        return model.eval()(pixel_values).logits


def fine_tune(hub, folder, monkeypatch):
    """Trains and pushes with `training.train`. The token is given as an argument only and must not appear anywhere."""
    published = make_published("cub_200_2011", folder / "published", num_classes=3, images_per_class=6)
    values = {
        **{"dataset_format": "cub_200_2011", "dataset_dir": published, "output_dir": folder / "fine-tuned"},
        **{"backbone_config": json.dumps(TINY_BACKBONE), "image_size": 32, "num_train_epochs": 1, "use_cpu": True},
        **{"push_to_hub": True, "hub_model_id": "alice/fine-tuned", "hub_token": hub.token, "disable_tqdm": True},
    }
    monkeypatch.setenv("RBI_CACHE", str(folder / "cache"))
    monkeypatch.delenv("HF_TOKEN")
    assert train.main([text for name, value in values.items() for text in (f"--{name}", str(value))]) == 0


@pytest.fixture(scope="module")
def local(model_folder, image_files):
    """What the model answers in the process that made it."""
    images = [Image.open(path) for path in image_files]
    pixel_values = AutoImageProcessor.from_pretrained(model_folder)(images, return_tensors="pt")["pixel_values"]
    model = AutoModelForImageClassification.from_pretrained(model_folder)
    with torch.no_grad():
        return {
            "pixel_values": pixel_values,
            "logits": model(pixel_values).logits,
            "base": AutoModel.from_pretrained(model_folder)(pixel_values).pooler_output,
        }, pipeline("image-classification", str(model_folder))(images[0])


@pytest.fixture(scope="module")
def round_trip(hub_module, tmp_path_factory, model_folder, image_files, local):
    """Models pushed in every way, loaded in a process without the package, and once more when the Hub is gone."""
    folder = tmp_path_factory.mktemp("round_trip")
    command = [sys.executable, "-c", WITHOUT_PACKAGE, json.dumps([str(path) for path in image_files]), f"{folder}/"]
    with hub_module.Hub() as hub, pytest.MonkeyPatch.context() as monkeypatch:
        hub.connect(monkeypatch, folder / "home")
        trained = push(hub, model_folder, folder, local[0]["pixel_values"])
        fine_tune(hub, folder, monkeypatch)
        command += [commit.id for commit in hub.repo("alice/pets").history()[1:]]
        process = subprocess.Popen(
            command, env=hub.env(folder), cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        assert "The Hub may go\n" in iter(process.stdout.readline, "")
    with process:
        process.communicate(timeout=300)
    assert process.returncode == 0
    online, offline = (
        (json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors"))
        for name in ("online", "offline")
    )
    return {"hub": hub, "folder": folder, "online": online, "offline": offline, "trained": trained}


def assert_same(actual, expected):
    """
    The same float32 results, computed separately. Kernels may depend on threads and memory alignment, which changes
    the last digits of sums of a few dozen terms. Other weights change the logits by more than 0.1.
    """
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def assert_same_answers(actual, expected):
    assert [answer["label"] for answer in actual] == [answer["label"] for answer in expected]
    assert [answer["score"] for answer in actual] == pytest.approx([answer["score"] for answer in expected], abs=1e-4)


@pytest.mark.slow
def test_loads_from_the_hub_without_the_package(round_trip, local):
    expected, answers = local
    report, results = round_trip["online"]
    assert_same({name: results[name] for name in expected}, expected)
    assert_same(results["alice/secret"], expected["logits"])
    assert_same_answers(report["answers"], answers)
    commit = round_trip["hub"].repo("zoo/pets").commit().id
    assert all(name.startswith(f"transformers_modules.zoo.pets.{commit}.") for name in report["modules"][:2])
    assert all(name.startswith("transformers_modules.") for name in report["modules"])
    assert "trust_remote_code=True" in report["untrusted"]


@pytest.mark.slow
def test_loads_from_the_cache_when_the_hub_is_gone(round_trip, local):
    expected, answers = local
    report, results = round_trip["offline"]
    assert_same(results, expected)
    assert_same_answers(report["answers"], answers)
    assert all(name.startswith("transformers_modules.zoo.pets.") for name in report["modules"])


@pytest.mark.slow
def test_revisions_are_pinned(round_trip, local):
    """`revision` selects the weights and `code_revision` the code, whatever was committed later."""
    expected, (report, results) = local[0]["logits"], round_trip["online"]
    titles = [commit.title for commit in round_trip["hub"].repo("alice/pets").history()]
    assert len(titles) == 4 and titles[2:] == ["Other weights", "New code"]
    assert_same(results["first"], expected)
    assert not torch.allclose(results["second"], expected, atol=0.1)
    # Weights of the last commit with the code of the one before.
    assert_same(results["third"], results["second"])
    assert report["new code"] == "RuntimeError: new code"


@pytest.mark.slow
def test_private_models_are_for_their_owners(round_trip):
    report, _ = round_trip["online"]
    assert round_trip["hub"].repo("alice/secret").private
    for name in ("nobody", "invalid"):
        assert report[name].startswith("OSError: ") and "alice/secret" in report[name], report[name]
    assert "hf auth login" in report["nobody"] and "hf_invalid" not in report["invalid"]


@pytest.mark.slow
def test_cards_are_changed_in_place(round_trip):
    repo = round_trip["hub"].repo("alice/secret")
    upload, *changes = repo.history()
    cards = [ModelCard(commit.files["README.md"].content.decode()) for commit in changes]
    first = {"license": "apache-2.0", "tags": ["rbi"]}
    task = {"pipeline_tag": "image-classification"}
    assert [card.data.to_dict() for card in cards] == [
        first,
        first | task,
        first | task | {"datasets": ["zoo/animals"]},
    ]
    assert all("# Pets" in card.text for card in cards)
    assert all(commit.files.keys() - upload.files.keys() == {"README.md"} for commit in changes)


@pytest.mark.slow
def test_trainer_pushes_what_it_trained(round_trip):
    assert_same(round_trip["online"][1]["alice/trained"], round_trip["trained"])
    (commit,) = round_trip["hub"].repo("alice/trained").history()
    assert commit.title == "End of training"


@pytest.mark.slow
def test_train_pushes_what_it_trained(hub_module, round_trip, local):
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
        expected = model(local[0]["pixel_values"]).logits
    assert_same(round_trip["online"][1]["alice/fine-tuned"], expected)


@pytest.mark.slow
def test_each_push_is_one_commit_with_the_code(round_trip, model_folder):
    hub, local = round_trip["hub"], {path.name: path.read_bytes() for path in model_folder.iterdir()}
    (commit,) = hub.repo("zoo/pets").history()
    assert commit.title == "All at once"
    files = {name: file.content for name, file in commit.files.items()}
    assert {name: content for name, content in files.items() if name != ".gitattributes"} == local
    assert [name for name, file in commit.files.items() if file.is_lfs] == ["model.safetensors"]
    # `push_to_hub` of model and image processor leaves the same files and a card.
    pushed = hub.repo("alice/pets").files(hub.repo("alice/pets").history()[1].id)
    assert pushed.keys() - local.keys() == {".gitattributes", "README.md"}
    # A loaded model also knows the dtype of its backbone's weights.
    assert [name for name in local if pushed[name] != local[name]] == ["config.json"]
    # The storage is not part of the Hub and refuses requests with a token.
    assert {request.status for request in hub.requests if request.path.startswith("/storage/")} == {200}


# Uploads that fail


@pytest.fixture
def api(hub, monkeypatch, tmp_path):
    """The client of this process as alice, connected to the empty Hub `hub`."""
    hub.connect(monkeypatch, tmp_path / "home")
    return HfApi()


@pytest.fixture
def two_objects(tmp_path):
    """A folder with two files that are LFS objects, and one that is not."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for number in range(2):
        (folder / f"model-{number}.safetensors").write_bytes(bytes([number]) * 300_000)
    return folder


@pytest.fixture
def upload(api, two_objects):
    def upload():
        api.create_repo("alice/pets", exist_ok=True)
        api.upload_folder(repo_id="alice/pets", folder_path=two_objects)

    return upload


def test_an_upload_that_was_cut_is_taken_up(hub_module, hub, upload, two_objects):
    # The second object is cut, and the client's next attempt is refused, as if the signed address had expired.
    hub.fail("^PUT", skip=1)
    hub.fail("^PUT", status=403, skip=1)
    with pytest.raises(RuntimeError, match="to the Hub"):
        upload()
    repo = hub.repo("alice/pets")
    assert hub.count("^PUT", status=None) == 1
    assert repo.history() == [] and len(repo.objects) == 1 and hub.count("/commit/") == 0

    hub.recover()
    upload()
    assert len(repo.history()) == 1
    assert repo.files() == {path.name: path.read_bytes() for path in two_objects.iterdir()} | {
        ".gitattributes": hub_module.GITATTRIBUTES.encode()
    }
    # Each object was stored once: the client did not send again the object that had arrived.
    stored = [request.path for request in hub.requests if request.method == "PUT" and request.status == 200]
    assert len(stored) == len(set(stored)) == 2

    # A third upload has nothing to do.
    upload()
    assert len(repo.history()) == 1 and hub.count("^PUT") == 2


def test_a_connection_is_cut_in_the_middle_of_the_body(hub):
    """The Hub reads half of the body and answers with less than it announced."""
    hub.fail("^PUT")
    with pytest.raises((OSError, http.client.HTTPException)):
        request(hub, "PUT", "/storage/0", bytes(10_000_000), token=None)
    assert [(each.method, each.status) for each in hub.requests] == [("PUT", None)]
    assert request(hub, "PUT", "/storage/0", bytes(100), token=None)[0] == 403


def test_the_client_itself_repeats_what_failed(hub, upload, two_objects):
    hub.fail("^PUT", status=500)
    hub.fail("preupload", status=429)
    upload()
    assert hub.count("^PUT", status=500) == hub.count("preupload", status=429) == 1
    assert len(hub.repo("alice/pets").history()) == 1
    assert set(hub.repo("alice/pets").objects) == {
        hashlib.sha256(path.read_bytes()).hexdigest() for path in two_objects.glob("*.safetensors")
    }


def test_a_commit_that_fails_leaves_nothing(hub, upload):
    hub.fail("/commit/", status=500)
    with pytest.raises(HfHubHTTPError, match="The Hub is out of order"):
        upload()
    assert hub.repo("alice/pets").files().keys() == {".gitattributes"}


# What the Hub refuses


def test_refusals(hub, api):
    bob, reader = HfApi(token=hub.add_user("bob")), HfApi(token=hub.add_user("alice", can_write=False))
    carol = HfApi(token=hub.add_user("carol", organizations=("zoo",)))
    nobody, invalid = HfApi(token=False), HfApi(token="hf_invalid")
    for repo_id, is_private in (("alice/pets", False), ("alice/secret", True)):
        api.create_repo(repo_id, private=is_private)

    def upload(api, content=b"{}", path="config.json", repo_id="alice/pets", **more):
        return api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repo_id, **more)

    def refused(error, text, function, *arguments, **keywords):
        with pytest.raises(error, match=text):
            function(*arguments, **keywords)

    refused(HfHubHTTPError, "Invalid user token", invalid.whoami)
    refused(HfHubHTTPError, "401", invalid.model_info, "alice/pets")
    refused(HfHubHTTPError, "409", api.create_repo, "alice/pets")
    refused(HfHubHTTPError, "401", nobody.create_repo, "alice/more")
    refused(HfHubHTTPError, '403(.|\n)*under the namespace "alice"', bob.create_repo, "alice/more")
    refused(HfHubHTTPError, "403", reader.create_repo, "alice/more")
    refused(HfHubHTTPError, "403", upload, bob)
    refused(HfHubHTTPError, "403", upload, reader)
    refused(HfHubHTTPError, "401", upload, nobody)
    refused(RepositoryNotFoundError, "404", upload, api, repo_id="alice/missing")
    refused(RevisionNotFoundError, "404", upload, api, revision="missing")
    refused(HfHubHTTPError, "412", upload, api, parent_commit="0" * 40)
    refused(ValueError, "Invalid YAML", upload, api, b"---\ntags: [\n---\n", "README.md")
    for other, status in ((bob, "404"), (nobody, "401")):
        refused(RepositoryNotFoundError, status, other.model_info, "alice/secret")
        refused(RepositoryNotFoundError, status, other.hf_hub_download, "alice/secret", ".gitattributes")
        refused(RepositoryNotFoundError, status, upload, other, repo_id="alice/secret")
    refused(RevisionNotFoundError, "404", api.hf_hub_download, "alice/pets", "config.json", revision="missing")
    refused(RemoteEntryNotFoundError, "404", api.hf_hub_download, "alice/pets", "missing.json")
    deletion = [CommitOperationDelete("missing")]
    refused(HfHubHTTPError, "404", api.create_commit, "alice/pets", deletion, commit_message="x")

    # Nothing was written to alice's two repositories; carol can write to her organization's.
    api.create_repo("zoo/pets")
    upload(carol, repo_id="zoo/pets")
    assert hub.repos.keys() == {("model", name) for name in ("alice/pets", "alice/secret", "zoo/pets")}
    assert [len(hub.repo(name).history()) for name in ("alice/pets", "alice/secret", "zoo/pets")] == [0, 0, 1]
    assert hub.repo("zoo/pets").history()[0].author == "carol"


def request(hub, method, path, body=None, token="", **headers):
    """Sends a request without the client. Returns the status, headers and body of the answer."""
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
        # Without a token, like the client when it is redirected to the storage.
        headers = {} if wanted is None else {"Range": wanted}
        answer, about, body = request(hub, "GET", address, token=None, **headers)
        assert (answer, body) == (status, expected)
        assert about["ETag"] == f'"{oid}"'


def test_files_are_named_as_git_names_them(hub_module):
    """Known object ids: of the empty blob and of "hello world" with a newline."""
    names = {
        b"": "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391",
        b"hello world\n": "3b18e512dba79e4c8300dd08aeb37f8e728b8dad",
    }
    for content, name in names.items():
        assert hub_module.File(content, is_lfs=False).oid == name


# What else a client does


def test_a_tour_of_a_model(hub_module, hub, api, two_objects):
    inside = {f"a/b/{path.name}": path.stat().st_size for path in two_objects.iterdir()}
    api.create_repo("alice/pets")
    api.upload_folder(repo_id="alice/pets", folder_path=two_objects, path_in_repo="a/b")
    sizes = {entry.path: getattr(entry, "size", None) for entry in api.list_repo_tree("alice/pets", recursive=True)}
    assert sizes == inside | {".gitattributes": len(hub_module.GITATTRIBUTES), "a": None, "a/b": None}
    assert {entry.path for entry in api.list_repo_tree("alice/pets", "a/b")} == inside.keys()
    paths = api.get_paths_info("alice/pets", ["a", "a/b/config.json", "missing"])
    assert {entry.path for entry in paths} == {"a", "a/b/config.json"}

    api.create_tag("alice/pets", tag="v1")
    api.create_branch("alice/pets", branch="try/it")
    api.delete_folder("a", repo_id="alice/pets", revision="try/it")
    refs = api.list_repo_refs("alice/pets")
    assert [ref.name for ref in refs.branches + refs.tags] == ["main", "try/it", "v1"]
    assert set(api.list_repo_files("alice/pets", revision="v1")) == {".gitattributes", *inside}
    assert api.list_repo_files("alice/pets", revision="try/it") == [".gitattributes"]
    downloaded = api.hf_hub_download("alice/pets", "a/b/model-1.safetensors", revision="v1")
    assert Path(downloaded).read_bytes() == (two_objects / "model-1.safetensors").read_bytes()
    api.delete_tag("alice/pets", tag="v1")
    api.delete_branch("alice/pets", branch="try/it")
    repo = hub.repo("alice/pets")
    assert repo.tags == {} and repo.branches.keys() == {"main"}

    front = b"---\nlicense: mit\ntags: [rbi]\npipeline_tag: image-classification\ndatasets: [zoo/animals]\n---\n"
    api.upload_file(path_or_fileobj=front, path_in_repo="README.md", repo_id="alice/pets")
    info = api.model_info("alice/pets")
    assert info.pipeline_tag == "image-classification" and info.author == "alice"
    assert set(info.tags) == {"rbi", "license:mit", "dataset:zoo/animals", "image-classification"}
    metadata = info.card_data.to_dict()
    assert metadata["datasets"] == ["zoo/animals"] and metadata["license"] == "mit"
    first, second = repo.history()
    assert second.id == info.sha and second.parent == first.id
    assert second.files.keys() - first.files.keys() == {"README.md"}


def test_a_tour_of_other_repositories(hub, api):
    api.create_repo("alice/demo", repo_type="space", space_sdk="gradio")
    front = b"---\ntitle: Pets\nsdk: gradio\ncolorFrom: blue\ncolorTo: red\n---\n"
    api.upload_file(path_or_fileobj=front, path_in_repo="README.md", repo_id="alice/demo", repo_type="space")
    api.upload_file(path_or_fileobj=bytes(9), path_in_repo="a.npy", repo_id="alice/demo", repo_type="space")
    space = hub.repo("alice/demo", "space")
    assert space.files()["a.npy"] == bytes(9) and len(space.objects) == 1
    downloaded = api.hf_hub_download("alice/demo", "a.npy", repo_type="space")
    assert Path(downloaded).read_bytes() == bytes(9)
    api.update_repo_settings("alice/demo", repo_type="space", private=True)
    info = api.space_info("alice/demo")
    assert info.sdk == "gradio" and info.private

    user = api.whoami()
    assert user["name"] == "alice" and [each["name"] for each in user["orgs"]] == ["zoo"]
    api.create_repo("zoo/rows", repo_type="dataset")
    assert ("dataset", "zoo/rows") in hub.repos
    api.delete_repo("zoo/rows", repo_type="dataset")
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


def test_a_card_without_metadata_gives_a_warning(hub_module):
    assert hub_module.check_card("# Pets")[1] == ["empty or missing yaml metadata in repo card"]
    errors, _ = hub_module.check_card("---\nsdk: flask\ncolorFrom: beige\n---\n", "space")
    assert len(errors) == 2 and '"sdk"' in errors[0] and '"colorFrom"' in errors[1]


def test_the_environment_of_a_client(hub, tmp_path, monkeypatch):
    """The user's own settings and tokens do not reach a client."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_mine")
    env = hub.env(tmp_path, RBI_CACHE="there")
    assert "HF_HUB_OFFLINE" not in env and "hf_mine" not in env.values()
    assert env["HF_ENDPOINT"] == hub.url and env["HF_TOKEN"] == hub.token and env["RBI_CACHE"] == "there"
    assert env["PATH"] == os.environ["PATH"] and "HF_TOKEN" not in hub.env(tmp_path, token=None)
