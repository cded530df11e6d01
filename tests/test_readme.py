"""The table of tests/README.md names tests that exist, for all of its fifty promises."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def test_every_named_test_exists():
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", (TESTS / "README.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 51))
    for number, cell in rows:
        named = re.findall(r"`(\w+\.py)::(\w+)`", cell)
        for file, function in named:
            assert re.search(rf"^def {function}\(", (TESTS / file).read_text(), re.MULTILINE), (number, file, function)
        assert named or "does not apply" in cell, number
