"""Cells of the table of signals x phases (signal_table.py), each a run that is signalled in one phase in one way."""

import pytest

from tests.faults.signal_table import PHASES, WAYS, judge, promised, try_out

BY_NAME = {way.name: way for way in WAYS}
FEW = [("import", "INT"), ("data", "group INT"), ("step", "terminal closed"), ("save", "INT, 1.3 s, INT")]
REST = [(phase, way) for phase in PHASES for way in BY_NAME if (phase, way) not in FEW]


@pytest.mark.parametrize(("phase", "way"), [*FEW, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in REST)])
def test_a_run_that_is_signalled(tmp_path, phase, way):
    outcome = try_out(tmp_path, phase, BY_NAME[way])
    assert judge(outcome, phase, BY_NAME[way]), (outcome, promised(phase, BY_NAME[way]))
