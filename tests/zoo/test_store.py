"""The shelf: what is damaged, truncated, swapped or missing is refused, and the message says how to mend it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from safescale_lib import zoo
from safescale_lib.zoo import store

WEIGHTS = "model.safetensors"


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A copy of the shipped shelf that a test may break."""
    copy = tmp_path / "zoo"
    copy.mkdir()
    shutil.copy(store.SHELF / store.MANIFEST, copy)
    shutil.copytree(store.SHELF / "weights", copy / "weights")
    return copy


@pytest.mark.parametrize("name", store.names())
def test_shipped_members_are_what_the_manifest_says(name: str) -> None:
    directory = store.check(name)
    present = {path.name for path in directory.iterdir()}
    assert {"config.json", "card.json"} <= present
    assert present & {"preprocessor_config.json", "scheduler_config.json", "tokenizer.json"}
    listed = json.loads((store.SHELF / store.MANIFEST).read_text())[name]
    assert present == {*listed, "README.md"}  # whatever is read is checked
    assert len([file for file in present if file.endswith(".safetensors")]) == 1
    assert not [path for path in directory.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]


def test_the_zoo_keeps_to_its_size() -> None:
    assert sum(path.stat().st_size for path in store.SHELF.rglob("*.safetensors")) <= 19_000_000


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "one bit flipped": (lambda d: _flip(d / WEIGHTS), "sha256"),
    "truncated": (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-7]), "bytes"),
    "missing": (lambda d: (d / WEIGHTS).unlink(), "missing"),
    "swapped with another member": (lambda d: shutil.copy(d.parent / "vit-robust" / WEIGHTS, d / WEIGHTS), "another model"),
    "configuration edited": (lambda d: (d / "config.json").write_text("{}"), "bytes"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_files_are_refused_with_the_command_that_mends_them(shelf: Path, damage: str) -> None:
    harm, word = DAMAGE[damage]
    harm(shelf / "weights" / "vit")
    with pytest.raises(store.ZooError, match=word) as refused:
        store.check("vit", shelf)
    assert "git checkout" in str(refused.value)
    assert "safescale zoo train vit" in str(refused.value)
    store.check("vit-robust", shelf)  # the other member is not concerned


def test_load_refuses_damage_before_reading_it(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _flip(shelf / "weights" / "vit" / WEIGHTS)
    monkeypatch.setattr(store.check, "__defaults__", (shelf,))
    monkeypatch.setattr("safescale_lib.zoo.adapter.load_classifier", lambda *a, **k: pytest.fail("read a damaged file"))
    with pytest.raises(zoo.ZooError):
        zoo.load("vit")


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"vit.*got 'resnet'"):
        zoo.load("resnet")


def test_shelving_replaces_the_whole_member_and_its_entry(shelf: Path) -> None:
    before = json.loads((shelf / store.MANIFEST).read_text())
    with store.staging(shelf) as staged:
        new = staged / "vit"
        shutil.copytree(shelf / "weights" / "vit", new)
        (new / "config.json").write_text('{"new": true}')
        (new / "preprocessor_config.json").unlink()
        store.shelve("vit", new, shelf)
    after = json.loads((shelf / store.MANIFEST).read_text())
    assert after["vit-robust"] == before["vit-robust"]
    assert "preprocessor_config.json" not in after["vit"]
    assert (store.check("vit", shelf) / "config.json").read_text() == '{"new": true}'
    assert {path.name for path in shelf.iterdir()} == {store.MANIFEST, "weights"}
    assert {path.name for path in (shelf / "weights").iterdir()} == set(store.names(shelf))


def test_a_failed_staging_leaves_nothing_behind(shelf: Path) -> None:
    def interrupted() -> None:
        with store.staging(shelf) as staged:
            (staged / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {path.name for path in shelf.iterdir()} == {store.MANIFEST, "weights"}


@pytest.mark.parametrize("name", store.names())
def test_cards_say_what_a_reader_needs(name: str) -> None:
    card = zoo.card(name)
    wanted = {"title", "summary", "architecture", "parameters", "bytes", "data", "recipe", "seconds", "machine", "seed"}
    assert wanted | {"intended_use", "limits", "metrics"} <= card.keys()
    (weights,) = store.folder(name).glob("*.safetensors")
    assert card["bytes"] == weights.stat().st_size
    assert card["metrics"][0]["n"] >= 500  # the headline
    for metric in card["metrics"]:
        assert 0 <= metric["low"] <= metric["value"] <= metric["high"]
        assert metric["high"] <= (255 if "grey levels" in metric["metric"] else 1)
        assert metric["n"] >= 200
