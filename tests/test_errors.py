"""Errors are also the built-in that fits, and name what to do."""

import pytest

from polyreward import errors


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.InvalidInputError, ValueError),
        (errors.MissingColumnError, LookupError),
        (errors.UnknownNameError, LookupError),
        (errors.MissingFileError, FileNotFoundError),
        (errors.MissingExtraError, ImportError),
        (errors.StorageError, OSError),
    ],
)
def test_each_error_is_ours_and_a_builtin(error, builtin):
    assert issubclass(error, errors.PolyrewardError)
    assert issubclass(error, builtin)
    assert str(error("a message")) == "a message"


def test_nearest_offers_the_closest_name_or_lists_all():
    assert errors.nearest("stratifed-grpo", ["grpo", "stratified-grpo"]) == "; did you mean 'stratified-grpo'?"
    assert errors.nearest("zzz", ["b", "a"]) == "; known: a, b"
    assert errors.nearest("zzz", []) == ""


def test_a_missing_extra_names_the_extra():
    with pytest.raises(errors.MissingExtraError, match=r"pip install 'polyreward\[text\]'"):
        errors.require("a_module_nobody_has", "text")
    assert errors.require("json", "text").loads("1") == 1
