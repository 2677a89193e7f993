"""A browser page that is watched while a test drives it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@contextmanager
def opened(browser: Browser, address: str, **settings: object) -> Iterator[Page]:
    """A page in a context of its own; at the end no script may have failed and no request have left the site."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((address, "data:")) else problems.append(request.url))
    try:
        yield page
    finally:
        context.close()
    assert not problems, "\n".join(problems)
