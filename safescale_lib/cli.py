"""The `safescale` command."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from safescale_lib import __version__
from safescale_lib.zoo import store

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Safety at Scale: the hands-on companion.")
zoo = typer.Typer(no_args_is_help=True, help="The small models that ship with the book.")
app.add_typer(zoo, name="zoo")

Name = Annotated[str, typer.Argument(metavar="NAME", help="A member, as `safescale zoo list` names it.")]


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """What `safescale` does before, or without, a subcommand."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads crawl on a busy machine
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def scorecard(
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write there; print if left out.")] = None,
    notebooks: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Of the notebooks; the clone's own if left out.")
    ] = None,
) -> None:
    """Every outcome of the notebooks as one JSON document."""
    from safescale_lib.survey.scorecard import as_text, scorecard

    try:
        text = as_text(scorecard(notebooks))
    except (OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    if out is None:
        typer.echo(text, nl=False)
        return
    if not out.parent.is_dir():
        raise typer.BadParameter(f"must lie in a folder that exists, got {out}", param_hint="--out")
    aside = out.with_name(f".{out.name}.new")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, out)


@zoo.command("list")
def list_members() -> None:
    """Name, size and clean accuracy of every member."""
    name_column = Column("name", no_wrap=True)  # it is what one types
    table = Table(name_column, "title", "parameters", "MB", "seconds to train", "first test metric")
    for name in store.names():
        card = store.card(name)
        table.add_row(
            name,
            card["title"],
            f"{card['parameters']:,}",
            f"{card['bytes'] / 1e6:.2f}",
            f"{card['seconds']:,}",
            f"{card['metrics'][0]['metric']} {_value(card['metrics'][0])}",
        )
    Console().print(table)


@zoo.command()
def show(name: Name) -> None:
    """Print a member's card: data, recipe, seconds, test metrics with intervals."""
    from rich.markdown import Markdown

    directory = _member(name)
    Console().print(Markdown((directory / "README.md").read_text().split("---\n", 2)[2]))


@zoo.command()
def verify(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One member; all of them if left out.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Checksums only, no measuring.")] = False,
) -> None:
    """Check files against the manifest's sha256, then measure each member again and compare with its card."""
    faults: list[str] = []
    for member in [name] if name else store.names():
        try:
            directory = store.check(_member(member).name)
        except store.ZooError as error:
            faults.append(str(error))
            continue
        if quick:
            typer.echo(f"{member}: files as listed in the manifest")
            continue
        from safescale_lib.zoo import load, recipes

        metrics = recipes.measure(member, load(member))
        _compare(member, metrics, json.loads((directory / "card.json").read_text())["metrics"])
        faults += recipes.differences(member, metrics, store.card(member)["metrics"])
    for fault in faults:
        typer.echo(fault, err=True)
    if faults:
        raise typer.Exit(1)


@zoo.command()
def train(
    name: Name,
    output: Annotated[Path, typer.Option(help="Where the new model goes, in a directory of its name.")] = Path("zoo-training"),
    seed: Annotated[int, typer.Option(min=0, help="Of everything random. The shipped members have seed 0.")] = 0,
    device: Annotated[str, typer.Option(help="A torch device: cpu, cuda, mps.")] = "cpu",
    shelve: Annotated[bool, typer.Option("--shelve", help="Also replace the shipped member and its manifest entry.")] = False,
) -> None:
    """Train a member from its recipe. Kill it at any moment: the same command goes on where it stopped."""
    from safescale_lib.zoo import recipes

    if name not in recipes.RECIPES:
        raise typer.BadParameter(f"must be one of {', '.join(recipes.RECIPES)}; got {name!r}", param_hint="NAME")
    output.mkdir(parents=True, exist_ok=True)
    state = output / f"{name}-seed{seed}.state.safetensors"
    staged, target = output / f".staging-{name}-seed{seed}", output / f"{name}-seed{seed}"
    shutil.rmtree(staged, ignore_errors=True)  # left behind by a kill
    staged.mkdir()
    recipes.make(name, staged, recipes.Run(seed=seed, device=device, state=state))
    metrics = json.loads((staged / "card.json").read_text())["metrics"]
    shipped = store.card(name)["metrics"] if name in store.names() else None
    shutil.rmtree(target, ignore_errors=True)
    os.replace(staged, target)
    state.unlink(missing_ok=True)
    _compare(name, metrics, shipped or metrics)
    typer.echo(f"written to {target}")
    if shelve:
        with store.staging() as copy:
            shutil.copytree(target, copy / name)
            store.shelve(name, copy / name)
        typer.echo(f"{name} is now the shipped member")


def _member(name: str) -> Path:
    try:
        return store.folder(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="NAME") from None


def _compare(name: str, metrics: list[dict[str, Any]], shipped: list[dict[str, Any]]) -> None:
    table = Table("metric", "measured now", "on the card", title=name)
    listed = {row["metric"]: row for row in shipped}
    for now in metrics:
        was = listed.get(now["metric"])
        table.add_row(now["metric"], _value(now), _value(was) if was else "not listed")
    Console().print(table)


def _value(row: dict[str, Any]) -> str:
    return f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f}, n = {row['n']:,})"
