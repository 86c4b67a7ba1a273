"""The share of held-out questions that a chat model answers rightly, by skill and language.

The questions are those of preparation/skills.py, some of them after other turns, which are answered as the data has it.
The model answers by its likeliest tokens. An answer counts as right if it is one that the data could have, whatever its
working says, and if it stops by itself.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tqdm import tqdm

from jaxgpt.config import Config
from jaxgpt.data.chat import with_system
from jaxgpt.evaluation.text_statistics import TOGETHER
from jaxgpt.inference.decoder import build_decoder, generate
from jaxgpt.inference.prompts import ChatPrompts
from jaxgpt.inference.sampling import SamplingOptions
from jaxgpt.preparation.skills import LANGUAGES, Turn, held_out, skill_names
from jaxgpt.training.models import LoadedModel

QUESTIONS = 20  # of each skill and language
_ROOM = 8  # tokens that an answer may have more than the longest right one
_SHOWN = 3  # wrong answers that are kept of each skill and language


class SkillQuestion(NamedTuple):
    turn: Turn
    prompt: list[int]


class SkillQuestions(NamedTuple):
    """Held-out questions as prompts of a model."""

    asked: list[SkillQuestion]
    options: SamplingOptions
    dropped: int
    """Turns before a question that did not fit the model."""


def skill_questions(model: LoadedModel, where: str, count: int | None) -> SkillQuestions:
    """Up to `count` questions of each skill and language, with room for an answer; `where` names the model.

    Raises:
        UserError: it is no chat model, or it reads too few tokens for a question and its answer.
    """
    tokenizer, positions = model.tokenizer, model.config.model.n_positions
    prompts = ChatPrompts(tokenizer, positions, where)
    found = [turns for s in skill_names() for one in LANGUAGES for turns in held_out(s, one, count or QUESTIONS)]
    longest = max(len(ids) for ids in tokenizer.encode_batch([turns[-1].answer for turns in found]))
    new = min(longest + _ROOM, max(positions // 2, 1))
    asked, dropped = [], 0
    for turns in found:
        messages = [{"role": "user", "content": turns[0].question}]
        for before, turn in zip(turns, turns[1:]):
            messages += [{"role": "assistant", "content": before.answer}, {"role": "user", "content": turn.question}]
        prompt = prompts.fit(with_system(messages, model.config.chat.system), new)
        asked.append(SkillQuestion(turns[-1], prompt.ids))
        dropped += prompt.dropped
    options = SamplingOptions(max_new_tokens=new, temperature=0.0, stop_token_ids=(prompts.end_of_turn,))
    return SkillQuestions(sorted(asked, key=lambda question: len(question.prompt)), options, dropped)


def answered(questions: SkillQuestions, config: Config, model: LoadedModel) -> dict[str, object]:
    """{"questions", "max_new_tokens", "dropped", "stops", the mean of each language, "rows": one a skill and language}.

    A mean is over the skills, each with the same weight.
    """
    asked, tokenizer = questions.asked, model.tokenizer
    decoder = build_decoder(
        config.model, model.vocab_size, model.params, tokenizer.end_of_text, rows=TOGETHER, ends=tokenizer.ends
    )
    rows = {(skill, one): _row(skill, one) for skill in skill_names() for one in LANGUAGES}
    with tqdm(total=len(asked), desc="answering", unit="question", disable=None, leave=False) as bar:
        for start in range(0, len(asked), TOGETHER):
            part = asked[start : start + TOGETHER]
            made = generate(decoder, [question.prompt for question in part], questions.options)
            for (turn, _), [answer] in zip(part, made, strict=True):
                stopped = answer.finish_reason == "stop"
                _count(rows[turn.skill, turn.language], turn, tokenizer.decode(answer.tokens), stopped)
            bar.update(len(part))
    return {
        "questions": len(asked),
        "max_new_tokens": questions.options.max_new_tokens,
        "dropped": questions.dropped,
        "stops": sum(row["stops"] for row in rows.values()) / len(asked),
        **{one: _mean([row for row in rows.values() if row["language"] == one]) for one in LANGUAGES},
        "rows": list(rows.values()),
    }


def _row(skill: str, language: str) -> dict:
    return {"skill": skill, "language": language, "questions": 0, "right": 0, "stops": 0, "wrong": []}


def _count(row: dict, turn: Turn, answer: str, stopped: bool) -> None:
    is_right = stopped and turn.is_right(answer)
    row["questions"] += 1
    row["stops"] += stopped
    row["right"] += is_right
    if not is_right and len(row["wrong"]) < _SHOWN:
        row["wrong"].append({"question": turn.question, "answer": answer, "expected": turn.answer})


def _mean(rows: Sequence[Mapping]) -> float:
    return sum(row["right"] / row["questions"] for row in rows) / len(rows)


def skill_table(found: Mapping) -> str:
    """What `answered` found, as a table."""
    lines = [
        f"{found['questions']:,} held-out questions, answers of up to {found['max_new_tokens']:,} tokens",
        f"{'skill':<12}  {LANGUAGES[0]:>8}  {LANGUAGES[1]:>8}  {'questions':>9}  {'stop':>7}",
    ]
    for skill in skill_names():
        rows = [row for row in found["rows"] if row["skill"] == skill]
        count = sum(row["questions"] for row in rows)
        cells = "".join(f"  {row['right'] / row['questions']:>8.1%}" for row in rows)
        lines.append(f"{skill:<12}{cells}  {count:>9,}  {sum(row['stops'] for row in rows) / count:>7.1%}")
    means = "".join(f"  {found[language]:>8.1%}" for language in LANGUAGES)
    lines.append(f"{'mean':<12}{means}  {found['questions']:>9,}  {found['stops']:>7.1%}")
    if found["dropped"]:
        lines.append(f"  {found['dropped']:,} turns before a question did not fit the model and were left out")
    return "\n".join(lines)
