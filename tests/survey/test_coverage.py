"""The ledger of committed outcomes, and what counts as running."""

import json

import pytest

from safescale_lib.survey import OUTCOME_MIME, Technique, coverage, outcomes

LEAF, SIBLING = "vfm.vit.adversarial_attack.patch", "vfm.vit.adversarial_attack.attention"
CATEGORY = "vfm.vit.adversarial_attack"


def outcome(technique, **changes):
    cost = {"forwards": 10, "backwards": 10, "queries": 0, "seconds": 0.1}
    numbers = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 100, "control": 0.01, "utility": 0.95}
    return {"technique": technique, "metric": "ASR", **numbers, "against": None, "cost": cost, "seed": 0, **changes}


def bound(key):
    return Technique(key, "fu2022patchfool", "safescale_lib.vfm.imagined", "attack")


def write(folder, *payloads, name="02_imagined.ipynb"):
    """A notebook with one code cell per payload."""
    cells = [{"cell_type": "markdown", "id": "intro", "metadata": {}, "source": "# Title"}]
    for position, payload in enumerate(payloads):
        output = {"output_type": "display_data", "metadata": {}, "data": {"text/plain": "a card", OUTCOME_MIME: payload}}
        stream = {"output_type": "stream", "name": "stdout", "text": "a line"}
        cells.append({"cell_type": "code", "id": f"cell-{position}", "outputs": [stream, output], "execution_count": 1})
    path = folder / name
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def test_the_ledger_says_where_an_outcome_stands(tmp_path):
    path = write(tmp_path, outcome(LEAF), outcome(SIBLING, value=0.7))
    first, second = outcomes(path)
    assert (first.notebook, first.cell, first.technique) == ("02_imagined.ipynb", "cell-0", LEAF)
    assert (second.cell, second.outcome["value"], second.outcome["cost"]["forwards"]) == ("cell-1", 0.7, 10)


def test_the_ledger_reads_what_outcomes_write(tmp_path):
    from safescale_lib.measure import outcomes as written
    from safescale_lib.measure.intervals import rate

    shown = written.Outcome(LEAF, "PGD-20", "robust accuracy", rate([True, False]), control=0.9, seed=0)
    path = write(tmp_path, shown._repr_mimebundle_()[OUTCOME_MIME])
    assert dict(outcomes(path)[0].outcome) == shown.as_json()


def test_an_output_may_hold_a_list_of_outcomes(tmp_path):
    path = write(tmp_path, [outcome(LEAF), outcome(SIBLING)], [])
    assert [(entry.cell, entry.technique) for entry in outcomes(path)] == [("cell-0", LEAF), ("cell-0", SIBLING)]


def test_a_notebook_without_outcomes_has_none(tmp_path):
    assert outcomes(write(tmp_path)) == ()


@pytest.mark.parametrize(
    ("payload", "complaint"),
    [
        ("half", "02_imagined.ipynb, cell cell-0: an outcome must be a JSON object, got str"),
        ([outcome(LEAF), {"technique": LEAF}], "lacks metric, value, low, high"),
    ],
)
def test_a_malformed_outcome_is_refused(tmp_path, payload, complaint):
    with pytest.raises(ValueError, match=complaint):
        outcomes(write(tmp_path, payload))


def test_a_malformed_notebook_is_refused(tmp_path):
    (tmp_path / "broken.ipynb").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.ipynb must be a Jupyter notebook"):
        outcomes(tmp_path / "broken.ipynb")
    with pytest.raises(FileNotFoundError):
        outcomes(tmp_path / "missing.ipynb")


@pytest.mark.parametrize(
    ("functions", "payloads", "runs"),
    [
        ([LEAF], [outcome(LEAF)], True),
        ([LEAF], [], False),  # bound, never run
        ([], [outcome(LEAF)], False),  # an outcome without a function
        ([LEAF], [outcome(SIBLING)], False),  # another leaf's outcome
        ([LEAF], [outcome(CATEGORY)], False),  # a baseline's outcome
        ([CATEGORY], [outcome(LEAF)], False),  # a baseline's function
        ([CATEGORY], [outcome(CATEGORY)], False),  # a baseline runs, no leaf does
    ],
)
def test_a_leaf_runs_with_both_a_function_and_an_outcome(tmp_path, functions, payloads, runs):
    write(tmp_path, *payloads)
    found = coverage(tmp_path, techniques=map(bound, functions))
    assert found.nodes[LEAF].runs is runs
    assert found.count().runs == int(runs)
    for key in ("vfm", "vfm.vit", CATEGORY, LEAF):
        assert found.count(key).runs == int(runs)
    assert found.count("llm").runs == found.count("vfm.sam").runs == 0


def test_counts(tmp_path):
    write(tmp_path, outcome(LEAF), outcome(LEAF, metric="distance"))
    found = coverage(tmp_path, techniques=[bound(LEAF), bound(SIBLING)])
    assert found.count() == (1, 2, 355)
    assert found.count(CATEGORY) == (1, 2, 6)
    assert str(found.count(CATEGORY)) == "1 of 6"
    assert len(found.leaves) == 355
    assert [entry.outcome["metric"] for entry in found.nodes[LEAF].outcomes] == ["ASR", "distance"]


def test_baselines_are_listed_under_their_category(tmp_path):
    write(tmp_path, outcome(CATEGORY), outcome(LEAF))
    found = coverage(tmp_path, techniques=[bound(CATEGORY), bound(LEAF)])
    (baseline,) = found.baselines
    assert (baseline.node.key, baseline.functions, len(baseline.outcomes)) == (CATEGORY, (bound(CATEGORY),), 1)


def test_an_outcome_of_an_unknown_technique_is_refused(tmp_path):
    write(tmp_path, outcome("vfm.vit.adversarial_attack.pach"))
    with pytest.raises(ValueError, match=rf"cell cell-0: unknown technique .*did you mean {LEAF}"):
        coverage(tmp_path, techniques=[])


def test_a_technique_with_an_unknown_key_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown key"):
        coverage(tmp_path, techniques=[bound("vfm.vit.nothing")])


def test_several_notebooks_add_up(tmp_path):
    write(tmp_path, outcome(LEAF), name="02_b.ipynb")
    write(tmp_path, outcome(LEAF), name="01_a.ipynb")
    found = coverage(tmp_path, techniques=[bound(LEAF)])
    assert [entry.notebook for entry in found.nodes[LEAF].outcomes] == ["01_a.ipynb", "02_b.ipynb"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none named 'nowhere'"):
        coverage(tmp_path / "nowhere")


def test_the_committed_notebooks_can_be_read():
    found = coverage()
    assert found.count().leaves == 355
    for entry in found.nodes.values():  # what is measured in the book is bound in the library
        assert not entry.outcomes or entry.functions, entry.node.key
