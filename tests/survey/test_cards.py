"""The cards of the atlas: complete, on the axes, in step with the taxonomy; and what a mistake in them says."""

import copy
import importlib
import re
from importlib.resources import files

import pytest
import yaml

from safescale_lib.survey import (
    AXES,
    SIDES,
    THREATS,
    Technique,
    card,
    cards,
    chapters,
    coverage,
    leaves,
    nearest_running,
    node,
    traits,
)
from safescale_lib.survey.cards import Card, read_cards

from .test_coverage import outcome, write

LEAF = "vfm.vit.adversarial_attack.patch"
CATEGORY = "vfm.vit.adversarial_attack"


@pytest.fixture(scope="module")
def loaded():
    folder = files("safescale_lib.survey").joinpath("data", "cards")
    return {c.key: yaml.safe_load(folder.joinpath(f"{c.key}.yml").read_text(encoding="utf-8")) for c in chapters()}


@pytest.fixture
def data(loaded):
    """The shipped entries, to be spoilt."""
    return copy.deepcopy(loaded)


def test_every_leaf_has_a_card_in_the_surveys_order():
    assert list(cards()) == [leaf.key for leaf in leaves()]
    assert all(found.node == node(key) for key, found in cards().items())


def test_every_word_is_on_its_axis():
    for found in cards().values():
        assert found.side in SIDES
        assert found.threat in THREATS
        for axis, known in AXES.items():
            values = found.tags.on(axis)
            assert values
            assert list(values) == [value for value in known.values if value in values], found.node.key


def test_every_axis_has_something_at_each_of_its_values():
    for axis, known in AXES.items():
        assert {value for found in cards().values() for value in found.tags.on(axis)} == set(known.values)
    assert {found.side for found in cards().values()} == set(SIDES)
    assert {found.threat for found in cards().values()} == set(THREATS)
    for value in (*SIDES.values(), *THREATS.values(), *(value for axis in AXES.values() for value in axis.values.values())):
        assert value.meaning.endswith(".")


def test_a_card_says_what_its_technique_does_in_a_sentence_or_two():
    for found in cards().values():
        words = len(found.what.split())
        assert 15 <= words <= 60, f"{found.node.key}: {words} words"
        for text in (found.what, found.goal, found.budget):
            assert re.match(r"[A-Z0-9].*[.?]$", text.strip(), re.DOTALL), f"{found.node.key}: {text}"
    assert len({found.what for found in cards().values()}) == len(cards())


def test_papers_are_the_surveys():
    assert [paper.id for paper in card(LEAF).papers] == list(node(LEAF).exemplars)
    assert all(found.papers for found in cards().values())


def test_the_side_agrees_with_the_sections_name():
    """A section of attacks may list a benchmark, and dm one defense that is an attack turned round; never the reverse."""
    other = {}
    for key, found in cards().items():
        named = key.split(".")[1].rpartition("_")[2]
        if named in SIDES and "attack_defense" not in key and found.side != named:
            other[key] = (named, found.side)
    defense = other.pop("dm.adversarial_attack.editing_and_animation.protective_perturbation")
    assert defense == ("attack", "defense")
    assert set(other.values()) == {("attack", "benchmark")}


def test_a_leaf_takes_its_categorys_words_and_may_differ(data):
    assert card(LEAF).goal == traits(CATEGORY).goal
    data["vfm"][LEAF] |= {
        "side": "benchmark",
        "goal": "Another goal.",
        "tags": {"access": "white-box", "stage": ["deployment", "fine-tuning"]},
    }
    found = read_cards(data)
    assert isinstance(found[LEAF], Card)
    assert (found[LEAF].side, found[LEAF].goal) == ("benchmark", "Another goal.")
    assert found[LEAF].tags.stage == ("fine-tuning", "deployment")  # in the order of a model's life
    assert found[LEAF].budget == found[CATEGORY].budget
    assert found[CATEGORY].side == "attack"


def test_sections_have_no_traits_of_their_own():
    assert traits("vfm.vit") is None
    assert traits(LEAF) is card(LEAF)
    with pytest.raises(ValueError, match="key must be in the taxonomy"):
        traits("vfm.nothing")
    with pytest.raises(ValueError, match=rf"key must be a leaf of the taxonomy, got '{CATEGORY}.pach'; did you mean {LEAF}"):
        card(f"{CATEGORY}.pach")


def test_cards_cannot_be_changed():
    with pytest.raises(TypeError):
        cards()["new"] = None
    with pytest.raises(AttributeError):
        card(LEAF).side = "defense"


SPOILT = {
    "missing": (lambda vfm: vfm.pop(LEAF), rf"^{LEAF}: no entry$"),
    "unknown": (lambda vfm: vfm.update({f"{LEAF}s": {}}), rf"^{LEAF}s: not in chapter vfm; did you mean {LEAF}"),
    "field": (lambda vfm: vfm[LEAF].update(goals="x"), rf"^{LEAF}: unknown field 'goals'; did you mean goal"),
    "category says what": (lambda vfm: vfm[CATEGORY].update(what="x"), rf"^{CATEGORY}: unknown field 'what'"),
    "nothing said": (lambda vfm: vfm[LEAF].update(what=" "), rf"^{LEAF}: what must be a text, got ' '$"),
    "not a mapping": (lambda vfm: vfm.update({LEAF: "text"}), rf"^{LEAF}: must be a mapping, got str$"),
    "side": (
        lambda vfm: vfm[LEAF].update(side="offense"),
        rf"^{LEAF}: side must be one of attack, defense, benchmark, got 'offense'$",
    ),
    "threat": (lambda vfm: vfm[CATEGORY].update(threat=["agent"]), rf"^{CATEGORY}: threat must be one of .*, got \['agent'\]$"),
    "tag": (lambda vfm: vfm[LEAF].update(tags={"acces": "white-box"}), rf"^{LEAF}: unknown tag 'acces'; did you mean access"),
    "tag value": (
        lambda vfm: vfm[LEAF].update(tags={"change": "weights"}),
        rf"^{LEAF}: tag change must be one of none, input, model, got 'weights'",
    ),
    "tags": (lambda vfm: vfm[LEAF].update(tags=["model"]), rf"^{LEAF}: tags must be a mapping, got list$"),
    "stage": (
        lambda vfm: vfm[LEAF].update(tags={"stage": "deployment"}),
        rf"^{LEAF}: tag stage must be a list .*, got 'deployment'$",
    ),
    "no stage": (lambda vfm: vfm[LEAF].update(tags={"stage": []}), rf"^{LEAF}: tag stage must be a list .*, got \[\]$"),
    "stage twice": (
        lambda vfm: vfm[LEAF].update(tags={"stage": ["deployment"] * 2}),
        rf"^{LEAF}: tag stage must be a list .* each once",
    ),
    "access": (
        lambda vfm: vfm[LEAF].update(tags={"access": "black-box"}),
        rf"^{LEAF}: tag access must be white-box, as the taxonomy says white-box; got 'black-box'$",
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_mistake_is_named_with_its_key(data, fault):
    spoil, complaint = SPOILT[fault]
    spoil(data["vfm"])
    with pytest.raises(ValueError, match=re.compile(complaint, re.MULTILINE)) as raised:
        read_cards(data)
    assert len(str(raised.value).splitlines()) == 1  # a category's mistake is not repeated for its leaves


def test_all_mistakes_are_named_at_once(data):
    del data["llm"]
    data["vfm"].pop(LEAF)
    with pytest.raises(ValueError, match=rf"(?s){LEAF}: no entry.*llm: must be a mapping from keys to entries, got NoneType"):
        read_cards(data)


def test_transfer_means_black_box():
    asked = [leaf.key for leaf in leaves() if leaf.access == "transfer"]
    assert asked
    assert {card(key).tags.access for key in asked} == {"black-box"}


# --- the nearest running relative ---------------------------------------------------------------------------------


def running(folder, *keys):
    write(folder, *map(outcome, keys))
    return coverage(
        folder, techniques=[Technique(key, "fu2022patchfool", "safescale_lib.vfm.imagined", "attack") for key in keys]
    )


SIBLING = "vfm.vit.adversarial_attack.attention"
STRANGER = "llm.adversarial_attack.white_box.gradient_based"


def test_the_relatives_are_what_the_tests_below_take_them_for():
    assert {card(key).threat for key in (LEAF, SIBLING, STRANGER)} == {"adversarial"}
    assert card("vfm.vit.adversarial_defense.adversarial_training").side == "defense"
    assert card("vfm.vit.backdoor_attack.patch_level_trigger").threat == "backdoor"


@pytest.mark.parametrize(
    ("candidates", "nearest"),
    [
        ([], None),
        (["vfm.vit.backdoor_attack.patch_level_trigger"], None),  # another threat never counts
        (["vfm.vit.adversarial_defense.adversarial_training"], "vfm.vit.adversarial_defense.adversarial_training"),
        (["vfm.vit.adversarial_defense.adversarial_training", STRANGER], STRANGER),  # the same side before the same family
        ([STRANGER, "vfm.sam.adversarial_attack.prompt_specific"], "vfm.sam.adversarial_attack.prompt_specific"),
        (["vfm.sam.adversarial_attack.prompt_specific", SIBLING], SIBLING),  # the longer shared path
        (["vfm.vit.adversarial_attack.token", SIBLING], SIBLING),  # the survey's order
        ([LEAF, STRANGER], STRANGER),  # a leaf is not its own relative
    ],
)
def test_the_nearest_running_relative(tmp_path, candidates, nearest):
    found = nearest_running(LEAF, running(tmp_path, *candidates))
    assert (found and found.node.key) == nearest


def test_what_is_bound_but_never_ran_is_no_relative(tmp_path):
    write(tmp_path)
    covered = coverage(tmp_path, techniques=[Technique(SIBLING, "fu2022patchfool", "safescale_lib.vfm.imagined", "attack")])
    assert nearest_running(LEAF, covered) is None


def test_the_files_ship_with_the_package():
    import tomllib
    from pathlib import Path

    shipped = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"][
        "package-data"
    ]
    assert "survey/data/cards/*" in shipped["safescale_lib"]
    assert importlib.import_module("safescale_lib.survey.cards").cards is cards
