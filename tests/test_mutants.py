"""Faults that the suite must notice: the list is sound, and the commit's share is caught (`make mutants`: all)."""

import pytest

from tests.mutants import FAULTS, ROOT, copy_of_the_project, survives


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return copy_of_the_project(tmp_path_factory.mktemp("project"))


def test_the_list_is_long_and_every_fault_has_its_place():
    assert len(FAULTS) >= 60
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    misplaced = [
        fault.name for fault in FAULTS if (ROOT / fault.file).read_text().count(fault.old) != 1
    ]
    assert not misplaced


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught(fault, copy):
    assert survives(fault, copy) == ""
