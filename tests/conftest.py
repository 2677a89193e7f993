"""For every test: no network beyond loopback, no accidental use of a hub, two threads at most."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class OutsideRequest(AssertionError):
    """A test tried to leave this machine."""


def _is_loopback(address: object) -> bool:
    if not isinstance(address, tuple):  # a Unix socket's path
        return True
    return str(address[0]) in {"localhost", "::1", "0.0.0.0", ""} or str(address[0]).startswith("127.")


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Refuse every connection and every name look-up that is not loopback."""
    connect, connect_ex, lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guard(call):  # type: ignore[no-untyped-def]
        def guarded(self: socket.socket, address: object) -> object:
            if not _is_loopback(address):
                raise OutsideRequest(f"a test tried to connect to {address}")
            return call(self, address)

        return guarded

    def guarded_lookup(host: object, *rest: object, **named: object) -> object:
        if host is not None and not _is_loopback((host.decode() if isinstance(host, bytes) else host,)):
            raise OutsideRequest(f"a test tried to look up {host}")
        return lookup(host, *rest, **named)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guard(connect))
        patch.setattr(socket.socket, "connect_ex", guard(connect_ex))
        patch.setattr(socket, "getaddrinfo", guarded_lookup)
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`: what shares results runs on one worker, a file, or in the technique checks a row; so each is made once."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByWhatIsShared(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            row = re.search(r"\[.+\]$", test) if file.endswith("test_technique_checks.py") else None
            return f"{file}{row[0]}" if row else file

    return ByWhatIsShared(config, log)
