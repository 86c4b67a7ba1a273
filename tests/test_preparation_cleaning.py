"""Each kind of dirt comes out as expected, clean text as it was, and cleaning twice is cleaning once."""

import json
import random
import sys
import time

import pytest

from jaxgpt.data.chat import from_plain
from jaxgpt.errors import UserError
from jaxgpt.preparation.cleaning import CHANGES, STEPS, Cleaned, Cleaner, symbol_ratio
from jaxgpt.settings import CleaningConfig

EVERYTHING = {
    "fix_encoding": True,
    "control_characters": True,
    "emoji": "strip",
    "urls": "mask",
    "emails": "mask",
    "whitespace": True,
}


def clean(text: str, **settings) -> str | None:
    return Cleaner(CleaningConfig(**settings))(text).text


def test_the_steps_are_the_settings_in_their_order():
    names = [*CleaningConfig.__dataclass_fields__]
    assert [*STEPS, "drop_duplicates", "near_duplicates"] == names


@pytest.mark.parametrize("text", ["", "Plain text.\n", " \u3000é\r\n😀 https://x.y \x00 <p>"])
def test_by_default_nothing_is_touched(text):
    assert Cleaner(CleaningConfig())(text) == Cleaned(text, None, ())


# ---------------------------------------------------------------- each kind of dirt

PAGE = """<!DOCTYPE html><html><head><title>T</title><style>p {}</style></head><body><script>if (a < b) x()</script>
<h1>Head  <b>line</b></h1><p>First
   part &amp; a <a href="x">link</a>ed word<br>next &lt;line&gt;</p><ul><li>one<li>two</ul>
<pre>  code
    x = 1</pre><table><tr><td>1<td>2<tr><td>3</table><!-- no --><noscript>no</noscript>
<p>中文 caf&eacute;</body></html>"""
TEXT = "Head line\nFirst part & a linked word\nnext <line>\none\ntwo\n  code\n    x = 1\n1 2\n3\n中文 café"

ENGLAND = "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"  # one flag
DIRT = [
    ("html", True, PAGE, TEXT),
    ("html", True, "<p>unclosed <div>nested", "unclosed\nnested"),
    ("html", True, "a < b, x<y and AT&amp;T, <url>", "a < b, x<y and AT&amp;T, <url>"),  # no HTML
    ("fix_encoding", True, "cafÃ© â€œquoteâ€\x9d\nand café", "café “quote”\nand café"),
    ("fix_encoding", True, "ä¸\xadæ–‡", "中文"),
    ("fix_encoding", True, "“引号”，全角：ＡＢＣ！ ﬁ &amp; ’", "“引号”，全角：ＡＢＣ！ ﬁ &amp; ’"),
    ("unicode", "NFC", "e\u0301 ﬁ Ａ，", "é ﬁ Ａ，"),
    ("unicode", "NFKC", "e\u0301 ﬁ Ａ，½", "é fi A,1⁄2"),
    ("control_characters", True, "a\x00b\x07\tc\r\nd\x9f\u200be\xadf\ufeff\u202eg\u2028", "ab\tc\r\ndefg\u2028"),
    ("control_characters", True, "می\u200cخواهم x\u200dy 👩\u200d💻\u200d", "می\u200cخواهم xy 👩\u200d💻"),
    ("control_characters", True, f"{ENGLAND} a\U000e0041b", f"{ENGLAND} ab"),
    ("emoji", "strip", "a👋🏽b👩\u200d👩\u200d👧c🇩🇪d1\ufe0f\u20e3e2\u20e3f❤\ufe0fg", "abcdefg"),
    ("emoji", "strip", "a❤\ufe0f\u200d🔥b🏳\ufe0f\u200d🌈c👨\u200d⚕\ufe0fd", "abcd"),
    ("emoji", "strip", ENGLAND + "☝🏽⛹🏽\u200d♀\ufe0f", ""),
    ("emoji", "strip", "1 # * © ™ ® ❤ ☎ ✔ ↔ ㊗ ♀ 中文。5🏽", "1 # * © ™ ® ❤ ☎ ✔ ↔ ㊗ ♀ 中文。5"),
    ("urls", "mask", "At https://a.b/c?d=e&f=%20#g. Or (www.x.org/y), http://é.fr/à!", "At <url>. Or (<url>), <url>!"),
    ("urls", "mask", "请访问https://example.com/p。谢谢 ftp://x/y", "请访问<url>。谢谢 <url>"),
    ("urls", "mask", "http: // www. https:// x.com", "http: // www. https:// x.com"),
    ("emails", "mask", "a.b+c@d-e.co.uk, 联系x@y.cn谢谢 <m@n.io>.", "<email>, 联系<email>谢谢 <<email>>."),
    ("emails", "mask", "a@b @c d@ e@f.1 3 @ 4.99", "a@b @c d@ e@f.1 3 @ 4.99"),
    ("whitespace", True, "  a  b\t\xa0c \r\n\r\n\r\n\r\n d\x85e \n\n", "a b c\n\nd\ne"),
    ("whitespace", True, "　中文　字　　句 　点　\n　　", "中文　字　句 点"),
]  # fmt: skip


@pytest.mark.parametrize(("step", "value", "dirty", "expected"), DIRT)
def test_each_kind_of_dirt_comes_out_as_expected(step, value, dirty, expected):
    cleaned = Cleaner(CleaningConfig(**{step: value}))(dirty)
    assert (cleaned.text or "") == expected
    assert cleaned.changed_by == ((step,) if dirty != expected else ())


def test_every_change_has_a_case():
    assert {step for step, _, dirty, expected in DIRT if dirty != expected} == set(CHANGES)


@pytest.mark.parametrize("form", ["keep", "NFC"])
def test_clean_chinese_and_english_stay_as_they_are(form):
    text = "　从前，有个人说：“你好！”——《故事》（第1章）…\n\nIt's “fine” – isn’t it? #1 * 繁體字、日本語の文、한국어"
    cleaned = Cleaner(CleaningConfig(html=True, **EVERYTHING | {"whitespace": False}, unicode=form))(text)
    assert cleaned == Cleaned(text, None, ())
    assert clean(text, whitespace=True) == text.strip()


# ---------------------------------------------------------------- twice is once

PIECES = [
    *("a", "B ", "7", "#", "é", "e\u0301", "\u0301", "Ã", "©", "\xa0", "Ã©", "â€™", "ä¸\xad", "中文", "，"),
    *("Ａ", "ﬁ", "½", "1\ufe0f\u20e3", "\u1100\u1161"),
    *("\u3000", " ", "  ", "\t", "\n", "\r\n", "\x85", "\u2028", "\x00", "\x9f", "\u200b", "\xad", "\u200d", "\u200c"),
    *("\ufeff", "😀", "👩", "💻", "🏽", "❤", "\ufe0f", "\u20e3", "🇩", "🇪", "🏴", "\U000e0067", "\U000e007f"),
    *("http://", "https://x.y/z", "www.", "@", "a@b.co", ".", "com", "<url>", "<email>", "한", "का", "می"),
]  # fmt: skip


@pytest.mark.parametrize("settings", [{name: value} for name, value in EVERYTHING.items()] + [
    EVERYTHING | {"unicode": form} for form in ("keep", "NFC", "NFKC")
], ids=lambda settings: "+".join(settings) if len(settings) == 1 else settings["unicode"])  # fmt: skip
def test_cleaning_twice_is_cleaning_once(settings):
    draw, cleaner, changed = random.Random(0), Cleaner(CleaningConfig(**settings)), 0
    for _ in range(600):
        dirty = "".join(draw.choices(PIECES, k=draw.randint(1, 25)))
        once = cleaner(dirty)
        changed += bool(once.changed_by)
        if once.text is not None:
            assert cleaner(once.text) == Cleaned(once.text, None, ()), dirty.encode("unicode_escape")
    assert changed > 50


def test_a_page_cleaned_twice_is_cleaned_once():
    cleaner = Cleaner(CleaningConfig(html=True, unicode="NFC", **EVERYTHING))
    once = cleaner(PAGE.replace("&lt;", "").replace("&gt;", ""))
    assert set(once.changed_by) == {"html", "whitespace"}
    assert cleaner(once.text) == Cleaned(once.text, None, ())


def test_what_one_step_uncovers_another_one_finds():
    assert clean("http\u200bs://x.y a@b😀.co e\u200b\u0301", unicode="NFC", **EVERYTHING) == "<url> <email> é"


# ---------------------------------------------------------------- filters


def test_filters_name_themselves_and_keep_what_is_at_the_limit():
    cleaner = Cleaner(CleaningConfig(min_chars=3, max_chars=5, max_symbol_ratio=0.4))
    assert [cleaner(text).dropped_by for text in ("ab", "abc", "中文字", "abcde", "abcdef", "ab!!c", "a!!!b")] == [
        *("min_chars", None, None, None, "max_chars", None, "max_symbol_ratio")
    ]  # fmt: skip
    assert cleaner("ab").text is None


@pytest.mark.parametrize(
    ("text", "ratio"), [("", 0), ("abc 1\n中文", 0), ("a!", 0.5), ("हिन्दी", 0), ("{}=>", 1), ("，。", 1)]
)
def test_letters_of_all_scripts_are_no_symbols(text, ratio):
    assert symbol_ratio(text) == ratio


def test_filters_judge_the_cleaned_text():
    assert Cleaner(CleaningConfig(whitespace=True, min_chars=2))("   a   ") == Cleaned(
        None, "min_chars", ("whitespace",)
    )


def test_a_document_of_which_nothing_is_left_is_dropped_by_the_step_that_took_it():
    assert Cleaner(CleaningConfig(emoji="strip"))("👋 👋") == Cleaned(None, "emoji", ("emoji",))


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Hello, where is my order? I have been waiting for two weeks.", "en"),
        ("您好，我想退货，请问怎么办理？", "zh"),
        ("這個東西多少錢？我想買兩個。", "zh"),
        ("Bonjour, je voudrais réserver une table pour deux personnes.", "fr"),
        ("この商品を返品したいのですが、どうすればいいですか。", "ja"),
        ("Ich möchte morgen nach Berlin fahren und brauche ein Ticket.", "de"),
    ],
)
def test_other_languages_are_dropped(text, language):
    for codes in ("en", "zh", "en,zh", "fr, ja"):
        expected = None if language in codes else "language"
        assert Cleaner(CleaningConfig(language=codes))(text).dropped_by == expected, codes


@pytest.mark.parametrize("text", ["ok", "Okay.", "你好", "3 x 4", "!"])
def test_what_is_too_short_to_tell_is_kept(text):
    assert clean(text, language="zh,en") == text


# ---------------------------------------------------------------- conversations, parts, mistakes


def conversation(*contents: str) -> str:
    roles = ("user", "assistant")
    return json.dumps([{"role": roles[n % 2], "content": c} for n, c in enumerate(contents)], ensure_ascii=False)


def test_a_conversation_is_cleaned_turn_by_turn_and_judged_as_a_whole():
    cleaner = Cleaner(CleaningConfig(emoji="strip", urls="mask", max_chars=20))
    assert cleaner.chat(conversation("hi 👋", "at http://x.y")) == Cleaned(
        conversation("hi", "at <url>"), None, ("emoji", "urls")
    )
    untouched = conversation("hi 中", "yes")
    assert cleaner.chat(untouched) == Cleaned(untouched, None, ())
    assert cleaner.chat(from_plain("\n at http://x.y\n")) == Cleaned(from_plain("\n at <url>\n"), None, ("urls",))
    assert cleaner.chat(from_plain("👋")) == Cleaned(None, "emoji", ("emoji",))
    assert cleaner.chat(conversation("hi 👋", "x" * 18)).dropped_by == "max_chars"
    assert cleaner.chat(conversation("👋", "hello")) == Cleaned(None, "emoji", ("emoji",))


def test_the_break_before_a_further_part_of_a_text_stays():
    cleaner = Cleaner(CleaningConfig(whitespace=True))
    parts = ["One  line. ", "\r\n\r\n\r\n  Two.", "\n three", " four"]
    cleaned = "".join(cleaner(part, continues=number > 0).text for number, part in enumerate(parts))
    assert cleaned == cleaner("".join(parts)).text == "One line.\n\nTwo.\nthree four"


def test_an_unknown_language_is_a_user_error():
    with pytest.raises(UserError, match="cleaning.language = en,xx: no language xx; there are .*, en, "):
        Cleaner(CleaningConfig(language="en,xx"))


@pytest.mark.parametrize(
    ("settings", "library"),
    [({"html": True}, "selectolax"), ({"fix_encoding": True}, "ftfy"), ({"language": "en"}, "py3langid")],
)
def test_a_missing_library_is_named_with_the_fix(settings, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"needs the package {library}: pip install -e '.*\[clean\]'"):
        Cleaner(CleaningConfig(**settings))


@pytest.mark.parametrize("tags", ["<div>", "<ul><li>", "<b>", "<font size=1>", "<table><tr><td>"])
def test_tags_nested_ten_thousand_deep_are_dropped_in_little_time(tags):
    clean = Cleaner(CleaningConfig(html=True))
    began = time.process_time()
    assert clean(tags * 10_000 + "text").dropped_by == "html"
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "page", ["<p>text " * 9_000, "<ul>" + "<li>text" * 9_000, "<br>text" * 9_000, "<i>text</i>" * 9000]
)
def test_long_pages_with_tags_that_close_by_themselves_are_kept(page):
    assert Cleaner(CleaningConfig(html=True))(page).text.count("text") == 9_000
