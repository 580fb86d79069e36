"""What tests of packaged data sets share."""

import functools
from pathlib import Path

import pytest

from training.data.packaged import elpv


# Fixtures of the clients that fetch the published data sets; pip is always there.
_CLIENTS = {"emoji": "npm", "cards": "apt_get", "fashion_mnist": "apt_get"}


@pytest.fixture(autouse=True)
def _client(request):
    """Requires the client of a published data set for the slow tests, which read it."""
    if request.node.get_closest_marker("slow"):
        parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
        name = parameters.get("name", Path(request.node.path).stem.removeprefix("test_"))
        if name in _CLIENTS:
            request.getfixturevalue(_CLIENTS[name])


@pytest.fixture(scope="session")
def _cells():
    return functools.cache(elpv._load_cells)


@pytest.fixture
def cells_read_once(monkeypatch, _cells):
    """Reads the 90 MB of solar cells once for all tests that ask for this."""
    monkeypatch.setattr(elpv, "_load_cells", _cells)
