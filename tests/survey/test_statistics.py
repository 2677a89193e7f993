"""The survey's printed statistics, and the list of datasets, as loaded, against their files."""

from importlib.resources import files

import pytest
import yaml

from safescale_lib.survey import THREAT_TITLES, chapters, citation_keys, datasets, papers, printed


def test_every_printed_share_is_a_whole_number_of_papers():
    """So that counting back from the share loses nothing: the count gives the printed share to its last digit."""
    data = yaml.safe_load(files("safescale_lib.survey").joinpath("data/printed_statistics.yml").read_text(encoding="utf-8"))
    found = printed()
    shares = {**data["families"], **{(row["threat"], row["side"]): row["share"] for row in data["threats"]}}
    counts = {**found.families, **found.threats}
    assert set(shares) == set(counts)
    for key, share in shares.items():
        assert 100 * counts[key] / found.total == pytest.approx(share, abs=0.00801), (
            key
        )  # the printed rounding, and a last digit


def test_the_printed_counts_add_up_three_times():
    found = printed()
    assert found.total == 390
    assert sum(found.families.values()) == sum(found.threats.values()) == sum(found.years.values()) == found.total


def test_printed_speaks_the_words_of_the_paper_list():
    found = printed()
    assert set(found.families) == {chapter.key for chapter in chapters()}
    assert {threat for threat, _ in found.threats} == {p.threat for p in papers().values()} - {"agent"}
    assert set(found.threats) <= {(p.threat, p.side) for p in papers().values()}
    assert set(THREAT_TITLES) == {p.threat for p in papers().values()}
    assert found.cite in citation_keys()


def test_datasets_come_family_by_family_each_name_once():
    order = [chapter.key for chapter in chapters()]
    places = [order.index(entry.family) for entry in datasets()]
    assert places == sorted(places)
    names = [(entry.family, entry.name) for entry in datasets()]
    assert len(names) == len(set(names))


def test_datasets_are_whole():
    assert len(datasets()) == 142
    for entry in datasets():
        assert entry.name
        assert entry.task
        assert entry.note
        assert 1990 < entry.year < 2030
