"""scripts/fault_drill.py: a real run, really hurt."""

import pytest

from scripts import fault_drill


def test_a_hurt_run_ends_with_the_same_bits(capsys):
    assert fault_drill.main(["broken", "--pairs", "1500"]) == 0
    out = capsys.readouterr().out
    assert "the same bits" in out and "was cut short" in out


def test_an_unknown_fault_is_told_with_the_choices():
    with pytest.raises(ValueError, match="no such fault: flood; there are: kill, stop"):
        fault_drill.main(["flood"])
