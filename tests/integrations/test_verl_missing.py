"""Without verl the integration says which extra to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

from polyreward.errors import MissingExtraError, PolyrewardError

WITHOUT_VERL = """
import sys
sys.modules["verl"] = None
import polyreward.integrations.verl
"""


def test_importing_without_verl_names_the_extra() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_VERL], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last == (
        "polyreward.errors.MissingExtraError: 'verl' is not installed; install it with: pip install 'polyreward[verl]'"
    )


def test_the_error_can_be_caught_as_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verl", None)
    monkeypatch.delitem(sys.modules, "polyreward.integrations.verl", raising=False)
    with pytest.raises(ImportError) as raised:
        __import__("polyreward.integrations.verl")
    assert isinstance(raised.value, MissingExtraError)
    assert isinstance(raised.value, PolyrewardError)


def test_the_rest_of_the_room_needs_no_verl() -> None:
    program = (
        "import sys; sys.modules['verl'] = None\n"
        "import polyreward.integrations.verl_settings, polyreward.integrations.verl_samples\n"
        "import polyreward.integrations.verl_estimators as e; print(len(e.ESTIMATORS))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
