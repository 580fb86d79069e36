# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The command that starts the Space's app: arguments, exit codes, messages. `tests/model_cards` has the app itself."""

import importlib.util
import shutil
import socket
import sys

import pytest

from training import space


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def served(monkeypatch):
    """What the app is asked to serve, and where, in place of serving it."""
    calls = []
    app = space.load_app()
    monkeypatch.setattr(app, "serve", lambda *where: calls.append(where))
    monkeypatch.setattr(space, "load_app", lambda: app)
    return calls


def test_serves_on_this_machine_alone(served, model_folder):
    assert space.main(["--model", str(model_folder)]) == 0
    ((app, host, port),) = served
    assert app.title == "RBI: pets"
    assert (host, port) == ("127.0.0.1", None)


@pytest.mark.parametrize("names", [("--host", "--port"), ("--server_name", "--server_port")])
def test_serves_where_it_is_told(served, model_folder, names):
    port = free_port()
    assert space.main(["--model", str(model_folder), names[0], "0.0.0.0", names[1], str(port)]) == 0
    assert served[0][1:] == ("0.0.0.0", port)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model"),
        (["--model", "x", "--prot", "8000"], "did you mean `--port`"),
        (["--model", "x", "--port", "0"], "between 1 and 65535"),
        (["--model", "x", "--port", "many"], "many"),
    ],
)
def test_wrong_arguments(served, capsys, argv, message):
    assert space.main(argv) == 2
    assert message in capsys.readouterr().err
    assert not served


def test_a_model_that_cannot_be_shown(served, capsys, tmp_path):
    assert space.main(["--model", str(tmp_path / "absent")]) == 1
    assert "There is no folder" in capsys.readouterr().err
    assert not served


def test_a_port_that_is_taken(capsys, model_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert space.main(["--model", str(model_folder), "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert f"port {port}: Address already in use" in error
    assert "--port" in error


# The address is kept for documentation (RFC 5737), the name for those that are of nobody (RFC 6761).
@pytest.mark.parametrize("host", ["192.0.2.1", "nobody.invalid"])
def test_a_host_that_is_none(served, capsys, model_folder, host):
    assert space.main(["--model", str(model_folder), "--host", host, "--port", str(free_port())]) == 1
    error = capsys.readouterr().err
    assert host in error
    assert "--host" in error
    assert "--port" not in error
    assert not served


def test_other_failures_are_told_as_they_are(served, capsys, model_folder, monkeypatch):
    def serve(*where):
        raise PermissionError(13, "Permission denied", "/uploads")

    monkeypatch.setattr(space.load_app(), "serve", serve)
    assert space.main(["--model", str(model_folder), "--port", str(free_port())]) == 1
    error = capsys.readouterr().err
    assert "Permission denied: '/uploads'" in error
    assert "port" not in error


def test_leaves_nothing_in_the_folder_that_is_uploaded(tmp_path, monkeypatch):
    folder = shutil.copytree(space.APP.parent, tmp_path / "space", ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(space, "APP", folder / "app.py")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.delitem(sys.modules, "space_app", raising=False)
    assert space.load_app().__file__ == str(folder / "app.py")
    assert sorted(folder.rglob("*")) == before
    # As Python itself does it.
    spec = importlib.util.spec_from_file_location("space_app", space.APP)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert list(folder.rglob("*.pyc"))


def test_without_gradio(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(space.importlib.util, "find_spec", lambda name: None)
    assert space.main(["--model", str(tmp_path)]) == 1
    assert 'pip install -e ".[space]"' in capsys.readouterr().err
