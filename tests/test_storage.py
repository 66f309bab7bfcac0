"""A file is written whole or not at all."""

import json
import os
import resource
import subprocess
import sys

import pytest

from polyreward.errors import StorageError
from polyreward.storage import write_atomically, write_json, write_text


def test_text_and_json_round_trip(tmp_path):
    assert write_text(tmp_path / "new" / "a.txt", "grüße").read_text(encoding="utf-8") == "grüße"
    path = write_json(tmp_path / "a.json", {"b": [1, 2.5]})
    assert json.loads(path.read_text()) == {"b": [1, 2.5]}
    with pytest.raises(ValueError):
        write_json(path, {"b": float("nan")})
    assert json.loads(path.read_text()) == {"b": [1, 2.5]}


def test_a_failing_writer_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fails(target):
        target.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"a\.txt: No space left on device; the earlier file"):
        write_atomically(path, fails)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_file_limit_of_the_system_is_reported(tmp_path):
    """A real limit of the kernel, in a process of its own: writing past it fails as a full disk does."""
    code = (
        "import signal, resource; from polyreward.storage import write_text;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        f"write_text({str(tmp_path / 'big.txt')!r}, 'x' * 10000)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "StorageError" in run.stderr
    assert os.listdir(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_a_path_that_cannot_be_a_folder(tmp_path):
    write_text(tmp_path / "file", "x")
    with pytest.raises(StorageError, match="cannot write"):
        write_text(tmp_path / "file" / "below", "y")
