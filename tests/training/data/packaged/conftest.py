"""What tests of packaged data sets share."""

import functools

import pytest

from training.data.packaged import elpv


@pytest.fixture(scope="session")
def _cells():
    return functools.cache(elpv._load_cells)


@pytest.fixture
def cells_read_once(monkeypatch, _cells):
    """Reads the 90 MB of solar cells once for all tests that ask for this."""
    monkeypatch.setattr(elpv, "_load_cells", _cells)
