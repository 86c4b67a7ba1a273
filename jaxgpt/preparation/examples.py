"""A few examples of what a stage did, short enough for a report."""

import os.path

EXAMPLES = 5  # of each kind
LENGTH = 200  # characters
_BEFORE = 40  # characters shown before the first difference


def shortened(text: str) -> str:
    return text if len(text) <= LENGTH else text[: LENGTH - 1] + "…"


def difference(before: str, after: str) -> dict[str, str]:
    """{"before", "after"}: both from shortly before the first character that differs."""
    begin = max(0, len(os.path.commonprefix([before, after])) - _BEFORE)
    lead = "…" if begin else ""
    return {"before": shortened(lead + before[begin:]), "after": shortened(lead + after[begin:])}
