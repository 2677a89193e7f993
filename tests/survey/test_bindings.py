"""Binding functions to the taxonomy."""

import importlib
import subprocess
import sys

import pytest

from safescale_lib.survey import Technique, bindings, citation_keys, nodes, technique

LEAF, CATEGORY = "vfm.vit.adversarial_attack.patch", "vfm.vit.adversarial_attack"
LATER = "vlm.jailbreak_defense.jailbreak_prevention.blue_team_suffix"
module = importlib.import_module("safescale_lib.survey.bindings")  # the package's attribute of that name is the function


@pytest.fixture
def notes(monkeypatch):
    """Techniques noted during the test, forgotten afterwards; the chapters are imported before, not into it."""
    bindings()
    noted = dict(module._NOTED)
    monkeypatch.setattr(module, "_NOTED", noted)
    return noted


def _in_chapter(name):
    def function():
        """Its docstring."""
        return 42

    function.__module__, function.__qualname__ = "safescale_lib.vfm.imagined", name
    return function


def test_the_function_comes_back_unchanged_but_for_one_attribute(notes):
    function = _in_chapter("patch_fool")
    bound = technique(LEAF, paper="fu2022patchfool")(function)
    assert bound is function
    assert bound() == 42
    assert vars(bound) == {"__technique__": Technique(LEAF, "fu2022patchfool", "safescale_lib.vfm.imagined", "patch_fool")}


def test_bindings_are_in_the_surveys_order_and_repeats_count_once(notes):
    first, second = _in_chapter("first"), _in_chapter("second")
    technique(LATER, paper="zhao2025bluesuffix")(first)
    technique(LEAF, paper="fu2022patchfool")(second)
    technique(CATEGORY, paper="madry2018pgd")(technique(LEAF, paper="navaneet2024slowformer")(first))
    technique(LEAF, paper="fu2022patchfool")(second)
    ours = [(found.name, found.key) for found in bindings() if found.module == "safescale_lib.vfm.imagined"]
    assert ours == [("first", CATEGORY), ("first", LEAF), ("second", LEAF), ("first", LATER)]
    assert first.__technique__.key == CATEGORY


def test_a_chapter_may_bind_a_shared_search_as_it_stands(notes):
    from safescale_lib.search import pixels

    technique(CATEGORY, paper="madry2018pgd")(pixels.pgd)
    assert ("safescale_lib.search.pixels", "pgd", "category") in [(b.module, b.name, b.level) for b in bindings()]


def test_what_notebooks_bind_stays_out(notes):
    @technique(LEAF, paper="fu2022patchfool")
    def mine(): ...

    assert mine.__technique__ not in bindings()


def test_decorating_reads_neither_taxonomy_nor_bibliography(notes):
    nodes.cache_clear()
    citation_keys.cache_clear()
    technique("no.such.key", paper="nobody1999")(_in_chapter("wrong"))
    assert nodes.cache_info().currsize == citation_keys.cache_info().currsize == 0


@pytest.mark.parametrize(
    ("key", "paper", "complaint"),
    [
        (
            "vfm.vit.adversarial_attack.pach",
            "fu2022patchfool",
            f"unknown key 'vfm.vit.adversarial_attack.pach'; did you mean {LEAF}",
        ),
        (LEAF, "fu2022patchfol", "unknown paper 'fu2022patchfol'; did you mean fu2022patchfool"),
        ("vfm", "fu2022patchfool", "is a whole chapter"),
    ],
)
def test_unknown_names_are_reported_with_the_function_and_the_closest(notes, key, paper, complaint):
    technique(key, paper=paper)(_in_chapter("wrong"))
    with pytest.raises(ValueError, match=rf"safescale_lib\.vfm\.imagined\.wrong: .*{complaint}"):
        bindings()


def test_all_faults_are_reported_at_once(notes):
    technique("no.such.key", paper="nobody1999")(_in_chapter("wrong"))
    with pytest.raises(ValueError, match=r"(?s)unknown key 'no.such.key'.*unknown paper 'nobody1999'"):
        bindings()


@pytest.mark.parametrize("arguments", [{"key": "", "paper": "x"}, {"key": LEAF, "paper": ""}, {"key": None, "paper": "x"}])
def test_empty_names_are_refused_at_once(arguments):
    with pytest.raises(TypeError, match="must be a non-empty string"):
        technique(arguments["key"], paper=arguments["paper"])


def test_every_technique_of_the_library_is_bound_rightly():
    for bound in bindings():
        assert bound.function.__technique__.module == bound.module
        assert bound.function.__doc__, f"{bound.module}.{bound.name} needs a docstring"


def test_importing_the_survey_reads_and_imports_nothing_heavy():
    script = (
        "import sys, safescale_lib, safescale_lib.survey as survey;"
        "heavy = {'torch', 'numpy', 'yaml', 'transformers', 'pybtex', 'nbformat'} & set(sys.modules);"
        "assert not heavy, heavy; assert survey.nodes.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
