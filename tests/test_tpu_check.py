"""tpu_scripts/check.py: what the workers of a TPU would refuse is refused before one is asked for, in one line."""

import fnmatch
import importlib.util
from pathlib import Path

import pytest

from jaxgpt import train
from jaxgpt.config import load_config, to_json
from jaxgpt.errors import UserError
from jaxgpt.planning.planner import vocabulary
from jaxgpt.preparation.make_dataset import prepare

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("tpu_check", ROOT / "tpu_scripts" / "check.py")
check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check)

CONFIG = """[model]
n_layer = 2
n_head = 2
n_embd = 8
n_positions = 16
[tokenizer]
type = "char"
[data]
source = "text"
path = "texts"
[train]
global_batch_size = 480
per_device_train_batch_size = 12
"""
STDLIB = ("--data.source", "stdlib", "--data.path", "none")


class Stored:
    """A bucket that is a dictionary."""

    name = "b"

    def __init__(self, **content: str):
        self.content = {key.replace("__", "/"): text for key, text in content.items()}

    def exists(self, key):
        return any(f"{name}/".startswith(f"{key}/") for name in self.content)

    def read(self, pattern):
        return {name: text for name, text in self.content.items() if fnmatch.fnmatch(name, pattern)}

    def fetch(self, key, target):
        for name, text in self.content.items():
            if f"{name}/".startswith(f"{key}/"):
                file = Path(f"{target}{name.removeprefix(key)}")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """A function that checks `train --config c.toml WORDS` as watch.sh has it done."""
    home = tmp_path / "home"
    tree = home / "jaxgpt"
    for folder in ("jaxgpt/committed", "jaxgpt-bucket/runs", "jaxgpt-bucket/prepared"):
        (home / folder).mkdir(parents=True)
    for name in ("runs", "prepared"):
        (tree / name).symlink_to(f"../jaxgpt-bucket/{name}")
    (tree / "c.toml").write_text(CONFIG)
    (tree / "committed" / "a.txt").write_text("in the commit")
    monkeypatch.chdir(tree)
    monkeypatch.setenv("HOME", str(home))

    def ask(*words, bucket=None, verb="train", config=("--config", "c.toml"), **settings):
        settings = {"TPU_TYPE": "v5e-8", "TPU_BUCKET": "b", **settings}
        stored = (bucket or Stored()) if settings["TPU_BUCKET"] == "b" else None
        return check.check(home, [verb, *config, *words], settings, stored)

    return ask


@pytest.fixture
def prepared(tmp_path_factory, monkeypatch):
    """The metadata of data that was prepared elsewhere with the settings of CONFIG, as a bucket holds it."""
    laptop = tmp_path_factory.mktemp("laptop")
    (laptop / "c.toml").write_text(CONFIG)
    (laptop / "texts").mkdir()
    for n in range(9):
        (laptop / "texts" / f"{n}.txt").write_text(f"document {n} " * 40)
    with monkeypatch.context() as context:
        context.chdir(laptop)
        prepare(load_config("c.toml"))
    (folder,) = [path.parent for path in laptop.glob("prepared/*/metadata.json")]
    return Stored(**{f"prepared__{folder.name}__metadata.json": (folder / "metadata.json").read_text()})


REFUSED = [
    (("--data.path", "other"), {}, "data.path = other: the workers have neither it nor data prepared from it"),
    (("--data.path", "/home/me/texts"), {}, "gs://b/prepared; run here: python -m jaxgpt.prepare"),
    (("--data.path", "runs/texts"), {}, "data.path = runs/texts: the workers have neither it"),
    (("--data.path", "../texts"), {}, "data.path = ../texts: the workers have neither it"),
    ((), {"TPU_BUCKET": ""}, "with these settings on a new TPU"),
    ((), {"verb": "trian"}, "jaxgpt has no verb trian"),
    ((), {"config": ("--config", "my.toml")}, "--config = my.toml: the workers have no such file; commit it, or"),
    ((), {"config": ("--config=/home/me/my.toml",)}, "give ~/jaxgpt-bucket/files/my.toml"),
    ((), {"config": ("--config", "my.toml"), "TPU_BUCKET": ""}, "my.toml: a new worker has no such file"),
    ((*STDLIB, "--train.max_step", "3"), {}, "did you mean train.max_steps?"),
    (STDLIB, {"TPU_EXTRAS": "serve"}, "--extras serve: without tpu"),
    # The slice
    (STDLIB, {"TPU_TYPE": "v6e-16"}, "192; v6e-16: with this global batch it may be 1, 2, 3, 5, 6, 10, 15, 30"),
    (STDLIB, {"TPU_TYPE": "v5p-14"}, "--type v5p-14: no such slice"),
    (STDLIB, {"TPU_TYPE": "v5e-256"}, "12 x 256 = 3072; v5e-256: no size divides this global batch"),
    (STDLIB, {"TPU_TYPE": "tpu7x-standard-4t", "TPU_TOPOLOGY": "2x2"}, "--topology tpu7x:2x2: v7x slices have 3 axes"),
    ((*STDLIB, "--mesh.fsdp", "3"), {}, "3 x 1 = 3 does not divide the 8 devices"),
    ((*STDLIB, "--mesh.data", "4"), {}, "but there are 8 devices"),
    ((*STDLIB, "--mesh.fsdp", "16"), {"TPU_SLICES": "2"}, "mesh.data = 1 cannot be split over 2 slices of 8 devices"),
    # Where it is read and written
    ((*STDLIB, "--workdir", "/tmp/run"), {}, "--workdir /tmp/run would lie on the workers' disks"),
    ((*STDLIB, "--data.prepared_dir", "data"), {}, "data.prepared_dir data would lie on the workers' disks"),
    ((*STDLIB, "--tokenizer.type", "folder", "--tokenizer.path", "tok"), {}, "tokenizer.path = tok: the workers have"),
    ((*STDLIB, "--init.from_checkpoint", "runs/a@best"), {}, "there is no gs://b/runs/a"),
    ((*STDLIB, "--init.from_checkpoint", "~/jaxgpt-bucket/runs/a"), {}, "there is no gs://b/runs/a"),
    ((*STDLIB, "--init.from_huggingface", "./gpt2"), {}, "from_huggingface = ./gpt2: the workers have no"),
    ((*STDLIB, "--data.skip_list", "/x/skip"), {}, "data.skip_list = /x/skip: the workers have no such file"),
    ((*STDLIB, "--eval.tasks", "choices=/x/own.jsonl"), {}, "eval.tasks = /x/own.jsonl: the workers have no such file"),
    # What the workers would need to prepare it
    (("--data.source", "huggingface:a/b", "--data.path", "none"), {}, "the workers lack huggingface: --extras tpu,hug"),
    ((*STDLIB, "--cleaning.near_duplicates", "0.8"), {"TPU_EXTRAS": "tpu,serve"}, "--extras tpu,serve,clean"),
]  # fmt: skip


@pytest.mark.parametrize("words, settings, said", REFUSED)
def test_what_the_workers_would_refuse_is_refused_in_one_line(ask, words, settings, said):
    with pytest.raises(UserError) as error:
        ask(*words, **settings)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_prepared_data_is_found_by_its_settings_wherever_its_source_lies(ask, prepared):
    (folder,) = [key.split("/")[1] for key in prepared.content]
    for path in ("texts", "/home/me/texts", "~/jaxgpt-bucket/files/texts"):
        assert ask("--data.path", path, bucket=prepared) == [f"the data is prepared: {folder} in gs://b/prepared"]
    for other in (("--data.max_bytes", "99"), ("--tokenizer.type", "bpe"), ("--data.source", "jsonl")):
        with pytest.raises(UserError, match="neither it nor data prepared"):
            ask(*other, bucket=prepared)


def test_what_is_not_prepared_but_can_be_is_a_note(ask):
    texts = Stored(files__texts__a="one")
    for words, settings in [
        (STDLIB, {}),
        (("--data.path", "committed"), {}),
        (("--data.path", "~/jaxgpt-bucket/files/texts"), {"bucket": texts}),
        (("--data.path", "/home/me/jaxgpt-bucket/files"), {"bucket": texts}),
        (("--data.source", "huggingface:a/b", "--data.path", "part"), {"TPU_EXTRAS": "tpu,huggingface"}),
        (("--data.source", "huggingface:a/b", "--data.path", "none"), {"TPU_EXTRAS": "tpu,huggingface"}),
    ]:
        (note,) = ask(*words, **settings)
        assert "the workers prepare it first" in note
    (note,) = ask("--data.path", "/mnt/texts", TPU_BUCKET="none")
    assert "not looked at" in note
    assert ask("--config", "x", verb="evaluate") == ["only train is checked before the TPU is asked for, not evaluate"]


def test_a_config_in_the_bucket_and_what_the_bucket_has_are_taken(ask):
    bucket = Stored(files__my_toml=CONFIG, runs__a__config_json="{}")
    bucket.content = {key.replace("_toml", ".toml"): text for key, text in bucket.content.items()}
    config = ("--config", "/home/me/jaxgpt-bucket/files/my.toml")
    ask(*STDLIB, "--init.from_checkpoint", "runs/a@best", bucket=bucket, config=config)
    ask(*STDLIB, "--init.from_huggingface", "gpt2", bucket=bucket)  # a name on the hub


def test_a_run_of_this_name_with_other_settings_is_refused_before_the_tpu_is_asked_for(ask):
    settled = {"train.max_steps": "100", "optimizer.warmup_steps": "10", "train.gradient_accumulation_steps": "5"}
    given = {"data.source": "stdlib", "data.path": "none", "train.seed": "7"}
    begun = to_json(load_config("c.toml", given | settled))
    bucket = Stored(**{"runs__c__config.json": begun})
    with pytest.raises(UserError, match="train.seed"):
        ask(*STDLIB, bucket=bucket)
    ask(*STDLIB, "--train.seed", "7", bucket=bucket)
    ask(*STDLIB, "--workdir", "runs/another", bucket=bucket)


def test_devices_are_those_of_jax():
    for kind, topology, devices in [
        ("v5e-8", "", 8), ("v5litepod-16", "", 16), ("v6e-1", "", 1), ("v4-32", "", 16), ("v5p-16", "", 8),
        ("v3-8", "", 8), ("tpu7x-standard-4t", "2x2x2", 16), ("tpu7x-standard-4t", "", 8),
        ("ct6e-standard-4t", "4x4", 16),
        ("ct6e-standard-8t", "", 8), ("ct5p-hightpu-4t", "2x2x2", 8),
    ]:  # fmt: skip
        assert check.devices_of(kind, topology) == devices, (kind, topology)


@pytest.mark.parametrize("kind, words", [("v5e-8", ()), ("v6e-8", ()), ("v6e-16", ("15",))])
def test_the_124m_config_fits_the_slices_that_the_docs_train_it_on(kind, words):
    config, *_ = train.read_arguments(
        ["--config", str(ROOT / "configs/gpt2_124m.toml"), *(f"--train.per_device_train_batch_size={n}" for n in words)]
    )
    check.check_devices(config, {"TPU_TYPE": kind})
    assert vocabulary(config) == 50257  # plan needs no hub for it


def test_what_gcloud_says_of_the_bucket(monkeypatch, tmp_path):
    answers = {
        "ls": 'echo "ERROR: One or more URLs matched no objects." >&2; exit 1',
        "cat": 'printf "==> gs://b/p/x/metadata.json <==\\n{}==> gs://b/p/y-1/metadata.json <==\\n[1]\\n"',
        "cp": 'echo "ERROR: (gcloud.storage.cp) gs://b not found: 404." >&2; exit 1',
    }
    program = tmp_path / "gcloud"
    program.write_text(
        "#!/bin/sh\ncase $2 in " + "".join(f"{verb}) {text} ;; " for verb, text in answers.items()) + "esac"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    bucket = check.Bucket("b", "")
    assert not bucket.exists("runs/a")
    assert bucket.read("p/*/metadata.json") == {"p/x/metadata.json": "{}", "p/y-1/metadata.json": "[1]\n"}
    with pytest.raises(UserError, match=r"gs://b not found: 404. \(is --bucket b yours\?\)"):
        bucket.fetch("x", tmp_path / "x")
