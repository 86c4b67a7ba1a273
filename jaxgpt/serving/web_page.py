"""The chat page: one file, and the rule that a browser is to run that file's own program and nothing else."""

import base64
import hashlib
import re
from importlib import resources


def read_page() -> tuple[str, dict[str, str]]:
    """(the page, its headers)."""
    text = resources.files("jaxgpt.serving").joinpath("page.html").read_text(encoding="utf-8")
    rules = [
        "default-src 'none'",
        "connect-src 'self'",
        "img-src 'self' data:",
        f"script-src {_hash_of('script', text)}",
        f"style-src {_hash_of('style', text)}",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    headers = {"Content-Security-Policy": "; ".join(rules), "Referrer-Policy": "no-referrer"}
    return text, headers | {"Cache-Control": "no-cache"}


def _hash_of(tag: str, text: str) -> str:
    """The hash by which a browser knows the page's one <script> or <style> (Content Security Policy Level 3, 8.4)."""
    [content] = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
