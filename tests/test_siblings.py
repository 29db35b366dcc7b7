"""Siblings share all but their docstring, constants and algorithm, to the byte."""

import difflib

import pytest
import siblings


@pytest.mark.parametrize("name", siblings.SIBLINGS)
def test_shared_sections_are_those_of_gspo(name):
    actual = siblings.sections((siblings.ROOT / f"{name}.py").read_text())
    expected = siblings.shared_for(name)
    assert list(actual) == list(siblings.sections((siblings.ROOT / "gspo.py").read_text()))
    for title, text in expected.items():
        lines = difflib.unified_diff(
            text.splitlines(), actual[title].splitlines(), "gspo.py", f"{name}.py", lineterm=""
        )
        difference = "\n".join(lines)
        assert not difference, f"section {title} has drifted; edit gspo.py, then make sync\n{difference}"


def test_sections_put_together_are_the_script():
    text = (siblings.ROOT / "gspo.py").read_text()
    assert "".join(siblings.sections(text).values()) == text
    titles = ["docstring", "imports", "Constants", "Algorithm", "Data and rewards", "Models and log-probs", "Rollouts"]
    assert list(siblings.sections(text)) == [*titles, "Trainer", "Run"]
