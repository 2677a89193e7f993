"""What a notebook's run costs, as `notebooks/build.py` writes it down."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

HERE = Path(__file__).parents[2] / "notebooks"
SCRIPT = """# %% [markdown]
# # Title

# %%
import time

time.sleep(0.3)

# %%

# %%
block = b"x" * 150_000_000
len(block)
"""


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build", HERE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_writes_down_its_costs(build: ModuleType, tmp_path: Path) -> None:
    script, measured = tmp_path / "09_x.py", tmp_path / "measured" / "09_x.json"
    script.write_text(SCRIPT)
    assert build.build(script)
    costs = json.loads(measured.read_text("utf-8"))
    slept, empty, filled = costs["cell_seconds"]
    assert 0.3 <= slept < 5
    assert empty == 0
    assert filled > 0
    assert costs["seconds"] == pytest.approx(sum(costs["cell_seconds"]), abs=0.06)
    assert costs["peak_mib"] is None or 143 < costs["peak_mib"] < 1000
    assert "Python 3.11" in costs["machine"]
    assert "torch" in costs["machine"]
    made = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert [cell.cell_type for cell in made.cells] == ["markdown", "code", "code", "code"]
    assert "resource" not in made.cells[-1].source

    measured.write_text("kept")  # nothing moved, so the notebook stays, and with it what was measured
    assert not build.build(script)
    assert measured.read_text() == "kept"
    measured.unlink()
    assert not build.build(script)
    assert len(json.loads(measured.read_text("utf-8"))["cell_seconds"]) == 3


def test_words_alone_are_not_measured(build: ModuleType, tmp_path: Path) -> None:
    script, measured = tmp_path / "09_x.py", tmp_path / "measured" / "09_x.json"
    script.write_text("# %% [markdown]\n# # Title\n\n# %%\n1 + 1\n")
    build.build(script)
    first = measured.read_bytes()
    script.write_text(script.read_text().replace("Title", "Other"))
    assert build.retell(script)
    assert measured.read_bytes() == first


def test_a_run_that_fails_leaves_no_costs(build: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "09_x.py"
    script.write_text("# %%\n1 / 0\n")
    with pytest.raises(Exception, match="division"):
        build.build(script)
    assert not (tmp_path / "measured").exists()


@pytest.mark.parametrize("path", sorted(HERE.glob("measured/*.json")), ids=lambda path: path.stem)
def test_the_committed_costs_name_no_machine(path: Path) -> None:
    costs = json.loads(path.read_text("utf-8"))
    assert set(costs) == {"machine", "seconds", "peak_mib", "cell_seconds"}
    assert "/" not in costs["machine"]
    assert (HERE / f"{path.stem}.ipynb").exists()
