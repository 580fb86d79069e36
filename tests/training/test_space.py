# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`python -m training.space`: arguments, exit codes, messages. `tests/model_cards` tests the app itself."""

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
    """Calls of the app's `serve`, which does nothing else."""
    calls = []
    app = space.load_app()
    monkeypatch.setattr(app, "serve", lambda *where: calls.append(where))
    monkeypatch.setattr(space, "load_app", lambda: app)
    return calls


def test_serves_only_this_machine(served, model_folder):
    assert space.main(["--model", str(model_folder)]) == 0
    ((app, host, port),) = served
    assert app.title == "RBI: pets"
    assert (host, port) == ("127.0.0.1", None)


def test_serves_where_it_is_told(served, model_folder):
    port = free_port()
    assert space.main(["--model", str(model_folder), "--host", "0.0.0.0", "--port", str(port)]) == 0
    assert served[0][1:] == ("0.0.0.0", port)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model"),
        (["--model", "x", "--prot", "8000"], "did you mean `--port`"),
        (["--model", "x", "--port", "0"], "between 1 and 65535"),
        (["--model", "x", "--port", "many"], "many"),
        (["--model", "x", "--server_port", "8000"], "no argument --server_port"),
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


# RFC 5737 reserves the address for documentation, RFC 6761 the name for hosts that do not exist.
@pytest.mark.parametrize("host", ["192.0.2.1", "nobody.invalid"])
def test_a_host_that_does_not_exist(served, capsys, model_folder, host):
    assert space.main(["--model", str(model_folder), "--host", host, "--port", str(free_port())]) == 1
    error = capsys.readouterr().err
    assert host in error
    assert "--host" in error
    assert "--port" not in error
    assert not served


def test_other_errors_keep_their_message(served, capsys, model_folder, monkeypatch):
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
    # Python's own loader does leave files.
    spec = importlib.util.spec_from_file_location("space_app", space.APP)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert list(folder.rglob("*.pyc"))


def test_without_gradio(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(space.importlib.util, "find_spec", lambda name: None)
    assert space.main(["--model", str(tmp_path)]) == 1
    assert 'pip install -e ".[space]"' in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_process(start_command, tmp_path):
    result = start_command("training.space", ["--model", tmp_path / "absent", "--port", free_port()])
    assert result.wait() == 1
    assert result.stderr.startswith("error: There is no folder") and not result.stdout
