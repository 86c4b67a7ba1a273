"""Is this machine ready for the experiment? Its run folder, room for checkpoints, data and compile cache."""

import errno
import os
import re
import secrets
import shutil
import stat
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.diagnosis.finding import NOT_APPLICABLE, OK, PROBLEM, WARNING, Case, Finding
from jaxgpt.diagnosis.machine import describe, in_words, lock_owners
from jaxgpt.errors import UserError
from jaxgpt.model.sizes import GPT2_VOCAB, checkpoint_bytes, checkpoints_at_once, padded_vocab, parameter_count
from jaxgpt.settings import sources_of
from jaxgpt.storage.lease import FILE

_SPARE = 1.2  # times the room of the checkpoints: logs, the report and hf/ need some too
_READING = 2.0  # seconds to spend on reading cache entries
_ZSTD = b"\x28\xb5\x2f\xfd"
_NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.gcsfuse", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs",
    "gcsfuse", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "virtiofs",
}  # fmt: skip
_FLEETING = {
    "tmpfs": "it lies in memory and is gone after a reboot",
    "ramfs": "it lies in memory and is gone after a reboot",
    "overlay": "it lies in the container and is gone with it",
}
_GCSFUSE = "--implicit-dirs --rename-dir-limit=100000"  # by default it renames no folder, and checkpoints are renamed
_FEW_FILES = 10_000  # a checkpoint has dozens, a compile cache hundreds


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
    """`finding`, or a warning that a run on this machine writes to the folder now."""
    lease, root = Path(case.workdir).expanduser() / FILE, Path(case.root)
    owners = lock_owners(lease, root) if lease.exists() else []
    if not owners:
        return finding
    text = f"{case.workdir} is being written by {describe(owners[0], root)}"
    fix = "wait for it, stop it, or choose another one: --workdir DIR"
    return Finding("run folder", WARNING, text, fix, finding.facts | {"pids": owners})


def _room(case: Case, checkpoints: Path, free: int) -> Finding:
    settings = case.config.tokenizer
    vocabulary = {"bpe": settings.entries, "char": 128, "folder": GPT2_VOCAB}[settings.type]  # an estimate
    vocabulary += len(settings.special_tokens)
    parameters = parameter_count(case.config.model, padded_vocab(vocabulary))
    size, count = checkpoint_bytes(case.config, vocabulary), checkpoints_at_once(case.config)
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


def compile_cache(case: Case) -> Iterator[Finding]:
    """Finds "compile cache": its size, and whether its entries can be read. A run without it only starts later."""
    folder = case.config.train.compilation_cache_dir
    if not folder:
        text = "train.compilation_cache_dir is empty: every start compiles anew"
        yield Finding("compile cache", NOT_APPLICABLE, text)
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
    """The entries that jax could not unpack, newest first, as many as can be read in two seconds.

    jax packs an entry with zstandard where it is installed, else with zlib; of the former, only the first bytes are
    checked.
    """
    started, damaged = time.monotonic(), []
    for file in sorted(entries, key=lambda file: file.stat().st_mtime, reverse=True):
        if time.monotonic() - started > _READING:
            break
        try:
            content = file.read_bytes()
            if not content.startswith(_ZSTD):
                zlib.decompress(content)
        except (OSError, zlib.error):
            damaged.append(file)
    return damaged


class WritableFolder(NamedTuple):
    """A folder that could be written, or made."""

    exists: bool
    free: int  # bytes that this user may still write
    text: str
    facts: dict[str, Any]


def check_folder(name: str, folder: str, fix: str, *, lasting: bool = False) -> tuple[Finding, WritableFolder | None]:
    """(finding, folder), the folder None where nothing can be written.

    `fix` says how to choose another folder; a `lasting` folder should survive a reboot.
    """
    if re.match(r"[a-z][a-z0-9+.-]+:/", folder):
        return _bucket(name, folder), None
    path = Path(folder).expanduser().absolute()
    there = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not there.is_dir():
        what = "a broken symbolic link" if there.is_symlink() and not there.exists() else "a file, not a folder"
        return Finding(name, PROBLEM, f"{folder}: {there} is {what}", fix, {"path": str(path)}), None
    mount, kind = file_system(there)
    try:
        seconds = write_and_rename(there)
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "")
        facts: dict[str, Any] = {"path": str(path), "file_system": kind, "errno": code}
        text = f"{folder}: {there} cannot be written: {error.strerror}"
        return Finding(name, PROBLEM, text, _cure(error, there, mount, kind, fix), facts), None
    free = shutil.disk_usage(there).free
    link = "" if there.resolve() == there else f", by a symbolic link to {there.resolve()}"
    network = f"network file system {kind}" if kind in _NETWORK else kind
    state = "" if there == path else f" (to be made in {there})"
    text = f"{folder}{state}: written in {seconds * 1e3:.0f} ms, {in_words(free)} free on {network} at {mount}{link}"
    facts = {"path": str(path), "file_system": kind, "mount": mount, "free_bytes": free, "seconds": round(seconds, 4)}
    place = WritableFolder(there == path, free, text, facts)
    files = os.statvfs(there)
    if files.f_files and files.f_favail < _FEW_FILES:
        return Finding(name, WARNING, f"{text}; only {files.f_favail} more files", "delete files there", facts), place
    if lasting and kind in _FLEETING:
        return Finding(name, WARNING, f"{text}; {_FLEETING[kind]}", fix, facts), place
    return Finding(name, OK, text, facts=facts), place


def _bucket(name: str, folder: str) -> Finding:
    bucket, _, rest = re.sub(r"^[^:]*:/+", "", folder).partition("/")
    text = f"{folder} is a bucket; jaxgpt writes to folders of mounted file systems"
    if not folder.startswith("gs:"):
        return Finding(name, PROBLEM, text, "mount it (s3fs, rclone mount) and give the folder")
    mounted = "/".join(part for part in (f"~/{bucket}", rest.strip("/")) if part)
    mount = f"mkdir -p ~/{bucket} && gcsfuse {_GCSFUSE} {bucket} ~/{bucket}"
    return Finding(name, PROBLEM, text, f"{mount}; then give {mounted}")


def write_and_rename(folder: Path) -> float:
    """The seconds to write a file, force it to disk and rename its folder, as a save does. Leaves nothing behind."""
    started, content = time.monotonic(), os.urandom(64 << 10)
    first = folder / f".jaxgpt-doctor-{os.getpid()}-{secrets.token_hex(4)}"
    second = first.with_name(first.name + ".renamed")
    try:
        first.mkdir()
        with (first / "file").open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        first.rename(second)
        if (second / "file").read_bytes() != content:
            raise OSError(errno.EIO, "what is read back is not what was written")
    finally:
        for path in (first, second):
            shutil.rmtree(path, ignore_errors=True)
    return time.monotonic() - started


def _cure(error: OSError, there: Path, mount: str, kind: str, fix: str) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"make room on {mount} (du -xh {mount} | sort -h | tail), or {fix}"
    if error.errno == errno.EROFS:
        return f"mount -o remount,rw {mount}, or {fix}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"sudo chown -R $USER {there}, or {fix}"
    if kind == "fuse.gcsfuse":
        return f"mount the bucket anew with {_GCSFUSE}, or {fix}"
    return f"{mount} is failing (dmesg tells more): {fix}"


def file_system(folder: Path) -> tuple[str, str]:
    """(mount point, type) of the file system of a folder that exists; ("/", "unknown") outside of Linux."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return "/", "unknown"
    path, best = folder.resolve(), ("/", "unknown")
    for line in lines:  # 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
        before, _, after = line.partition(" - ")
        mount = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), before.split()[4])
        if path.is_relative_to(mount) and len(mount) >= len(best[0]):  # a later line lies over an earlier one
            best = (mount, after.split()[0])
    return best
