"""Cleaning of a document: changes first, then filters, each a named step of `CleaningConfig`, in its order.

Each change is a plain function from text to text. Changes are repeated until nothing changes, because one can make work
for another (two halves of an address meet when the invisible character between them is removed); so cleaning a cleaned
text gives the same text. The exception is `html`, which runs once: a page about HTML contains tags as text.
"""

import functools
import importlib
import itertools
import json
import unicodedata
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import regex

from jaxgpt.data.chat import from_plain, plain_of, to_text
from jaxgpt.errors import UserError, how_to_install
from jaxgpt.settings import CleaningConfig

if TYPE_CHECKING:
    import ftfy
    from py3langid.langid import LanguageIdentifier

CHANGES = ("html", "fix_encoding", "unicode", "control_characters", "emoji", "urls", "emails", "whitespace")
FILTERS = ("min_chars", "max_chars", "max_symbol_ratio", "language")
STEPS = CHANGES + FILTERS

_LIBRARIES = {"html": "selectolax", "fix_encoding": "ftfy", "language": "py3langid"}
_DEEPEST = 3000  # no page of the web is; a third of a second to parse
_ROUNDS = 8  # two are usual; a text that needs more stays as it is then
_LANGUAGE_CHARS = 1000  # the beginning of a document that decides its language: half a millisecond
_SURE, _POSSIBLE = 0.2, 0.1  # measured: no English or Chinese sentence of 20 characters or more is dropped for another


class Cleaned(NamedTuple):
    text: str | None  # None if the document is dropped
    dropped_by: str | None  # the filter that dropped it, or the change that left nothing
    changed_by: tuple[str, ...]


class Cleaner:
    """The steps that the settings turn on."""

    def __init__(self, settings: CleaningConfig):
        """Load what the steps need; a UserError names a library that is missing, or an unknown language."""
        self._changes = _changes(settings)
        self._filters = _filters(settings)

    def __call__(self, text: str, continues: bool = False) -> Cleaned:
        """The cleaned text. A part that `continues` a long text keeps the line break before its first line."""
        before = _break_before(text) if continues else ""
        changed: dict[str, None] = {}
        text = self._change(text, changed)
        if not text.strip() and changed:
            return Cleaned(None, list(changed)[-1], tuple(changed))
        if before and not text[:1].isspace():
            text = before + text
        return self._filtered(text, text, changed)

    def chat(self, text: str, continues: bool = False) -> Cleaned:
        """The cleaned canonical conversation: changes apply to each content, filters to all of them together."""
        if (plain := plain_of(text)) is not None:
            cleaned = self(plain, continues)
            return cleaned if cleaned.text is None else cleaned._replace(text=from_plain(cleaned.text))
        messages = json.loads(text)
        changed: dict[str, None] = {}
        for message in messages:
            changed_here: dict[str, None] = {}
            message["content"] = self._change(message["content"], changed_here).strip()
            changed |= changed_here
            if not message["content"]:
                return Cleaned(None, list(changed_here)[-1], tuple(changed))
        contents = "\n".join(message["content"] for message in messages)
        return self._filtered(contents, to_text(messages) if changed else text, changed)

    def _change(self, text: str, changed: dict[str, None]) -> str:
        """The text after all changes; adds the names of those that had an effect to `changed`."""
        for number in range(_ROUNDS):
            before = text
            for name, change in self._changes.items():
                if name == "html" and number:
                    continue
                if (new := change(text)) != text:
                    changed[name], text = None, new
            if text == before:
                break
        return text

    def _filtered(self, judged: str, text: str, changed: dict[str, None]) -> Cleaned:
        for name, passes in self._filters.items():
            if not passes(judged):
                return Cleaned(None, name, tuple(changed))
        return Cleaned(text, None, tuple(changed))


def _changes(settings: CleaningConfig) -> dict[str, Callable[[str], str]]:
    chosen = {
        "html": settings.html and html_to_text,
        "fix_encoding": settings.fix_encoding and fix_encoding,
        "unicode": settings.unicode != "keep" and functools.partial(unicodedata.normalize, settings.unicode),
        "control_characters": settings.control_characters and remove_control_characters,
        "emoji": settings.emoji == "strip" and remove_emoji,
        "urls": settings.urls == "mask" and mask_urls,
        "emails": settings.emails == "mask" and mask_emails,
        "whitespace": settings.whitespace and collapse_whitespace,
    }
    changes: dict[str, Callable[[str], str]] = {name: change for name, change in chosen.items() if change}
    _check_libraries(changes)
    return changes


def _filters(settings: CleaningConfig) -> dict[str, Callable[[str], bool]]:
    filters: dict[str, Callable[[str], bool]] = {}
    if settings.min_chars:
        filters["min_chars"] = lambda text: len(text) >= settings.min_chars
    if (most := settings.max_chars) is not None:
        filters["max_chars"] = lambda text: len(text) <= most
    if settings.max_symbol_ratio < 1:
        filters["max_symbol_ratio"] = lambda text: symbol_ratio(text) <= settings.max_symbol_ratio
    if codes := [code.strip() for code in settings.language.split(",") if code.strip()]:
        _check_libraries(["language"])
        filters["language"] = language_filter(codes)
    return filters


def _check_libraries(names: Iterable[str]) -> None:
    """Import the libraries of the steps now, rather than in the middle of the data."""
    for name in names:
        library = _LIBRARIES.get(name)
        try:
            if library:
                importlib.import_module(library)
        except ImportError:
            raise UserError(f"cleaning.{name} needs the package {library}: {how_to_install('clean')}") from None


# ---------------------------------------------------------------- changes

_NO_TEXT = ["script", "style", "noscript", "template", "svg", "select", "iframe", "object", "head"]
_BLOCKS = (
    "address,article,aside,blockquote,br,caption,dd,details,div,dl,dt,fieldset,figcaption,figure,footer,form,"
    "h1,h2,h3,h4,h5,h6,header,hr,li,main,nav,ol,p,section,summary,table,tr,ul"
)
# Characters that Unicode will never assign stand for white space that must survive the collapsing of the rest.
_LINE, _KEPT_LINE, _KEPT_SPACE, _KEPT_TAB = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_KEEP = str.maketrans({"\n": _KEPT_LINE, " ": _KEPT_SPACE, "\t": _KEPT_TAB})
_GIVE_BACK = str.maketrans({_LINE: "\n", _KEPT_LINE: "\n", _KEPT_SPACE: " ", _KEPT_TAB: "\t"})


@functools.cache
def _patterns() -> dict[str, regex.Pattern]:
    """The patterns, compiled once in a process, with the `regex` package because it knows Unicode properties."""
    cjk = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\u3000-\u303f\uff00-\uffef"
    picture = r"(?![0-9#*])\p{Emoji}"
    emoji = rf"(?:\p{{Emoji_Presentation}}|{picture}\ufe0f|{picture}\p{{Emoji_Modifier}})"
    joined = rf"(?:\p{{Emoji_Modifier}}|\ufe0f|[\U000e0020-\U000e007f]|\u200d{picture}\ufe0f?)*"
    sources = {
        "html": r"(?i)<(?:!doctype|/?(?:html|body|head|title|meta|link|script|style|"
        rf"{_BLOCKS.replace(',', '|')}|span|a|b|i|u|em|strong|small|sub|sup|code|pre|td|th|tbody|thead|img|font|center|"
        r"input|button|label|option|textarea|template|noscript|svg|iframe|object|select))(?=[\s/>])[^<>]*>",
        # C0 and C1 except line breaks and tab; soft hyphen, zero-width space, direction marks and overrides, word
        # joiner and the like, byte order mark, annotations; tags, except those of a flag (England's); joiners next to
        # plain ASCII only, as Persian, Indian scripts and emoji need them elsewhere.
        "control": r"(\U0001f3f4[\U000e0020-\U000e007e]{1,6}\U000e007f)|[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad"
        r"\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
        r"|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])",
        # Flags, keycaps, pictures; but not those that are text unless a selector follows (the copyright sign).
        "emoji": rf"\p{{Regional_Indicator}}{{2}}|[0-9#*]\ufe0f?\u20e3|(?:{emoji}|\p{{Extended_Pictographic}}"
        rf"(?=\ufe0f?\u200d)){joined}",
        # Up to white space, quotes, brackets of a tag, or Chinese, Japanese or Korean text that follows without a
        # space; the last character is not punctuation.
        "url": rf"(?i)(?<![A-Za-z0-9])(?:https?://|ftp://|www\.)[^\s<>\"“”‘’«»`|{{}}\\^{cjk}]+(?<![.,;:!?'*_~()\[\]…])",
        "email": r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![A-Za-z0-9-])",
        "symbol": r"[^\p{L}\p{M}\p{N}\s]+",
        "line": r"\r\n|[\r\v\f\x85\u2028\u2029]",
        "space": r"[\t\x1c-\x1f\xa0\u1680\u2000-\u200a\u202f\u205f]",
        "spaces": r"[ \u3000]{2,}",
        "blank": r"\n{3,}",
        # Those that hold others and must be closed; HTML closes a paragraph, an item, a row or a cell by itself.
        "tag": r"(?i)<(/?)(?!(?:area|base|br|col|embed|hr|img|input|link|meta|source|track|wbr|p|li|d[dt]|t[dhr]|"
        r"option|thead|tbody|tfoot|rt|rp)\b)[a-z][^<>\s/]*",
        "html_space": r"[ \t\n\r\f]+",
        "html_line": rf" ?{_LINE}[{_LINE} ]*",
    }
    return {name: regex.compile(source) for name, source in sources.items()}


def html_to_text(text: str) -> str:
    """The text of a page: a line for each paragraph, heading, item or row, <pre> as it is. Other text is unchanged.

    Of a page with tags nested _DEEPEST deep nothing is left: the parser's time grows with the square of the depth.
    """
    patterns = _patterns()
    if not patterns["html"].search(text):
        return text
    if text.count("<") > _DEEPEST and _depth(text) > _DEEPEST:
        return ""
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(text)
    tree.strip_tags(_NO_TEXT)
    for node in tree.css("pre,textarea"):
        node.replace_with(_LINE + node.text().translate(_KEEP) + _LINE)
    for node in tree.css(_BLOCKS):
        node.insert_before(_LINE)
        node.insert_after(_LINE)
    for node in tree.css("td,th"):
        node.insert_after(" ")
    root = tree.body or tree.root
    text = root.text() if root else ""
    text = patterns["html_line"].sub(_LINE, patterns["html_space"].sub(" ", text))
    return text.strip(" " + _LINE).translate(_GIVE_BACK)


def _depth(text: str) -> int:
    """How deep the tags of a page are nested at most, counting those that are never closed."""
    steps = (-1 if tag[1] else 1 for tag in _patterns()["tag"].finditer(text))
    return max(itertools.accumulate(steps, lambda depth, step: max(0, depth + step)), default=0)


def fix_encoding(text: str) -> str:
    """The text with wrong decoding repaired by ftfy, whose other changes (quotes, wide letters) are turned off."""
    if text.isascii():
        return text
    import ftfy

    config = _repair_only()
    return "\n".join(line if line.isascii() else ftfy.fix_text(line, config) for line in text.split("\n"))


@functools.cache
def _repair_only() -> "ftfy.TextFixerConfig":
    import ftfy

    off = (
        *("unescape_html", "remove_terminal_escapes", "fix_latin_ligatures", "fix_character_width"),
        *("uncurl_quotes", "fix_line_breaks", "remove_control_chars", "explain"),
    )
    return ftfy.TextFixerConfig(normalization=None, **dict.fromkeys(off, False))


def remove_control_characters(text: str) -> str:
    return _patterns()["control"].sub(r"\1", text)


def remove_emoji(text: str) -> str:
    return text if text.isascii() else _patterns()["emoji"].sub("", text)


def mask_urls(text: str) -> str:
    return _patterns()["url"].sub("<url>", text)


def mask_emails(text: str) -> str:
    return _patterns()["email"].sub("<email>", text) if "@" in text else text


def collapse_whitespace(text: str) -> str:
    """The text with line feeds only, without spaces at line ends, double spaces and double blank lines.

    A single ideographic space, which Chinese uses between words, is kept.
    """
    patterns = _patterns()
    text = patterns["space"].sub(" ", patterns["line"].sub("\n", text))
    if "  " in text or "\u3000" in text:
        text = patterns["spaces"].sub(lambda run: " " if " " in run[0] else "\u3000", text)
    for space in " \u3000":  # no two of them are left side by side
        text = text.replace(f"{space}\n", "\n").replace(f"\n{space}", "\n")
    return patterns["blank"].sub("\n\n", text).strip()


def _break_before(text: str) -> str:
    """The line break, blank line or space that a text begins with."""
    lead = text[: len(text) - len(text.lstrip())]
    return "\n" * min(2, lead.replace("\r\n", "\n").count("\n")) or lead[:1]


# ---------------------------------------------------------------- filters


def symbol_ratio(text: str) -> float:
    """The share of characters that are neither letters (with their marks), digits nor white space."""
    return sum(map(len, _patterns()["symbol"].findall(text))) / max(1, len(text))


def language_filter(codes: list[str]) -> Callable[[str], bool]:
    """A filter that passes texts in one of the languages, and short texts that could be in any."""
    identifier = _identifier()
    unknown = sorted(set(codes) - set(identifier.labels))
    if unknown:
        raise UserError(
            f"cleaning.language = {','.join(codes)}: no language {', '.join(unknown)}; "
            f"there are {', '.join(sorted(identifier.labels))}"
        )

    def speaks(text: str) -> bool:
        ranked = identifier.rank(text[:_LANGUAGE_CHARS])
        return ranked[0][1] < _SURE or sum(share for code, share in ranked if code in codes) >= _POSSIBLE

    return speaks


@functools.cache
def _identifier() -> "LanguageIdentifier":
    """py3langid's identifier with the model of the package: half a second to load, so once in a process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
