"""Sources with a name in a public catalog: TFDS and Hugging Face datasets.

Both have named splits of rows. The held-out one, validation or test, comes before train, so that a limit on the whole
can leave each its share.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.errors import BadRecord, UserError, how_to_install
from jaxgpt.preparation.documents import BadRecords, SourceRecord, SplitName
from jaxgpt.settings import SourceConfig

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

TFDS, HUGGINGFACE = "tfds:", "huggingface:"


def catalog_splits(
    part: SourceConfig, bad: BadRecords, field: str | None
) -> list[tuple[SplitName | None, Iterator[SourceRecord]]]:
    """(split, its rows): validation, then train; a single split is None, and the caller divides it."""
    if part.source.startswith(TFDS):
        builder = tfds_builder(part)
        return [
            (split, tfds_rows(builder, name, part, split, field, bad))
            for split, name in _splits(part, list(builder.info.splits))
        ]
    splits = _huggingface_call(part, "load_dataset", streaming=True)
    return [
        (split, _huggingface_rows(splits[name], name, part, split, field))
        for split, name in _splits(part, list(splits))
    ]


def catalog_facts(part: SourceConfig) -> tuple[list[str], list[tuple[str, Path]]]:
    """Facts that change with the dataset, without reading it: lines of text, and files by name."""
    if part.source.startswith(HUGGINGFACE):
        name, config, revision = hub_name(part)
        if re.fullmatch("[0-9a-f]{40}", revision):  # a commit never changes: nobody has to be asked
            return [name, config, revision, part.path or ""], []
        builder = _huggingface_call(part, "load_dataset_builder")
        files = builder.config.data_files or {}
        origins = [f"{split} {files[split].origin_metadata}" for split in files]  # revisions on the hub, times of files
        return [str(builder.config.name), str(builder.config.version), str(builder.hash), *origins], []
    root = _tfds_folder(part)
    if not tfds_on_disk(part):
        tfds_builder(part)  # downloads it, so that later calls give the same facts
    return [str(root.resolve())], [(str(file.relative_to(root)), file) for file in tfds_on_disk(part)]


def catalog_content(part: SourceConfig) -> tuple[list[str], list[Path]]:
    """Lines and files that are the dataset's content, wherever the files lie; of the hub, its name and revision."""
    if part.source.startswith(TFDS):
        if not tfds_on_disk(part):
            tfds_builder(part)
        folders = [file.parent for file in tfds_on_disk(part)]
        return [], [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
    if hub_name(part)[2]:
        return catalog_facts(part)[0], []
    found = _huggingface_call(part, "load_dataset_builder").config.data_files or {}
    files = [Path(name) for names in found.values() for name in names]
    if files and all(file.is_file() for file in files):
        return [f"{split} {len(found[split])}" for split in found], files
    return catalog_facts(part)[0], []


def _splits(part: SourceConfig, names: list[str]) -> list[tuple[SplitName | None, str]]:
    """(split of ours, its name in the catalog) of the splits that are used."""
    held_out = next((name for name in ("validation", "test") if name in names), None)
    if "train" in names and held_out:
        return [("validation", held_out), ("train", "train")]
    if "train" in names or held_out:
        return [(None, held_out or "train")]
    raise UserError(f"{part.source}: no split train, validation or test, only {', '.join(names)}")


def _check_field(part: SourceConfig, field: str | None, names: Iterable[str]) -> None:
    if field is not None and field not in names:
        raise UserError(f'{part.source}: no feature "{field}"; it has {", ".join(names)}: set data.text_field')


def _plain(value: Any) -> Any:
    """The value in Python's own types instead of NumPy's, and bytes, which TFDS uses for text, as text."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # an array
        value = value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def tfds_rows(
    builder: "tfds.core.DatasetBuilder",
    name: str,
    part: SourceConfig,
    split: SplitName | None,
    field: str | None,
    bad: BadRecords,
) -> Iterator[SourceRecord]:
    """The rows of the builder's split `name`, called `split` here; only `field` of them, if given."""
    _check_field(part, field, builder.info.features)
    for number, example in enumerate(builder.as_data_source(split=name)):
        where = f"{part.source}, split {name}, example {number}"
        try:
            chosen = example if field is None else {field: example[field]}
            yield SourceRecord(where, {key: _plain(value) for key, value in chosen.items()}, split)
        except UnicodeDecodeError as error:
            bad.add(BadRecord(where, f"not UTF-8 at byte {error.start}"))


def _tfds_folder(part: SourceConfig) -> Path:
    """The data_dir: data.path, or TFDS's own default."""
    return Path(part.path or Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser())


def tfds_on_disk(part: SourceConfig) -> list[Path]:
    """The dataset_info.json of every version of the dataset in the data_dir."""
    pattern = f"{part.source.removeprefix(TFDS).replace(':', '/')}/**/dataset_info.json"
    return [file for file in sorted(_tfds_folder(part).glob(pattern)) if "incomplete" not in file.parent.name]


def tfds_builder(part: SourceConfig) -> "tfds.core.DatasetBuilder":
    """The dataset on disk in ArrayRecord form, else the one that TFDS downloads and writes in that form."""
    import tensorflow_datasets as tfds

    name, folder = part.source.removeprefix(TFDS), _tfds_folder(part)
    array_record = tfds.core.FileFormat.ARRAY_RECORD
    found = [file.parent for file in tfds_on_disk(part)]
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


def _tfds_download(name: str, folder: Path, file_format: "tfds.core.FileFormat") -> "tfds.core.DatasetBuilder":
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=folder, file_format=file_format)
        builder.download_and_prepare(file_format=file_format)
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"tfds:{name}: TFDS knows no dataset of this name, and {folder} holds none; see "
            "https://www.tensorflow.org/datasets/catalog/overview"
        ) from None
    except (ImportError, OSError) as error:  # errors of `requests` are OSErrors
        request = getattr(error, "request", None)
        reason = f"no answer from {request.url}" if request else _first_line(error)
        raise UserError(
            f"tfds:{name}: cannot be downloaded and prepared here ({reason}); prepare it on another machine "
            f"with: tfds build {name} --file_format=array_record, and set data.path to its data_dir"
        ) from None
    return builder


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def hub_name(part: SourceConfig) -> tuple[str, str, str]:
    """(name, configuration, revision) of huggingface:NAME[:CONFIG][@REVISION]; what is not given is empty."""
    place, _, revision = part.source.removeprefix(HUGGINGFACE).partition("@")
    name, _, config = place.partition(":")
    return name, config, revision


def _huggingface_call(part: SourceConfig, function: str, **options: object) -> Any:
    """The result of `datasets.FUNCTION` for the dataset that `hub_name` tells."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{part.source} needs the package datasets: {how_to_install('huggingface')}") from None
    name, config, revision = hub_name(part)
    try:
        found = getattr(datasets, function)
        return found(name, config or None, data_dir=part.path, revision=revision or None, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{part.source}: datasets cannot open it ({_first_line(error)}); check the name on "
            "https://huggingface.co/datasets, or give huggingface:json, csv, parquet or text and data.path, a folder"
        ) from None


def _huggingface_rows(
    rows: Iterable[dict[str, Any]], name: str, part: SourceConfig, split: SplitName | None, field: str | None
) -> Iterator[SourceRecord]:
    import datasets

    number = 0
    try:
        for number, row in enumerate(rows):
            if number == 0:
                _check_field(part, field, row)
            chosen = row if field is None else {field: row.get(field)}
            yield SourceRecord(f"{part.source}, split {name}, row {number}", chosen, split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        # Refused under any data.on_bad_record: datasets reads in blocks, and cannot continue after a broken one.
        where = f"{part.source}, split {name}, after row {number}"
        raise UserError(f"{where}: datasets cannot read it ({_first_line(error)})") from None
