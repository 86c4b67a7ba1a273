"""What an experiment needs on this machine: its run folder, room for checkpoints, its data, its compile cache."""

import os
import stat
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from jaxgpt.diagnosis.file_holders import describe, lock_owners
from jaxgpt.diagnosis.finding import NOT_APPLICABLE, OK, PROBLEM, WARNING, Case, Finding
from jaxgpt.diagnosis.folders import check_folder
from jaxgpt.diagnosis.machine import in_words
from jaxgpt.errors import UserError
from jaxgpt.settings import sources_of

_SPARE = 1.2  # of the room that checkpoints need: logs, the report and hf/ lie beside them
_READING = 2.0  # seconds to spend on reading cache entries
_ZSTD = b"\x28\xb5\x2f\xfd"


def run_folder(case: Case) -> Iterator[Finding]:
    """Finds "run folder": whether it can be written, and "disk room": whether its next checkpoints fit."""
    other = "choose another one: --workdir DIR"
    finding, place = check_folder("run folder", case.workdir, other, lasting=True)
    checkpoints = Path(case.workdir).expanduser() / "checkpoints"
    if place and checkpoints.is_dir() and not os.access(checkpoints, os.W_OK | os.X_OK):
        fix = f"sudo chown -R $USER {checkpoints}, or {other}"
        finding = Finding("run folder", PROBLEM, f"{checkpoints} belongs to another user", fix, place.facts)
    elif place:
        finding = _in_use(case, finding)
    yield finding
    if place is None:
        yield Finding("disk room", NOT_APPLICABLE, "the run folder cannot be written")
    elif not case.is_given:
        yield Finding("disk room", NOT_APPLICABLE, "no config is given; --config FILE asks whether its checkpoints fit")
    else:
        yield _room(case, checkpoints, place.free)


def _in_use(case: Case, finding: Finding) -> Finding:
    """`finding`, or that a run on this machine writes to the folder now."""
    from jaxgpt.storage.lease import FILE

    lease, root = Path(case.workdir).expanduser() / FILE, Path(case.root)
    owners = lock_owners(lease, root) if lease.exists() else []
    if not owners:
        return finding
    text = f"{case.workdir} is being written by {describe(owners[0], root)}"
    fix = "wait for it, stop it, or choose another one: --workdir DIR"
    return Finding("run folder", WARNING, text, fix, finding.facts | {"pids": owners})


def _room(case: Case, checkpoints: Path, free: int) -> Finding:
    parameters, size = checkpoint_size(case)
    keep = case.config.checkpoint
    count = keep.save_total_limit + keep.keep_best + 1  # the one being written is there before an old one goes
    there = sum(file.lstat().st_size for file in checkpoints.rglob("*") if file.is_file())
    needed = max(count * size - there, 0)
    facts = {
        "parameters": parameters, "checkpoint_bytes": size, "checkpoints": count, "present_bytes": there,
        "needed_bytes": needed, "free_bytes": free,
    }  # fmt: skip
    text = f"{count} checkpoints of {in_words(size)} ({parameters / 1e6:.1f}M parameters) need {in_words(needed)} more"
    if free >= needed * _SPARE:
        return Finding("disk room", OK, f"{text}; {in_words(free)} free", facts=facts)
    more = in_words(needed * _SPARE - free)
    fix = f"make {more} more room, choose another --workdir, or lower checkpoint.save_total_limit"
    status = PROBLEM if free < needed else WARNING
    return Finding("disk room", status, f"{text}, but only {in_words(free)} are free", fix, facts)


def checkpoint_size(case: Case) -> tuple[int, int]:
    """(parameters, bytes of a checkpoint): weights and two moments, float32; Muon keeps one moment less."""
    from jaxgpt.model.sizes import GPT2_VOCAB, parameter_count

    config, settings = case.config, case.config.tokenizer
    vocabulary = {"bpe": settings.vocab_size, "char": 128, "folder": GPT2_VOCAB}[settings.type]
    vocabulary += len(settings.special_tokens)
    parameters = parameter_count(config.model, -(-vocabulary // 128) * 128)  # the embedding is padded
    return parameters, parameters * (10 if config.optimizer.adam_mu_dtype == "bfloat16" else 12)


# ---------------------------------------------------------------- data


def data(case: Case) -> Iterator[Finding]:
    """Finds "prepared data": whether its folder can be written, and whether the config's dataset lies in it, whole."""
    folder = case.config.data.prepared_dir
    finding, place = check_folder("prepared data", folder, "choose another one: data.prepared_dir")
    if place is None or not case.is_given or finding.status != OK:
        yield finding
        return
    config = case.config
    is_remote = any(part.source.startswith(("tfds:", "huggingface:")) for part in sources_of(config.data))
    if is_remote or (config.tokenizer.path or "").startswith("hf:"):
        text = f"{place.text}; not looked for: even asking where it lies would download its source"
        yield Finding("prepared data", OK, text, facts=place.facts)
        return
    from jaxgpt.data.dataset import open_dataset
    from jaxgpt.preparation import make_dataset

    try:
        path = make_dataset.place_of(config, make_dataset.given_tokenizer(config))
        dataset = open_dataset(path, verify="sizes") if path.exists() else None
    except UserError as error:
        fix = "correct [data] or [tokenizer] in the config; a damaged folder: delete it and run jaxgpt prepare"
        yield Finding("prepared data", PROBLEM, str(error), fix, place.facts)
        return
    if dataset is None:
        yield Finding("prepared data", OK, f"{place.text}; not prepared yet, train does it first", facts=place.facts)
        return
    text = f"{path}: {dataset.train.num_tokens:,} training tokens, vocabulary {dataset.vocab_size:,}"
    yield Finding("prepared data", OK, text, facts=place.facts)


# ---------------------------------------------------------------- compile cache


def compile_cache(case: Case) -> Iterator[Finding]:
    """Finds "compile cache": its size, and whether its entries can be read. A run without it only starts later."""
    folder = case.config.train.compilation_cache_dir
    if not folder:
        yield Finding(
            "compile cache", NOT_APPLICABLE, "train.compilation_cache_dir is empty: every start compiles anew"
        )
        return
    finding, place = check_folder("compile cache", folder, "choose another one: train.compilation_cache_dir")
    if place is None:
        text = f"{finding.text}; every start compiles anew"
        yield Finding("compile cache", WARNING, text, finding.fix, finding.facts)
        return
    path = Path(folder).expanduser()
    entries = [file for file in path.rglob("*-cache") if file.is_file()] if place.exists else []
    size = sum(file.stat().st_size for file in entries)
    damaged = damaged_entries(entries)
    facts = place.facts | {"entries": len(entries), "bytes": size, "damaged": [str(file) for file in damaged]}
    text = f"{place.text}; {len(entries)} programs, {in_words(size)}"
    if damaged:
        fix = "rm " + " ".join(str(file) for file in damaged[:3]) if len(damaged) <= 3 else f"rm -r {path}"
        yield Finding("compile cache", WARNING, f"{text}; {len(damaged)} damaged: {damaged[0].name}", fix, facts)
    elif place.exists and path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        text += "; others may write to it, and what lies in it is run"
        yield Finding("compile cache", WARNING, text, f"chmod -R go-w {path}", facts)
    else:
        yield Finding("compile cache", finding.status, text, finding.fix, facts)


def damaged_entries(entries: list[Path]) -> list[Path]:
    """Those that jax could not unpack, the newest first, as many as can be read in two seconds.

    jax packs an entry with zstandard where it is installed, else with zlib; without it, of the former only the
    beginning can be told.
    """
    started, damaged = time.monotonic(), []
    for file in sorted(entries, key=lambda file: file.stat().st_mtime, reverse=True):
        if time.monotonic() - started > _READING:
            break
        try:
            content = file.read_bytes()
        except OSError:
            damaged.append(file)
            continue
        if not content.startswith(_ZSTD) and not _is_zlib(content):
            damaged.append(file)
    return damaged


def _is_zlib(content: bytes) -> bool:
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(content)
    except zlib.error:
        return False
    return unpacker.eof
