"""Where documents come from: this Python's own library, text files, JSON lines, TFDS datasets.

The idea: a source is read front to back, as often as needed, always in the same order, and never held whole;
`source_key` says cheaply whether it is still the same without reading it.
"""

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from jaxgpt.config import DataConfig, UserError

SUFFIXES = {"stdlib": (".py", ".txt"), "text": (".txt", ".md", ".py"), "jsonl": (".jsonl",)}

# Parts of the library that are not source a person would write or read: tests, character tables and generated
# files (which differ between machines besides), other people's packages.
# fmt: off
_NOT_STDLIB = frozenset([
    "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "ensurepip",
    "site-packages", "dist-packages", "lib-dynload", "__pycache__", "__phello__",
])
# fmt: on
_NOT_STDLIB_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize", "__hello__")


class Document(NamedTuple):
    text: str
    split: Literal["train", "validation"] | None = None
    """The split that the source gives it; None where the source has no splits."""


def documents(data: DataConfig) -> Iterator[Document]:
    """The documents of `data`, blank ones left out, up to `data.max_bytes` of UTF-8.

    A file of text is one document, so is a line of JSON and an example of TFDS. Under `max_bytes` a TFDS
    validation split comes first and gets the share `validation_fraction`; the last document is cut between
    two characters.

    Raises:
        UserError: the source is missing, empty or broken; names the file and the line or byte.
    """
    if data.source.startswith("tfds:"):
        source = _tfds_documents(data)
    elif data.source == "jsonl":
        source = _jsonl_documents(data)
    else:
        source = (Document(_read_text(file)) for _, file in _files(data))
    count = 0
    for document in _limited(source, data.max_bytes):
        count += 1
        yield document
    if not count:
        raise UserError(f"{describe(data)}: no text in it; the corpus is empty")


def describe(data: DataConfig) -> str:
    """The source in a user's words, for messages."""
    return f'data.source = "{data.source}"' + (f", data.path = {data.path}" if data.path else "")


def short_name(data: DataConfig) -> str:
    """A name for folders: "stdlib", the stem of a file or folder, or "tfds-NAME"."""
    name = Path(data.path).resolve().stem if data.source in ("text", "jsonl") else data.source
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in name).strip("-") or data.source


def source_key(data: DataConfig) -> str:
    """A digest that changes when the source probably has: file names, sizes and times, or Python's version.

    Raises:
        UserError: the source is missing.
    """
    if data.source.startswith("tfds:"):
        root = _tfds_folder(data)
        if not _tfds_on_disk(data):
            _tfds_builder(data)  # downloads it, so that the key is that of later calls
        files = [(str(file.relative_to(root)), file) for file in _tfds_on_disk(data)]
        facts = [str(root.resolve())]
    elif data.source == "stdlib":  # no times: the same on every machine of one version
        facts = [platform.python_implementation(), platform.python_version()]
        facts += [f"{name} {file.stat().st_size}" for name, file in _files(data)]
        files = []
    else:
        files = _files(data)
        facts = [str(Path(data.path).resolve())]
    for name, file in files:
        stat = file.stat()
        facts.append(f"{name} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode("utf-8", "surrogateescape")).hexdigest()


def _limited(source: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    left = max_bytes
    for document in source:
        if not document.text.strip():
            continue
        if left is not None:
            text = _cut(document.text, left)
            left -= len(text.encode())
            if text:
                yield document._replace(text=text)
            if left <= 0 or len(text) < len(document.text):
                return
        else:
            yield document


def _cut(text: str, max_bytes: int) -> str:
    """The beginning of `text` that fits into `max_bytes` of UTF-8."""
    return text.encode()[:max_bytes].decode(errors="ignore")


# ---------------------------------------------------------------- files


def _files(data: DataConfig) -> list[tuple[str, Path]]:
    """(relative path, file) of the source's files, sorted by relative path."""
    stdlib = data.source == "stdlib"
    root = Path(sysconfig.get_paths()["stdlib"] if stdlib else data.path)
    if not root.exists():
        raise UserError(f"data.path = {root}: no such file or folder")
    if root.is_file():
        return [(root.name, root)]
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _left_out(name, stdlib)]
        for name in names:
            if name.endswith(SUFFIXES[data.source]) and not _left_out(name, stdlib):
                file = Path(folder, name)
                found.append((file.relative_to(root).as_posix(), file))
    if not found:
        raise UserError(f"data.path = {root}: no {', '.join(SUFFIXES[data.source])} file in this folder")
    return sorted(found)


def _left_out(name: str, stdlib: bool) -> bool:
    if stdlib:
        return name in _NOT_STDLIB or name.startswith(_NOT_STDLIB_PREFIXES)
    return name.startswith(".")  # hidden: .git, editors' files


def _read_text(file: Path) -> str:
    return _decode(_read_bytes(file), file).removeprefix("\ufeff")  # a byte order mark is no text


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except PermissionError:
        raise UserError(f"{file}: no permission to read it") from None


def _decode(content: bytes, file: Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 at byte {error.start} (0x{content[error.start]:02x}); convert it, for example "
            f"with: iconv -f latin1 -t utf-8"
        ) from None


def _jsonl_documents(data: DataConfig) -> Iterator[Document]:
    for _, file in _files(data):
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Document(_jsonl_text(line, f"{file}:{number}", data.text_field))


def _jsonl_text(line: bytes, where: str, field: str) -> str:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__}; each line must be an object with a text")
    if field not in record:
        raise UserError(f'{where}: no field "{field}"; it has {", ".join(record) or "no field"}: set data.text_field')
    return _checked(record[field], where, field)


def _checked(value: object, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise UserError(f'{where}: field "{field}" is not text but {type(value).__name__}; set data.text_field')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f'{where}: field "{field}" holds half a character (U+{ord(value[error.start]):04X}) '
            f"at position {error.start}, which is not Unicode text"
        ) from None
    return value


# ---------------------------------------------------------------- TFDS


def _tfds_documents(data: DataConfig) -> Iterator[Document]:
    builder = _tfds_builder(data)
    names = list(builder.info.splits)
    held_out = next((name for name in ("validation", "test") if name in names), None)
    train = "train" if "train" in names else None
    if train is None and held_out is None:
        raise UserError(f"{data.source}: no split train, validation or test, only {', '.join(names)}")
    if train is None:
        return _tfds_split(builder, held_out, None, data)
    if held_out is None:
        return _tfds_split(builder, train, None, data)
    share = data.max_bytes and max(1, int(data.max_bytes * data.validation_fraction))
    return _joined(
        _limited(_tfds_split(builder, held_out, "validation", data), share),
        _tfds_split(builder, train, "train", data),
    )


def _joined(*sources: Iterable[Document]) -> Iterator[Document]:
    for source in sources:
        yield from source


def _tfds_split(builder, name: str, split: str | None, data: DataConfig) -> Iterator[Document]:
    features = builder.info.features
    if data.text_field not in features:
        raise UserError(
            f'{data.source}: no feature "{data.text_field}"; it has {", ".join(features)}: set data.text_field'
        )
    for number, example in enumerate(builder.as_data_source(split=name)):
        where = f"{data.source}, split {name}, example {number}"
        value = example[data.text_field]
        try:
            value = value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 at byte {error.start}") from None
        yield Document(_checked(value, where, data.text_field), split)


def _tfds_name(data: DataConfig) -> str:
    return data.source.removeprefix("tfds:")


def _tfds_folder(data: DataConfig) -> Path:
    """The data_dir: data.path, or TFDS's own default."""
    if data.path:
        return Path(data.path)
    return Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def _tfds_on_disk(data: DataConfig) -> list[Path]:
    """The dataset_info.json of every version of the dataset in the data_dir."""
    pattern = f"{_tfds_name(data).replace(':', '/')}/**/dataset_info.json"
    return [file for file in sorted(_tfds_folder(data).glob(pattern)) if "incomplete" not in file.parent.name]


def _tfds_builder(data: DataConfig):
    """The dataset on disk in ArrayRecord form, or the one that TFDS downloads and writes in that form."""
    import tensorflow_datasets as tfds

    name, folder = _tfds_name(data), _tfds_folder(data)
    array_record = tfds.core.FileFormat.ARRAY_RECORD
    found = [file.parent for file in _tfds_on_disk(data)]
    on_disk = [tfds.builder_from_directory(path) for path in found]
    usable = [builder for builder in on_disk if builder.info.file_format == array_record]
    if usable:
        return max(usable, key=lambda builder: tfds.core.Version(builder.version))
    if on_disk:
        raise UserError(
            f"{found[0]}: stored as {on_disk[0].info.file_format.value}, which cannot be read without "
            f"TensorFlow; where TensorFlow is installed, run: tfds build {name} --file_format=array_record"
        )
    return _tfds_download(name, folder, array_record)


def _tfds_download(name: str, folder: Path, file_format):
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=folder, file_format=file_format)
        builder.download_and_prepare(file_format=file_format)
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"tfds:{name}: TFDS knows no dataset of this name, and {folder} holds none; see "
            "https://www.tensorflow.org/datasets/catalog/overview"
        ) from None
    except (ImportError, OSError) as error:  # those of `requests` are OSErrors
        request = getattr(error, "request", None)
        reason = f"no answer from {request.url}" if request else f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(
            f"tfds:{name}: cannot be downloaded and prepared here ({reason}); prepare it on another machine "
            f"with: tfds build {name} --file_format=array_record, and set data.path to its data_dir"
        ) from None
    return builder
