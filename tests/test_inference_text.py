"""Streamed text is the decoded text, cut at the first stop text, wherever the chunks end."""

import json
import random
import time

import jax
import numpy as np
import pytest

from jaxgpt.data.tokenizer import END_OF_TEXT, Tokenizer, char_tokenizer, train_bpe
from jaxgpt.errors import UserError
from jaxgpt.inference.decoder import build_decoder, generate
from jaxgpt.inference.sampling import SamplingOptions
from jaxgpt.inference.text import TextGeneration, TextStream, complete, fit_prompt
from jaxgpt.model import gpt2
from jaxgpt.settings import ModelConfig

ODD = "你好，世界。 🙂👩‍👩‍👧‍👦🇫🇷 e\u0301o\u0302 \u200d\ufffd\ufeff\x00\x07\x7f \u00a0ñ end\r\n\t"
CORPUS = ["the cat sat on the mat.\n" * 20, "def f(x):\n    return x + 1\n" * 20, "你好，世界。你们好。" * 9, ODD]


def bpe() -> Tokenizer:
    return train_bpe(CORPUS, 320)


def char() -> Tokenizer:
    return char_tokenizer([*CORPUS, END_OF_TEXT])


def added_tokens() -> Tokenizer:
    """A byte-level BPE with special tokens whose letters are, and are not, in the alphabet of bytes."""
    backend = bpe().backend
    backend.add_special_tokens(["<|user|>", "你好", "Ġé", "<0xE4>"])
    return Tokenizer(backend.to_str())


def byte_fallback() -> Tokenizer:
    """As SentencePiece makes them: "▁" is a space, bytes have tokens of their own, the first space is dropped."""
    import tokenizers
    from tokenizers import decoders, models

    words = [
        END_OF_TEXT,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁the",
        "▁cat",
        "s",
        "好",
        "é",
        "\n",
        "\ufffd",
    ]
    backend = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend.to_str())


def word_pieces() -> Tokenizer:
    import tokenizers
    from tokenizers import decoders, models

    words = [END_OF_TEXT, "the", "cat", "##s", "##好", ".", "n't", "don", "你", "[UNK]"]
    backend = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}))
    backend.decoder = decoders.WordPiece()
    return Tokenizer(backend.to_str())


def metaspace() -> Tokenizer:
    import tokenizers
    from tokenizers import decoders, models

    words = [END_OF_TEXT, "▁", "▁the", "▁cat", "s", "好", "▁▁"]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, END_OF_TEXT))
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend.to_str())


@pytest.fixture(scope="module", params=[bpe, char, added_tokens, byte_fallback, word_pieces, metaspace])
def tokenizer(request):
    return request.param()


def chunks(rng: random.Random, tokens: list[int]) -> list[list[int]]:
    """The tokens in parts of random lengths, some of them empty."""
    parts, start = [], 0
    while start < len(tokens):
        end = start + rng.randrange(5)
        parts.append(tokens[start:end])
        start = end
    return parts


def random_tokens(rng: random.Random, tokenizer: Tokenizer) -> list[int]:
    """Any tokens: bytes in any order, mixed with the tokens of real text that is cut in the middle."""
    any_of_them = [rng.randrange(tokenizer.vocab_size + 2) for _ in range(rng.randrange(12))]
    try:
        text = tokenizer.encode("".join(rng.choices(ODD, k=6)) + ODD[: rng.randrange(len(ODD))])
    except UserError:
        text = []
    start = rng.randrange(len(text) + 1)
    return any_of_them + text[start : start + rng.randrange(20)] + any_of_them[:3]


def cut(text: str, stop) -> str:
    return text[: min((text.index(end) for end in stop if end in text), default=len(text))]


def test_pieces_are_the_decoded_text_for_any_tokens_and_any_chunks(tokenizer):
    rng = random.Random(0)
    for _ in range(1000):
        tokens = random_tokens(rng, tokenizer)
        stream = TextStream(tokenizer)
        pieces = [stream.add(part) for part in chunks(rng, tokens)]
        assert "".join(pieces) + stream.finish() == tokenizer.decode(tokens), tokens
        assert not stream.stopped


def test_pieces_end_before_the_first_stop_text(tokenizer):
    rng, stopped = random.Random(1), 0
    for _ in range(1000):
        tokens = random_tokens(rng, tokenizer)
        text = tokenizer.decode(tokens)
        starts = [rng.randrange(len(text) + 1) for _ in range(rng.randrange(4))]
        ends = [text[start : start + rng.randrange(1, 9)] + rng.choice(["", "", "t", "\ufffd"]) for start in starts]
        stop = [end for end in ends if end]
        stream = TextStream(tokenizer, stop)
        pieces = [stream.add(part) for part in chunks(rng, tokens)]
        assert "".join(pieces) + stream.finish() == cut(text, stop), (tokens, stop)
        assert stream.stopped == any(end in text for end in stop)
        stopped += stream.stopped
    assert 300 < stopped < 900


def bytes_of(tokenizer: Tokenizer, content: bytes) -> list[int]:
    """One token a byte, whatever the bytes."""
    alphabet = sorted(range(256), key=lambda byte: not (0x21 <= byte < 0x7F or 0xA1 <= byte < 0xAD or byte >= 0xAE))
    characters = {byte: chr(byte if i < 188 else 256 + i - 188) for i, byte in enumerate(alphabet)}
    return [tokenizer.backend.token_to_id(characters[byte]) for byte in content]


def test_a_character_comes_with_its_last_byte_and_not_later():
    stream = TextStream(bpe())
    text = "a好🙂\u200dé"
    expected = [part for character in text for part in [""] * (len(character.encode()) - 1) + [character]]
    assert [stream.add([token]) for token in bytes_of(bpe(), text.encode())] == expected
    assert stream.finish() == ""


@pytest.mark.parametrize(
    "content, pieces, rest",
    [
        (b"\xffa", ["\ufffd", "a"], ""),  # no character begins so: no need to wait
        (b"\x80\x80", ["\ufffd", "\ufffd"], ""),
        (b"\xe5\xa5a", ["", "", "\ufffda"], ""),  # the third byte of a character is missing
        (b"\xe5\xa5\xe5\xa5\xbd", ["", "", "\ufffd", "", "好"], ""),
        (b"\xf0\x9f\x99", ["", "", ""], "\ufffd"),  # the end comes before the fourth
        (b"\xc0\x80", ["\ufffd", "\ufffd"], ""),  # an overlong zero
    ],
)
def test_bytes_that_are_no_character_are_replaced_as_soon_as_that_is_certain(content, pieces, rest):
    tokenizer = bpe()
    stream, tokens = TextStream(tokenizer), bytes_of(tokenizer, content)
    assert [stream.add([token]) for token in tokens] == pieces
    assert stream.finish() == rest
    assert tokenizer.decode(tokens) == "".join(pieces) + rest


def test_what_may_begin_a_stop_text_is_held_back_and_given_when_it_does_not():
    tokenizer = char_tokenizer(["abcdx\n"])
    stream = TextStream(tokenizer, ["abc\n", "bx"])
    assert [stream.add(tokenizer.encode(c)) for c in "dabdabcabx"] == ["d", "", "", "abd", "", "", "", "abc", "", "a"]
    assert stream.stopped
    assert stream.add(tokenizer.encode("dd")) == "" and stream.finish() == ""


def test_of_two_stop_texts_the_one_that_begins_first_counts():
    tokenizer = char_tokenizer(["abcdx"])
    for text, kept in (("xabcd", "x"), ("xabcx", "xa"), ("xabc", "xa")):
        stream = TextStream(tokenizer, ["abcd", "bc"])
        assert "".join(stream.add([token]) for token in tokenizer.encode(text)) + stream.finish() == kept
        assert stream.stopped


def test_a_stop_text_may_end_inside_a_token_and_hold_an_emoji():
    tokenizer = bpe()
    stream = TextStream(tokenizer, ["🙂 the c"])
    assert stream.add(tokenizer.encode("you 🙂 the cat")) == "you "
    assert stream.stopped


def test_a_continuation_keeps_the_space_that_a_text_of_its_own_would_lose():
    tokenizer = metaspace()
    the, cat = (tokenizer.backend.token_to_id(word) for word in ("▁the", "▁cat"))
    assert TextStream(tokenizer).add([cat]) == "cat"
    assert TextStream(tokenizer, after=[the]).add([cat]) == " cat"


def test_the_cost_of_a_token_does_not_grow_with_the_text(tokenizer):
    def seconds(count: int) -> float:
        stream, began = TextStream(tokenizer, ["a stop text that never comes"]), time.process_time()
        for token in tokens[:count]:
            stream.add([token])
        return time.process_time() - began

    rng = random.Random(2)
    tokens = [rng.randrange(tokenizer.vocab_size) for _ in range(16_000)]
    short, long = min(seconds(2000) for _ in range(3)), seconds(16_000)
    assert long < 24 * short  # 8 times the tokens; decoding all of them each time would be 64 times the work


def test_a_prompt_and_the_new_tokens_that_just_fit_are_left_alone():
    options = SamplingOptions(max_new_tokens=6)
    assert fit_prompt([1, 2, 3, 4], options, 10, truncate=False) == [1, 2, 3, 4]
    assert fit_prompt([], SamplingOptions(max_new_tokens=9), 10, truncate=True) == []


def test_a_prompt_too_long_is_refused_by_how_much_or_keeps_its_last_tokens():
    options = SamplingOptions(max_new_tokens=6)
    with pytest.raises(UserError, match=r"5 tokens and 6 new ones are 1 more .* n_positions = 10; .* at most 5 new"):
        fit_prompt([1, 2, 3, 4, 5], options, 10, truncate=False)
    assert fit_prompt([1, 2, 3, 4, 5], options, 10, truncate=True) == [2, 3, 4, 5]
    assert fit_prompt(range(100), options, 10, truncate=True) == [96, 97, 98, 99]
    with pytest.raises(UserError, match=r"100 tokens and 6 new ones are 96 more .*; shorten"):
        fit_prompt(range(100), options, 10, truncate=False)


def test_new_tokens_that_leave_no_room_for_a_prompt_are_refused_even_to_truncate():
    for truncate in (False, True):
        with pytest.raises(UserError, match=r"max_new_tokens = 10, .* at most 9"):
            fit_prompt([1], SamplingOptions(max_new_tokens=10), 10, truncate)


# ---------------------------------------------------------------- with a model

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=32, n_positions=64, dtype="float32")
PROMPTS = ["the cat", "你好", "", "def f(x):"]
OPTIONS = {"max_new_tokens": 40, "num_return_sequences": 2, "seed": 3}


@pytest.fixture(scope="module")
def text_model():
    """(decoder, tokenizer): random weights that are large, so its tokens are anything."""
    tokenizer, rng = bpe(), np.random.default_rng(0)
    _, shapes, _ = gpt2.abstract_model(MODEL, tokenizer.vocab_size)
    params = jax.device_put(jax.tree.map(lambda s: 0.2 * rng.standard_normal(s.shape, np.float32), shapes))
    return build_decoder(MODEL, tokenizer.vocab_size, params, tokenizer.end_of_text), tokenizer


def test_completions_are_the_decoded_continuations(text_model):
    decoder, tokenizer = text_model
    options = SamplingOptions(**OPTIONS)
    expected = generate(decoder, [tokenizer.encode(prompt) for prompt in PROMPTS], options)
    made = complete(decoder, tokenizer, PROMPTS, options)
    assert [len(completions) for completions in made] == [2] * len(PROMPTS)
    for completions, continuations in zip(made, expected, strict=True):
        for completion, continuation in zip(completions, continuations, strict=True):
            assert completion.text == tokenizer.decode(continuation.tokens)
            assert completion.tokens == continuation.tokens and completion.logprobs == continuation.logprobs
            assert completion.finish_reason == continuation.finish_reason
    assert complete(decoder, tokenizer, [tokenizer.encode(prompt) for prompt in PROMPTS], options) == made


def test_a_stop_text_ends_a_completion_and_changes_no_other(text_model):
    decoder, tokenizer = text_model
    wholes = [row for rows in complete(decoder, tokenizer, PROMPTS, SamplingOptions(**OPTIONS)) for row in rows]
    cuts = 0
    for one, other in zip(wholes, wholes[3:]):
        stop = tuple(text[len(text) // 2 :][:4] or "never" for text in (one.text, other.text))
        made = complete(decoder, tokenizer, PROMPTS, SamplingOptions(**OPTIONS, stop=stop))
        for completion, whole in zip([row for rows in made for row in rows], wholes, strict=True):
            is_cut = any(end in whole.text for end in stop)
            cuts += is_cut
            assert completion.text == cut(whole.text, stop)
            assert completion.finish_reason == ("stop" if is_cut else whole.finish_reason)
            count = len(completion.tokens)
            assert completion.tokens == whole.tokens[:count] and completion.logprobs == whole.logprobs[:count]
            if is_cut:  # the fewest tokens that hold the text
                assert TextStream(tokenizer).add(completion.tokens).startswith(completion.text)
                assert len(TextStream(tokenizer).add(completion.tokens[:-1])) < len(completion.text) or count == 0
            else:
                assert count == len(whole.tokens)
    assert 5 <= cuts < 5 * len(wholes)


def test_a_generation_can_be_left_with_what_was_made_so_far(text_model):
    decoder, tokenizer = text_model
    options = SamplingOptions(**OPTIONS)
    generation = TextGeneration(decoder, tokenizer, PROMPTS, options)
    texts = next(iter(generation))
    made = [row for rows in generation.completions for row in rows]
    wholes = [row for rows in complete(decoder, tokenizer, PROMPTS, options) for row in rows]
    assert [completion.text for completion in made] == texts
    unfinished = 0
    for completion, whole in zip(made, wholes, strict=True):
        assert whole.text.startswith(completion.text)
        count = len(completion.tokens)
        assert whole.tokens[:count] == completion.tokens and whole.logprobs[:count] == completion.logprobs
        unfinished += completion.finish_reason is None and 0 < count < 40
    assert unfinished > 2


def test_streamed_texts_are_the_completions(text_model):
    decoder, tokenizer = text_model
    options = SamplingOptions(**OPTIONS)
    generation, texts = TextGeneration(decoder, tokenizer, PROMPTS, options), [""] * 8
    rounds = 0
    for new in generation:
        rounds += 1
        texts = [text + piece for text, piece in zip(texts, new, strict=True)]
    assert rounds > 2
    assert generation.completions == complete(decoder, tokenizer, PROMPTS, options)
    assert texts == [completion.text for completions in generation.completions for completion in completions]


def test_text_can_always_be_written_as_utf8(text_model):
    """Random bytes are never handed out as lone surrogates."""
    decoder, tokenizer = text_model
    for completions in complete(decoder, tokenizer, PROMPTS, SamplingOptions(**OPTIONS, temperature=2, top_k=0)):
        for completion in completions:
            assert json.loads(json.dumps(completion.text, ensure_ascii=False).encode()) == completion.text
