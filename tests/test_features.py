"""docs/FEATURES.md is true as far as a machine can tell: every row is there, and every test that it names exists."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
COUNTS = {"A": 17, "M": 41, "MG": 10, "Q": 18, "C": 12, "T": 20, "L": 19}
COUNTS |= {"A-": 8, "M-": 13, "T-": 7, "L-": 8}  # faults that the systems are known for
STATES = ("ours", "differs", "not yet")


def rows() -> list[list[str]]:
    lines = (ROOT / "docs/FEATURES.md").read_text().splitlines()
    cells = [line.strip("|").split(" | ") for line in lines if re.match(r"\| [A-Z]+-?\d+ \|", line)]
    return [[cell.strip() for cell in row] for row in cells]


ROWS = rows()


def test_every_feature_of_the_reference_systems_has_one_row():
    expected = [f"{prefix}{i}" for prefix, count in COUNTS.items() for i in range(1, count + 1)]
    assert sorted(row[0] for row in ROWS) == sorted(expected)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_rows_say_where_and_name_tests_that_exist(row):
    assert len(row) == 5
    _, feature, state, where, proof = row
    assert state in STATES
    assert feature
    assert where
    assert proof
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", " ".join(row))
    assert named or state != "ours", "what is ours names its test"
    for path, name in named:
        source = ROOT / path
        assert source.exists(), f"{path} does not exist"
        assert re.search(rf"^def {name}\(", source.read_text(), re.MULTILINE), (
            f"no {name} in {path}"
        )


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(gqa_jax/[\w/]+(?:\.py)?)", str(ROWS)))))
def test_files_named_exist(path):
    assert (ROOT / path).exists()
