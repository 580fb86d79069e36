"""The made-up data sets have what the publishers' have."""

import pytest

from training.data.layouts import LAYOUTS, PUBLISHED
from training.data.tiny import make_published


@pytest.mark.parametrize("name", LAYOUTS)
def test_sizes_and_repeatability(name, tmp_path):
    splits = len(PUBLISHED[name].split_sizes)
    first, second = (make_published(name, tmp_path / part, 3, splits) for part in "ab")
    for path in (first, second):
        read = LAYOUTS[name](path)
        assert list(read) == list(PUBLISHED[name].split_sizes)
        assert all(sorted(split["label"]) == [0, 1, 2] for split in read.values())
    files = [sorted(path.relative_to(root) for path in root.rglob("*")) for root in (first, second)]
    assert files[0] == files[1]
    for file in files[0]:
        # scipy writes the time into its files.
        if (first / file).is_file() and file.suffix != ".mat":
            assert (first / file).read_bytes() == (second / file).read_bytes()


@pytest.mark.parametrize("name", LAYOUTS)
def test_archives_are_the_publishers(name, tmp_path):
    path = make_published(name, tmp_path, archive=True)
    names = {file.name for file in tmp_path.iterdir()}
    assert set(PUBLISHED[name].archives) <= names
    assert not any(file.is_dir() for file in tmp_path.iterdir())
    assert path == (tmp_path if PUBLISHED[name].folder is None else tmp_path / PUBLISHED[name].archives[0])


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"'cub' is not a published layout: choose one of cub_200_2011, "):
        make_published("cub", tmp_path)
    with pytest.raises(ValueError, match="at least 2 classes and 3 images of each, got 2 and 2"):
        make_published("oxford_flowers", tmp_path, num_classes=2, images_per_class=2)
    with pytest.raises(ValueError, match="got 1 and 6"):
        make_published("cub_200_2011", tmp_path, num_classes=1)
