"""Reads the tokenizer of any Hugging Face folder so that texts get the ids that transformers gives them.

A folder says in up to eight files what its tokens are: tokenizer.json, or vocab.json and merges.txt (GPT-2), or
vocab.txt (BERT); added_tokens.json, special_tokens_map.json and tokenizer_config.json add tokens; config.json and
generation_config.json name the tokens that end a text; chat_template.jinja is its chat template. State that only one
use of a tokenizer had, such as truncation, is cleared with a warning. Nothing in a folder runs as code.
"""

import functools
import json
import logging
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from jaxgpt.data.tokenizer import END_OF_TEXT, FILE, GENERATION, Declared, Tokenizer, library_errors
from jaxgpt.errors import UserError
from jaxgpt.storage import manifest

logger = logging.getLogger(__name__)

GPT2, BERT = "GPT2Tokenizer", "BertTokenizer"  # classes of transformers that build their rules anew
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULTS: dict[str | None, dict[str, str]] = {
    GPT2: dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    BERT: {
        name: f"[{name[:-6].upper()}]" for name in ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    },
}
# Classes that take tokenizer.json as it is.
_PLAIN = (None, "PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
# Settings of generation_config.json that change no text.
_SILENT = ("bos_token_id", "pad_token_id", "use_cache", "output_attentions", "output_hidden_states")


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has a file that `load_tokenizer` reads."""
    return any((folder / name).is_file() for name in (FILE, "vocab.json", "merges.txt", "vocab.txt"))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, with the ends of texts and the chat template that it declares.

    Raises:
        UserError: the files are missing or broken, the tokenizer needs code, or there is no end-of-text token.
    """
    folder = Path(folder)
    manifest.check(folder, unread="*.safetensors")
    try:
        with library_errors(f"{folder}: the tokenizer's files are broken"):
            return _load(folder)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # ValueError: JSON and UTF-8
        raise UserError(f"{folder}: the tokenizer's files are broken ({error!r})") from None


def _load(folder: Path) -> Tokenizer:
    settings, config = _object(folder / "tokenizer_config.json"), _object(folder / "config.json")
    if "AutoTokenizer" in (settings.get("auto_map") or ()):
        raise UserError(f"{folder}: its tokenizer is code of its own (auto_map), which is not run; save it as {FILE}")
    if "model_type" not in config:  # a config of another kind
        config = {}
    kind = settings.get("tokenizer_class") or config.get("tokenizer_class")
    kind = kind.removesuffix("Fast") if kind else GPT2 if config.get("model_type") == "gpt2" else None
    if (folder / FILE).is_file():
        content = json.loads(_text(folder / FILE))
        text = json.dumps(_cleared(content, kind, settings, folder), ensure_ascii=False)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        text, kind = _gpt2_json(folder, settings), GPT2
    elif (folder / "vocab.txt").is_file():
        text, kind = _bert_json(folder, settings), BERT
    else:
        names = f"{FILE}, vocab.json and merges.txt, or vocab.txt"
        raise UserError(f"{folder}: no tokenizer here; it must hold {names}")
    backend = tokenizers.Tokenizer.from_str(text)
    special = _DEFAULTS.get(kind, {}) | _special(folder, settings)
    if _add_tokens(backend, folder, settings, special, config.get("vocab_size")):
        text = backend.to_str()
    eos = special.get("eos_token") or (special.get("sep_token") if kind == BERT else None)
    end = END_OF_TEXT if backend.token_to_id(END_OF_TEXT) is not None else eos
    if end is None or backend.token_to_id(end) is None:
        raise UserError(
            f"{folder}: the tokenizer has no end-of-text token: neither {END_OF_TEXT} nor an eos_token in "
            "tokenizer_config.json; add one"
        )
    known = {name: token for name, token in special.items() if token and backend.token_to_id(token) is not None}
    generation = _object(folder / GENERATION)
    ends = _ends(folder, backend, known.get("eos_token"), generation, config)
    usual = {"eos_token_id": None, **dict.fromkeys(("bos_token_id", "pad_token_id"), backend.token_to_id(end))}
    kept = {key: generation[key] for key in generation if key not in usual or generation[key] != usual[key]}
    for name in ("eos_token_id", "transformers_version", "_from_model_config"):
        kept.pop(name, None)
    if unused := [key for key in kept if key not in _SILENT and kept[key] is not None]:
        _say(f"{folder / GENERATION}: {', '.join(unused)}: kept, but not used here; give sampling rules as options")
    return Tokenizer(text, end, Declared(known, ends, _templates(folder, settings), kept))


@functools.cache
def _say(line: str) -> None:
    """Log a warning, once a process: several parts of a command read the same folder."""
    logger.warning(line)


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8-sig")


def _object(file: Path) -> dict[str, Any]:
    """The JSON object of a file; {} if there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object")
    return content


# ---------------------------------------------------------------- rules


def _cleared(content: dict, kind: str | None, settings: dict, folder: Path) -> dict:
    """The content of a tokenizer.json without the state of one use, and with the rules that its class decides."""
    model, file = content["model"], folder / FILE
    len(model["vocab"])  # there must be one
    for place, name in ((content, "truncation"), (content, "padding"), (model, "dropout")):
        if place.get(name):
            _say(
                f"{file}: {name} is stored in it ({json.dumps(place[name])[:80]}); cleared, as it would change the ids"
            )
            place[name] = None
    splitter = content.get("pre_tokenizer") or {}
    if kind == GPT2 and "merges" in model and splitter.get("type") == "ByteLevel" and not content.get("normalizer"):
        splitter["add_prefix_space"] = bool(settings.get("add_prefix_space", False))
    elif kind == BERT and "continuing_subword_prefix" in model:
        content["normalizer"] = _bert_normalizer(settings)
    elif kind not in _PLAIN:
        _say(
            f"{file}: transformers builds a {kind} by rules of its own; those of this file are used. If ids "
            'differ there, write "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json'
        )
    return content


def _gpt2_json(folder: Path, settings: dict) -> str:
    lines = (line.removesuffix("\r") for line in _text(folder / "merges.txt").split("\n"))
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    vocab = json.loads(_text(folder / "vocab.json"))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[(first, second) for first, second in pairs]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    return backend.to_str()


def _bert_json(folder: Path, settings: dict) -> str:
    lines = _text(folder / "vocab.txt").removesuffix("\n").split("\n")
    vocab = {line.rstrip(): number for number, line in enumerate(lines)}
    unknown = _content(settings.get("unk_token")) or "[UNK]"
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return json.dumps(json.loads(backend.to_str()) | {"normalizer": _bert_normalizer(settings)}, ensure_ascii=False)


def _bert_normalizer(settings: dict) -> dict[str, Any]:
    made = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    return json.loads(made.__getstate__())


# ---------------------------------------------------------------- tokens


def _content(token: object) -> str | None:
    """The text of a token, which a file holds as text or as an object."""
    return token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else None


def _special(folder: Path, settings: dict) -> dict[str, str | None]:
    """{"eos_token": its text, ...} as the folder declares them; an old special_tokens_map.json comes first."""
    if "added_tokens_decoder" not in settings:
        settings |= _object(folder / "special_tokens_map.json")
    return {key: _content(value) for key, value in settings.items() if key.endswith("_token") and _is_token(value)}


def _is_token(value: object) -> bool:
    return value is None or _content(value) is not None


def _add_tokens(
    backend: tokenizers.Tokenizer, folder: Path, settings: dict, special: dict[str, str | None], rows: int | None
) -> bool:
    """Add the tokens of the side files in transformers' order, which decides their ids; False if there were none."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
    names = [*special.values(), *map(_content, extra.values() if isinstance(extra, dict) else extra)]
    wanted = list(dict.fromkeys(name for name in names if name))
    listed: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in settings:
        for number, token in settings["added_tokens_decoder"].items():
            listed[int(number)] = AddedToken(**{key: value for key, value in token.items() if key != "__type"})
    else:
        for name, number in _object(folder / "added_tokens.json").items():
            listed[number] = AddedToken(name, normalized=name not in wanted, special=name in wanted)
    known = backend.get_added_tokens_decoder()
    same = {repr(token) for token in known.values()}
    new = [token for _, token in sorted(listed.items(), key=lambda item: item[0]) if repr(token) not in same]
    there = {token.content for token in (*known.values(), *new)}
    size = backend.get_vocab_size() + sum(backend.token_to_id(token.content) is None for token in new)
    for name in wanted:
        number = backend.token_to_id(name)
        if name in there or (number is None and name == END_OF_TEXT):  # a default of the class, which is not there
            continue
        if number is None and rows is not None and size >= rows:
            _say(f"{folder}: the special token {name} has no row in the model (vocab_size = {rows}); left out")
            continue
        if name == special.get("eos_token") and backend.encode(name, add_special_tokens=False).ids == [number]:
            _say(f"{folder}: the eos_token {name!r} is an ordinary word: a text that holds it seems to end there")
        size += number is None
        new.append(AddedToken(name, special=True))
    for token in new:
        token.special = token.special or token.content in special.values()
    backend.add_tokens(new)
    for number, token in listed.items():
        if (actual := backend.token_to_id(token.content)) != number:
            _say(
                f"{folder}: the token {token.content} is declared as {number} and becomes {actual}, as in transformers"
            )
    return bool(new)


def _ends(
    folder: Path, backend: tokenizers.Tokenizer, eos: str | None, generation: dict, config: dict
) -> tuple[int, ...]:
    """The tokens that end a text: generation_config.json's, config.json's and tokenizer_config.json's together."""
    found: dict[int, str] = {}
    for name, ids in ((GENERATION, generation.get("eos_token_id")), ("config.json", config.get("eos_token_id"))):
        for number in ids if isinstance(ids, list) else () if ids is None else (ids,):
            if type(number) is not int:
                raise UserError(f"{folder / name}: eos_token_id = {ids!r} is neither a token id nor a list of them")
            if number < 0 or backend.id_to_token(number) is None:
                _say(f"{folder / name}: eos_token_id = {number} is no token of this tokenizer, so no text ends there")
            else:
                found.setdefault(number, name)
    if eos is not None and (number := backend.token_to_id(eos)) not in found:
        if found:
            line = "ends a text here, too; transformers' generate goes on there, as eos_token_id does not name it"
            _say(f"{folder}: the eos_token {eos} {line}")
        found[number] = "tokenizer_config.json"
    return tuple(found)


def _templates(folder: Path, settings: dict) -> dict[str, str]:
    """{"default": the chat template, ...}; a template file comes before those of tokenizer_config.json."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if found := {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}:
        return found
    stored = settings.get("chat_template")
    if isinstance(stored, list):
        return {entry["name"]: entry["template"] for entry in stored}
    return {} if not stored else dict(stored) if isinstance(stored, dict) else {"default": str(stored)}


def find_tokenizer(where: str) -> Tokenizer:
    """The tokenizer that a user names: its file or folder, a run, a checkpoint, or a prepared dataset."""
    path = Path(where).expanduser()
    if not path.exists():  # RUN@best: all checkpoints of a run have the same
        path = path.with_name(path.name.partition("@")[0])
    near = [path, path / "tokenizer", *([path.parent.parent / "tokenizer"] if path.is_dir() else [])]
    for folder in [path.parent] if path.name == FILE else near:
        if has_tokenizer(folder):
            return load_tokenizer(folder)
    what = "it holds no tokenizer" if path.exists() else "it is not there"
    raise UserError(f"--tokenizer {where}: {what}; give a tokenizer's folder, a run, a Hugging Face folder or hf:NAME")
