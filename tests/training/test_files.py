"""The cache, the guard of output folders, and files that are complete or absent, whatever stops the writing."""

import errno
import json
import os
import resource
from contextlib import contextmanager

import numpy as np
import pytest

from modeling_rbi import UserError
from training.files import cache_dir, check_output_dir, filled_whole, made_once, names_in, read_json, write_json


OLD, NEW = {"config.json": "old", "a": "old a", "z": "old z"}, {"config.json": "new", "a": "new a", "z": "new z"}


@contextmanager
def room_for(num_bytes):
    """No file can grow beyond this: the write that would fails half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def fill(folder, files):
    with filled_whole(folder, last="config.json") as draft:
        for name, text in files.items():
            (draft / name).write_text(text)


@pytest.fixture(params=["new", "old"])
def folder(request, tmp_path):
    """One that is not there yet, in a folder that is not there either, and one that is filled."""
    folder = tmp_path / "runs" / "run"
    if request.param == "old":
        fill(folder, OLD)
    return folder


def test_names_without_the_draft_of_a_killed_run(folder):
    before = contents(folder) if folder.exists() else {}
    with filled_whole(folder, last="config.json"):
        assert len([*folder.iterdir()]) == len(before) + 1
        assert names_in(folder) == sorted(before)
    assert names_in(folder / "nowhere") == []


@pytest.mark.parametrize("content", [{"a": [1, 2.5, None]}, [], "ä", 3])
def test_json_comes_back(tmp_path, content):
    path = tmp_path / "a.json"
    for _ in range(2):
        write_json(path, content)
        assert json.loads(path.read_text(encoding="utf-8")) == content
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float64("nan")])
def test_numbers_that_json_lacks_are_null(tmp_path, value):
    path = tmp_path / "a.json"
    write_json(path, {"a": value, "b": [1.5, (value, 2)], "c": {"d": {"e": value}}, "f": "NaN"})
    expected = {"a": None, "b": [1.5, [None, 2]], "c": {"d": {"e": None}}, "f": "NaN"}
    assert json.loads(path.read_text()) == expected


@pytest.mark.parametrize("old", [None, "before"])
@pytest.mark.parametrize("fault", ["full", "unserializable", "replace"])
def test_json_that_cannot_be_written_leaves_all_as_it_was(tmp_path, monkeypatch, old, fault):
    path = tmp_path / "a.json"
    if old is not None:
        path.write_text(old)
    content = {"value": object() if fault == "unserializable" else "x" * 10_000}
    if fault == "replace":
        monkeypatch.setattr(os, "replace", _raise_full)
    with room_for(1000 if fault == "full" else 10**9), pytest.raises((OSError, TypeError)):
        write_json(path, content)
    assert contents(tmp_path) == ({} if old is None else {"a.json": old})


def _raise_full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_is_read_is_a_mapping_or_refused_by_name(tmp_path):
    path = tmp_path / "run.json"
    assert read_json(path, "record") is None
    write_json(path, {"a": 1})
    assert read_json(path, "record") == {"a": 1}
    for content in ("{", "[]", '"a"'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"run\.json is not a valid record.*: move it away"):
            read_json(path, "record")


def test_a_folder_is_filled(folder):
    fill(folder, NEW)
    assert contents(folder) == NEW


def test_other_files_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    fill(tmp_path, NEW)
    assert contents(tmp_path) == NEW | {"notes.txt": "mine"}


def test_what_makes_it_whole_comes_last_and_goes_first(folder, monkeypatch):
    seen = []
    replace = os.replace

    def watch(source, target):
        seen.append((target.name, "config.json" in os.listdir(folder)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    fill(folder, NEW)
    assert seen == [("a", False), ("z", False), ("config.json", False)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, "full"])
def test_an_error_while_it_is_written_changes_nothing(folder, error):
    before = contents(folder) if folder.exists() else {}
    with pytest.raises(OSError if error == "full" else error), filled_whole(folder, last="config.json") as draft:
        (draft / "config.json").write_text("new")
        (draft / "sub").mkdir()
        (draft / "sub" / "b").write_text("new")
        if error != "full":
            raise error
        with room_for(1000):
            (draft / "a").write_text("x" * 10_000)
    assert contents(folder) == before


@pytest.mark.parametrize("num_moves", [0, 1, 2])
def test_an_error_while_files_move_leaves_what_is_not_taken_for_whole(folder, monkeypatch, num_moves):
    replace, moves = os.replace, []

    def fail(source, target):
        if len(moves) == num_moves:
            _raise_full()
        moves.append(target.name)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "replace", fail)
        fill(folder, NEW)
    left = contents(folder)
    assert "config.json" not in left
    assert set(left) <= {"a", "z"}, "no drafts"
    fill(folder, NEW)
    assert contents(folder) == NEW


def test_what_a_killed_process_of_the_same_number_left_is_no_obstacle(folder):
    """In a container, a run has the same process number each time."""
    (folder / f".{os.getpid()}.tmp").mkdir(parents=True)
    (folder / f".a.json.{os.getpid()}.tmp").write_text("cut o")
    fill(folder, NEW)
    write_json(folder / "a.json", 1)
    assert {name: text for name, text in contents_of_files(folder).items() if name in NEW} == NEW
    assert json.loads((folder / "a.json").read_text()) == 1


def contents_of_files(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_files_can_be_read_by_those_whom_the_umask_lets(tmp_path):
    umask = os.umask(0o022)
    try:
        fill(tmp_path / "run", NEW)
        write_json(tmp_path / "run" / "a.json", 1)
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "run").iterdir()} == {0o644}
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o755


class TestCache:
    @pytest.fixture(autouse=True)
    def _cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("RBI_CACHE", str(tmp_path / "cache"))

    @pytest.mark.parametrize("value", [None, ""])
    def test_where_it_is_by_default(self, monkeypatch, tmp_path, value):
        monkeypatch.setenv("HOME", str(tmp_path))
        if value is None:
            monkeypatch.delenv("RBI_CACHE")
        else:
            monkeypatch.setenv("RBI_CACHE", value)
        assert cache_dir() == tmp_path / ".cache" / "modeling-rbi"

    def test_an_interrupted_make_leaves_nothing_behind(self):
        def fail(draft):
            draft.mkdir()
            (draft / "half").touch()
            raise RuntimeError("interrupted")

        with pytest.raises(RuntimeError, match="interrupted"):
            made_once("folder/thing", fail)
        assert list((cache_dir() / "folder").iterdir()) == []
        path = made_once("folder/thing", lambda draft: draft.write_text("whole"))
        assert path == cache_dir() / "folder" / "thing"
        assert made_once("folder/thing", fail) == path
        assert path.read_text() == "whole"

    def test_a_folder_that_another_process_made_meanwhile_is_taken(self):
        def make(draft):
            for folder, text in ((cache_dir() / "thing", "theirs"), (draft, "ours")):
                folder.mkdir()
                (folder / "file").write_text(text)

        assert (made_once("thing", make) / "file").read_text() == "theirs"
        assert [path.name for path in cache_dir().iterdir()] == ["thing"]


class TestOutputDir:
    NAMES = ("results.json", "figures")

    def check(self, folder):
        """As a command that replaces its earlier result, known by `results.json`."""
        check_output_dir(folder, "an assessment", self.NAMES, lambda folder: (folder / "results.json").exists())

    @pytest.mark.parametrize("what", [None, "an assessment"])
    def test_missing_or_empty(self, tmp_path, what):
        check_output_dir(tmp_path, what, self.NAMES)
        check_output_dir(tmp_path / "new" / "deep", what, self.NAMES)
        assert not (tmp_path / "new").exists(), "nothing is made"

    @pytest.mark.parametrize("what", [None, "an assessment"])
    def test_a_file(self, tmp_path, what):
        path = tmp_path / "out"
        path.write_text("")
        with pytest.raises(UserError, match=r"--output_dir .*out is a file: name a folder\."):
            check_output_dir(path, what, self.NAMES)

    def test_a_command_that_replaces_nothing(self, tmp_path):
        (tmp_path / "results.json").write_text("{}")
        with pytest.raises(UserError, match=r"is not empty: name a new folder\."):
            check_output_dir(tmp_path)

    def test_an_earlier_result(self, tmp_path):
        (tmp_path / "figures").mkdir()
        (tmp_path / "results.json").write_text("{}")
        self.check(tmp_path)

    def test_its_names_without_an_earlier_result(self, tmp_path):
        (tmp_path / "figures").mkdir()
        with pytest.raises(UserError, match=r"holds other files than an assessment \(figures\): name another folder"):
            self.check(tmp_path)

    def test_other_files_beside_an_earlier_result(self, tmp_path):
        for name in ("results.json", *"abcdefg"):
            (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match=r"than an assessment \(a, b, c, d, e and 2 more\): name another folder"):
            self.check(tmp_path)
        assert len(list(tmp_path.iterdir())) == 8

    @pytest.mark.parametrize("is_former", [True, False])
    def test_any_names_where_a_result_has_no_fixed_ones(self, tmp_path, is_former):
        (tmp_path / "anything").write_text("")
        if is_former:
            check_output_dir(tmp_path, "a demo", is_former=lambda folder: is_former)
        else:
            with pytest.raises(UserError, match=r"holds other files than a demo \(anything\)"):
                check_output_dir(tmp_path, "a demo", is_former=lambda folder: is_former)

    @pytest.mark.parametrize("what", [None, "an assessment"])
    def test_drafts_of_killed_runs_do_not_count(self, tmp_path, what):
        with filled_whole(tmp_path, last="results.json"):
            assert list(tmp_path.iterdir())
            check_output_dir(tmp_path, what, self.NAMES, lambda folder: False)
        for name in (".hidden", ".x.draft.tmp"):  # a file is not a draft
            (tmp_path / name).write_text("")
            with pytest.raises(UserError, match=name):
                check_output_dir(tmp_path, "an assessment", self.NAMES)
            (tmp_path / name).unlink()
