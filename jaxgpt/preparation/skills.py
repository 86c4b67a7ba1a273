"""Conversations whose answers a program can check, made up in English and Chinese: the source "skills".

skills.toml has the phrases, this module the numbers and words in them; the skill "service" asks what support.toml has.
Conversation n is a function of the seed and n, so that any of them can be made at once and again.

A tenth of the operands (the pair of a sum, the letters to spell) and of the wordings is held out, by a hash: a training
conversation has none of them, a validation conversation and a question of `held_out` no others. What is known by heart
(colours, opposites) has only its wordings held out, and so has what a customer asks.

Answers with several steps show their working, because a small model has no room to do it unseen: it has to give the
first digit of a sum before the carries that it depends on. Lee et al. (Teaching Arithmetic to Small Transformers, ICLR
2024, arXiv:2307.03381) train such models on sums in four forms. Digits from the right need a fraction of the examples
of plain sums, and working that shows each digit's sum with its carry the fewest. So 128 + 367 is written as on paper:
"8+7=15, 2+6+1=9, 1+3=4, so 495." Each step is one of 200 facts about digits, the carry is the 1 in front of the step
before, and the result is the last step with the last digits of the others, in the order that people read. Digits have
no spaces between them, which would keep a BPE from joining them: people would have to type them, too. In the same way
comparisons go from digit to digit, counting counts aloud, days are stepped through, and prices are added up.
"""

import functools
import hashlib
import itertools
import re
import string
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.errors import UserError
from jaxgpt.preparation.augmentation import Draw
from jaxgpt.preparation.dialogues import slot_value, support_phrases
from jaxgpt.preparation.documents import SourceRecord

COUNT = 50_000  # conversations, unless data.max_bytes says how much text
LANGUAGES = ("english", "chinese")
_HELD_OUT = 10  # one in so many
_SLOPPY = 0.2  # share of the questions in small letters and without the last mark
_STRANGE = 0.1  # share of the later turns that are in any language
_ENDS = ".?!。？！"
_WORKING = {"steps": f"[^{_ENDS}]+"}

Made = tuple[tuple, dict[str, str]]
"""The operands that are held out or not (none: always asked), and the values of the slots."""


class Turn(NamedTuple):
    """A question and its answer."""

    skill: str
    language: str
    question: str
    answer: str
    wording: tuple[str, ...]
    operands: tuple
    forms: Sequence[str]  # of a right answer
    values: Mapping[str, str]  # of the slots in them
    free: Mapping[str, str]  # patterns of the slots that may have other values

    def is_right(self, answer: str) -> bool:
        """Whether the answer is right: its result and its words; the working before a result may be anything."""
        patterns = (_pattern(form, self.values, self.free) for form in self.forms)
        return any(re.fullmatch(pattern, answer.strip(), re.IGNORECASE) for pattern in patterns)


def version() -> str:
    """Identifies the conversations: a digest of what they are made from."""
    files = [Path(__file__).with_name(name) for name in ("skills.toml", "skills.py", "support.toml")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def skill_names() -> list[str]:
    return list(_texts()["weights"])


def weights(given: Sequence[str]) -> dict[str, float]:
    """The weight of each skill and each language, with those of `data.skills` ("addition=4") in place of the usual."""
    found = {**_texts()["weights"], **dict.fromkeys(LANGUAGES, 1.0)}
    for entry in given:
        name, _, number = entry.partition("=")
        if name.strip() not in found or not re.fullmatch(r"\s*\d{1,6}(\.\d{1,6})?\s*", number):
            raise UserError(f"data.skills = {entry}: write NAME=WEIGHT with one of {', '.join(found)}, as addition=4")
        found[name.strip()] = float(number)
    for names, what in ((skill_names(), "skill"), (LANGUAGES, "language")):
        if not any(found[name] for name in names):
            raise UserError(f"data.skills: every {what} has the weight 0, which leaves nothing")
    return found


def skill_records(given: Sequence[str], held_out: float, endless: bool, seed: int = 0) -> Iterator[SourceRecord]:
    """COUNT conversations, or more and more of them; the share `held_out` of them is for validation."""
    shares = weights(given)
    for number in itertools.count() if endless else range(COUNT):
        is_held = Draw(_hash("split", seed, number)).chance(held_out)
        turns = conversation(Draw(_hash("turns", seed, number)), shares, is_held)
        pairs = ((("user", turn.question), ("assistant", turn.answer)) for turn in turns)
        messages = [{"role": role, "content": text} for pair in pairs for role, text in pair]
        where = f"skills, conversation {number}"
        yield SourceRecord(where, {"messages": messages}, "validation" if is_held else "train")


def held_out(skill: str, language: str, count: int) -> list[list[Turn]]:
    """Up to `count` different conversations that no training conversation is like; the last turn is of the skill."""
    draws = (Draw(_hash("question", skill, language, number)) for number in range(3 * count))
    made = (conversation(draw, weights(()), True, skill, language) for draw in draws)
    return list({tuple(turn.question for turn in turns): turns for turns in made}.values())[:count]


def conversation(
    draw: Draw, shares: Mapping[str, float], held: bool, skill: str | None = None, language: str | None = None
) -> list[Turn]:
    """One to four turns; the last one is of `skill`, and all of `language`, if they are given."""
    usual = language or _weighted(draw, shares, LANGUAGES)
    count = 2 + draw.one(range(3)) if draw.chance(_texts()["several"]) else 1
    turns: list[Turn] = []
    while len(turns) < count:
        is_last = len(turns) == count - 1
        strange = turns and not (is_last and language) and draw.chance(_STRANGE)
        spoken = _weighted(draw, shares, LANGUAGES) if strange else usual
        chosen = skill if skill and is_last else _weighted(draw, shares, skill_names())
        turns += _service(spoken, draw, held) if chosen == "service" else [_turn(chosen, spoken, draw, held)]
    return turns[:4]


def is_held_out(*item: object) -> bool:
    """Whether a wording, or operands, are kept out of training."""
    return bool(item) and _hash(*item) % _HELD_OUT == 0


def _hash(*item: object) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(map(str, item)).encode()).digest()[:8])


def _weighted(draw: Draw, shares: Mapping[str, float], names: Sequence[str]) -> str:
    left = sum(shares[name] for name in names)
    for name in (kept := [name for name in names if shares[name]]):
        if draw.chance(shares[name] / left):
            return name
        left -= shares[name]
    return kept[-1]


@functools.cache
def _texts() -> dict[str, Any]:
    """The content of skills.toml, each text as the list of its alternatives."""
    texts = tomllib.loads(Path(__file__).with_name("skills.toml").read_text(encoding="utf-8"))
    return texts | {language: _split(texts[language]) for language in LANGUAGES}


def _split(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _split(each) for name, each in value.items()}
    return value.split("|") if isinstance(value, str) else [_split(each) for each in value]


def _turn(skill: str, language: str, draw: Draw, held: bool) -> Turn:
    """A question of the skill, with wording and operands that are held out, or with none that is."""
    texts = _texts()[language]
    kind = draw.one(list(texts[skill]))
    asked, said, *table = texts[skill][kind]
    make = _MAKERS.get(kind, lambda draw, texts: ((), {}))
    wording, (operands, values) = _wording(texts, skill, asked, draw), make(draw, texts)
    while is_held_out(language, kind, wording) != held:
        wording = _wording(texts, skill, asked, draw)
    while operands and is_held_out(*operands) != held:
        operands, values = make(draw, texts)
    if table:
        a, b = draw.one(table[0]).split(":")
        values = {"a": a, "b": b, "A": _capital(a), "B": _capital(b)}
    values = {name: draw.one(choices) for name, choices in texts["lists"].items()} | values
    question, answer = wording.format_map(values), draw.one(said).format_map(values)
    if language == "english" and wording != wording.lower().rstrip(_ENDS):
        question = _capital(question)
    right = list(said)
    if not re.search(r"\w", re.sub(r"\d", "", question)):  # "7 + 8 = ?" is in no language: an answer in any is right
        right += itertools.chain.from_iterable(_texts()[other][skill][kind][1] for other in LANGUAGES)
    return Turn(skill, language, question, answer, (language, kind, wording), operands, right, values, _WORKING)


def _wording(texts: Mapping[str, Any], skill: str, asked: Sequence[str], draw: Draw) -> str:
    text = draw.one(asked)
    if skill not in _texts()["bare"]:
        before, after = draw.one(texts["before"]), draw.one(texts["after"])
        text = before + (_capital(text) if before.endswith((". ", "? ")) else text) + after
    return text.lower().rstrip(_ENDS) if draw.chance(_SLOPPY) else text


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _pattern(form: str, values: Mapping[str, str], free: Mapping[str, str]) -> str:
    """What an answer of this form looks like; a slot of `free` has a pattern of its own."""
    parts = string.Formatter().parse(form)
    slot = lambda name: free[name] if name in free else re.escape(values[name])
    return "".join(re.escape(text) + (slot(name) if name else "") for text, name, _, _ in parts)


# ---------------------------------------------------------------- customer service


def _service(language: str, draw: Draw, held: bool) -> list[Turn]:
    """The turns of a topic of support.toml; only the first one is held out.

    What has been said before keeps its value in a right answer; a price or a day that nobody named may be any.
    """
    phrases = support_phrases()[language]
    steps, wording = _first_question(phrases, draw)
    while is_held_out(language, "service", wording) != held:
        steps, wording = _first_question(phrases, draw)
    values = {slot: slot_value(wordings, draw) for slot, wordings in phrases["slots"].items()}
    free = {slot: f"(?:{re.escape(forms)})" for slot, forms in phrases["slots"].items()}
    free = {slot: form.replace(r"\|", "|").replace(r"\#", r"\d") for slot, form in free.items()}
    turns: list[Turn] = []
    for asked, said in steps[: 1 if held else None]:
        wording = draw.one(asked.split("|")) if turns else wording
        answer = draw.one(said.split("|"))
        free = {slot: form for slot, form in free.items() if f"{{{slot}}}" not in wording}
        key = () if turns else (language, "service", wording)
        texts = wording.format(**values), _capital(answer.format(**values))
        turns.append(Turn("service", language, *texts, key, (), said.split("|"), values, free))
        free = {slot: form for slot, form in free.items() if f"{{{slot}}}" not in answer}
    return turns


def _first_question(texts: Mapping[str, Any], draw: Draw) -> tuple[list[list[str]], str]:
    """The [user, assistant] steps of a topic, and the wording of the first question."""
    steps = draw.one(list(texts["topics"].values()))["steps"]
    before, core, after = (draw.one(forms.split("|")) for forms in (texts["before"], steps[0][0], texts["after"]))
    if before.endswith((", ", ": ")) and not core.startswith("I "):
        core = core[0].lower() + core[1:]
    return steps, before + core + after


# ---------------------------------------------------------------- operands


def _made(texts: Mapping[str, Any], *operands: object, **values: object) -> Made:
    """The operands, and the values as texts; those that are lists are joined."""
    text = lambda name, value: texts["comma" if name == "steps" else "between"][0].join(map(str, value))
    is_list = lambda value: isinstance(value, list | range)
    return operands, {name: text(name, v) if is_list(v) else str(v) for name, v in values.items()}


def _pair(draw: Draw) -> tuple[int, int]:
    """Two numbers of up to three digits, most of them with two."""
    digits = draw.one((1, 2, 2, 2, 2, 3))
    other = digits if draw.chance(0.7) else draw.one(range(1, digits + 1))
    a, b = (draw.one(range(10 ** (n - 1) if n > 1 else 0, 10**n)) for n in (digits, other))
    return (a, b) if draw.chance(0.5) else (b, a)


def _columns(a: int, b: int) -> list[tuple[str, str]]:
    """The digits of both, from the left, with zeros in front of the shorter one."""
    width = len(str(max(a, b)))
    return list(zip(f"{a:0{width}}", f"{b:0{width}}", strict=True))


def _added(a: int, b: int) -> list[str]:
    """The digits' sums from the right, each with its carry."""
    steps, total = [], 0
    for x, y in reversed(_columns(a, b)):
        carry = "+1" if total > 9 else ""
        total = int(x) + int(y) + bool(carry)
        steps.append(f"{x}+{y}{carry}={total}")
    return steps


def _sum(draw: Draw, texts: Mapping[str, Any]) -> Made:
    a, b = _pair(draw)
    return _made(texts, "sum", *sorted((a, b)), steps=_added(a, b), result=a + b, a=a, b=b)


def _difference(draw: Draw, texts: Mapping[str, Any]) -> Made:
    (b, a), steps, top = sorted(_pair(draw)), [], 0
    for x, y in reversed(_columns(a, b)):
        borrowed = "-1" if top > 9 else ""
        low = int(y) + bool(borrowed)
        top = int(x) + (10 if int(x) < low else 0)
        steps.append(f"{top}-{y}{borrowed}={top - low}")
    return _made(texts, "difference", a, b, steps=steps, result=a - b, a=a, b=b)


def _comparison(draw: Draw, texts: Mapping[str, Any]) -> Made:
    a, b = _pair(draw)
    b = a - a % 10 + draw.one(range(10)) if draw.chance(0.3) else b  # some are alike
    b += a == b
    sign = lambda x, y: f"{x}{'<' if x < y else '>' if x > y else '='}{y}"
    if (lengths := (len(str(a)), len(str(b))))[0] != lengths[1]:
        steps = [sign(*lengths) + texts["digits"][0]]
    else:
        pairs = _columns(a, b)
        differs = next(place for place, (x, y) in enumerate(pairs) if x != y)
        steps = [sign(x, y) for x, y in pairs[: differs + 1]]
    steps += [sign(a, b)] if max(a, b) > 9 else []
    low, high = sorted((a, b))
    verdict = texts["yes" if a > b else "no"][0]
    return _made(texts, "comparison", low, high, steps=steps, a=a, b=b, small=low, large=high, verdict=verdict)


def _total(draw: Draw, texts: Mapping[str, Any]) -> Made:
    a, n = draw.one(range(2, 13)), draw.one(range(2, 7))
    steps = [f"{count}x{a}={count * a}" for count in range(1, n + 1)]
    return _made(texts, "price", a, n, steps=steps, result=a * n, a=a, n=n)


def _clock(draw: Draw, texts: Mapping[str, Any]) -> Made:
    hour, minute, n = draw.one(range(1, 12)), 5 * draw.one(range(12)), 5 * draw.one(range(1, 12))
    end = minute + n
    steps = [*_added(minute, n), *([f"{end}-60={end - 60}"] if end >= 60 else [])]
    result = f"{hour + end // 60}:{end % 60:02}"
    return _made(texts, "clock", hour, minute, n, steps=steps, result=result, a=f"{hour}:{minute:02}", n=n)


def _upto(draw: Draw, texts: Mapping[str, Any]) -> Made:
    a, more = draw.one(range(1, 21)), draw.one(range(2, 8))
    return _made(texts, "upto", a, more, a=a, b=a + more, numbers=range(a, a + more + 1))


def _numbers(draw: Draw, texts: Mapping[str, Any]) -> Made:
    numbers = draw.shuffled(range(10) if draw.chance(0.6) else range(10, 100), draw.one((3, 4, 5)))
    rising = sorted(numbers)
    return _made(texts, "sort", *rising, list=numbers, sorted=rising, falling=rising[::-1])


def _letters(draw: Draw, texts: Mapping[str, Any]) -> Made:
    """An English word, whose letters are known by heart, or a made-up one: of those there are too many for that."""
    word, is_made_up = draw.one(_texts()["english"]["words"]), draw.chance(0.6)
    if is_made_up:
        syllables = [draw.one("bcdfghjklmnprstvwz") + draw.one("aeiou") for _ in range(draw.one((2, 2, 3)))]
        word = "".join(syllables) + draw.one(("", "n", "s", "r"))
    steps = [f"{letter} {count}" for count, letter in enumerate(word, 1)]
    spelled, mirrored = "-".join(word), "-".join(word[::-1])
    key = ("word", word) if is_made_up else ()
    return _made(texts, *key, steps=steps, result=len(word), word=word, spelled=spelled, mirrored=mirrored)


def _letter(draw: Draw, texts: Mapping[str, Any]) -> Made:
    key, values = _letters(draw, texts)
    word = values["word"]
    one = draw.one(word) if draw.chance(0.8) else draw.one(string.ascii_lowercase)
    steps = [f"{letter} {word[: place + 1].count(one)}" for place, letter in enumerate(word)]
    return _made(texts, *key, steps=steps, result=word.count(one), word=word, one=one)


def _words(draw: Draw, texts: Mapping[str, Any]) -> Made:
    words = draw.shuffled(texts["words"], draw.one((2, 3, 4)))
    steps = [f"{word} {count}" for count, word in enumerate(words, 1)]
    return _made(texts, "words", *words, steps=steps, result=len(words), words=words, backwards=words[::-1])


def _again(draw: Draw, texts: Mapping[str, Any]) -> Made:
    word, n = draw.one(texts["words"]), draw.one((2, 3, 4))
    return _made(texts, "again", word, n, word=word, n=n, again=[word] * n)


def _alphabet(draw: Draw, texts: Mapping[str, Any]) -> Made:
    by_letter = {word[0]: word for word in draw.shuffled(_texts()["english"]["words"], 12)}
    words = [*by_letter.values()][: draw.one((2, 3, 4))]
    return _made(
        texts, "alphabet", *sorted(words), steps=sorted(word[0] for word in words), list=words, sorted=sorted(words)
    )


def _days(step: int, draw: Draw, texts: Mapping[str, Any]) -> Made:
    start, n = draw.one(range(7)), draw.one(range(2, 7))
    days = [texts["week"][(start + step * count) % 7] for count in range(n + 1)]
    steps = [f"{count} {day}" for count, day in enumerate(days) if count]
    return _made(texts, "days", step, start, n, steps=steps, result=days[-1], a=days[0], n=n)


# fmt: off
_MAKERS: dict[str, Callable[[Draw, Mapping[str, Any]], Made]] = {
    "sum": _sum, "difference": _difference, "total": _total, "clock": _clock, "upto": _upto,
    "larger": _comparison, "smaller": _comparison, "more": _comparison, "ascending": _numbers, "descending": _numbers,
    "letters": _letters, "spelled": _letters, "mirror": _letters, "letter": _letter, "alphabet": _alphabet,
    "wordcount": _words, "repeat": _words, "order": _words, "times": _again,
    "later": functools.partial(_days, 1), "earlier": functools.partial(_days, -1),
}
# fmt: on
