"""The command line: answers, and errors that say what would be right."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from safescale_lib import __version__
from safescale_lib.cli import app
from safescale_lib.zoo import store

runner = CliRunner(env={"COLUMNS": "200"})


def test_version() -> None:
    assert runner.invoke(app, ["--version"]).output.strip() == __version__


def test_list_names_every_member_without_torch() -> None:
    calls = "from safescale_lib.cli import app; app(['zoo', 'list'], standalone_mode=False)"
    code = f"import sys; {calls}; assert 'torch' not in sys.modules"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in answer.stdout for name in store.names())


@pytest.mark.parametrize("name", store.names())
def test_show_prints_the_card(name: str) -> None:
    answer = runner.invoke(app, ["zoo", "show", name])
    assert answer.exit_code == 0
    assert store.card(name)["title"] in answer.output
    assert "Test metrics" in answer.output


@pytest.mark.parametrize("command", ["show", "verify", "train"])
def test_unknown_members_are_refused(command: str) -> None:
    answer = runner.invoke(app, ["zoo", command, "resnet"])
    assert answer.exit_code == 2
    assert "vit" in answer.output


def test_quick_verification_of_what_ships() -> None:
    answer = runner.invoke(app, ["zoo", "verify", "--quick"])
    assert answer.exit_code == 0
    assert answer.output.count("files as listed") == len(store.names())


def test_verify_measures_again_and_agrees_with_the_card() -> None:
    answer = runner.invoke(app, ["zoo", "verify", "vit"])
    assert answer.exit_code == 0, answer.output


def test_a_metric_that_the_card_lacks_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"metric": "courage", "value": 0.5, "low": 0.4, "high": 0.6, "n": 100}
    monkeypatch.setattr("safescale_lib.zoo.recipes.measure", lambda name, model: [row])
    answer = runner.invoke(app, ["zoo", "verify", "vit"])
    assert answer.exit_code == 1
    assert "not listed" in answer.output
    assert "courage is not on the card" in answer.output


def test_verify_reports_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(name: str) -> None:
        raise store.ZooError(f"{name}: config.json is missing")

    monkeypatch.setattr(store, "check", damaged)
    answer = runner.invoke(app, ["zoo", "verify", "--quick"])
    assert answer.exit_code == 1
    assert "is missing" in answer.output
