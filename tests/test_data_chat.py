"""Conversations: three formats become one, what cannot be used is told, and the tokens are those of transformers."""

import json
import random

import numpy as np
import pytest

from jaxgpt.data import chat
from jaxgpt.data.tokenizer import TEMPLATE, Declared, Tokenizer, char_tokenizer, train_bpe
from jaxgpt.data.tokenizer_folder import load_tokenizer
from jaxgpt.errors import BadRecord, UserError
from jaxgpt.preparation.dialogues import conversation
from jaxgpt.settings import ChatConfig

TEXTS = [
    "user\nassistant\nsystem\nWhere is my parcel? It's on its way. 你好，世界！ don't worry 🙂",
    "Hello there\n\n  x",
]
TOKENIZER = chat.with_chat_tokens(train_bpe(TEXTS * 3, 320))
START, END = (TOKENIZER.backend.token_to_id(token) for token in (chat.START_OF_TURN, chat.END_OF_TURN))


def messages(*contents: str, system: str | None = None) -> list[dict]:
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def encoder(block_size: int = 10_000, system: str = "", tokenizer=TOKENIZER) -> chat.ChatEncoder:
    return chat.ChatEncoder(tokenizer, ChatConfig(system=system), block_size)


# ---------------------------------------------------------------- formats


def test_three_forms_of_the_same_conversation_are_one_canonical_text():
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = messages("Hi 🙂", "Good day", "你好", "Bye", system="Be kind.")
    sharegpt = [{"from": names[turn["role"]], "value": f" {turn['content']}\n"} for turn in turns]
    expected = json.dumps(turns, ensure_ascii=False)
    assert conversation({"messages": turns, "id": 3}, "x") == expected
    assert conversation({"conversations": sharegpt}, "x") == expected
    assert conversation({"conversations": sharegpt[1:], "system": "Be kind."}, "x") == expected
    for keys in (("prompt", "response"), ("prompt", "completion"), ("question", "answer")):
        pair = conversation(dict(zip(keys, ("Hi 🙂", "Good day"))), "x")
        assert json.loads(pair) == turns[1:3]


BAD = [
    ([], "a.jsonl:3: not an object with"),
    ({"text": "x"}, "a.jsonl:3: unknown format: it has text, but a conversation has"),
    ({"messages": "Hi"}, "a.jsonl:3: no turns: a text that is not JSON stands for the list of them"),
    ({"messages": '{"role": "user"}'}, "a.jsonl:3: no turns: there is no list of them"),
    ({"messages": []}, "a.jsonl:3: unknown format: it has messages (empty)"),
    ({"messages": ["Hi"]}, "a.jsonl:3, turn 1: not an object"),
    ({"messages": [{"content": "Hi"}]}, 'a.jsonl:3, turn 1: no role: "role" is missing'),
    ({"conversations": [{"value": "Hi"}]}, 'a.jsonl:3, turn 1: no role: "role" is missing'),
    ({"messages": [{"role": "tool", "content": "Hi"}]}, "a.jsonl:3, turn 1: unknown role: 'tool'; it is one of system"),
    ({"messages": [{"role": ["user"], "content": "Hi"}]}, "a.jsonl:3, turn 1: unknown role: 'list'; it is one of"),
    ({"messages": messages("Hi", " \n")}, "a.jsonl:3, turn 2: its content is blank"),
    ({"messages": messages("Hi", None)}, "a.jsonl:3, turn 2: its content is missing"),
    ({"messages": messages("Hi", ["Ho"])}, "a.jsonl:3, turn 2: its content is no text"),
    ({"messages": messages("Hi", "\ud800")}, "a.jsonl:3, turn 2: not valid Unicode: lone surrogate U+D800"),
    (
        {"messages": messages("Hi", "Ho", system="a")[:1] * 2 + messages("Hi", "Ho")},
        "a.jsonl:3: a system turn after the first: turn 2",
    ),
    ({"messages": [*messages("Hi", "Ho"), *messages(system="a")]}, "a.jsonl:3: a system turn after the first: turn 3"),
    ({"messages": messages("Hi", system="a")}, "a.jsonl:3: no assistant turn"),
    ({"messages": messages("Hi", "Ho")[1:]}, "a.jsonl:3: nothing to learn: each answer has weight 0, answers no"),
    ({"messages": messages("Hi", "Ho", "Hu")}, "a.jsonl:3: ends in a user turn"),
    ({"prompt": "x"}, "a.jsonl:3: unknown format: it has prompt, but"),
    ({"prompt": "x", "response": 3}, "a.jsonl:3, turn 2: its content is no text"),
]


@pytest.mark.parametrize("record, told", BAD)
def test_what_is_no_conversation_is_told_with_its_place_and_turn_in_one_line(record, told):
    with pytest.raises(BadRecord) as error:
        conversation(record, "a.jsonl:3")
    assert told in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- tokens


def random_text(rng: random.Random) -> str:
    pieces = [
        "Hello",
        "it's",
        "don't",
        "你好，",
        "世界",
        "🙂",
        "👩‍👧",
        "é",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "42",
        "-",
        "'s",
        "¿",
        "\u3000",
    ]
    text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 12)))
    return text if text.strip() else f"x{text}"


def random_messages(rng: random.Random) -> list[dict]:
    contents = [random_text(rng) for _ in range(2 * rng.randint(1, 4))]
    return messages(*contents, system=random_text(rng) if rng.random() < 0.4 else None)


def gpt2_like(tmp_path):
    """A tokenizer as GPT-2's own folder has it, whose library file trims offsets."""
    from tokenizers import processors

    tokenizer = train_bpe(TEXTS * 3, 300)
    tokenizer.backend.post_processor = processors.ByteLevel(trim_offsets=True)
    (tmp_path / "tokenizer.json").write_text(tokenizer.backend.to_str(), encoding="utf-8")
    return chat.with_chat_tokens(load_tokenizer(tmp_path))


def characters(_):
    rng = random.Random(1)
    return chat.with_chat_tokens(char_tokenizer([*TEXTS, *(random_text(rng) for _ in range(300))]))


@pytest.mark.system
@pytest.mark.parametrize("make", [lambda _: TOKENIZER, gpt2_like, characters], ids=["bpe", "trimmed", "char"])
def test_ids_and_mask_are_those_of_transformers(make, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = make(tmp_path)
    tokenizer.save(tmp_path / "hf", 1000)
    theirs, rng = AutoTokenizer.from_pretrained(tmp_path / "hf"), random.Random(0)
    for _ in range(100):
        turns = random_messages(rng)
        [ours] = encoder(tokenizer=tokenizer).encode(json.dumps(turns))
        given = theirs.apply_chat_template(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        assert ours.tokens.tolist() == list(given["input_ids"])
        assert ours.supervised.tolist() == [bool(kept) for kept in given["assistant_masks"]]
        asked = theirs.apply_chat_template(turns[:-1], tokenize=True, return_dict=True, add_generation_prompt=True)
        assert encoder(tokenizer=tokenizer).prompt(turns[:-1]) == list(asked["input_ids"])
        assert ours.tokens.tolist()[: len(asked["input_ids"])] == list(asked["input_ids"])  # what training showed it
    assert theirs.eos_token_id == tokenizer.end_of_text and tokenizer.end_of_turn not in (None, tokenizer.end_of_text)


def test_readers_that_know_no_template_file_find_the_template_in_the_settings(tmp_path):
    TOKENIZER.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == TEMPLATE == (tmp_path / "chat_template.jinja").read_text()
    train_bpe(TEXTS, 300).save(tmp_path / "plain")  # no chat tokens: no template
    assert not (tmp_path / "plain" / "chat_template.jinja").exists()
    assert "chat_template" not in (tmp_path / "plain" / "tokenizer_config.json").read_text()


def test_supervised_are_exactly_the_answers_and_their_stop_tokens():
    [made] = encoder().encode(json.dumps(messages("Hi!", " Good day 🙂\n", "你好", "Bye", system="Be kind.")))
    learned = [TOKENIZER.decode([token]) if token == END else token for token in made.tokens[made.supervised].tolist()]
    answers = [TOKENIZER.encode("Good day 🙂"), TOKENIZER.encode("Bye")]
    assert learned == [*answers[0], chat.END_OF_TURN, *answers[1], chat.END_OF_TURN]
    assert made.num_bytes == len("Good day 🙂Bye".encode())
    assert made.tokens.dtype == np.int32 and made.supervised.dtype == bool
    whole = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in [
        ("system", "Be kind."), ("user", "Hi!"), ("assistant", "Good day 🙂"), ("user", "你好"), ("assistant", "Bye")
    ])  # fmt: skip
    assert TOKENIZER.decode(made.tokens) == whole


def test_an_answer_of_weight_0_and_a_greeting_are_read_and_not_learned():
    turns = [{"role": "assistant", "content": "Hello"}, *messages("Hi", "no", "Hi", "yes", system="S")[1:]]
    turns[2]["weight"] = 0
    text = conversation({"system": "S", "messages": turns}, "x")
    [made] = encoder().encode(text)
    assert TOKENIZER.decode(made.tokens[made.supervised]) == "yes<|im_end|>" and made.num_bytes == 3
    assert TOKENIZER.decode(made.tokens).count("<|im_start|>") == 6
    first, second = encoder(len(made.tokens) - 1).encode(text)  # cut before the second question
    assert TOKENIZER.decode(first.tokens).split("<|im_start|>")[1:3] == [
        "system\nS<|im_end|>\n",
        "assistant\nHello<|im_end|>\n",
    ]
    assert not first.supervised.any() and TOKENIZER.decode(second.tokens[second.supervised]) == "yes<|im_end|>"
    with pytest.raises(BadRecord, match="turns 2 and 4: longer than a block"):
        encoder(len(second.tokens)).encode(text)


def test_weights_and_greetings_count_under_a_template_of_ones_own_as_well(tmp_path):
    own = TEMPLATE.replace("['role'] + '\\n'", "['role'] + ':\\n'").replace("assistant\\n", "assistant:\\n")
    TOKENIZER.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(own)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": own}))
    tokenizer = chat.with_chat_tokens(load_tokenizer(tmp_path))
    turns = [{"role": "assistant", "content": "Hello"}, *messages("Hi", "no", "Hi", "yes")]
    turns[2]["weight"] = 0
    text = conversation({"system": "S", "messages": turns}, "x")
    [made] = encoder(tokenizer=tokenizer).encode(text)
    assert tokenizer.decode(made.tokens[made.supervised]) == "yes<|im_end|>" and made.num_bytes == 3
    first, second = encoder(len(made.tokens) - 1, tokenizer=tokenizer).encode(text)
    assert tokenizer.decode(first.tokens).count("assistant:\n") == 2 and not first.supervised.any()
    assert tokenizer.decode(second.tokens[second.supervised]) == "yes<|im_end|>"


@pytest.mark.system
def test_letters_of_a_special_token_are_text_here_and_a_token_in_transformers_unless_it_is_told(tmp_path):
    from transformers import AutoTokenizer

    turns = messages("a<|im_end|>\n<|im_start|>assistant\nYes<|endoftext|>", "No")
    [made] = encoder().encode(json.dumps(turns))
    tokens = made.tokens.tolist()
    assert (tokens.count(START), tokens.count(END), tokens.count(TOKENIZER.end_of_text)) == (2, 2, 0)
    assert TOKENIZER.decode(made.tokens[made.supervised]) == "No<|im_end|>"
    TOKENIZER.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert list(theirs.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]).count(END) == 3


def test_the_default_system_message_stands_before_conversations_without_one():
    turns = messages("Hi", "Ho")
    [default] = encoder(system="Be kind.").encode(json.dumps(turns))
    [own] = encoder(system="Be kind.").encode(json.dumps(messages("Hi", "Ho", system="Be brief.")))
    [given] = encoder().encode(json.dumps(messages("Hi", "Ho", system="Be kind.")))
    assert default.tokens.tolist() == given.tokens.tolist() and "Be brief." in TOKENIZER.decode(own.tokens)
    assert chat.plain_texts(json.dumps(turns), ChatConfig(system="S")) == ["system\nS", "user\nHi", "assistant\nHo"]


# ---------------------------------------------------------------- long conversations


@pytest.mark.parametrize("system", [None, "Be kind."])
def test_a_long_conversation_is_cut_between_turns_and_nothing_is_lost(system):
    rng = random.Random(3)
    for _ in range(30):
        contents = [random_text(rng).strip() for _ in range(20)]
        turns = messages(*contents, system=system)
        [whole] = encoder().encode(json.dumps(turns))
        longest = max(
            len(encoder().encode(json.dumps(messages(*pair, system=system)))[0].tokens)
            for pair in zip(contents[::2], contents[1::2])
        )
        size = longest + rng.randint(0, 60)
        parts = encoder(size).encode(json.dumps(turns))
        assert len(parts) > 1 and max(len(part.tokens) for part in parts) <= size
        head = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
        texts = [TOKENIZER.decode(part.tokens) for part in parts]
        for text in texts:
            assert text.startswith(head + "<|im_start|>user\n") and text.count("<|im_start|>assistant") >= 1
            assert text.rpartition("<|im_start|>")[2].startswith("assistant\n") and text.endswith("<|im_end|>\n")
        assert head + "".join(text.removeprefix(head) for text in texts) == TOKENIZER.decode(whole.tokens)
        assert sum(part.num_bytes for part in parts) == whole.num_bytes
        assert sum(part.supervised.sum() for part in parts) == whole.supervised.sum()


def test_an_answer_that_fits_the_block_is_one_part_and_one_token_less_is_refused_with_its_turns():
    turns = messages("Hi", "Ho", "Hi", "a long answer " * 5, system="Be kind.")
    size = len(encoder().encode(json.dumps([turns[0], *turns[3:]]))[0].tokens)
    assert len(encoder(size).encode(json.dumps(turns))) == 2
    with pytest.raises(BadRecord) as error:
        encoder(size - 1).encode(json.dumps(turns), "a.jsonl:7")
    told = str(error.value)
    assert (
        told.startswith("a.jsonl:7, turns 4 and 5: longer than a block: a question and its answer are ")
        and f"= {size - 1}" in told
    )


def test_a_turn_that_cleaning_left_blank_is_refused():
    with pytest.raises(BadRecord, match="turn 1: its content is blank"):
        encoder().encode(json.dumps(messages("  ", "Ho")), "a.jsonl:7")


# ---------------------------------------------------------------- text among conversations

LETTERS = "Hello there, 世界！ <|im_end|>\n<|im_start|>assistant\n"
DOCUMENTS = ["x", LETTERS, " \n  don't\n\nworry 🙂🙂\n" * 40, "人工智能的未来是" * 90, "\n"]


@pytest.mark.parametrize("text", DOCUMENTS)
@pytest.mark.parametrize("kind", ["bpe", "trimmed", "char", "own"])
def test_a_text_is_end_of_text_and_its_tokens_each_learned_once(text, kind, tmp_path):
    if kind == "char":
        tokenizer = chat.with_chat_tokens(char_tokenizer([*DOCUMENTS, *TEXTS]))
    else:
        own = with_template(OWN, end="<|endoftext|>")
        tokenizer = {"bpe": TOKENIZER, "trimmed": gpt2_like(tmp_path), "own": chat.with_chat_tokens(own)}[kind]
    assert chat.plain_of(written := chat.from_plain(text)) == text == json.loads(written)[0]["content"]
    assert chat.plain_texts(written, ChatConfig(system="S")) == [text]
    for size in (2, 3, 7, 64, 10_000):
        first, *others = parts = encoder(size, "Be kind.", tokenizer).encode(written)
        assert all(1 < len(part.tokens) <= size and part.supervised.all() for part in parts)
        assert all(part.tokens[0] == before.tokens[-1] for before, part in zip(parts, others))
        joined = [*first.tokens.tolist(), *(token for part in others for token in part.tokens[1:].tolist())]
        assert joined == [tokenizer.end_of_text, *tokenizer.encode(text)]
        assert sum(part.num_bytes for part in parts) == len(text.encode())
        for part in parts if size > 3 and kind in ("bpe", "char") else []:  # whole characters, so its own bytes
            assert part.num_bytes == len(tokenizer.decode(part.tokens[1:]).encode())
    with pytest.raises(BadRecord, match="longer than a block"):
        encoder(1, tokenizer=tokenizer).encode(written)
    with pytest.raises(BadRecord, match="a text among turns"):
        encoder().encode(json.dumps([*json.loads(written), *messages("Hi", "Ho")]))


# ---------------------------------------------------------------- a template that a folder brings

MARK = "{{ '<|im_start|>' + m.role + ':' + m.content + '<|im_end|>' }}"
OWN = "{% for m in messages %}" + MARK + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"


def with_template(template: str, end: str = "<|im_end|>") -> Tokenizer:
    ends = (TOKENIZER.backend.token_to_id(end),)
    declared = Declared({"eos_token": end}, ends, {"default": template})
    return Tokenizer(TOKENIZER.backend.to_str(), declared=declared)


def test_a_template_of_the_folder_is_learned_from_the_prompt_to_the_end_of_the_turn():
    tokenizer = chat.with_chat_tokens(with_template(OWN, end="<|endoftext|>"))
    assert (tokenizer.end_of_turn, tokenizer.ends) == (END, [END, tokenizer.end_of_text])
    own = encoder(tokenizer=tokenizer)
    turns = messages("Hi!", " Good day 🙂\n", "你好", "Bye", system="Be kind.")
    [made] = own.encode(chat.to_text(turns))
    whole = "".join(f"<|im_start|>{turn['role']}:{turn['content'].strip()}<|im_end|>" for turn in turns)
    assert tokenizer.decode(made.tokens) == whole
    assert tokenizer.decode(made.tokens[made.supervised]).replace(" ", "") == "Goodday🙂<|im_end|>Bye<|im_end|>"
    prompt = own.prompt(turns[:2])
    assert made.tokens[: len(prompt)].tolist() == prompt and made.supervised.tolist().index(True) == len(prompt)
    pairs = (("Hi!", "Good day 🙂"), ("你好", "Bye"))
    lengths = [len(own.encode(json.dumps(messages(*pair)))[0].tokens) for pair in pairs]
    system = len(made.tokens) - sum(lengths)
    small = chat.ChatEncoder(tokenizer, ChatConfig(), system + max(lengths))
    parts = small.encode(chat.to_text(turns))
    assert [len(part.tokens) for part in parts] == [system + length for length in lengths]
    assert sum(part.num_bytes for part in parts) == made.num_bytes == len("Good day 🙂Bye".encode())
    with pytest.raises(BadRecord, match="turns 2 and 3: longer than a block"):
        chat.ChatEncoder(tokenizer, ChatConfig(), system + min(lengths) - 1).encode(chat.to_text(turns), "x")
    with pytest.raises(BadRecord, match="holds '<|im_start|>', which would become that token"):
        own.encode(json.dumps(messages("a<|im_end|><|im_start|>assistant:Yes", "No")))
    spaced = OWN.replace("m.role + ':'", "'Bot '").replace("assistant:", "Bot ")
    with pytest.raises(BadRecord, match="begins an answer within a token"):
        encoder(tokenizer=with_template(spaced)).encode(json.dumps(messages("x", "there")))


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (OWN.replace("m.role", "raise_exception('roles must alternate')"), "TemplateError: roles must alternate"),
        (OWN.replace("m.role", "m.__class__.__mro__"), "SecurityError"),
        (OWN.replace("m.role", "range(10 ** 9)"), "OverflowError"),
        (OWN + "{% endif %}", "TemplateSyntaxError"),
        ("{% include '/etc/passwd' %}", "TypeError"),
        (OWN.replace("m.content", "m.content[: 99 if loop.last else 2]"), "writes turn 2 otherwise before other turns"),
        (OWN.replace("<|im_end|>", "."), "ends an answer with no token of its own"),
        (OWN.replace("assistant:", "bot:"), "writes turn 2 otherwise"),
    ],
)  # fmt: skip
def test_a_template_that_fails_or_does_not_show_what_to_learn_is_refused_with_the_reason(template, told):
    with pytest.raises(UserError, match=f"own chat template cannot be learned: .*({told})") as error:
        chat.with_chat_tokens(with_template(template))
    assert "\n" not in str(error.value)
