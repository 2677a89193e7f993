"""The committed notebooks as files: executed, clean, described, in step with their scripts and small in their cells."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from safescale_lib.measure import OUTCOME_MIME
from tests.nbval_outcomes import carried, differences

HERE = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(HERE.glob("[0-9]*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:tmp|home|root|Users|opt|mnt|var|private|work|usr|srv)/[\w.-]+|[A-Z]:\\\\")


@pytest.fixture(scope="session")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build", HERE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> nbformat.NotebookNode:
    read: nbformat.NotebookNode = nbformat.read(request.param, as_version=4)
    nbformat.validate(read)
    return read


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
    assert {path.stem for path in NOTEBOOKS} == {path.stem for path in HERE.glob("[0-9]*.py")}


def test_every_code_cell_was_executed_in_order(notebook: nbformat.NotebookNode) -> None:
    """nbval never compares a cell without an execution count, so a stripped notebook would pass it."""
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


def test_no_output_is_an_error_a_warning_or_a_path(notebook: nbformat.NotebookNode) -> None:
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error", cell.id
            assert not (output.output_type == "stream" and output.name == "stderr"), cell.id
            texts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
            for text in texts:
                assert not MACHINE_PATH.search(text), f"{cell.id}: {MACHINE_PATH.search(text)}"
                assert not re.search(r"Warning\b|Traceback|<[\w.]+ at 0x", text), f"{cell.id}: {text[:200]}"


def test_every_picture_has_a_name_a_caption_and_an_alt_text(notebook: nbformat.NotebookNode) -> None:
    names = []
    for cell in code_cells(notebook):
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            texts = cell.metadata["mystnb"]
            assert len(texts["image"]["alt"]) > 40, cell.id
            assert len(texts["figure"]["caption"]) > 20, cell.id
            names.append(texts["figure"]["name"])
    assert names
    assert len(names) == len(set(names))


def test_outcomes_are_whole_and_told_apart(notebook: nbformat.NotebookNode) -> None:
    found = [outcome for cell in code_cells(notebook) for outcome in carried(cell.outputs)]
    assert found, f"a chapter without a single {OUTCOME_MIME}"
    for outcome in found:
        assert outcome["low"] <= outcome["value"] <= outcome["high"]
        assert outcome["n"] >= 20  # the interval says what so few are worth
        uncontrolled = outcome["method"] == "no attack" or outcome["metric"] == "mean L2 distance"  # which would be zero
        assert uncontrolled or outcome["control"] is not None, outcome["method"]
    different = {json.dumps(outcome, sort_keys=True): outcome for outcome in found}.values()  # one may be shown twice
    keys = [tuple(outcome[key] for key in ("technique", "method", "metric", "against", "seed", "n")) for outcome in different]
    assert len(keys) == len(set(keys)), [key for key in keys if keys.count(key) > 1]


def test_cells_are_small_and_have_their_reason_before_them(notebook: nbformat.NotebookNode) -> None:
    lines = sorted(sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in code_cells(notebook))
    assert statistics.median(lines) <= 8
    assert lines[int(0.9 * (len(lines) - 1))] <= 20
    assert notebook.cells[0].cell_type == "markdown"
    texts = "\n".join(cell.source for cell in notebook.cells)
    assert "pip install" not in texts
    assert "**You will learn to**" in notebook.cells[0].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_matches_its_script(build: ModuleType, path: Path) -> None:
    assert build.drifted(path.with_suffix(".py")) is None


def test_drift_is_noticed(build: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "09_x.py"
    script.write_text("# %% [markdown]\n# # Title\n\n# %%\n1 + 1\n")
    assert "has not been made" in build.drifted(script)
    nbformat.write(build.from_source(script), script.with_suffix(".ipynb"))
    assert build.drifted(script) is None
    script.write_text(script.read_text().replace("1 + 1", "1 + 2"))
    assert "older" in build.drifted(script)


def test_a_notebook_that_only_took_longer_stays_as_it_is(build: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "09_x.py"
    cell = """# %%
import time
from safescale_lib.measure.costs import Cost
from safescale_lib.measure.intervals import Interval
from safescale_lib.measure.outcomes import Outcome

Outcome("a.b", "m", "rate", Interval(0.5, 0.4, 0.6, 100), cost=Cost(seconds=time.time() % 1000))
"""
    script.write_text(cell)
    assert build.build(script)
    first = script.with_suffix(".ipynb").read_bytes()
    assert not build.build(script)
    assert script.with_suffix(".ipynb").read_bytes() == first
    script.write_text(cell.replace("0.5, 0.4", "0.51, 0.4"))
    assert build.build(script)


def test_prose_is_taken_over_without_running_and_code_is_not(build: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "09_x.py"
    script.write_text("# %% [markdown]\n# Old words\n\n# %%\n1 + 1\n")
    build.build(script)
    script.write_text(script.read_text().replace("Old", "New"))
    assert build.retell(script)
    assert build.drifted(script) is None
    assert nbformat.read(script.with_suffix(".ipynb"), as_version=4).cells[1].outputs
    script.write_text(script.read_text().replace("1 + 1", "1 + 2"))
    with pytest.raises(RuntimeError, match="has to run"):
        build.retell(script)


@pytest.mark.parametrize("bad", ["1 / 0", "import sys; print('x', file=sys.stderr)"])
def test_a_notebook_that_fails_or_complains_is_not_written(build: ModuleType, tmp_path: Path, bad: str) -> None:
    script = tmp_path / "09_x.py"
    script.write_text(f"# %%\n{bad}\n")
    with pytest.raises(Exception, match=r"division|stderr"):
        build.build(script)
    assert not script.with_suffix(".ipynb").exists()


def outcome(value: float, **other: object) -> dict[str, object]:
    base = {"technique": "a", "method": "m", "metric": "rate", "against": None, "seed": 0, "n": 100}
    return {**base, "value": value, "low": 0.4, "high": 0.6, **other}


def test_reproduction_accepts_the_interval_and_nothing_else() -> None:
    committed = [outcome(0.5)]
    assert differences(committed, [outcome(0.59)]) == []
    assert "committed 0.4000 to 0.6000" in differences(committed, [outcome(0.61)])[0]
    assert differences(committed, [])[0].startswith("outcome is gone")
    assert len(differences(committed, [outcome(0.5, method="other")])) == 2
    trained = [{**outcome(0.5), "trained": True}]
    assert differences(trained, [{**outcome(0.69), "trained": True}]) == []
    assert len(differences(trained, [{**outcome(0.71), "trained": True}])) == 1


def test_reproduction_fails_a_cell_under_nbval(build: ModuleType, tmp_path: Path) -> None:
    """The plugin bites: the same notebook passes with its own number and fails with a forged one."""
    import subprocess
    import sys

    script = tmp_path / "09_x.py"
    script.write_text(
        "# %%\nfrom safescale_lib.measure.intervals import Interval\nfrom safescale_lib.measure.outcomes import Outcome\n\n"
        'Outcome("a.b", "m", "rate", Interval(0.5, 0.4, 0.6, 100))\n'
    )
    build.build(script)
    made = script.with_suffix(".ipynb")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.nbval_outcomes", "--nbval-lax", "-p", "no:cacheprovider"]
    root = Path(__file__).parents[2]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, str(made)], cwd=root, capture_output=True, text=True, check=False)

    assert run().returncode == 0
    notebook = nbformat.read(made, as_version=4)
    notebook.cells[0].outputs[0]["data"][OUTCOME_MIME] |= {"value": 0.8, "low": 0.7, "high": 0.9}
    nbformat.write(notebook, made)
    forged = run()
    assert forged.returncode == 1
    assert "committed 0.7000 to 0.9000" in forged.stdout
