"""Exercises keep one form: a heading with difficulty and minutes, a typed stub, a check, a hint, a folded solution.

The rules read the committed notebooks; each is tried on an exercise that breaks it before it is trusted.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from safescale_lib.course import exercise

HERE = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(HERE.glob("[0-9]*.ipynb"))
FOLDED = {"hide-cell", "hide-input", "hide-output", "remove-cell", "remove-input", "remove-output"}
VERDICTS = {"assert", "claim"}


# --- reading an exercise ------------------------------------------------------------------------------------------


def split(cells: list[NotebookNode]) -> Iterator[list[NotebookNode]]:
    """Each exercise's cells: from its heading to the next heading of its level or above."""
    found: list[NotebookNode] = []
    for cell in cells:
        first = re.search(r"^#{1,3} .*", cell.source, flags=re.MULTILINE) if cell.cell_type == "markdown" else None
        starts = re.search(r"^#+ Exercise\b.*", cell.source, flags=re.MULTILINE) if first else None
        if first and found:
            yield found
            found = []
        if starts or found:
            found.append(cell)
    if found:
        yield found


def heading(cells: list[NotebookNode]) -> str:
    found = re.search(r"^#+ Exercise\b.*", cells[0].source, flags=re.MULTILINE)
    assert found
    return found[0]


def tags(cell: NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", []))


def functions(cell: NotebookNode) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(cell.source).body if isinstance(node, ast.FunctionDef)]


def called(cell: NotebookNode) -> set[str]:
    """Names of the functions a cell calls."""
    calls = (node.func for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call))
    return {function.id for function in calls if isinstance(function, ast.Name)}


def untyped(function: ast.FunctionDef) -> list[str]:
    """Parameters without an annotation, and "return"; a model is any callable, so it needs none."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    missing = [a.arg for a in arguments if a.annotation is None and a.arg != "model"]
    return missing + (["return"] if function.returns is None else [])


def verdicts(cell: NotebookNode) -> set[str]:
    """How a cell can fail: by `assert`, by `claim(...)`."""
    found = {"assert"} if any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(cell.source))) else set()
    return found | ({"claim"} & called(cell))


def printed(cell: NotebookNode) -> str:
    texts = (output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)
    return "".join(texts)


def faults(cells: list[NotebookNode]) -> list[str]:
    """What an exercise misses, as sentences; empty if it keeps the form."""
    try:
        said = exercise(heading(cells))
    except ValueError as error:
        return [str(error)]
    code = [cell for cell in cells if cell.cell_type == "code" and "remove-cell" not in tags(cell)]
    words = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    found = []
    if not re.search(r"<details>\s*<summary>Hint</summary>\s*\S[\s\S]*?</details>", words):
        found.append("no hint: <details><summary>Hint</summary> ... </details>")
    solutions = [cell for cell in code if "hide-cell" in tags(cell)]
    if not any(verdicts(cell) & VERDICTS for cell in solutions):
        found.append("no solution in a cell tagged hide-cell that can fail (assert, or claim)")
    found += ["the solution was not executed" for cell in solutions if cell.execution_count is None]
    if said.measure:
        return found
    visible = [cell for cell in code if not tags(cell) & FOLDED]
    stubs = [(cell, function) for cell in visible for function in functions(cell)]
    if not stubs:
        return [*found, "no stub: a visible cell with a function to complete (or mark the exercise: measure)"]
    cell, stub = stubs[0]
    if missing := untyped(stub):
        found.append(f"the stub {stub.name} has no type for: {', '.join(missing)}")
    checks = [other for other in visible if other is not cell and _names(other, stub.name)]
    if not checks:
        found.append(f"no visible cell after the stub checks {stub.name}")
    elif not any(printed(check).strip() for check in checks):
        found.append("the check says nothing of the unfinished stub")
    elif not set.union(*map(called, checks)) & set().union(*map(called, solutions)):
        found.append("the solution is not put to the same check")
    elif any(printed(check).strip() == printed(solution).strip() for check in checks for solution in solutions):
        found.append("the check says the same of the unfinished stub as of the solution")
    return found


def _names(cell: NotebookNode, name: str) -> bool:
    return any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(ast.parse(cell.source)))


# --- the rules catch what breaks them -----------------------------------------------------------------------------


def code(source: str, printed: str = "", *labels: str) -> NotebookNode:
    outputs = [nbformat.v4.new_output("execute_result", {"text/plain": printed}, execution_count=1)] if printed else []
    return nbformat.v4.new_code_cell(source, outputs=outputs, execution_count=1, metadata={"tags": list(labels)})


def good() -> list[NotebookNode]:
    say = nbformat.v4.new_markdown_cell
    return [
        say("## Exercises\n\n### Exercise 9.1: double it (easy, 5 minutes)\n\nComplete the function."),
        code("def double(model, x: int) -> int:\n    return x"),
        code("def check(answer):\n    return 'correct' if answer(3) == 6 else 'not yet'\n\ncheck(double)", "'not yet'"),
        say("<details><summary>Hint</summary>\n\nAdd it to itself.\n\n</details>"),
        code(
            "def doubled(x):\n    return x + x\n\nassert check(doubled) == 'correct'\ncheck(doubled)", "'correct'", "hide-cell"
        ),
    ]


def test_a_good_exercise_has_no_fault_and_ends_at_the_next_heading() -> None:
    after = nbformat.v4.new_markdown_cell("### Exercise 9.2: next (hard, 5 minutes)")
    one, two = split([nbformat.v4.new_markdown_cell("# Title"), *good(), after])
    assert len(one) == 5
    assert faults(one) == []
    assert len(faults(two)) == 3
    (only,) = split([*good(), nbformat.v4.new_markdown_cell("## Summary"), code("1 + 1")])
    assert len(only) == 5


BREAKS = {
    "heading must read": (0, "(easy, 5 minutes)", "(5 minutes)"),
    "no hint": (3, "Hint", "Tip"),
    "has no type for: x, return": (1, "x: int) -> int", "x)"),
    "no visible cell after the stub checks double": (2, "check(double)", "check(abs)"),
    "no solution": (4, "assert ", ""),
    "not put to the same check": (4, "check(doubled)", "str(doubled)"),
}


@pytest.mark.parametrize("complaint", BREAKS)
def test_a_broken_exercise_is_noticed(complaint: str) -> None:
    place, old, new = BREAKS[complaint]
    cells = good()
    assert old in cells[place].source
    cells[place].source = cells[place].source.replace(old, new)
    assert any(complaint in fault for fault in faults(cells)), faults(cells)


def test_what_was_not_run_or_says_nothing_is_noticed() -> None:
    def changed(place: int, **other: object) -> str:
        cells = copy.deepcopy(good())
        cells[place].update(other)
        return "; ".join(faults(cells))

    assert "was not executed" in changed(4, execution_count=None)
    assert "says nothing" in changed(2, outputs=[])
    assert "says the same" in changed(2, outputs=good()[4].outputs)
    assert "no solution" in changed(4, metadata={})
    assert "no visible cell after the stub checks" in changed(2, metadata=nbformat.from_dict({"tags": ["hide-input"]}))


def test_an_exercise_without_a_stub_has_to_say_so() -> None:
    heading, _, _, hint, solution = good()
    assert any("or mark the exercise: measure" in fault for fault in faults([heading, hint, solution]))
    heading.source = heading.source.replace("minutes)", "minutes, measure)")
    assert faults([heading, hint, solution]) == []
    solution.source = 'claim("it doubles", True)'
    assert faults([heading, hint, solution]) == []


# --- the notebooks keep them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_exercise_keeps_the_form(path: Path) -> None:
    exercises = list(split(nbformat.read(path, as_version=4).cells))
    assert exercises, "a chapter without an exercise"
    found = [f"{heading(cells)}: {fault}" for cells in exercises for fault in faults(cells)]
    assert not found, "\n".join(found)
    numbers = [tuple(map(int, exercise(heading(cells)).number.split("."))) for cells in exercises]
    assert numbers == [(int(path.stem[:2]), place) for place in range(1, len(numbers) + 1)]
