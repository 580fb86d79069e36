# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A small Hugging Face Hub on loopback, for the real client.

It keeps repositories with their history in memory and checks what the Hub checks, so that a client that would be
refused there is refused here: tokens, rights, sizes and SHA-256 of uploads, LFS objects that a commit names, model
cards. It can be told to fail, and remembers what it was asked.

    with Hub() as hub:
        subprocess.run([sys.executable, "client.py"], env=hub.env(tmp_path))
        assert hub.repo("alice/pets").files().keys() == {".gitattributes", "config.json"}

The client reads its environment at import, so clients are processes of their own.
"""

import base64
import binascii
import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import secrets
import socket
import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


REPO_TYPES = ("model", "dataset", "space")
LFS_EXTENSIONS = ("bin", "ckpt", "h5", "npy", "npz", "onnx", "pickle", "pkl", "pt", "pth", "safetensors", "tar", "zip")
GITATTRIBUTES = "".join(f"*.{extension} filter=lfs diff=lfs merge=lfs -text\n" for extension in LFS_EXTENSIONS)
# Larger files are LFS objects whatever their names.
MAX_REGULAR_SIZE = 10 * 2**20
# The common ones; the Hub refuses what is not on its list.
LICENSES = (
    *("agpl-3.0", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    *("cc-by-sa-4.0", "cc0-1.0", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "mit", "mpl-2.0", "openrail", "other", "unknown"),
)
COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")


# What is stored


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a commit."""

    content: bytes
    is_lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git holds of an LFS object."""
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def oid(self) -> str:
        """Git's name of the blob."""
        blob = self.pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid

    def info(self, path: str) -> dict:
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)} | (
            {"lfs": lfs} if self.is_lfs else {}
        )


@dataclasses.dataclass(frozen=True)
class Commit:
    """A whole state of a repository, and how it came to be."""

    title: str
    description: str
    author: str
    date: str
    parent: str | None
    files: dict[str, File]

    @cached_property
    def id(self) -> str:
        files = [(path, file.oid) for path, file in sorted(self.files.items())]
        content = [self.title, self.description, self.author, self.date, self.parent, files]
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


class Repo:
    """A repository: its commits by id, branches, tags, and the LFS objects that were uploaded to it by SHA-256."""

    def __init__(self, repo_type: str, repo_id: str, private: bool, author: str, sdk: str | None = None):
        self.type, self.id, self.private, self.sdk = repo_type, repo_id, private, sdk
        self.variables: dict[str, str] = {}  # of a Space
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.add("main", "initial commit", "", author, {".gitattributes": File(GITATTRIBUTES.encode(), False)})

    def add(self, branch: str, title: str, description: str, author: str, files: dict[str, File]) -> Commit:
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        commit = Commit(title, description, author, date, self.branches.get(branch), dict(sorted(files.items())))
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id
        return commit

    def commit(self, revision: str = "main") -> Commit:
        """The commit of a branch, a tag or an id; `KeyError` without one."""
        return self.commits[self.branches.get(revision) or self.tags.get(revision) or revision]

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits up to a revision, oldest first, without the one that creates the repository."""
        commits = [self.commit(revision)]
        while (parent := commits[-1].parent) is not None:
            commits.append(self.commits[parent])
        return commits[-2::-1]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The content of each file."""
        return {path: file.content for path, file in self.commit(revision).files.items()}


@dataclasses.dataclass(frozen=True)
class User:
    """Whom a token speaks for, the organizations that they write to, and whether with this token."""

    name: str
    organizations: tuple[str, ...]
    can_write: bool


@dataclasses.dataclass(frozen=True)
class Request:
    """A request as it was answered: `status` is None where the connection was cut, `user` where nobody signed in."""

    method: str
    path: str
    user: str | None
    status: int | None
    size: int


@dataclasses.dataclass
class _Fault:
    pattern: str
    status: int | None
    skip: int
    times: int


class _Error(Exception):
    """An answer that is an error, with what the client looks at to tell which."""

    def __init__(self, status: int, message: str, code: str | None = None, **more):
        super().__init__(message)
        self.status = status
        self.body = {"error": message} | more
        self.headers = {"X-Error-Message": message.replace("\n", " ")} | ({"X-Error-Code": code} if code else {})


class Hub:
    """
    The Hub, with a user `alice`, who is in the organization `zoo`. `url` and `token` are what a client needs.

    Attributes:
        repos (`dict[tuple[str, str], Repo]`): by type and id.
        requests (`list[Request]`): all that was asked.
    """

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.user = "alice"
        self._users: dict[str, User] = {}
        self._faults: list[_Fault] = []
        # The addresses that uploads were sent to: repository, SHA-256 and size by what signs them.
        self._uploads: dict[str, tuple[Repo, str, int]] = {}
        self._lock = threading.RLock()
        self.token = self.add_user("alice", organizations=("zoo",))
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        # As on the Hub, LFS objects are on another host, which gets no token.
        self._storage_url = f"http://localhost:{port}/storage"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Stops answering: connections are refused from then on."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    # For tests

    def add_user(self, name: str, organizations: Iterable[str] = (), can_write: bool = True) -> str:
        """A token for a user; one who is there already gets another."""
        token = f"hf_{secrets.token_hex(17)}"
        self._users[token] = User(name, tuple(organizations), can_write)
        return token

    def env(self, folder: Path, token: str | None = "", **more: str) -> dict[str, str]:
        """
        The environment of a client process with its own home and cache in `folder`.

        Args:
            folder: where the client keeps its cache; the same folder again is the same cache.
            token: `None` for nobody, by default alice's.
            more: further variables.
        """
        own = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        env = {name: value for name, value in os.environ.items() if not name.upper().startswith(own)}
        env |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(folder / "hf_home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }
        if token is not None:
            env["HF_TOKEN"] = token or self.token
        return env | more

    def connect(self, monkeypatch, folder: Path):
        """
        Lets the client of this process talk to this Hub, with its cache in `folder` and alice's token. It suffices for
        calls of huggingface_hub; transformers and datasets keep what they read at import.
        """
        from huggingface_hub import constants

        monkeypatch.setenv("HF_TOKEN", self.token)
        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HOME": str(folder),
            "HF_HUB_CACHE": str(folder / "hub"),
            "HF_TOKEN_PATH": str(folder / "token"),
            "HF_STORED_TOKENS_PATH": str(folder / "stored_tokens"),
        }.items():
            monkeypatch.setattr(constants, name, value)

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        """A repository; `KeyError` without one."""
        return self.repos[repo_type, repo_id]

    def fail(self, pattern: str, status: int | None = None, skip: int = 0, times: int = 1):
        r"""
        Answers the requests that match with an error, or cuts them in the middle of what they send.

        Args:
            pattern: regular expression that is searched in `METHOD /path`, such as `"^PUT"` for uploads of LFS objects
                or `"POST /api/models/.*/commit"`.
            status: of the error; `None` cuts the connection.
            skip: how many such requests go well before.
            times: how many go wrong.
        """
        with self._lock:
            self._faults.append(_Fault(pattern, status, skip, times))

    def recover(self):
        """Ends what [`fail`] began."""
        with self._lock:
            self._faults.clear()

    def count(self, pattern: str, status: int | None = 200) -> int:
        """How many requests that match `pattern`, as in [`fail`], were answered with `status`."""
        return sum(
            request.status == status and re.search(pattern, f"{request.method} {request.path}") is not None
            for request in self.requests
        )

    # For the handler

    def fault(self, method: str, path: str) -> _Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times and re.search(fault.pattern, f"{method} {path}"):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def sign_in(self, authorization: str | None) -> User | None:
        if authorization is None:
            return None
        user = self._users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise _Error(401, "Invalid credentials in Authorization header")
        return user

    def answer(self, request: "_Handler", user: User | None, body: bytes) -> tuple[int, dict, bytes | dict | list]:
        """Status, headers and body of the answer."""
        path, query = urlsplit(request.path).path, parse_qs(urlsplit(request.path).query)
        for method, pattern, function in _ROUTES:
            if request.command == method and (match := pattern.fullmatch(path)):
                values = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                with self._lock:
                    answer = function(self, user, body, query, request.headers, **values)
                return answer if isinstance(answer, tuple) else (200, {}, answer)
        if re.match(r"/api/(models|datasets|spaces)/|.*/resolve/", path):
            raise _not_found(user)
        raise _Error(404, f"This Hub does not know {request.command} {path}")

    def readable(self, user: User | None, kind: str, repo_id: str) -> Repo:
        repo = self.repos.get((kind.removesuffix("s") or "model", repo_id))
        if repo is None or (repo.private and not _owns(user, repo_id)):
            raise _not_found(user)
        return repo

    def writable(self, user: User | None, kind: str, repo_id: str) -> Repo:
        repo = self.readable(user, kind, repo_id)
        if user is None:
            raise _Error(401, "Invalid username or password.")
        if not user.can_write:
            raise _Error(403, "Forbidden: you must use a write token to upload to a repository.")
        if not _owns(user, repo_id):
            raise _Error(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def repo_url(self, repo: Repo) -> str:
        return f"{self.url}/{'' if repo.type == 'model' else repo.type + 's/'}{repo.id}"


def _owns(user: User | None, repo_id: str) -> bool:
    return user is not None and repo_id.split("/")[0] in (user.name, *user.organizations)


def _not_found(user: User | None) -> _Error:
    # Nobody learns of a private repository whether there is one.
    if user is None:
        return _Error(401, "Invalid username or password.", "RepoNotFound")
    return _Error(404, "Repository not found", "RepoNotFound")


def _commit(repo: Repo, revision: str) -> Commit:
    try:
        return repo.commit(revision)
    except KeyError:
        raise _Error(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None


# What is asked: functions of the Hub, the user, the body, the query, the headers and the parts of the path

_ROUTES = []
_PATTERNS = {
    "kind": r"(?P<kind>models|datasets|spaces)",
    "git_kind": r"(?:(?P<kind>datasets|spaces)/)?",
    "repo": r"(?P<repo_id>[^/]+/[^/]+?)",
    "revision": r"(?P<revision>[^/]+)",
    "path": r"(?P<path>.+)",
}


def _route(method: str, pattern: str):
    def register(function):
        _ROUTES.append((method, re.compile(pattern.format_map(_PATTERNS)), function))
        return function

    return register


@_route("GET", "/api/whoami-v2")
def _whoami(hub, user, body, query, headers):
    if user is None:
        raise _Error(401, "Invalid username or password.")
    organizations = [
        {"type": "org", "name": name, "fullname": name, "roleInOrg": "write"} for name in user.organizations
    ]
    access_token = {"displayName": "token", "role": "write" if user.can_write else "read"}
    return {
        "type": "user",
        "name": user.name,
        "fullname": user.name.title(),
        "isPro": False,
        "orgs": organizations,
        "auth": {"type": "access_token", "accessToken": access_token},
    }


@_route("POST", "/api/repos/create")
def _create(hub, user, body, query, headers):
    wanted = json.loads(body)
    repo_type = wanted.get("type") or "model"
    if repo_type not in REPO_TYPES:
        raise _Error(400, f'"type" must be one of [{", ".join(REPO_TYPES)}]')
    if user is None:
        raise _Error(401, "Invalid username or password.")
    owner = wanted.get("organization") or user.name
    repo_id = f"{owner}/{wanted['name']}"
    if not _owns(user, repo_id) or not user.can_write:
        raise _Error(403, f'You don\'t have the rights to create a {repo_type} under the namespace "{owner}"')
    if (repo_type, repo_id) in hub.repos:
        url = hub.repo_url(hub.repos[repo_type, repo_id])
        raise _Error(409, f"You already created this {repo_type} repo", url=url, name=repo_id)
    if repo_type == "space" and wanted.get("sdk") not in ("gradio", "docker", "static"):
        raise _Error(400, '"sdk" must be one of [gradio, docker, static]')
    private = wanted.get("visibility") == "private" or wanted.get("private") is True
    repo = hub.repos[repo_type, repo_id] = Repo(repo_type, repo_id, private, user.name, wanted.get("sdk"))
    repo.variables = {each["key"]: each["value"] for each in wanted.get("variables", [])}
    return {"url": hub.repo_url(repo), "name": repo_id}


@_route("DELETE", "/api/repos/delete")
def _delete(hub, user, body, query, headers):
    unwanted = json.loads(body)
    repo_id = f"{unwanted.get('organization') or (user and user.name)}/{unwanted['name']}"
    repo = hub.writable(user, unwanted.get("type") or "model", repo_id)
    del hub.repos[repo.type, repo.id]
    return {}


@_route("PUT", "/api/{kind}/{repo}/settings")
def _settings(hub, user, body, query, headers, kind, repo_id):
    repo, wanted = hub.writable(user, kind, repo_id), json.loads(body)
    if "visibility" in wanted or "private" in wanted:
        repo.private = wanted.get("visibility") == "private" or wanted.get("private") is True
    return {}


@_route("POST", "/api/validate-yaml")
def _validate_yaml(hub, user, body, query, headers):
    wanted = json.loads(body)
    errors, warnings = check_card(wanted["content"], wanted.get("repoType") or "model")
    _refuse_card(errors, warnings)
    return _card_report(errors, warnings)


def _card_report(errors: list[str], warnings: list[str]) -> dict:
    return {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}


def _refuse_card(errors: list[str], warnings: list[str]):
    if errors:
        raise _Error(400, "\n".join(errors), **_card_report(errors, warnings))


@_route("POST", "/api/{kind}/{repo}/preupload/{revision}")
def _preupload(hub, user, body, query, headers, kind, repo_id, revision):
    repo = hub.writable(user, kind, repo_id)
    commit = _commit(repo, revision)
    answers = []
    for wanted in json.loads(body)["files"]:
        path, file = wanted["path"], commit.files.get(wanted["path"])
        mode = "lfs" if _is_lfs(commit, path, wanted["size"]) else "regular"
        answers.append(
            {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None if file is None else file.etag}
        )
    return {"files": answers, "commitOid": commit.id}


def _is_lfs(commit: Commit, path: str, size: int) -> bool:
    attributes = commit.files.get(".gitattributes", File(b"", False)).content.decode()
    patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line.split()]
    return size > MAX_REGULAR_SIZE or any(fnmatch.fnmatch(path.rpartition("/")[2], pattern) for pattern in patterns)


@_route("POST", r"/{git_kind}{repo}\.git/info/lfs/objects/batch")
def _lfs_batch(hub, user, body, query, headers, repo_id, kind=""):
    repo, wanted = hub.writable(user, kind, repo_id), json.loads(body)
    if wanted["operation"] != "upload" or wanted["hash_algo"] != "sha256" or "basic" not in wanted["transfers"]:
        raise _Error(422, "Only basic uploads with sha256 are done here")
    answers = []
    for each in wanted["objects"]:
        answer = {"oid": each["oid"], "size": each["size"]}
        if len(repo.objects.get(each["oid"], b"")) != each["size"]:
            signature = secrets.token_hex(16)
            hub._uploads[signature] = (repo, each["oid"], each["size"])
            verify = f"{hub.url}/api/{repo.type}s/{repo.id}/lfs-verify"
            answer["actions"] = {
                "upload": {"href": f"{hub._storage_url}/{each['oid']}?signature={signature}"},
                "verify": {"href": verify},
            }
        answers.append(answer)
    return {"transfer": "basic", "objects": answers}


@_route("PUT", "/storage/(?P<oid>[0-9a-f]+)")
def _put_object(hub, user, body, query, headers, oid):
    if "Authorization" in headers:
        raise _Error(400, "The storage is no part of the Hub: do not send it tokens")
    repo, signed_oid, size = hub._uploads.get(query.get("signature", [""])[0], (None, None, None))
    if repo is None or signed_oid != oid:
        raise _Error(403, "The signature does not fit")
    if len(body) != size:
        raise _Error(400, f"{size} bytes were announced, and {len(body)} came")
    if hashlib.sha256(body).hexdigest() != oid:
        raise _Error(400, f"What came is not the content of {oid}")
    repo.objects[oid] = body
    return {}


@_route("GET", "/storage/(?P<oid>[0-9a-f]+)")
@_route("HEAD", "/storage/(?P<oid>[0-9a-f]+)")
def _get_object(hub, user, body, query, headers, oid):
    if "Authorization" in headers:
        raise _Error(400, "The storage is no part of the Hub: do not send it tokens")
    repo, signed_oid, _ = hub._uploads.get(query.get("signature", [""])[0], (None, None, None))
    if repo is None or signed_oid != oid:
        raise _Error(403, "The signature does not fit")
    return _content(repo.objects[oid], oid, headers)


@_route("POST", "/api/{kind}/{repo}/lfs-verify")
def _verify(hub, user, body, query, headers, kind, repo_id):
    repo, wanted = hub.writable(user, kind, repo_id), json.loads(body)
    if len(repo.objects.get(wanted["oid"], b"")) != wanted["size"]:
        raise _Error(404, f"There is no object {wanted['oid']} of {wanted['size']} bytes")
    return {}


@_route("POST", "/api/{kind}/{repo}/commit/{revision}")
def _commit_files(hub, user, body, query, headers, kind, repo_id, revision):
    repo = hub.writable(user, kind, repo_id)
    if "create_pr" in query:
        raise _Error(400, "This Hub has no pull requests")
    if revision not in repo.branches:
        raise _Error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    head = repo.commit(revision)
    lines = [json.loads(line) for line in body.splitlines() if line.strip()]
    if not lines or lines[0]["key"] != "header" or not lines[0]["value"].get("summary"):
        raise _Error(400, "The commit has no summary")
    header = lines[0]["value"]
    if header.get("parentCommit") not in (None, head.id):
        raise _Error(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in lines[1:]:
        _apply(repo, files, line["key"], line["value"])
    card = files.get("README.md")
    if card is not None and card != head.files.get("README.md"):
        _refuse_card(*check_card(card.content.decode(), repo.type))
    commit = repo.add(revision, header["summary"], header.get("description", ""), user.name, files)
    return {
        "success": True,
        "commitOid": commit.id,
        "commitUrl": f"{hub.repo_url(repo)}/commit/{commit.id}",
        "hookOutput": "",
    }


def _apply(repo: Repo, files: dict[str, File], key: str, value: dict):
    """Does one line of a commit to the files."""
    path = value["path"]
    if not path.strip("/") or path.startswith("/") or {"..", ".", ".git"} & set(path.split("/")):
        raise _Error(400, f'"{path}" is no path for a file')
    if key == "file":
        try:
            content = base64.b64decode(value["content"], validate=True)
        except binascii.Error:
            raise _Error(400, f"The content of {path} is not base64") from None
        if len(content) > MAX_REGULAR_SIZE:
            raise _Error(400, f"Your push was rejected because it contains files larger than 10 MiB: {path}")
        files[path] = File(content, is_lfs=False)
    elif key == "lfsFile":
        content = repo.objects.get(value["oid"])
        if value["algo"] != "sha256" or content is None or len(content) != value.get("size", len(content)):
            raise _Error(
                400, f"Your push was rejected because an LFS pointer points to a file that is not there: {path}"
            )
        files[path] = File(content, is_lfs=True)
    elif key == "deletedFile":
        if path not in files:
            raise _Error(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        del files[path]
    elif key == "deletedFolder":
        inside = [name for name in files if name.startswith(path.rstrip("/") + "/")]
        if not inside:
            raise _Error(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
        for name in inside:
            del files[name]
    else:
        raise _Error(400, f'"{key}" is nothing that a commit can do')


@_route("GET", "/api/{kind}/{repo}")
@_route("GET", "/api/{kind}/{repo}/revision/{revision}")
def _info(hub, user, body, query, headers, kind, repo_id, revision="main"):
    repo = hub.readable(user, kind, repo_id)
    commit = _commit(repo, revision)
    card = commit.files.get("README.md")
    metadata = {} if card is None else _front_matter(card.content.decode()) or {}
    siblings = []
    for path, file in commit.files.items():
        more = {"blobId": file.oid, "size": len(file.content)} | (
            {"lfs": {"sha256": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}}
            if file.is_lfs
            else {}
        )
        siblings.append({"rfilename": path} | (more if "blobs" in query else {}))
    tags = _listed(metadata.get("tags"))
    tags += [metadata[name] for name in ("library_name", "pipeline_tag") if name in metadata]
    tags += [f"{name}:{value}" for name in ("license", "base_model") for value in _listed(metadata.get(name))]
    tags += [f"dataset:{value}" for value in _listed(metadata.get("datasets"))]
    info = {
        "id": repo.id,
        "author": repo.id.split("/")[0],
        "sha": commit.id,
        "createdAt": repo.history()[0].date if repo.history() else commit.date,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags,
        "cardData": metadata,
        "siblings": siblings,
    }
    if repo.type == "model":
        config = commit.files.get("config.json")
        info |= {"modelId": repo.id, "config": json.loads(config.content) if config else {}}
        info |= {name: metadata[name] for name in ("pipeline_tag", "library_name", "model-index") if name in metadata}
    if repo.type == "space":
        info |= {"sdk": repo.sdk}
    return info


def _listed(value) -> list:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


@_route("GET", "/api/{kind}/{repo}/tree/{revision}(?:/{path})?")
def _tree(hub, user, body, query, headers, kind, repo_id, revision, path=""):
    commit = _commit(hub.readable(user, kind, repo_id), revision)
    prefix = f"{path.rstrip('/')}/" if path else ""
    if prefix and not any(name.startswith(prefix) for name in commit.files):
        raise _Error(404, f'{path} does not exist on "{revision}"', "EntryNotFound")
    recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
    entries = [
        entry
        for entry in _entries(commit)
        if entry["path"].startswith(prefix) and (recursive or "/" not in entry["path"].removeprefix(prefix))
    ]
    return entries


def _entries(commit: Commit) -> list[dict]:
    """All files and folders."""
    folders = {
        "/".join(parts[:depth])
        for parts in (path.split("/") for path in commit.files)
        for depth in range(1, len(parts))
    }
    entries = [
        {"type": "directory", "path": name, "oid": hashlib.sha1(f"{commit.id}{name}".encode()).hexdigest(), "size": 0}
        for name in sorted(folders)
    ]
    return entries + [file.info(path) for path, file in commit.files.items()]


@_route("POST", "/api/{kind}/{repo}/paths-info/{revision}")
def _paths_info(hub, user, body, query, headers, kind, repo_id, revision):
    commit = _commit(hub.readable(user, kind, repo_id), revision)
    is_json = headers.get("Content-Type", "").startswith("application/json")
    wanted = (json.loads(body) if is_json else parse_qs(body.decode())).get("paths", [])
    return [entry for entry in _entries(commit) if entry["path"] in {path.rstrip("/") for path in _listed(wanted)}]


@_route("GET", "/api/{kind}/{repo}/commits/{revision}")
def _commits(hub, user, body, query, headers, kind, repo_id, revision):
    repo = hub.readable(user, kind, repo_id)
    commit: Commit | None = _commit(repo, revision)
    answers = []
    while commit is not None:
        authors = [{"user": commit.author}]
        answers.append(
            {"id": commit.id, "title": commit.title, "message": commit.description, "authors": authors}
            | {"date": commit.date}
        )
        commit = repo.commits.get(commit.parent or "")
    return answers


@_route("GET", "/api/{kind}/{repo}/refs")
def _refs(hub, user, body, query, headers, kind, repo_id):
    repo = hub.readable(user, kind, repo_id)

    def listed(refs: dict[str, str], where: str) -> list[dict]:
        return [{"name": name, "ref": f"refs/{where}/{name}", "targetCommit": oid} for name, oid in refs.items()]

    branches, tags = listed(repo.branches, "heads"), listed(repo.tags, "tags")
    return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}


@_route("POST", "/api/{kind}/{repo}/(?P<what>branch|tag)/{revision}")
def _add_ref(hub, user, body, query, headers, kind, repo_id, what, revision):
    repo, wanted = hub.writable(user, kind, repo_id), json.loads(body or b"{}")
    if what == "branch":
        refs, name, start = repo.branches, revision, wanted.get("startingPoint", "main")
    else:
        refs, name, start = repo.tags, wanted["tag"], revision
    if name in refs:
        raise _Error(409, f"Reference already exists: {name}")
    refs[name] = _commit(repo, start).id
    return {}


@_route("DELETE", "/api/{kind}/{repo}/(?P<what>branch|tag)/{revision}")
def _delete_ref(hub, user, body, query, headers, kind, repo_id, what, revision):
    repo = hub.writable(user, kind, repo_id)
    refs = repo.branches if what == "branch" else repo.tags
    if revision not in refs:
        raise _Error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    if refs is repo.branches and revision == "main":
        raise _Error(403, "The main branch cannot be deleted")
    del refs[revision]
    return {}


@_route("GET", "/api/{kind}/{repo}/auth-check(?P<write>/write)?")
def _auth_check(hub, user, body, query, headers, kind, repo_id, write=""):
    (hub.writable if write else hub.readable)(user, kind, repo_id)
    return {}


@_route("GET", "/{git_kind}{repo}/resolve/{revision}/{path}")
@_route("HEAD", "/{git_kind}{repo}/resolve/{revision}/{path}")
def _resolve(hub, user, body, query, headers, repo_id, revision, path, kind=""):
    repo = hub.readable(user, kind, repo_id)
    commit = _commit(repo, revision)
    file = commit.files.get(path)
    if file is None:
        error = _Error(404, "Entry not found", "EntryNotFound")
        error.headers["X-Repo-Commit"] = commit.id
        raise error
    about = {"X-Repo-Commit": commit.id}
    if not file.is_lfs:
        status, more, content = _content(file.content, file.etag, headers)
        return status, about | more, content
    signature = secrets.token_hex(16)
    hub._uploads[signature] = (repo, file.sha256, len(file.content))
    about |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
    return 302, about | {"Location": f"{hub._storage_url}/{file.sha256}?signature={signature}"}, b""


def _content(content: bytes, etag: str, headers) -> tuple[int, dict, bytes]:
    """A file, or the range of it that was asked for."""
    about = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range", ""))
    if wanted is None or wanted.groups() == ("", ""):
        return 200, about, content
    first, last = wanted.groups()
    begin = int(first) if first else max(0, len(content) - int(last))
    end = min(int(last), len(content) - 1) if first and last else len(content) - 1
    if begin > end:
        return 416, about | {"Content-Range": f"bytes */{len(content)}"}, b""
    return 206, about | {"Content-Range": f"bytes {begin}-{end}/{len(content)}"}, content[begin : end + 1]


# Model cards


def _front_matter(content: str):
    """What the YAML block at the top of a card says; None without one. Raises `yaml.YAMLError`."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(\r?\n|$)", content, re.DOTALL)
    return None if match is None else yaml.safe_load(match[1])


def check_card(content: str, repo_type: str = "model") -> tuple[list[str], list[str]]:
    """
    What the Hub says about the metadata of a README.md: errors and warnings, in its words. It knows the fields that
    this project writes.
    """
    try:
        metadata = _front_matter(content)
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    if not metadata:
        missing = "empty or missing yaml metadata in repo card"
        return ([f'"{missing}"'], []) if repo_type == "space" else ([], [missing])
    if not isinstance(metadata, dict):
        return ['"value" must be of type object'], []
    errors = []
    for name in ("library_name", "pipeline_tag", "license", "license_name", "license_link", "title", "app_file"):
        if name in metadata and not (isinstance(metadata[name], str) and metadata[name]):
            errors.append(f'"{name}" must be a string')
    for name in ("tags", "metrics", "datasets", "base_model", "models", "language"):
        errors += _check_strings(name, metadata.get(name, []))
    errors += [
        f'"{name}" with value "{value}" is not valid. Use an id of the Hub: owner/name.'
        for name in ("base_model", "datasets", "models")
        for value in _listed(metadata.get(name))
        if isinstance(value, str) and not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", value)
    ]
    if isinstance(metadata.get("license"), str) and metadata["license"] not in LICENSES:
        errors.append(f'"license" must be one of [{", ".join(LICENSES)}]')
    if "widget" in metadata and not (
        isinstance(metadata["widget"], list) and all(isinstance(each, dict) for each in metadata["widget"])
    ):
        errors.append('"widget" must be an array')
    if "model-index" in metadata:
        errors += _check_model_index(metadata["model-index"])
    if repo_type == "space":
        errors += _check_space(metadata)
    return errors, []


def _check_strings(name: str, values) -> list[str]:
    if isinstance(values, str) and name != "tags":
        return []
    if not isinstance(values, list):
        return [f'"{name}" must be an array']
    return [f'"{name}[{at}]" must be a string' for at, value in enumerate(values) if not isinstance(value, str)]


def _check_model_index(models) -> list[str]:
    if not isinstance(models, list):
        return ['"model-index" must be an array']
    errors = []
    for at, model in enumerate(models):
        where = f"model-index[{at}]"
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            errors.append(f'"{where}.name" is required')
            continue
        for number, result in enumerate(model.get("results") or []):
            parts = [("task", result.get("task"), ("type",)), ("dataset", result.get("dataset"), ("type", "name"))]
            parts += [
                (f"metrics[{n}]", metric, ("type", "value")) for n, metric in enumerate(result.get("metrics") or [])
            ]
            if not result.get("metrics"):
                errors.append(f'"{where}.results[{number}].metrics" is required')
            errors += [
                f'"{where}.results[{number}].{part}.{name}" is required'
                for part, values, names in parts
                for name in names
                if not isinstance(values, dict) or values.get(name) is None
            ]
    return errors


def _check_space(metadata: dict) -> list[str]:
    errors = []
    if metadata.get("sdk") not in ("gradio", "docker", "static"):
        errors.append('"sdk" must be one of [gradio, docker, static]')
    for name in ("colorFrom", "colorTo"):
        if name in metadata and metadata[name] not in COLORS:
            errors.append(f'"{name}" must be one of [{", ".join(COLORS)}]')
    if not isinstance(metadata.get("short_description", ""), str) or len(metadata.get("short_description", "")) > 60:
        errors.append('"short_description" length must be less than or equal to 60 characters long')
    if "sdk_version" in metadata and not re.fullmatch(r"\d+(\.\d+)*", str(metadata["sdk_version"])):
        errors.append('"sdk_version" must be a version')
    return errors


# HTTP


class _Server(ThreadingHTTPServer):
    hub: Hub
    daemon_threads = True
    # Waiting for the connections that clients keep open would be waiting for the clients.
    block_on_close = False


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    # Headers and body of an answer in one packet, at once.
    wbufsize = -1
    disable_nagle_algorithm = True

    def _handle(self):
        hub, size = self.server.hub, int(self.headers.get("Content-Length", 0))
        fault = hub.fault(self.command, self.path)
        if fault is not None and fault.status is None:
            size = len(self.rfile.read(size // 2))
            self._log(None, None, size)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body, user = self.rfile.read(size), None
        try:
            if "Transfer-Encoding" in self.headers:
                self.close_connection = True
                raise _Error(501, "A header you provided implies functionality that is not implemented")
            if fault is not None:
                raise _Error(fault.status, "The Hub is out of order")
            is_storage = self.path.startswith("/storage/")
            user = None if is_storage else hub.sign_in(self.headers.get("Authorization"))
            status, headers, content = hub.answer(self, user, body)
        except _Error as error:
            status, headers, content = error.status, error.headers, error.body
        except (ValueError, KeyError, TypeError) as error:
            status, headers, content = 400, {}, {"error": f"The request has not the expected form: {error!r}"}
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), headers | {"Content-Type": "application/json"}
        self._log(user, status, size)
        try:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
            self.wfile.flush()
        except ConnectionError:
            # A client that was ended in the middle.
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _log(self, user: User | None, status: int | None, size: int):
        self.server.hub.requests.append(
            Request(self.command, urlsplit(self.path).path, user.name if user else None, status, size)
        )

    def log_message(self, format, *args):
        """The server's log is `Hub.requests`."""
