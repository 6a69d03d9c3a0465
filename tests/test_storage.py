"""Files on this machine and behind URLs."""

import pytest

from clipn.storage import expand_patterns

# Patterns


def test_braces_count_and_list_in_order(tmp_path):
    for name in ("train-008.tar", "train-009.tar", "train-010.tar", "val-009.tar", "val-010.tar"):
        (tmp_path / name).touch()

    def names(pattern):
        return [path.name for path in expand_patterns(str(tmp_path / pattern))]

    assert names("train-{008..010}.tar") == ["train-008.tar", "train-009.tar", "train-010.tar"]
    assert names("{val,train}-010.tar") == ["val-010.tar", "train-010.tar"]
    assert names("{train,val}-{009..010}.tar") == ["train-009.tar", "train-010.tar", "val-009.tar", "val-010.tar"]
    assert names("train-*.tar") == ["train-008.tar", "train-009.tar", "train-010.tar"]
    assert names("{val,train}-0?0.tar") == ["val-010.tar", "train-010.tar"]
    assert names("val-010.tar") == ["val-010.tar"]


def test_a_list_of_patterns_keeps_its_order(tmp_path):
    for name in "abc":
        (tmp_path / name).touch()
    patterns = [str(tmp_path / "c"), str(tmp_path / "{a,b}")]
    assert [path.name for path in expand_patterns(patterns)] == ["c", "a", "b"]


def test_a_missing_shard_is_named(tmp_path):
    (tmp_path / "0.tar").touch()
    with pytest.raises(FileNotFoundError, match=r"data\.shards=.*\{0\.\.2\}.*1\.tar$"):
        expand_patterns(str(tmp_path / "{0..2}.tar"))
    for nothing in (str(tmp_path / "x*.tar"), str(tmp_path), "", []):
        with pytest.raises(FileNotFoundError, match=r"data\.shards"):
            expand_patterns(nothing)
