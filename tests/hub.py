# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A small Hugging Face Hub on the loopback interface, for the real client.

It keeps repositories with their history in memory. It checks tokens, rights, the sizes and SHA-256 of uploads, the LFS
objects that a commit names, and model cards, and refuses what the Hub refuses. Tests can make it fail and can look at
the requests that it got.

    with Hub() as hub:
        subprocess.run([sys.executable, "client.py"], env=hub.env(tmp_path))
        assert hub.repo("alice/pets").files().keys() == {".gitattributes", "config.json"}

A client reads its environment at import. `Hub.connect` redirects the client of the process that is running.
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
import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.datastructures import Headers, QueryParams
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


REPO_TYPES = ("model", "dataset", "space")
SDKS = ("gradio", "docker", "static")
LFS_EXTENSIONS = ("bin", "ckpt", "h5", "npy", "npz", "onnx", "pickle", "pkl", "pt", "pth", "safetensors", "tar", "zip")
GITATTRIBUTES = "".join(f"*.{extension} filter=lfs diff=lfs merge=lfs -text\n" for extension in LFS_EXTENSIONS)
# Larger files are LFS objects, whatever their names.
MAX_REGULAR_SIZE = 10 * 2**20
# The most common ones; the Hub refuses any license that is not on its list.
LICENSES = (
    *("agpl-3.0", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    *("cc-by-sa-4.0", "cc0-1.0", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "mit", "mpl-2.0", "openrail", "other", "unknown"),
)
REPO_ID = r"[\w.-]{1,96}(/[\w.-]{1,96})?"
COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")


# Repositories


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
        """The text that git stores in place of an LFS object."""
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def oid(self) -> str:
        """The git object id."""
        blob = self.pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid

    def lfs_info(self, name: str) -> dict:
        """The `lfs` field of an answer, which calls the SHA-256 `name`; empty for a regular file."""
        info = {name: self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return {"lfs": info} if self.is_lfs else {}


@dataclasses.dataclass(frozen=True)
class Commit:
    """One state of a repository, with all its files."""

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
    """A repository. Its branches and tags are ids of commits, and its objects are LFS objects by SHA-256."""

    def __init__(self, repo_type: str, repo_id: str, private: bool, author: str, sdk: str | None = None):
        self.type, self.id, self.private, self.sdk = repo_type, repo_id, private, sdk
        self.variables: dict[str, str] = {}
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.add("main", "initial commit", "", author, {".gitattributes": File(GITATTRIBUTES.encode(), False)})

    def add(self, branch: str, title: str, description: str, author: str, files: dict[str, File]) -> Commit:
        """Commits `files`, which replace all files of the branch."""
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        commit = Commit(title, description, author, date, self.branches.get(branch), dict(sorted(files.items())))
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id
        return commit

    def commit(self, revision: str = "main") -> Commit:
        """The commit of a branch, a tag or an id. Raises `KeyError` if there is none."""
        return self.commits[self.branches.get(revision) or self.tags.get(revision) or revision]

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits up to a revision, oldest first, without the commit that created the repository."""
        commits = [self.commit(revision)]
        while (parent := commits[-1].parent) is not None:
            commits.append(self.commits[parent])
        return commits[-2::-1]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The content of each file."""
        return {path: file.content for path, file in self.commit(revision).files.items()}


# The Hub as tests see it


@dataclasses.dataclass(frozen=True)
class User:
    """The owner of a token, the organizations they belong to, and whether the token can write."""

    name: str
    organizations: tuple[str, ...]
    can_write: bool


@dataclasses.dataclass(frozen=True)
class Request:
    """An answered request. `status` is `None` if the connection was cut."""

    method: str
    path: str
    status: int | None


@dataclasses.dataclass
class _Fault:
    pattern: str
    status: int | None
    skip: int
    times: int


class Hub:
    """
    A Hub with the user `alice`, who belongs to the organization `zoo`.

    Attributes:
        url (`str`): its address.
        token (`str`): a token of alice that can write.
        repos (`dict[tuple[str, str], Repo]`): repositories by type and id.
        requests (`list[Request]`): all requests, in the order of their answers.
    """

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self._users: dict[str, User] = {}
        self._faults: list[_Fault] = []
        # Repository, SHA-256 and size of an LFS object by the signature of an address that was given out for it.
        self._signed: dict[str, tuple[Repo, str, int]] = {}
        self.token = self.add_user("alice", organizations=("zoo",))

        app = Starlette(routes=_ROUTES, exception_handlers={404: _unknown, 405: _unknown})
        app.state.hub = self

        async def undecoded(scope, receive, send):
            # The name of a branch may contain a slash, which is %2F in the path that was sent.
            await app(scope | {"path": scope["raw_path"].decode()}, receive, send)

        config = uvicorn.Config(
            *(undecoded, "127.0.0.1", 0),
            **{"loop": "asyncio", "http": "h11", "lifespan": "off", "ws": "none"},
            **{"log_config": None, "log_level": "critical", "timeout_graceful_shutdown": 1},
        )
        self._server = uvicorn.Server(config)
        # Listens before the thread starts, so that clients can connect at once.
        listener = config.bind_socket()
        listener.listen(config.backlog)
        port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        # LFS objects are on another host, as on the Hub, and clients do not send their token there.
        self._storage_url = f"http://localhost:{port}/storage"
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Stops answering. Connections are then refused."""
        self._server.should_exit = True
        self._thread.join()

    def add_user(self, name: str, organizations: Iterable[str] = (), can_write: bool = True) -> str:
        """Adds a user and returns a token. An existing user gets one more token."""
        token = f"hf_{secrets.token_hex(17)}"
        self._users[token] = User(name, tuple(organizations), can_write)
        return token

    def env(self, folder: Path, token: str | None = "", **more: str) -> dict[str, str]:
        """
        The environment of a client process with a home and cache of its own.

        Args:
            folder: where the client keeps its home and cache.
            token: the client's token; `None` for no token, by default alice's.
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
        Lets the client of this process talk to this Hub, with its cache in `folder` and alice's token.

        huggingface_hub reads these constants at each call, and so does transformers, except for the folder of remote
        code. datasets keeps what it read at import.
        """
        import transformers.utils.hub
        from huggingface_hub import constants, hf_api

        monkeypatch.setenv("HF_TOKEN", self.token)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        if hasattr(transformers.utils.hub, "hf_api"):  # newer versions keep a client of their own after its first use
            monkeypatch.setattr(transformers.utils.hub.hf_api(), "endpoint", self.url)
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
        """A repository. Raises `KeyError` if there is none."""
        return self.repos[repo_type, repo_id]

    def fail(self, pattern: str, status: int | None = None, skip: int = 0, times: int = 1):
        r"""
        Answers matching requests with an error, or cuts their connection in the middle of the body that they send.

        Args:
            pattern: regular expression that is searched in `METHOD /path`, such as `"^PUT"` for uploads of LFS objects
                or `"POST /api/models/.*/commit"`.
            status: status of the error; `None` cuts the connection, but not for HEAD, whose answer has no body.
            skip: number of matching requests that succeed first.
            times: number of matching requests that then fail.
        """
        self._faults.append(_Fault(pattern, status, skip, times))

    def recover(self):
        """Ends all faults."""
        self._faults.clear()

    def count(self, pattern: str, status: int | None = 200) -> int:
        """The number of requests that match `pattern`, as in [`fail`], and were answered with `status`."""
        return sum(
            request.status == status and re.search(pattern, f"{request.method} {request.path}") is not None
            for request in self.requests
        )

    # For the routes

    async def _respond(self, request: HTTPRequest, function):
        """The response to a request that `function` answers."""
        path, user = request.scope["path"], None
        fault = self._next_fault(f"{request.method} {path}")
        is_cut = fault is not None and fault.status is None
        body, size = bytearray(), int(request.headers.get("content-length", 0))
        async for part in request.stream():
            body += part
            if is_cut and len(body) >= size // 2:
                break
        if is_cut:
            self.requests.append(Request(request.method, path, None))
            return _cut
        try:
            if "transfer-encoding" in request.headers:
                raise _Error(501, "A header you provided implies functionality that is not implemented")
            if fault is not None:
                raise _Error(fault.status, "The Hub is out of order")
            if not path.startswith("/storage/"):
                user = self._sign_in(request.headers.get("authorization"))
            parts = {name: unquote(value) for name, value in request.path_params.items()}
            answer = function(_Call(self, user, parts, request.query_params, request.headers, bytes(body)))
            response = answer if isinstance(answer, Response) else JSONResponse(answer)
        except _Error as error:
            response = JSONResponse(error.body, error.status, error.headers)
        except (ValueError, KeyError, TypeError) as error:
            response = JSONResponse({"error": f"The request does not have the expected form: {error!r}"}, 400)
        self.requests.append(Request(request.method, path, response.status_code))
        return response

    def _next_fault(self, request: str) -> _Fault | None:
        for fault in self._faults:
            if fault.times and re.search(fault.pattern, request):
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def _sign_in(self, authorization: str | None) -> User | None:
        if authorization is None:
            return None
        user = self._users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise _Error(401, "Invalid credentials in Authorization header")
        return user

    def _find(self, user: User | None, repo_type: str, repo_id: str, to_write: bool) -> Repo:
        """A repository that the user may read or write."""
        repo = self.repos.get((repo_type, repo_id))
        if repo is None or (repo.private and not _owns(user, repo_id)):
            raise _not_found(user)
        if to_write and user is None:
            raise _Error(401, "Invalid username or password.")
        if to_write and not user.can_write:
            raise _Error(403, "Forbidden: you must use a write token to upload to a repository.")
        if to_write and not _owns(user, repo_id):
            raise _Error(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def _repo_url(self, repo: Repo) -> str:
        return f"{self.url}/{'' if repo.type == 'model' else repo.type + 's/'}{repo.id}"

    def _sign(self, repo: Repo, oid: str, size: int) -> str:
        """An address for the upload or download of an LFS object."""
        signature = secrets.token_hex(16)
        self._signed[signature] = (repo, oid, size)
        return f"{self._storage_url}/{oid}?signature={signature}"


class _Error(Exception):
    """An answer with an error. Clients tell errors apart by their code."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **more):
        super().__init__(message)
        self.status = status
        self.body = {"error": message} | more
        self.headers = (headers or {}) | {"X-Error-Message": " ".join(message.split())}
        if code is not None:
            self.headers["X-Error-Code"] = code


async def _cut(scope, receive, send):
    """Starts an answer and does not end it, so that uvicorn closes the connection."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})


def _owns(user: User | None, repo_id: str) -> bool:
    return user is not None and repo_id.split("/")[0] in (user.name, *user.organizations)


def _not_found(user: User | None) -> _Error:
    # The same for a missing and a private repository: strangers must not learn which it is.
    if user is None:
        return _Error(401, "Invalid username or password.", "RepoNotFound")
    return _Error(404, "Repository not found", "RepoNotFound")


# Routes. Their functions answer a call with JSON or a response.


@dataclasses.dataclass(frozen=True)
class _Call:
    """A request. `parts` are the variable parts of its path."""

    hub: Hub
    user: User | None
    parts: dict[str, str]
    query: QueryParams
    headers: Headers
    body: bytes

    @cached_property
    def json(self):
        return json.loads(self.body)

    def repo(self, to_write: bool = False) -> Repo:
        """The repository of the path, if the user may read or write it."""
        repo_type = self.parts.get("kind", "models").removesuffix("s")
        return self.hub._find(self.user, repo_type, f"{self.parts['owner']}/{self.parts['name']}", to_write)

    def commit(self, repo: Repo, revision: str | None = None) -> Commit:
        """The commit of a revision, by default the one of the path or main."""
        revision = revision or self.parts.get("revision", "main")
        try:
            return repo.commit(revision)
        except KeyError:
            raise _no_revision(revision) from None


def _no_revision(revision: str) -> _Error:
    return _Error(404, f"Invalid rev id: {revision}", "RevisionNotFound")


_ROUTES: list[Route] = []
_API = "/api/{kind}/{owner}/{name}"


def _route(method: str, *paths: str):
    """Registers a function for paths. GET includes HEAD."""

    def register(function):
        async def respond(request: HTTPRequest):
            return await request.app.state.hub._respond(request, function)

        _ROUTES.extend(Route(path, respond, methods=[method]) for path in paths)
        return function

    return register


@_route("GET", "/api/whoami-v2")
def _whoami(call):
    user = call.user
    if user is None:
        raise _Error(401, "Invalid username or password.")
    access_token = {"displayName": "token", "role": "write" if user.can_write else "read"}
    organizations = [{"type": "org", "name": name, "roleInOrg": "write"} for name in user.organizations]
    auth = {"type": "access_token", "accessToken": access_token}
    return {"type": "user", "name": user.name, "orgs": organizations, "auth": auth}


@_route("POST", "/api/repos/create")
def _create(call):
    hub, user, wanted = call.hub, call.user, call.json
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
        url = hub._repo_url(hub.repos[repo_type, repo_id])
        raise _Error(409, f"You already created this {repo_type} repo", url=url, name=repo_id)
    if repo_type == "space" and wanted.get("sdk") not in SDKS:
        raise _Error(400, f'"sdk" must be one of [{", ".join(SDKS)}]')
    repo = Repo(repo_type, repo_id, _is_private(wanted), user.name, wanted.get("sdk"))
    repo.variables = {each["key"]: each["value"] for each in wanted.get("variables", [])}
    hub.repos[repo_type, repo_id] = repo
    return {"url": hub._repo_url(repo), "name": repo_id}


def _is_private(wanted: dict) -> bool:
    return wanted.get("visibility") == "private" or wanted.get("private") is True


@_route("DELETE", "/api/repos/delete")
def _delete(call):
    unwanted = call.json
    repo_id = f"{unwanted.get('organization') or (call.user and call.user.name)}/{unwanted['name']}"
    repo = call.hub._find(call.user, unwanted.get("type") or "model", repo_id, to_write=True)
    del call.hub.repos[repo.type, repo.id]
    return {}


@_route("PUT", f"{_API}/settings")
def _settings(call):
    repo = call.repo(to_write=True)
    if "visibility" in call.json or "private" in call.json:
        repo.private = _is_private(call.json)
    return {}


@_route("GET", f"{_API}/auth-check", f"{_API}/auth-check/{{write}}")
def _auth_check(call):
    call.repo(to_write="write" in call.parts)
    return {}


@_route("POST", "/api/validate-yaml")
def _validate_yaml(call):
    return _accept_card(call.json["content"], call.json.get("repoType") or "model")


def _accept_card(content: str, repo_type: str) -> dict:
    """What the Hub reports about a card without errors."""
    errors, warnings = check_card(content, repo_type)
    report = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    if errors:
        raise _Error(400, "\n".join(errors), **report)
    return report


# Uploads


@_route("POST", f"{_API}/preupload/{{revision}}")
def _preupload(call):
    commit = call.commit(call.repo(to_write=True))
    answers = []
    for wanted in call.json["files"]:
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


@_route("POST", *(f"{kind}/{{owner}}/{{name}}.git/info/lfs/objects/batch" for kind in ("", "/{kind}")))
def _lfs_batch(call):
    repo, wanted = call.repo(to_write=True), call.json
    if wanted["operation"] != "upload" or wanted["hash_algo"] != "sha256" or "basic" not in wanted["transfers"]:
        raise _Error(422, "This Hub supports basic uploads with sha256 only")
    answers = []
    for each in wanted["objects"]:
        oid, size = each["oid"], each["size"]
        answer = {"oid": oid, "size": size}
        if not _has_object(repo, oid, size):
            verify = f"{call.hub.url}/api/{repo.type}s/{repo.id}/lfs-verify"
            upload = call.hub._sign(repo, oid, size)
            answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        answers.append(answer)
    return {"transfer": "basic", "objects": answers}


def _has_object(repo: Repo, oid: str, size: int) -> bool:
    return oid in repo.objects and len(repo.objects[oid]) == size


def _signed(call) -> tuple[Repo, str, int]:
    """Repository, SHA-256 and size of the LFS object that the address was signed for."""
    if "authorization" in call.headers:
        raise _Error(400, "The storage is not part of the Hub: do not send your token to it")
    repo, oid, size = call.hub._signed.get(call.query.get("signature", ""), (None, None, None))
    if repo is None or oid != call.parts["oid"]:
        raise _Error(403, "The signature does not match")
    return repo, oid, size


@_route("PUT", "/storage/{oid}")
def _put_object(call):
    repo, oid, size = _signed(call)
    if len(call.body) != size:
        raise _Error(400, f"{size} bytes were announced, and {len(call.body)} came")
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise _Error(400, f"The SHA-256 of the content is not {oid}")
    repo.objects[oid] = call.body
    return {}


@_route("GET", "/storage/{oid}")
def _get_object(call):
    repo, oid, _ = _signed(call)
    return _content(call, repo.objects[oid], oid)


@_route("POST", f"{_API}/lfs-verify")
def _verify(call):
    if not _has_object(call.repo(to_write=True), call.json["oid"], call.json["size"]):
        raise _Error(404, f"There is no object {call.json['oid']} of {call.json['size']} bytes")
    return {}


@_route("POST", f"{_API}/commit/{{revision}}")
def _commit_files(call):
    repo, revision = call.repo(to_write=True), call.parts["revision"]
    if "create_pr" in call.query:
        raise _Error(400, "This Hub has no pull requests")
    if revision not in repo.branches:
        raise _no_revision(revision)
    head = repo.commit(revision)
    lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
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
        _accept_card(card.content.decode(), repo.type)
    commit = repo.add(revision, header["summary"], header.get("description", ""), call.user.name, files)
    url = f"{call.hub._repo_url(repo)}/commit/{commit.id}"
    return {"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": ""}


def _apply(repo: Repo, files: dict[str, File], key: str, value: dict):
    """Applies one operation of a commit to the files."""
    path = value["path"]
    if not path.strip("/") or path.startswith("/") or {"..", ".", ".git"} & set(path.split("/")):
        raise _Error(400, f'"{path}" is not a valid path of a file')
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
            raise _Error(400, f"Your push was rejected because an LFS pointer points to a missing file: {path}")
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
        raise _Error(400, f'"{key}" is not an operation of a commit')


# What is in a repository


@_route("GET", _API, f"{_API}/revision/{{revision}}")
def _info(call):
    repo = call.repo()
    commit = call.commit(repo)
    card = commit.files.get("README.md")
    metadata = {} if card is None else _front_matter(card.content.decode()) or {}
    siblings = [{"rfilename": path} for path in commit.files]
    if "blobs" in call.query:
        for sibling, file in zip(siblings, commit.files.values(), strict=True):
            sibling |= {"blobId": file.oid, "size": len(file.content)} | file.lfs_info("sha256")
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
        "tags": tags,
        "cardData": metadata,
        "siblings": siblings,
    }
    info |= {"gated": False, "disabled": False, "downloads": 0, "likes": 0}
    if repo.type == "model":
        config = commit.files.get("config.json")
        info |= {"modelId": repo.id, "config": json.loads(config.content) if config else {}}
        info |= {name: metadata[name] for name in ("pipeline_tag", "library_name", "model-index") if name in metadata}
    if repo.type == "space":
        info |= {"sdk": repo.sdk}
    return info


def _listed(value) -> list:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


@_route("GET", f"{_API}/tree/{{revision}}", f"{_API}/tree/{{revision}}/{{path:path}}")
def _tree(call):
    commit, path = call.commit(call.repo()), call.parts.get("path", "")
    prefix = f"{path.rstrip('/')}/" if path else ""
    if prefix and not any(name.startswith(prefix) for name in commit.files):
        raise _Error(404, f'{path} does not exist on "{call.parts["revision"]}"', "EntryNotFound")
    recursive = call.query.get("recursive", "false").lower() in ("true", "1")
    return [
        entry
        for entry in _entries(commit)
        if entry["path"].startswith(prefix) and (recursive or "/" not in entry["path"].removeprefix(prefix))
    ]


def _entries(commit: Commit) -> list[dict]:
    """All folders and files."""
    folders = {parent.as_posix() for path in commit.files for parent in PurePosixPath(path).parents[:-1]}
    oids = {name: hashlib.sha1(f"{commit.id}{name}".encode()).hexdigest() for name in sorted(folders)}
    return [{"type": "directory", "path": name, "oid": oid, "size": 0} for name, oid in oids.items()] + [
        {"type": "file", "path": path, "oid": file.oid, "size": len(file.content)} | file.lfs_info("oid")
        for path, file in commit.files.items()
    ]


@_route("POST", f"{_API}/paths-info/{{revision}}")
def _paths_info(call):
    paths = {path.rstrip("/") for path in parse_qs(call.body.decode()).get("paths", [])}
    return [entry for entry in _entries(call.commit(call.repo())) if entry["path"] in paths]


@_route("GET", f"{_API}/commits/{{revision}}")
def _commits(call):
    repo = call.repo()
    commit: Commit | None = call.commit(repo)
    answers = []
    while commit is not None:
        answer = {"id": commit.id, "title": commit.title, "message": commit.description, "date": commit.date}
        answers.append(answer | {"authors": [{"user": commit.author}]})
        commit = repo.commits.get(commit.parent or "")
    return answers


@_route("GET", f"{_API}/refs")
def _refs(call):
    def listed(refs: dict[str, str], where: str) -> list[dict]:
        return [{"name": name, "ref": f"refs/{where}/{name}", "targetCommit": oid} for name, oid in refs.items()]

    repo = call.repo()
    branches, tags = listed(repo.branches, "heads"), listed(repo.tags, "tags")
    return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}


@_route("POST", *(f"{_API}/{what}/{{revision}}" for what in ("branch", "tag")))
def _add_ref(call):
    repo, wanted = call.repo(to_write=True), json.loads(call.body or b"{}")
    refs, name, start = repo.branches, call.parts["revision"], wanted.get("startingPoint", "main")
    if "tag" in wanted:
        refs, name, start = repo.tags, wanted["tag"], call.parts["revision"]
    if name in refs:
        raise _Error(409, f"Reference already exists: {name}")
    refs[name] = call.commit(repo, start).id
    return {}


@_route("DELETE", f"{_API}/{{what}}/{{revision}}")
def _delete_ref(call):
    repo, name = call.repo(to_write=True), call.parts["revision"]
    refs = {"branch": repo.branches, "tag": repo.tags}[call.parts["what"]]
    if name not in refs:
        raise _no_revision(name)
    if refs is repo.branches and name == "main":
        raise _Error(403, "The main branch cannot be deleted")
    del refs[name]
    return {}


@_route("GET", *(f"{kind}/{{owner}}/{{name}}/resolve/{{revision}}/{{path:path}}" for kind in ("", "/{kind}")))
def _resolve(call):
    repo = call.repo()
    commit = call.commit(repo)
    file, about = commit.files.get(call.parts["path"]), {"X-Repo-Commit": commit.id}
    if file is None:
        raise _Error(404, "Entry not found", "EntryNotFound", about)
    if not file.is_lfs:
        return _content(call, file.content, file.etag, about)
    about |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
    return Response(b"", 302, about | {"Location": call.hub._sign(repo, file.sha256, len(file.content))})


def _content(call, content: bytes, etag: str, about: dict[str, str] | None = None) -> Response:
    """A file, or the requested range of its bytes."""
    about = (about or {}) | {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("range", ""))
    if wanted is None or wanted.groups() == ("", ""):
        return Response(content, 200, about)
    first, last = wanted.groups()
    begin = int(first) if first else max(0, len(content) - int(last))
    end = min(int(last), len(content) - 1) if first and last else len(content) - 1
    if begin > end:
        return Response(b"", 416, about | {"Content-Range": f"bytes */{len(content)}"})
    return Response(content[begin : end + 1], 206, about | {"Content-Range": f"bytes {begin}-{end}/{len(content)}"})


async def _unknown(request: HTTPRequest, _):
    def refuse(call):
        path = request.scope["path"]
        if re.match(r"/api/(models|datasets|spaces)/|.*/resolve/", path):
            raise _not_found(call.user)
        raise _Error(404, f"This Hub does not know {request.method} {path}")

    return await request.app.state.hub._respond(request, refuse)


# Model cards


def _front_matter(content: str):
    """The metadata at the top of a card, `None` without any. Raises `yaml.YAMLError`."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(\r?\n|$)", content, re.DOTALL)
    return None if match is None else yaml.safe_load(match[1])


def check_card(content: str, repo_type: str = "model") -> tuple[list[str], list[str]]:
    """
    The Hub's errors and warnings, in its words, about the metadata of a README.md. Only the fields that this project
    writes are checked.
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
        values = metadata.get(name, [])
        if not isinstance(values, list) and (name == "tags" or not isinstance(values, str)):
            errors.append(f'"{name}" must be an array')
            continue
        for at, value in enumerate(_listed(values)):
            if not isinstance(value, str):
                errors.append(f'"{name}[{at}]" must be a string')
            elif name in ("base_model", "datasets", "models") and not re.fullmatch(REPO_ID, value):
                errors.append(f'"{name}" with value "{value}" is not valid. Use an id of the Hub: owner/name.')
    if isinstance(metadata.get("license"), str) and metadata["license"] not in LICENSES:
        errors.append(f'"license" must be one of [{", ".join(LICENSES)}]')
    widget = metadata.get("widget", [])
    if not isinstance(widget, list) or not all(isinstance(each, dict) for each in widget):
        errors.append('"widget" must be an array')
    errors += _check_model_index(metadata.get("model-index", []))
    return errors + (_check_space(metadata) if repo_type == "space" else []), []


def _check_model_index(models) -> list[str]:
    if not isinstance(models, list):
        return ['"model-index" must be an array']
    errors = []
    for at, model in enumerate(models):
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            errors.append(f'"model-index[{at}].name" is required')
            continue
        for number, result in enumerate(model.get("results") or []):
            where, metrics = f"model-index[{at}].results[{number}]", result.get("metrics") or []
            parts = [("task", result.get("task"), ("type",)), ("dataset", result.get("dataset"), ("type", "name"))]
            parts += [(f"metrics[{n}]", metric, ("type", "value")) for n, metric in enumerate(metrics)]
            missing = [] if metrics else ["metrics"]
            missing += [
                f"{part}.{name}"
                for part, values, names in parts
                for name in names
                if not isinstance(values, dict) or values.get(name) is None
            ]
            errors += [f'"{where}.{name}" is required' for name in missing]
    return errors


def _check_space(metadata: dict) -> list[str]:
    errors = []
    if metadata.get("sdk") not in SDKS:
        errors.append(f'"sdk" must be one of [{", ".join(SDKS)}]')
    for name in ("colorFrom", "colorTo"):
        if name in metadata and metadata[name] not in COLORS:
            errors.append(f'"{name}" must be one of [{", ".join(COLORS)}]')
    if not isinstance(metadata.get("short_description", ""), str) or len(metadata.get("short_description", "")) > 60:
        errors.append('"short_description" length must be less than or equal to 60 characters long')
    if "sdk_version" in metadata and not re.fullmatch(r"\d+(\.\d+)*", str(metadata["sdk_version"])):
        errors.append('"sdk_version" must be a version')
    return errors
