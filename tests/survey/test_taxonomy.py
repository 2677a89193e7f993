"""The taxonomy and the papers, as loaded, against the files they come from."""

from collections import Counter
from importlib.resources import files

import pytest
from pybtex.database import parse_string

from safescale_lib.survey import chapters, citation_keys, leaves, node, nodes, paper, papers
from safescale_lib.survey.papers import BIBLIOGRAPHIES

LEVELS = ("chapter", "section", "category", "leaf")


def _bibliography(name):
    return parse_string(files("safescale_lib.survey").joinpath("data", name).read_text(encoding="utf-8"), "bibtex").entries


def test_counts():
    assert [chapter.key for chapter in chapters()] == ["vfm", "llm", "vlp", "vlm", "dm", "agent"]
    assert Counter(found.level for found in nodes().values()) == {"chapter": 6, "section": 48, "category": 106, "leaf": 355}
    assert len(leaves()) == 355 == sum(len(chapter.leaves()) for chapter in chapters())
    assert len(papers()) == 561


def test_no_two_nodes_share_a_key():
    assert len(nodes()) == sum(1 for chapter in chapters() for _ in chapter.walk())


def test_a_key_spells_its_path():
    for found in nodes().values():
        assert found.path[-1] == found.key
        assert [node(key).level for key in found.path] == list(LEVELS[: len(found.path)])
        if len(found.path) > 1:
            assert found in node(found.path[-2]).children


def test_section_numbers_are_strings_in_the_surveys_order():
    numbers = [section.number for chapter in chapters() for section in chapter.children]
    assert all(isinstance(number, str) for number in numbers)
    assert numbers == sorted(numbers, key=lambda number: [int(part) for part in number.split(".")])
    assert {"3.1", "3.10", "7.1", "7.10"} <= set(numbers)
    assert {entry.section for entry in papers().values()} <= set(numbers)


def test_leaves_come_in_the_surveys_order():
    assert leaves()[0].key == "vfm.vit.adversarial_attack.patch"
    order = {key: position for position, key in enumerate(nodes())}
    assert [order[leaf.key] for leaf in leaves()] == sorted(order[leaf.key] for leaf in leaves())
    assert node("vfm.vit.adversarial_attack.patch").leaves() == (leaves()[0],)


def test_every_exemplar_is_listed_and_can_be_cited():
    for leaf in leaves():
        assert leaf.exemplars, leaf.key
        for exemplar in leaf.exemplars:
            assert paper(exemplar).id == exemplar
            assert exemplar in citation_keys()


def test_papers_carry_typed_facts():
    first = paper("fu2022patchfool")
    assert (first.year, first.section, first.family, first.venue) == (2022, "2.1", "vfm", "ICLR")
    assert all(isinstance(entry.year, int) and entry.title for entry in papers().values())


def test_citation_keys_are_what_a_bibtex_parser_reads():
    survey, ours = (set(_bibliography(name)) for name in BIBLIOGRAPHIES)
    assert survey == set(papers())
    assert not survey & ours
    assert citation_keys() == survey | ours
    assert {"goodfellow2015fgsm", "madry2018pgd", "wilson1927", "ma2025safety"} <= citation_keys()


@pytest.mark.parametrize("name", BIBLIOGRAPHIES)
def test_every_entry_can_be_printed(name):
    from pybtex.errors import capture
    from pybtex.plugin import find_plugin

    entries = _bibliography(name)
    with capture() as complaints:
        printed = list(find_plugin("pybtex.style.formatting", "unsrt")().format_entries(entries.values()))
    assert len(printed) == len(entries)
    assert not complaints
    for entry in entries.values():
        assert entry.persons["author"], entry.key
        assert 1900 < int(entry.fields["year"]) <= 2026, entry.key


@pytest.mark.parametrize(
    ("look_up", "wrong", "right"),
    [
        (node, "vfm.vit.adversarial_attack.pach", "vfm.vit.adversarial_attack.patch"),
        (paper, "fu2022patchfol", "fu2022patchfool"),
    ],
)
def test_an_unknown_name_lists_the_closest(look_up, wrong, right):
    with pytest.raises(ValueError, match=f"got '{wrong}'; did you mean {right}"):
        look_up(wrong)
    with pytest.raises(ValueError, match=r"got 'zzzzzz'$"):
        look_up("zzzzzz")


def test_loaded_data_cannot_be_changed():
    with pytest.raises(TypeError):
        nodes()["new"] = None
    with pytest.raises(AttributeError):
        leaves()[0].title = "other"
