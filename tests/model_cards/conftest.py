"""Image files of all kinds, which the handler and the Space decode as training does."""

import pytest

from tests.odd_images import ODD_IMAGES


@pytest.fixture(scope="session")
def kinds_of_images():
    """Image files by the name of their kind."""
    return {name: odd.file for name, odd in ODD_IMAGES.items()}


@pytest.fixture(params=ODD_IMAGES)
def odd_image(request):
    """Each image file in turn, with its right pixels."""
    return ODD_IMAGES[request.param]
