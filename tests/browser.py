"""Headless Chromium for tests of pages: the system's own, driven by playwright's Python package.

    with chromium() as browser, opened(browser, url, locale="zh-CN") as page:
        page.click("#go")

Where either is missing these tests are skipped, except on a CI machine (the variable CI is set), where they fail.
"""

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator

import pytest

WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""


@contextlib.contextmanager
def chromium() -> Iterator:
    """A browser, which takes two seconds to start."""
    path, has_driver = shutil.which("chromium"), importlib.util.find_spec("playwright") is not None
    if not path or not has_driver:
        reason = "needs Debian's package chromium" if not path else "needs pip install playwright"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])  # CI runs as root
        yield made
        made.close()


@contextlib.contextmanager
def opened(browser, url: str, key: str | None = None, routes: dict | None = None, **options) -> Iterator:
    """A page at `url` in a context of its own.

    At the end nothing may have broken the page's content security policy, raised an error, or opened a dialog.

    Args:
        key: an API key that this tab already has.
        routes: {pattern: function of a playwright Route}: answers in place of the server's.
        options: of the context: viewport, locale, color_scheme, ...
    """
    context = browser.new_context(**({"locale": "en-US"} | options))
    context.add_init_script(WATCH)
    if key:
        context.add_init_script(f"sessionStorage.setItem('jaxgpt.key', JSON.stringify('{key}'))")
    page, wrong = context.new_page(), []
    page.set_default_timeout(15_000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    for pattern, function in (routes or {}).items():
        page.route(pattern, function)
    try:
        page.goto(url)
        yield page
        assert wrong == [] and page.evaluate("violations") == []
    finally:
        context.close()
