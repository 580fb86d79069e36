# Copyright 2026 The RBI authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The command that starts the Space's app: arguments, exit codes, messages. `tests/model_cards` has the app itself."""

import socket

import pytest

from training import space


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
    assert space.main(["--model", str(model_folder), names[0], "0.0.0.0", names[1], "8000"]) == 0
    assert served[0][1:] == ("0.0.0.0", 8000)


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
    assert str(port) in error
    assert "--port" in error


def test_without_gradio(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(space.importlib.util, "find_spec", lambda name: None)
    assert space.main(["--model", str(tmp_path)]) == 1
    assert 'pip install -e ".[space]"' in capsys.readouterr().err
