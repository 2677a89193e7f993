"""Make the committed notebooks from their percent scripts: `python notebooks/build.py [--check | --text] [STEM ...]`.

The .py file beside a notebook is its source. This script turns it into a notebook, runs it from top to bottom in a
fresh kernel, and writes the .ipynb with its outputs. It is careful in three ways. Cell ids and metadata are fixed, so
that a second run gives the same bytes. Seconds are the one thing allowed to differ: if nothing else moved, the
committed file stays as it is. And a notebook that fails, or writes to stderr, is not written at all.

What a run cost - seconds of every cell, the kernel's peak memory - goes to measured/STEM.json beside the notebook, and
from there to the book's page of execution times. To measure again although nothing moved, delete that file first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from safescale_lib.figures import FIGURE_MIME
from safescale_lib.measure import OUTCOME_MIME

HERE = Path(__file__).parent
CELL_SECONDS = 240
PEAK_MEMORY = """
import sys
from pathlib import Path

status = Path("/proc/self/status")
if status.exists():  # not ru_maxrss: on Linux it begins with the size of the process that started this one
    print(int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024)
elif sys.platform == "darwin":
    import resource

    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
else:  # Windows keeps no such number where Python reads it
    print(0)
"""


def from_source(script: Path) -> nbformat.NotebookNode:
    """The notebook a percent script describes, without outputs, with ids that depend on position alone."""
    notebook = jupytext.read(script, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell["source"] = cell["source"].strip("\n")
        cell["id"] = f"{script.stem.replace('_', '-')[:40]}-{number:03d}"
    notebook.metadata = nbformat.from_dict(
        {
            "jupytext": {"formats": "ipynb,py:percent"},
            "kernelspec": {
                "display_name": "Python 3",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def execute(notebook: nbformat.NotebookNode, label: str) -> dict[str, Any]:
    """Run every cell in place, with a bar over the cells, and say what it cost.

    One thread: the last bits of sums depend on their number. The last cell asks for the memory and does not stay.
    """
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
    }
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    probe = nbformat.v4.new_code_cell(PEAK_MEMORY)
    begun: dict[int, float] = {}
    took: dict[int, float] = {}
    columns = (
        *Progress.get_default_columns()[:-1],
        TimeElapsedColumn(),
        TextColumn("{task.completed}/{task.total} cells"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(label, total=len(code))

        def after(cell_index: int, **_: Any) -> None:
            took[cell_index] = time.perf_counter() - begun[cell_index]
            bar.update(task, completed=min(len(took), len(code)))

        notebook.cells.append(probe)
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": str(HERE)}},
            on_cell_execute=lambda cell_index, **_: begun.update(
                {cell_index: time.perf_counter()}
            ),
            on_cell_executed=after,
        )
        client.execute()
    notebook.cells.pop()
    seconds = [
        round(took.get(place, 0.0), 3)  # an empty cell does not run
        for place, cell in enumerate(notebook.cells)
        if cell.cell_type == "code"
    ]
    peak = int(probe.outputs[0].text)
    return {
        "machine": machine(),
        "seconds": round(sum(seconds), 1),
        "peak_mib": round(peak / 2**20) or None,
        "cell_seconds": seconds,
    }


def machine() -> str:
    """Where a notebook ran, in words: nothing that names the machine itself."""
    cores = os.cpu_count()
    system = f"{platform.system()} on {platform.machine()}"
    return (
        f"{cores} processor cores, one thread, no GPU; {system}; "
        f"Python {platform.python_version()}, torch {version('torch')}"
    )


def finish(notebook: nbformat.NotebookNode) -> None:
    """Keep what belongs in the repository: no stray metadata; a figure's texts where the site looks for them."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                raise RuntimeError(
                    f"cell {cell.id} wrote to stderr: {output.text[:500]}"
                )
            texts = output.get("data", {}).pop(FIGURE_MIME, None)
            if texts:
                figure = {"caption": texts["caption"], "name": texts["name"]}
                cell.metadata["mystnb"] = {
                    "image": {"alt": texts["alt"]},
                    "figure": figure,
                }
    nbformat.validate(notebook)


def without_seconds(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """The notebook with the wall-clock seconds of its outcomes blanked, for comparing two runs."""
    plain: dict[str, Any] = json.loads(nbformat.writes(notebook))
    for cell in plain["cells"]:
        for output in cell.get("outputs", []):
            carried = output.get("data", {}).get(OUTCOME_MIME, [])
            for outcome in carried if isinstance(carried, list) else [carried]:
                outcome["cost"]["seconds"] = 0.0
    return plain


def build(script: Path) -> bool:
    """Run one script and write its notebook if anything but seconds moved; says whether it was written."""
    target = script.with_suffix(".ipynb")
    notebook = from_source(script)
    costs = execute(notebook, script.stem)
    finish(notebook)
    written = _write(notebook, target)
    measured = script.parent / "measured" / f"{script.stem}.json"
    if written or not measured.exists():
        measured.parent.mkdir(exist_ok=True)
        aside = measured.with_suffix(".partial")
        aside.write_text(json.dumps(costs) + "\n", encoding="utf-8")
        os.replace(aside, measured)
    return written


def _write(notebook: nbformat.NotebookNode, target: Path) -> bool:
    if target.exists() and without_seconds(
        nbformat.read(target, as_version=4)
    ) == without_seconds(notebook):
        return False
    aside = target.with_suffix(".partial")
    nbformat.write(notebook, aside)
    os.replace(aside, target)
    return True


def retell(script: Path) -> bool:
    """Take over changed prose without running anything; refuses if a code cell changed. Says whether it was written."""
    target = script.with_suffix(".ipynb")
    notebook, made = from_source(script), nbformat.read(target, as_version=4)
    new, old = (
        [cell for cell in book.cells if cell.cell_type == "code"]
        for book in (notebook, made)
    )
    if [cell.source for cell in new] != [cell.source for cell in old]:
        raise RuntimeError("code changed, so the notebook has to run: leave out --text")
    notebook.metadata = made.metadata
    for fresh, run in zip(new, old, strict=True):
        fresh.update(outputs=run.outputs, execution_count=run.execution_count)
        fresh.metadata = (
            run.metadata | fresh.metadata
        )  # a figure's texts come from its run, tags from the script
    return _write(notebook, target)


def drifted(script: Path) -> str | None:
    """Why a committed notebook no longer matches its script, or None."""
    target = script.with_suffix(".ipynb")
    if not target.exists():
        return f"{target.name} has not been made"
    made, wanted = nbformat.read(target, as_version=4).cells, from_source(script).cells
    if [(c.cell_type, c.source, c.id) for c in made] != [
        (c.cell_type, c.source, c.id) for c in wanted
    ]:
        return f"{target.name} was made from an older {script.name}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "stems",
        nargs="*",
        help="notebooks to make, by file name without ending; all if left out",
    )
    parser.add_argument(
        "--text",
        action="store_true",
        help="take over changed prose without running the code",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only say which notebooks have drifted from their scripts",
    )
    arguments = parser.parse_args()
    scripts = sorted(
        path
        for path in HERE.glob("[0-9]*.py")
        if not arguments.stems or path.stem in arguments.stems
    )
    missing = set(arguments.stems) - {path.stem for path in scripts}
    if missing or not scripts:
        parser.error(f"no such notebook: {', '.join(sorted(missing)) or 'none found'}")
    if arguments.check:
        faults = [fault for script in scripts if (fault := drifted(script))]
        print("\n".join(faults) or "every notebook matches its script")
        return bool(faults)
    for script in scripts:
        start = time.perf_counter()
        try:
            written = retell(script) if arguments.text else build(script)
        except (CellExecutionError, RuntimeError) as error:
            print(f"{script.stem}: {error}", file=sys.stderr)
            return 1
        print(
            f"{script.stem}: {time.perf_counter() - start:.0f} s, {'written' if written else 'unchanged'}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
