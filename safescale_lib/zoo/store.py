"""The shelf of shipped models: what is there, and whether the files are the ones that were measured.

Nothing here needs torch, so that `safescale zoo list` answers at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SHELF = Path(__file__).parent
MANIFEST = "manifest.json"


class ZooError(RuntimeError):
    """A shipped model is missing, damaged or not the one it claims to be; the message says how to mend it."""


def names(shelf: Path = SHELF) -> tuple[str, ...]:
    """Names of the members that ship with the library."""
    return tuple(_manifest(shelf))


def folder(name: str, shelf: Path = SHELF) -> Path:
    """Directory of a member, laid out like a Hub repository. Unknown names raise ValueError."""
    if name not in _manifest(shelf):
        raise ValueError(f"name must be one of {', '.join(names(shelf)) or 'no members yet'}; got {name!r}")
    return shelf / "weights" / name


def card(name: str, shelf: Path = SHELF) -> dict[str, Any]:
    """The model card as data: title, recipe, seconds, metrics with intervals, intended use."""
    loaded: dict[str, Any] = json.loads((folder(name, shelf) / "card.json").read_text())
    return loaded


def check(name: str, shelf: Path = SHELF) -> Path:
    """Compare every file of a member with the manifest's sha256; returns its directory or raises ZooError."""
    directory = folder(name, shelf)
    for file, wanted in _manifest(shelf)[name].items():
        path = directory / file
        mend = f"Restore it with `git checkout -- {directory}`, or rebuild it: `safescale zoo train {name} --shelve`."
        if not path.is_file():
            raise ZooError(f"{name}: {file} is missing. {mend}")
        if path.stat().st_size != wanted["bytes"]:
            raise ZooError(f"{name}: {file} has {path.stat().st_size:,} bytes instead of {wanted['bytes']:,}. {mend}")
        if _sha256(path) != wanted["sha256"]:
            raise ZooError(f"{name}: {file} is damaged or belongs to another model (sha256 differs). {mend}")
    return directory


def shelve(name: str, staged: Path, shelf: Path = SHELF) -> Path:
    """Put a finished member on the shelf and enter it into the manifest; staged: directory with all its files.

    The directory is moved in whole and the manifest is replaced last, so that a kill leaves the old or the new.
    """
    target = shelf / "weights" / name
    entry = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(staged.iterdir())
        if path.suffix in {".json", ".jinja", ".safetensors"}
    }
    manifest = {**(_manifest(shelf)), name: entry}
    target.parent.mkdir(parents=True, exist_ok=True)
    old = target.with_name(f".{name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(staged, target)
    _write(shelf / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    shutil.rmtree(old, ignore_errors=True)
    return target


@contextmanager
def staging(shelf: Path = SHELF) -> Iterator[Path]:
    """A scratch directory beside the shelf; what is not shelved from it is removed."""
    shelf.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=".staging-", dir=shelf))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _manifest(shelf: Path) -> dict[str, dict[str, dict[str, Any]]]:
    path = shelf / MANIFEST
    if not path.exists():
        return {}
    loaded: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text())
    return loaded


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text)
    os.replace(aside, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
