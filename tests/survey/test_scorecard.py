"""The scorecard: complete, the same bytes each time, and as its schema says."""

import copy
import hashlib
import json
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

from safescale_lib.cli import app
from safescale_lib.survey import Technique, card, coverage, outcomes, scorecard
from safescale_lib.survey.scorecard import as_text, schema

from .test_coverage import CATEGORY, LEAF, SIBLING, outcome, write

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
VALIDATOR = jsonschema.Draft202012Validator(schema())
runner = CliRunner()


@pytest.fixture(scope="module")
def document():
    return scorecard()


def full(technique, **changes):
    """An outcome with all that the library writes."""
    return outcome(technique, method="PGD-20", trained=False, **changes)


def made(folder, *keys):
    bound = [Technique(key, "fu2022patchfool", "safescale_lib.vfm.imagined", "attack") for key in keys]
    return scorecard(folder, covered=coverage(folder, techniques=bound))


def test_the_schema_is_one_and_describes_every_field():
    jsonschema.Draft202012Validator.check_schema(schema())
    undescribed = []

    def walk(part, path):
        for name, field in part.get("properties", {}).items():
            if not field.get("description"):
                undescribed.append(f"{path}.{name}")
            walk(field, f"{path}.{name}")
        if "items" in part:
            walk(part["items"], f"{path}[]")

    walk(schema(), "")
    assert not undescribed


def test_the_committed_notebooks_make_a_valid_document(document):
    VALIDATOR.validate(document)
    assert document["outcomes"]


def test_it_holds_every_outcome_of_the_notebooks_once_and_in_order(document):
    ledger = [entry for path in sorted(NOTEBOOKS.glob("*.ipynb")) for entry in outcomes(path)]
    kept = [{name: entry[name] for name in found.outcome} for entry, found in zip(document["outcomes"], ledger, strict=True)]
    assert kept == [dict(found.outcome) for found in ledger]
    assert [(entry["notebook"], entry["cell"]) for entry in document["outcomes"]] == [(f.notebook, f.cell) for f in ledger]


def test_it_names_its_sources_with_their_checksums(document):
    assert [source["file"] for source in document["notebooks"]] == sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
    for source in document["notebooks"]:
        assert source["sha256"] == hashlib.sha256((NOTEBOOKS / source["file"]).read_bytes()).hexdigest()
    assert sum(source["outcomes"] for source in document["notebooks"]) == len(document["outcomes"])


def test_what_it_says_of_a_technique_is_what_the_atlas_says(tmp_path):
    write(tmp_path, full(LEAF), full(CATEGORY), full("vfm.vit"))
    leaf, category, section = made(tmp_path, LEAF, CATEGORY, "vfm.vit")["outcomes"]
    own = card(LEAF)
    assert (leaf["title"], leaf["level"], leaf["section"]) == ("Patch Attack", "leaf", "2.1 Attacks and Defenses for ViT")
    assert (leaf["side"], leaf["threat"], leaf["tags"]) == (own.side, own.threat, own.tags.as_dict())
    assert leaf["functions"] == ["safescale_lib.vfm.imagined.attack"]
    assert leaf["link"] == "notebooks/02_imagined.html#cell-cell-0"
    assert (category["level"], category["side"]) == ("category", "attack")
    assert (section["level"], section["side"], section["threat"], section["tags"]) == ("section", None, None, None)


def test_outcomes_come_in_the_order_of_the_cells_not_of_the_survey(tmp_path):
    write(tmp_path, full(SIBLING), [full(SIBLING, value=0.45), full(LEAF)])
    document = made(tmp_path, LEAF, SIBLING)
    VALIDATOR.validate(document)
    assert [entry["technique"] for entry in document["outcomes"]] == [SIBLING, SIBLING, LEAF]
    assert [entry["value"] for entry in document["outcomes"]] == [0.5, 0.45, 0.5]


def test_the_same_notebooks_give_the_same_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    texts = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        write(folder, full(LEAF))
        texts.append(as_text(made(folder, LEAF)))
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["outcomes"][0]["technique"] == LEAF
    write(tmp_path / "b", full(LEAF, value=0.55))
    assert as_text(made(tmp_path / "b", LEAF)) != texts[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("value", "0.5"),
        ("n", 0),
        ("n", 1.5),
        ("side", "offense"),
        ("threat", "weather"),
        ("cost", {"forwards": 1}),
        ("tags", {"target": "model", "change": "input", "stage": [], "access": "white-box"}),
        ("level", "chapter"),
        ("unheard_of", 1),
    ],
)
def test_the_schema_refuses_what_is_wrong(tmp_path, field, value):
    write(tmp_path, full(LEAF))
    document = copy.deepcopy(made(tmp_path, LEAF))
    VALIDATOR.validate(document)
    document["outcomes"][0][field] = value
    assert not VALIDATOR.is_valid(document)


def test_the_schema_misses_what_is_missing(tmp_path):
    write(tmp_path, full(LEAF))
    document = made(tmp_path, LEAF)
    for field in list(document["outcomes"][0]):
        spoilt = copy.deepcopy(document)
        del spoilt["outcomes"][0][field]
        assert not VALIDATOR.is_valid(spoilt), field


def test_the_command_prints_and_writes_the_same(tmp_path, document):
    printed = runner.invoke(app, ["scorecard"])
    assert printed.exit_code == 0
    assert json.loads(printed.stdout) == document
    target = tmp_path / "scorecard.json"
    target.write_text("old")
    assert runner.invoke(app, ["scorecard", "--out", str(target)]).exit_code == 0
    assert target.read_text("utf-8") == printed.stdout == as_text(document)
    assert [path.name for path in tmp_path.iterdir()] == ["scorecard.json"]  # nothing left aside


def test_the_command_reads_another_folder(tmp_path):
    write(tmp_path, full(LEAF))
    answer = runner.invoke(app, ["scorecard", "--notebooks", str(tmp_path)])
    assert len(json.loads(answer.stdout)["outcomes"]) == 1


def test_the_command_says_what_is_wrong(tmp_path):
    nowhere = runner.invoke(app, ["scorecard", "--notebooks", str(tmp_path / "nowhere")])
    assert nowhere.exit_code == 1
    assert "none named 'nowhere'" in nowhere.stderr
    write(tmp_path, full(f"{LEAF}s"))
    wrong = runner.invoke(app, ["scorecard", "--notebooks", str(tmp_path)])
    assert wrong.exit_code == 1
    assert "unknown technique" in wrong.stderr
    outside = runner.invoke(app, ["scorecard", "--out", str(tmp_path / "nowhere" / "file.json")])
    assert outside.exit_code == 2
