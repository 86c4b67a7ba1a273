"""Tokenizer folders as people have them: the ids are those of transformers, whatever files say what the tokens are."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxgpt.data.tokenizer import END_OF_TEXT
from jaxgpt.data.tokenizer_folder import load_tokenizer
from jaxgpt.errors import UserError

TEXTS = [f"第{i}句：这是一个句子，数字是{i * 3}。 Line {i} says Hello World, café!\n" for i in range(30)]
SAMPLES = [
    "".join(TEXTS[:3]) + "  two  spaces\tand a tab, ÀÉ 🙂 中文English混排",
    "hello <tool> WORLD Line 7 </S> and [sep",
    " a leading space, e\u0301 and \u3000 wide",
    "a" * 600,
]
TURN = ("<|im_start|>", "<|im_end|>")


def bpe(*special: str, **options: bool) -> tokenizers.Tokenizer:
    """A byte-level BPE; `special` are its special tokens, trained in."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=list(special), initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def write(
    folder: Path, backend: tokenizers.Tokenizer | None = None, change: dict | None = None, **files: object
) -> None:
    """tokenizer.json with top-level changes, and JSON files by their names without a suffix."""
    if backend is not None:
        content = json.loads(backend.to_str()) | (change or {})
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def pair(folder: Path, ends_of_lines: str = "\n", **files: object) -> dict[str, int]:
    """vocab.json and merges.txt."""
    model = json.loads(bpe(END_OF_TEXT).to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"]), ""]
    (folder / "merges.txt").write_bytes(ends_of_lines.join(lines).encode())
    write(folder, **files)
    return model["vocab"]


def with_dropout(folder: Path) -> None:
    backend = bpe(END_OF_TEXT)
    write(folder, backend, {"model": json.loads(backend.to_str())["model"] | {"dropout": 0.5}})


def with_truncation(folder: Path) -> None:
    backend = bpe(END_OF_TEXT)
    backend.enable_truncation(8)
    write(folder, backend, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT})


def with_padding(folder: Path) -> None:
    backend = bpe(END_OF_TEXT)
    backend.enable_padding(length=700, pad_token=END_OF_TEXT)
    write(folder, backend, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})


def with_added_tokens(folder: Path) -> None:
    vocab = pair(folder, tokenizer_config={"eos_token": "<|im_end|>", "tokenizer_class": "GPT2Tokenizer"})
    ids = {"<|im_end|>": len(vocab), "<|im_start|>": len(vocab) + 1, "<tool>": len(vocab) + 2}
    write(folder, added_tokens=ids)


def with_decoder_of_added_tokens(folder: Path) -> None:
    size = len(pair(folder))
    flags = dict(lstrip=False, rstrip=False, single_word=False)
    tokens = {"</s>": True, "<tool>": False, "Line": False}
    table = {
        str(size + i): {"content": name, "special": special, "normalized": not special, **flags}
        for i, (name, special) in enumerate(tokens.items())
    }
    write(folder, tokenizer_config={"added_tokens_decoder": table, "eos_token": "</s>"}, added_tokens={"<x>": size})


def with_a_special_tokens_map(folder: Path) -> None:
    token = {"content": "</s>", "lstrip": False, "rstrip": False, "normalized": True, "single_word": False}
    pair(folder, special_tokens_map={"eos_token": token, "additional_special_tokens": list(TURN)}, tokenizer_config={})


def with_extra_tokens(folder: Path) -> None:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "extra_special_tokens": TURN}
    write(folder, bpe(END_OF_TEXT), tokenizer_config=settings)


def with_a_gap(folder: Path) -> None:
    backend = bpe(END_OF_TEXT)
    content = json.loads(backend.to_str())
    gap = content["added_tokens"][0] | {"id": 900, "content": "<gap>"}
    write(folder, backend, {"added_tokens": [*content["added_tokens"], gap]})


def with_plain_added_tokens(folder: Path) -> None:
    backend = bpe(END_OF_TEXT)
    backend.add_tokens([AddedToken("  ", special=False), AddedToken(" WORLD", lstrip=True, special=False)])
    write(folder, backend, tokenizer_config={"eos_token": END_OF_TEXT})


def with_a_start_of_text(folder: Path) -> None:
    backend = bpe("<s>", END_OF_TEXT)
    added = [("<s>", 0), (END_OF_TEXT, 1)]
    template = processors.TemplateProcessing(single=f"<s> $A {END_OF_TEXT}", special_tokens=added)
    backend.post_processor = template
    settings = {"eos_token": END_OF_TEXT, "bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    write(folder, backend, tokenizer_config=settings)


def with_a_prefix_space(folder: Path) -> None:
    write(folder, bpe(END_OF_TEXT), tokenizer_config={"add_prefix_space": True, "tokenizer_class": "GPT2TokenizerFast"})


def with_a_prefix_space_in_the_rules(folder: Path) -> None:
    settings = {"eos_token": END_OF_TEXT, "tokenizer_class": "PreTrainedTokenizerFast"}
    write(folder, bpe(END_OF_TEXT, add_prefix_space=True), tokenizer_config=settings)


def with_byte_fallback(folder: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=450, special_tokens=names))
    added = [token for token in json.loads(backend.to_str())["added_tokens"] if token["id"] < 3]
    eos = {"content": "</s>", "__type": "AddedToken", "special": True}
    settings = {"eos_token": eos, "bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    write(folder, backend, {"added_tokens": added}, tokenizer_config=settings | {"add_bos_token": True})


def with_two_ends(folder: Path) -> None:
    backend = bpe(END_OF_TEXT)
    backend.add_special_tokens(list(TURN))
    write(folder, backend, tokenizer_config={"eos_token": "<|im_end|>", "pad_token": END_OF_TEXT})


def with_a_normalizer(folder: Path) -> None:
    backend = bpe("</s>")
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    write(folder, backend, tokenizer_config={"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"})


def with_a_byte_order_mark(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + bpe(END_OF_TEXT).to_str().encode())


def bert_vocabulary() -> list[str]:
    characters = sorted({*"".join(TEXTS).lower(), *"".join(TEXTS)} - {" ", "\n"})
    parts = [f"##{c}" for c in characters if c.isascii()]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *parts, "hello", "Hello"]


def bert(folder: Path, **settings: object) -> None:
    (folder / "vocab.txt").write_text("\n".join(bert_vocabulary()) + "\n", encoding="utf-8")
    names = {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    }
    write(folder, tokenizer_config={"tokenizer_class": "BertTokenizer", **settings}, special_tokens_map=names)


def bert_with_crlf(folder: Path) -> None:
    bert(folder, do_lower_case=False)
    (folder / "vocab.txt").write_bytes("\r\n".join(bert_vocabulary()).encode())


def bert_json(folder: Path) -> None:
    vocab = {token: number for number, token in enumerate(bert_vocabulary())}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    backend.add_special_tokens(bert_vocabulary()[:5])
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    write(folder, backend, tokenizer_config={"tokenizer_class": "BertTokenizer", "do_lower_case": False})


FOLDERS: dict[str, tuple[Callable[[Path], None], str, str | None]] = {
    # name: (what writes it, its end token, a word of the warning)
    "tokenizer.json": (lambda folder: write(folder, bpe(END_OF_TEXT)), END_OF_TEXT, None),
    "vocab and merges": (lambda folder: pair(folder) and None, END_OF_TEXT, None),
    "CRLF merges": (lambda folder: pair(folder, "\r\n") and None, END_OF_TEXT, None),
    "truncation": (with_truncation, END_OF_TEXT, "truncation is stored"),
    "padding": (with_padding, END_OF_TEXT, "padding is stored"),
    "dropout": (with_dropout, END_OF_TEXT, "dropout is stored"),
    "added_tokens.json": (with_added_tokens, END_OF_TEXT, None),
    "added_tokens_decoder": (with_decoder_of_added_tokens, END_OF_TEXT, None),
    "special_tokens_map.json": (with_a_special_tokens_map, END_OF_TEXT, None),
    "extra_special_tokens": (with_extra_tokens, END_OF_TEXT, None),
    "gap": (with_a_gap, END_OF_TEXT, None),
    "plain added tokens": (with_plain_added_tokens, END_OF_TEXT, None),
    "start of text": (with_a_start_of_text, END_OF_TEXT, None),
    "prefix space": (with_a_prefix_space, END_OF_TEXT, None),
    "prefix space in the rules": (with_a_prefix_space_in_the_rules, END_OF_TEXT, None),
    "byte fallback": (with_byte_fallback, "</s>", None),
    "two ends": (with_two_ends, END_OF_TEXT, None),
    "normalizer": (with_a_normalizer, "</s>", None),
    "byte order mark": (with_a_byte_order_mark, END_OF_TEXT, None),
    "bert": (lambda folder: bert(folder), "[SEP]", None),
    "bert, case": (lambda folder: bert(folder, do_lower_case=False, strip_accents=True), "[SEP]", None),
    "bert, Chinese words": (lambda folder: bert(folder, tokenize_chinese_chars=False), "[SEP]", None),
    "bert, eos": (lambda folder: bert(folder, eos_token="[CLS]"), "[CLS]", None),
    "bert, CRLF": (bert_with_crlf, "[SEP]", None),
    "bert, tokenizer.json": (bert_json, "[SEP]", None),
}


@pytest.mark.system
@pytest.mark.parametrize("name", FOLDERS)
def test_ids_are_those_of_transformers_as_they_are_and_saved_again(name, tmp_path, caplog):
    from transformers import AutoTokenizer, GPT2Config

    make, end, warning = FOLDERS[name]
    folder, again = tmp_path / "given", tmp_path / "again"
    folder.mkdir()
    make(folder)
    with caplog.at_level(logging.WARNING, "jaxgpt"):
        ours = load_tokenizer(folder)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("jaxgpt")]
    assert [warning in line for line in said] == [True] if warning else name in ("gap",) or not said
    assert ours.end_of_text == ours.backend.token_to_id(end)
    ours.save(again)
    saved = load_tokenizer(again)
    assert (saved.digest, saved.ends) == (ours.digest, ours.ends)
    if not name.startswith("byte order"):  # transformers cannot read it
        write(folder, config={"model_type": "gpt2"})
        for where in (folder, again):
            theirs = AutoTokenizer.from_pretrained(where, config=GPT2Config())
            for text in SAMPLES:
                expected = theirs(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
                assert ours.encode(text) == saved.encode(text) == ours.encode_batch([text])[0].tolist() == expected
                assert ours.decode(expected) == theirs.decode(expected, clean_up_tokenization_spaces=False)


def test_the_ids_of_a_folder_in_the_forms_that_used_to_go_wrong(tmp_path, caplog):
    """Without transformers: what stored state changed, and the ids that side files decide."""
    text, expected = SAMPLES[0], None
    for name, make in {"plain": FOLDERS["tokenizer.json"][0], "cut": with_truncation, "padded": with_padding}.items():
        (folder := tmp_path / name).mkdir()
        make(folder)
        expected = expected or load_tokenizer(folder).encode(text)
        assert load_tokenizer(folder).encode(text) == expected and len(expected) > 100
    (folder := tmp_path / "dropout").mkdir()
    with_dropout(folder)
    assert len({tuple(load_tokenizer(folder).encode(text)) for _ in range(5)}) == 1
    (folder := tmp_path / "added").mkdir()
    with_added_tokens(folder)
    added = load_tokenizer(folder)
    assert [added.backend.token_to_id(name) for name in ("<|im_end|>", "<|im_start|>", "<tool>")] == [340, 341, 342]
    assert added.ends == [340, added.end_of_text]
    chatting = added.with_special_tokens(TURN)  # it has them: the ids stay
    assert (chatting.end_of_turn, chatting.vocab_size) == (340, 343) and chatting.extends(added)
    (folder := tmp_path / "bert").mkdir()
    bert(folder)
    chinese = load_tokenizer(folder)
    vocabulary = bert_vocabulary()
    assert [vocabulary[i] for i in chinese.encode("这是Hello\n个 1")] == ["这", "是", "hello", "个", "1"]
    assert chinese.end_of_text == 3 and load_tokenizer(folder).decode(chinese.encode("是hello")) == "是 hello"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: write(f, tokenizer_config={"auto_map": {"AutoTokenizer": ["x.Y", None]}}), "code of its own"),
        (lambda f: write(f, generation_config={"eos_token_id": "0"}), "neither a token id nor a list"),
        (lambda f: write(f, added_tokens=[1]), "not a JSON object"),
        (lambda f: (f / "tokenizer_config.json").write_bytes(b"\xff\xfe{"), "not JSON"),
        (lambda f: write(f, tokenizer_config={"chat_template": [{"name": "default"}]}), "broken"),
        (
            lambda f: write(f, bpe(END_OF_TEXT), {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}),
            "broken",
        ),
        (lambda f: write(f, bpe(END_OF_TEXT), {"decoder": {"type": "None of them"}}), "broken"),
        (lambda f: write(f, bpe("x")), "no end-of-text token"),
    ],
)
def test_what_cannot_be_read_is_one_line(change, told, tmp_path):
    write(tmp_path, bpe(END_OF_TEXT))
    change(tmp_path)
    with pytest.raises(UserError, match=told) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_what_the_library_raises_while_it_reads_a_text_is_one_line(tmp_path):
    vocabulary = {token: i for i, token in enumerate(["[SEP]", "a"])}  # no [UNK]
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    write(tmp_path, backend, tokenizer_config={"eos_token": "[SEP]"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == [1]
    for read in (
        tokenizer.encode,
        lambda text: tokenizer.encode_batch([text]),
        lambda text: tokenizer.encode_from(text, 0),
    ):
        with pytest.raises(UserError, match=r"cannot read .*UNK"):
            read("b")


def test_what_is_declared_and_not_there_or_not_used_is_told(tmp_path, caplog):
    settings = {"eos_token": "e", "pad_token": "[PAD]", "tokenizer_class": "LlamaTokenizer"}
    write(tmp_path, bpe(END_OF_TEXT), tokenizer_config=settings, config={"model_type": "gpt2", "vocab_size": 340})
    write(tmp_path, generation_config={"eos_token_id": [0, 50256], "temperature": 0.6, "use_cache": True})
    with caplog.at_level(logging.WARNING, "jaxgpt"):
        tokenizer = load_tokenizer(tmp_path)
    said = "\n".join(record.getMessage() for record in caplog.records)
    for words in ("LlamaTokenizer by rules of its own", "[PAD] has no row", "50256 is no token", "temperature: kept"):
        assert words in said
    assert "'e' is an ordinary word" in said and "the eos_token e ends a text here, too" in said
    assert tokenizer.vocab_size == 340 and [tokenizer.decode([end]) for end in tokenizer.ends] == [END_OF_TEXT, "e"]
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").declared == tokenizer.declared
