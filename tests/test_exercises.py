"""
The exercises (tests/exercises/README.md) are not part of this suite: they fail until a learner has done them. What is
tested here is that all can be run, and that each fails because its work is not done and for no other reason.
"""

import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from conftest import ROOT, clean_environment

FOLDER = ROOT / "tests/exercises"


@pytest.mark.slow
def test_each_says_what_is_to_be_done(tmp_path):
    """In a process of its own, whose session must not end this one's process group."""
    report = tmp_path / "report.xml"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}",
                           str(FOLDER)], cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=300)
    cases = list(ElementTree.parse(report).iter("testcase"))
    files = {case.get("classname").rpartition(".")[2] for case in cases}
    assert files == {path.stem for path in FOLDER.glob("test_*.py")} and len(files) == 8, done.stdout
    for case in cases:
        said = [part.get("message") for part in case if part.tag in ("failure", "error")]
        assert said and all("not done yet: " in message for message in said), (case.get("name"), said)


def test_the_page_has_a_section_for_each():
    page = (FOLDER / "README.md").read_text()
    numbers = [int(number) for number in re.findall(r"^## (\d)\. ", page, re.MULTILINE)]
    assert numbers == list(range(1, 9))
    for path in FOLDER.glob("test_*.py"):
        assert path.name in page, path.name
