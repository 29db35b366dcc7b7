"""Siblings share all but their docstring, constants, algorithm and the exemptions listed with a reason, to the byte."""

import ast
import difflib
import subprocess

import pytest
import siblings
from conftest import SCRIPTS

import configs


@pytest.mark.parametrize("name", siblings.SIBLINGS)
def test_shared_sections_are_those_of_the_parent(name):
    actual = (siblings.ROOT / f"{name}.py").read_text()
    expected = siblings.synced(name, actual)
    parent = f"{siblings.parent_of(name)}.py"
    lines = difflib.unified_diff(expected.splitlines(), actual.splitlines(), parent, f"{name}.py", n=1, lineterm="")
    difference = "\n".join(lines)
    assert not difference, f"{name}.py has drifted; edit {parent}, then make sync\n{difference}"


@pytest.mark.parametrize("name", siblings.SIBLINGS)
def test_every_exemption_has_a_reason_and_is_still_needed(name):
    here, shared = {}, {}
    for parts, text in (
        (here, siblings.sections((siblings.ROOT / f"{name}.py").read_text())),
        (shared, siblings.renamed(name)),
    ):
        for title, section in text.items():
            if title == "imports":
                parts[title] = section
            elif title not in siblings.OWN:
                parts |= siblings.blocks(section)
    for block, reason in siblings.EXEMPTIONS.get(name, {}).items():
        assert len(reason.split()) > 4, f"{block}: say why {name}.py needs its own"
        assert block in here, f"{block}: {name}.py has no such function; remove the exemption"
        assert here[block] != shared.get(block), f"{block}: identical to its parent's by now; remove the exemption"


def test_a_script_is_its_sections_and_a_section_is_its_blocks():
    text = (siblings.ROOT / "gspo.py").read_text()
    parts = siblings.sections(text)
    assert "".join(parts.values()) == text
    titles = ["docstring", "imports", "Constants", "Algorithm", "Data and log-probs"]
    assert list(parts) == [*titles, "Trainer", "Run"]
    for section in parts.values():
        assert "".join(siblings.blocks(section).values()) == section
    assert "GSPOTrainer.train_step" in siblings.blocks(parts["Trainer"])


def test_drift_is_undone_and_an_own_function_is_kept(monkeypatch):
    text = (siblings.ROOT / "grpo.py").read_text()
    drifted = text.replace("def completion_logps(", "def kept():\n    return 1\n\n\ndef completion_logps(")
    drifted = drifted.replace("self.optimizer.zero_grad()", "pass")
    assert siblings.synced("grpo", drifted) == text
    monkeypatch.setitem(siblings.EXEMPTIONS, "grpo", {"kept": "because a test of the exemptions asks for it"})
    result = siblings.synced("grpo", drifted)
    assert "def kept():\n    return 1\n\n\ndef completion_logps(" in result and "self.optimizer.zero_grad()" in result


@pytest.mark.parametrize("line", ["VALUE = 1\n", "async def f():\n    pass\n"])
def test_code_after_an_exempt_function_is_not_exempt(line):
    text = (siblings.ROOT / "dapo.py").read_text()
    start = text.index("def completion_logps")
    assert siblings.synced("dapo", text[:start] + line + "\n\n" + text[start:]) == text
    start = text.index("    # -- Around the steps")
    assert siblings.synced("dapo", text[:start] + "    value = 1\n\n" + text[start:]) == text


LINES = {"gspo.py": 600}  # of the reference copy; of a sibling:
LINES_OF_A_SIBLING, LINES_OF_A_FUNCTION = 650, 45


def test_scripts_and_functions_are_short_enough_to_be_read():
    for path in configs.scripts():
        lines = len(path.read_text().splitlines())
        assert lines <= LINES.get(path.name, LINES_OF_A_SIBLING), f"{path.name} has {lines} lines"
    for path in [*configs.HERE.glob("*.py"), *configs.HERE.glob("[a-z]*/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= LINES_OF_A_FUNCTION, f"{path.name}: {node.name} has {lines} lines"


def test_scripts_are_found_by_their_banner():
    found = {path.stem for path in configs.HERE.glob("*.py") if "\n# ---- Algorithm" in path.read_text()}
    assert {"gspo", "grpo", "dapo"} <= found
    assert {path.stem for path in configs.scripts()} == found and configs.scripts()[0].stem == "gspo"
    assert [script.__name__ for script in SCRIPTS] == [path.stem for path in configs.scripts()]
    named = subprocess.run(
        ["make", "--no-print-directory", "scripts"], cwd=configs.HERE, capture_output=True, text=True
    )
    assert set(named.stdout.split()) == found, named.stderr
