"""Says what the workers of a TPU would refuse, before one is asked for: `check.py HOME train --config FILE ...`.

HOME is laid out as a worker's home folder: HOME/jaxgpt is the code at the commit that the workers get. watch.sh makes
it and runs this; the TPU's settings are the scripts' own TPU_ variables. The bucket is asked with gcloud. Exit code 2
and one line for what will not do, a line "note: ..." for what will, and could be cheaper. No device is started.
"""

import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

HINT = "set --check to a Python that has jaxgpt (pip install -e . in the clone), or --check none to go on unchecked"


class Bucket:
    """The bucket of the workers, by gcloud."""

    def __init__(self, name: str, project: str):
        self.name, self._project = name, project

    def exists(self, key: str) -> bool:
        return self._ask("ls", f"gs://{self.name}/{key}") is not None

    def read(self, pattern: str) -> dict[str, str]:
        """{key: content} of the objects that fit the pattern."""
        told = self._ask("cat", "--display-url", f"gs://{self.name}/{pattern}") or ""
        found = re.split(rf"==> gs://{re.escape(self.name)}/([^\n]*) <==\n", told)
        return dict(zip(found[1::2], found[2::2]))

    def fetch(self, key: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self._ask("cp", "--recursive", f"gs://{self.name}/{key}", str(target.parent))

    def _ask(self, *words: str) -> str | None:
        """What gcloud says; None where nothing fits. Raises UserError where it fails."""
        from jaxgpt.errors import UserError

        command = ["gcloud", "storage", *words, *([f"--project={self._project}"] if self._project else []), "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout
        if "matched no objects" in done.stderr:
            return None
        raise UserError(f"gs://{self.name}: {' '.join(done.stderr.split()[-40:])} (is --bucket {self.name} yours?)")


class Workers:
    """What a file's name means on a worker: a place in the code, or a key of the bucket."""

    def __init__(self, home: Path, bucket: Bucket | None, own_folder: bool):
        self.home, self.tree, self.bucket, self.own_folder = home, home / "jaxgpt", bucket, own_folder

    def key(self, place: str) -> str | None:
        """The key in the bucket; None for a place outside of it."""
        place = re.sub("^(/home/[^/]+|/root)/jaxgpt-bucket(?=/|$)", str(self.home / "jaxgpt-bucket"), place)
        path = Path(os.path.normpath(self.tree / place))
        for folder, prefix in (("jaxgpt-bucket", ""), ("jaxgpt/runs", "runs"), ("jaxgpt/prepared", "prepared")):
            if path.is_relative_to(self.home / folder):
                return (Path(prefix) / path.relative_to(self.home / folder)).as_posix()
        return None

    def have(self, place: str) -> bool:
        """Whether a worker can read the place."""
        if self.own_folder and (Path(place).is_absolute() or self.key(place)):
            return True  # in a folder that the user mounts: nothing is known of it here
        if (key := self.key(place)) is not None:
            return self.bucket is not None and self.bucket.exists(key)
        path = Path(os.path.normpath(self.tree / place))
        return path.is_relative_to(self.tree) and path.exists()

    def fetch(self, place: str | None) -> str:
        """The place where it can be read here: copied if it lies in the bucket."""
        if not place or self.bucket is None or (key := self.key(place)) is None:
            return place or ""
        self.bucket.fetch(key, self.home / "jaxgpt-bucket" / key)
        return str(self.home / "jaxgpt-bucket" / key)

    def read(self, pattern: str) -> None:
        """Copy the small files of the bucket that fit the pattern."""
        for key, content in self.bucket.read(self.key(pattern) or "").items() if self.bucket else ():
            file = self.home / "jaxgpt-bucket" / key
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")

    def need(self, setting: str, place: str) -> None:
        """Raise UserError unless a worker can read the place."""
        from jaxgpt.errors import UserError

        if self.have(place):
            return
        if self.bucket is None:
            raise UserError(
                f"{setting} = {place}: a new worker has no such file; commit it, or upload it to a --bucket"
            )
        if (key := self.key(place)) is not None:
            raise UserError(f"{setting} = {place}: there is no gs://{self.bucket.name}/{key}")
        raise UserError(
            f"{setting} = {place}: the workers have no such file; commit it, or upload it (gcloud storage cp "
            f"--recursive {place} gs://{self.bucket.name}/files/) and give ~/jaxgpt-bucket/files/{Path(place).name}"
        )


def check(home: Path, words: list[str], settings: Mapping[str, str], bucket: Bucket | None) -> list[str]:
    """Notes about a run that the workers will take; the current folder is HOME/jaxgpt, and HOME is home.

    Raises:
        UserError: they would refuse it; says why, and what to do.
    """
    from jaxgpt import train
    from jaxgpt.__main__ import VERBS
    from jaxgpt.errors import UserError

    verb, *arguments = words
    if verb not in VERBS:
        raise UserError(f"jaxgpt has no verb {verb}; the command after -- is, for example, train --config FILE")
    if verb != "train":
        return [f"only train is checked before the TPU is asked for, not {verb}"]
    workers = Workers(home, bucket, settings.get("TPU_BUCKET") == "none")
    config, workdir, force = train.read_arguments(with_config(arguments, workers))
    if "tpu" not in (extras := settings.get("TPU_EXTRAS", "tpu").split(",")):
        raise UserError(f"--extras {','.join(extras)}: without tpu the workers' jax finds no TPU; add it")
    check_devices(config, settings)
    for setting, place in named_files(config):
        workers.need(setting, place.partition("@")[0] if setting == "init.from_checkpoint" else place)
    if bucket:
        for setting, place in (("--workdir", str(workdir)), ("data.prepared_dir", config.data.prepared_dir)):
            if workers.key(place) is None:
                within = "runs/NAME" if setting == "--workdir" else "prepared"
                raise UserError(
                    f"{setting} {place} would lie on the workers' disks, which go with the TPU; leave it out, or give "
                    f"{within}, which lies in gs://{bucket.name}"
                )
        workers.fetch(config.tokenizer.path)
        workers.read(f"{config.data.prepared_dir}/*/metadata.json")
        workers.read(f"{workdir}/config.json")
    if (workdir / "config.json").exists():  # in the bucket: a run of this name has begun
        from jaxgpt.training.resume import check_workdir

        check_workdir(config, workdir, force)
    return check_data(config, workers, extras)


def with_config(arguments: list[str], workers: Workers) -> list[str]:
    """The arguments with the config file where it can be read here, if the workers have it."""
    found = list(arguments)
    for n, word in enumerate(arguments):
        flag, equals, file = word.partition("=")
        if flag == "--config" and (equals or n + 1 < len(arguments)):
            workers.need("--config", file if equals else arguments[n + 1])
            here = workers.fetch(file if equals else arguments[n + 1])
            found[n if equals else n + 1] = f"--config={here}" if equals else here
    return found


def check_devices(config: typing.Any, settings: Mapping[str, str]) -> None:
    """Raise UserError unless the mesh and the batch of the settings fit the slices."""
    from jaxgpt.errors import UserError
    from jaxgpt.parallel.mesh import check_slices, mesh_shape

    slices = int(settings.get("TPU_SLICES", "1"))
    total = slices * devices_of(settings["TPU_TYPE"], settings.get("TPU_TOPOLOGY", ""))
    data, fsdp, tensor = shape = mesh_shape(config.mesh, total)
    check_slices(shape, slices)
    if config.train.per_device_train_batch_size == "auto":
        return
    from jaxgpt.training.step import resolve_batch

    try:
        resolve_batch(config, data * fsdp)
    except UserError as error:
        rows = config.train.global_batch_size or 0
        fits = [str(n) for n in range(1, rows // (data * fsdp) + 1) if rows % (n * data * fsdp) == 0]
        fix = f"with this global batch it may be {', '.join(fits)}" if fits else "no size divides this global batch"
        raise UserError(f"{error}; {settings['TPU_TYPE']}: {fix}") from None


def devices_of(kind: str, topology: str) -> int:
    """jax's devices in a slice of the type, as --type and --topology name it."""
    from jaxgpt.errors import UserError
    from jaxgpt.parallel.chips import CHIPS
    from jaxgpt.planning.topology import parse_slice

    if old := re.fullmatch(r"v[23]-(\d+)", kind):
        return int(old[1])
    family = {"ct5p": "v5p", "ct6e": "v6e", "tpu7x": "tpu7x"}.get(kind.partition("-")[0])
    try:
        if family is None:
            return parse_slice(kind).devices
        if topology:
            return parse_slice(f"{family}:{topology}").devices
    except UserError as error:
        raise UserError(str(error).replace("--tpu", "--topology" if family else "--type")) from None
    (chips,) = re.findall(r"-(\d+)t", kind)
    return int(chips) * CHIPS["v7x" if family == "tpu7x" else family].devices_per_chip


def named_files(config: typing.Any) -> Iterator[tuple[str, str]]:
    """(setting, file or folder) of each that a worker reads, whatever the data."""
    from jaxgpt.config import config_fields, flatten
    from jaxgpt.settings import Place

    values = flatten(config)
    for name, field in config_fields().items():
        if name.startswith(("data.path", "data.prepared_dir")) or not _holds(field.type, Place):
            continue
        for value in values[name] if isinstance(values[name], tuple) else [values[name]]:
            form, equals, file = (value or "").partition("=")
            place = file if equals and name == "eval.tasks" else value
            if not place or place.startswith("hf:") or (name == "eval.tasks" and not equals):
                continue
            if name == "init.from_huggingface" and not place.startswith((".", "/", "~")) and not Path(place).exists():
                continue  # a name on the hub
            yield name, place


def _holds(kind: typing.Any, part: typing.Any) -> bool:
    return kind == part or any(_holds(each, part) for each in typing.get_args(kind) if typing.get_origin(kind) != part)


def on_hub(where: str) -> Path:
    """The folder of the tokenizer hf:NAME."""
    from jaxgpt.model.huggingface import locate_tokenizer  # imports jax

    return locate_tokenizer(where)


def check_data(config: typing.Any, workers: Workers, extras: list[str]) -> list[str]:
    """Notes on the data. Raises UserError if it is neither prepared nor can be prepared by the workers."""
    from jaxgpt.errors import UserError
    from jaxgpt.preparation import sources
    from jaxgpt.preparation.make_dataset import found_without_source, given_tokenizer, place_of
    from jaxgpt.settings import sources_of

    if workers.own_folder:
        return ["the data is not looked at: it lies in the folder that you mount (--bucket none)"]
    tokenizer, data = given_tokenizer(config, on_hub), config.data
    where = f"in gs://{workers.bucket.name}/prepared" if workers.bucket else "on a new TPU"
    hub = [part.source for part in sources_of(data) if part.source.startswith("huggingface:")]
    # Of a data set on the hub, data.path is a folder there.
    files = [part.path for part in sources_of(data) if part.path and not (part.source in hub and "/" in part.source)]
    moving = [source for source in hub if not re.search("@[0-9a-f]{40}$", source)]
    if files or moving or not sources.is_at_hand(data):  # asking for the source here would not ask what a worker sees
        found = found_without_source(Path(data.prepared_dir), config, tokenizer)
    else:
        place = place_of(config, tokenizer).path
        found = place if place.exists() else None
    if found:
        notes = [f"the data is prepared: {found.name} {where}"]
        if moving and "huggingface" in extras:
            notes.append(f"{moving[0]} is prepared anew if it changes on the hub; name a commit: {moving[0]}@COMMIT")
        return notes
    prepare = "python -m jaxgpt.prepare with the same --config and --data settings"
    if workers.bucket:
        prepare += f", then gcloud storage cp --recursive prepared gs://{workers.bucket.name}/"
    if absent := [path for path in files if not workers.have(path)]:
        raise UserError(
            f"data.path = {absent[0]}: the workers have neither it nor data prepared from it with these settings "
            f"{where}; run here: {prepare}"
        )
    cleaning, needed = config.cleaning, {"huggingface"} if hub else set()
    if cleaning.html or cleaning.fix_encoding or cleaning.language or cleaning.near_duplicates:
        needed.add("clean")
    if lacking := sorted(needed - set(extras)):
        raise UserError(
            f"the data is not {where}, and to prepare it the workers lack {' and '.join(lacking)}: --extras "
            f"{','.join([*extras, *lacking])}; or run here: {prepare}"
        )
    return [f"the data is not {where}: the workers prepare it first, and the TPU waits; cheaper here: {prepare}"]


def main() -> int:
    home, words = Path(sys.argv[1]), sys.argv[2:]
    sys.path.insert(0, str(home / "jaxgpt"))
    os.environ.setdefault("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    os.environ["HOME"] = str(home)
    os.environ.pop("TFDS_DATA_DIR", None)
    os.chdir(home / "jaxgpt")
    name = os.environ.get("TPU_BUCKET", "")
    bucket = None if name in ("", "none") else Bucket(name, os.environ.get("TPU_PROJECT", ""))

    try:
        from jaxgpt import cli

        @cli.command
        def run(_: object) -> None:
            for note in check(home, words, os.environ, bucket):
                print(f"note: {note}")

        return run(None)
    except ImportError as error:
        print(f"error: the run cannot be checked before the TPU is asked for: {error}; {HINT}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
