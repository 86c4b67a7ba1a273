"""The share of held-out questions that a chat model answers rightly, by skill and language.

The questions are those of preparation/skills.py, some of them after other turns, which are answered as the data has it.
The model answers by its likeliest tokens. An answer counts as right if it is one that the data could have, whatever its
working says, and if it stops by itself.
"""

from collections.abc import Mapping
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


class SkillQuestions(NamedTuple):
    """Held-out questions as prompts of a model."""

    asked: list[tuple[Turn, list[int]]]
    options: SamplingOptions
    dropped: int
    """Turns before a question that did not fit the model."""


def skill_questions(model: LoadedModel, where: str, count: int | None) -> SkillQuestions:
    """Up to `count` questions of each skill and language, with room for an answer; `where` names the model.

    Raises:
        UserError: it is no chat model, or it reads too few tokens for a question and its answer.
    """
    encode, positions = model.tokenizer.encode, model.config.model.n_positions
    prompts = ChatPrompts(model.tokenizer, positions, where)
    found = [turns for s in skill_names() for one in LANGUAGES for turns in held_out(s, one, count or QUESTIONS)]
    new = min(max(len(encode(turns[-1].answer)) for turns in found) + _ROOM, max(positions // 2, 1))
    asked, dropped = [], 0
    for turns in found:
        texts = [text for turn in turns for text in (turn.question, turn.answer)][:-1]
        messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        prompt = prompts.fit(with_system(messages, model.config.chat.system), new)
        asked.append((turns[-1], prompt.ids))
        dropped += prompt.dropped
    options = SamplingOptions(max_new_tokens=new, temperature=0.0, stop_token_ids=(prompts.end_of_turn,))
    return SkillQuestions(sorted(asked, key=lambda each: len(each[1])), options, dropped)


def answered(questions: SkillQuestions, config: Config, model: LoadedModel) -> dict[str, object]:
    """{"questions", "max_new_tokens", "dropped", "stops", the mean of each language, "rows": one a skill and language}.

    A mean is over the skills, each with the same weight.
    """
    asked, tokenizer = questions.asked, model.tokenizer
    end, ends = tokenizer.end_of_text, tokenizer.ends
    decoder = build_decoder(config.model, model.vocab_size, model.params, end, rows=TOGETHER, ends=ends)
    names = [{"skill": skill, "language": language} for skill in skill_names() for language in LANGUAGES]
    rows: list[dict] = [{**name, "questions": 0, "right": 0, "stops": 0, "wrong": []} for name in names]
    by_name = {(row["skill"], row["language"]): row for row in rows}
    with tqdm(total=len(asked), desc="answering", unit="question", disable=None, leave=False) as bar:
        for start in range(0, len(asked), TOGETHER):
            part = asked[start : start + TOGETHER]
            made = generate(decoder, [prompt for _, prompt in part], questions.options)
            for (turn, _), [answer] in zip(part, made, strict=True):
                text, stopped = tokenizer.decode(answer.tokens), answer.finish_reason == "stop"
                row, is_right = by_name[turn.skill, turn.language], stopped and turn.is_right(text)
                row["questions"] += 1
                row["stops"] += stopped
                row["right"] += is_right
                row.setdefault("first", {"question": turn.question, "answer": text})
                if not is_right and len(row["wrong"]) < _SHOWN:
                    row["wrong"].append({"question": turn.question, "answer": text, "expected": turn.answer})
            bar.update(len(part))
    shares = {one: [row["right"] / row["questions"] for row in rows if row["language"] == one] for one in LANGUAGES}
    return {
        "questions": len(asked),
        "max_new_tokens": questions.options.max_new_tokens,
        "dropped": questions.dropped,
        "stops": sum(row["stops"] for row in rows) / len(asked),
        **{language: sum(own) / len(own) for language, own in shares.items()},
        "rows": rows,
    }


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
