"""The first stage of a preparation: the source, once, front to back, into chunks."""

import dataclasses

from tqdm import tqdm

from jaxgpt.errors import UserError
from jaxgpt.failpoints import failpoint
from jaxgpt.preparation import sources
from jaxgpt.preparation.chunks import SPLIT_CODES, Rows, WorkFolder, read_json, read_rows, write_json, write_rows
from jaxgpt.preparation.documents import BadRecords
from jaxgpt.preparation.stages import told
from jaxgpt.settings import DataConfig

CHUNK_BYTES = 4_000_000  # of text: a second or two of work, so that cores stay busy to the end and little is lost
_FACTS = "read.json"


def read(data: DataConfig, work: WorkFolder) -> dict:
    """Write the chunks "read" and return what is known about them, the same after a kill.

    Returns:
        {"rows": [of each chunk], "bytes": [of each chunk], "documents": their number,
        "bad": {reason: {"count", "where": [...]}} of the records that were left out,
        "mixture": the fields of sources.Reading}

    Raises:
        UserError: as `sources.documents`, or the source changed while it was read.
    """
    file = work.path / _FACTS
    if file.exists():
        return read_json(file)
    key = sources.source_key(data)
    bad, reading = BadRecords(data.on_bad_record), sources.Reading()
    chunk, facts, size, number = Rows(), {"rows": [], "bytes": []}, 0, -1

    def end_chunk() -> None:
        _write_if_new(work, len(facts["rows"]), chunk)
        facts["rows"].append(len(chunk))
        facts["bytes"].append(size)

    with progress("reading") as bar:
        for document in sources.documents(data, bad, reading):
            num_bytes = len(document.text.encode())
            number += not document.continues
            split = SPLIT_CODES[document.split]
            chunk.append(document.text, split, document.part, number, document.continues, document.where)
            size += num_bytes
            bar.update(num_bytes)
            if size >= CHUNK_BYTES:
                end_chunk()
                chunk, size = Rows(), 0
        if len(chunk):
            end_chunk()
    if sources.source_key(data) != key:
        raise UserError(f"{sources.describe(data)}: changed while it was read; prepare again")
    facts |= {"documents": number + 1, "bad": told(bad), "mixture": dataclasses.asdict(reading)}
    write_json(file, facts)
    return facts


def progress(label: str, total: int | None = None):
    """A bar of bytes on stderr, where that is a terminal."""
    return tqdm(desc=label, total=total, unit="B", unit_scale=True, disable=None, leave=False)


def _write_if_new(work: WorkFolder, number: int, rows: Rows) -> None:
    file = work.rows("read", number)
    if not (file.exists() and read_rows(file, ["contents"]).contents == rows.contents):
        write_rows(file, rows)
        failpoint("prepare.read")
