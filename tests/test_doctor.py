"""The doctor: a healthy machine passes, a fault is named with one fix, nothing hangs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from machines import SECRET, case, with_gpu, with_process, with_tpu
from tiny import RUN

from jaxgpt import doctor
from jaxgpt.config import Config
from jaxgpt.diagnosis import accelerators, checkup, machine
from jaxgpt.diagnosis.checkup import PROBES, Child
from jaxgpt.diagnosis.finding import NOT_APPLICABLE, OK, PROBLEM, STATUSES, WARNING, Case
from jaxgpt.errors import EXIT_USER
from jaxgpt.settings import MeshConfig, TrainConfig

NAMES = [name for probe in PROBES for name in probe.names]


def probe(name: str):
    return next(probe for probe in PROBES if name in probe.names)


def run(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """The command as a user starts it; it fails if the command itself has imported jax."""
    code = (
        "import sys; from jaxgpt.doctor import main; code = main(sys.argv[1:]); "
        "assert 'jax' not in sys.modules; sys.exit(code)"
    )
    (folder / "config.toml").write_text(RUN.format(folder=folder) + "[train]\nmax_steps = 200\n")
    (folder / "text.txt").write_text("a text " * 100)
    command = [sys.executable, "-c", code, "--config", "config.toml", "--workdir", str(folder / "run"), *options]
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


# ---------------------------------------------------------------- the command


@pytest.mark.system
def test_a_healthy_machine_passes_and_tells_no_secret(tmp_path):
    secrets = {"HF_TOKEN": SECRET, "http_proxy": f"http://user:{SECRET}@proxy.invalid:3128"}
    done = run(tmp_path, "--json", "found.json", "--expect", "cpu", **secrets)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "found.json").read_text()
    report = json.loads(text)
    assert report["healthy"]
    assert [finding["name"] for finding in report["findings"]] == NAMES
    assert all(set(finding) == {"name", "status", "text", "fix", "facts"} for finding in report["findings"])
    assert all(finding["status"] in STATUSES for finding in report["findings"])
    found = {finding["name"]: finding for finding in report["findings"]}
    assert found["accelerator"]["facts"]["devices"] == 8
    assert found["arithmetic"]["facts"]["result"] == 8 * 64**3
    assert found["mesh"]["status"] == found["disk room"]["status"] == OK
    assert SECRET not in done.stdout + done.stderr + text
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"config.toml", "text.txt", "found.json"}  # the doctor makes no folder


@pytest.mark.system
def test_a_missing_tpu_is_a_problem_with_one_fix_line(tmp_path):
    done = run(tmp_path, "--expect", "tpu", "--json", "found.json")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    [number] = [n for n, text in enumerate(lines) if text.startswith("problem")]
    assert "accelerator" in lines[number] and "not the tpu" in lines[number]
    assert lines[number + 1].split()[0] == "fix:"
    report = json.loads((tmp_path / "found.json").read_text())
    assert not report["healthy"]
    wrong = [finding for finding in report["findings"] if finding["status"] in (WARNING, PROBLEM)]
    assert [finding["fix"] for finding in wrong] == [text.split("fix: ")[1] for text in lines if "fix: " in text]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--expect", "vpu"], "invalid choice"),
        (["--timeout", "0"], "above 0"),
        (["--timeout", "soon"], "above 0"),
        (["--config", "nowhere.toml"], "no such config"),
        (["--model.n_layr", "3"], "did you mean"),
        (["--json", "/nowhere/found.json"], "no folder"),
        (["--jsno", "x"], "did you mean --json"),
    ],
)
def test_wrong_arguments_cost_one_line_and_exit_2(arguments, message, capsys):
    assert doctor.main(arguments) == EXIT_USER
    out, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and not out


# ---------------------------------------------------------------- probes that hang or crash


@pytest.fixture
def hanging(tmp_path) -> Case:
    """A machine whose /proc/meminfo never answers: a pipe that nobody writes to."""
    (tmp_path / "proc").mkdir()
    os.mkfifo(tmp_path / "proc/meminfo")
    return case(tmp_path, root=str(tmp_path))


def is_gone(child: Child) -> bool:
    return not psutil.pid_exists(child._process.pid)


@pytest.mark.system
def test_a_probe_that_hangs_ends_itself_in_time_and_says_where(hanging):
    started = time.monotonic()
    child = Child(probe("memory"), hanging, 3.0)
    memory, open_files = child.findings()
    assert time.monotonic() - started < 12
    assert (memory.name, memory.status) == ("memory", PROBLEM)
    assert memory.text.startswith("no answer in 3 s (in ") and memory.fix == "restart the machine"
    assert "machine.py" in memory.facts["stack"]
    assert open_files.status == NOT_APPLICABLE
    assert is_gone(child)


@pytest.mark.system
def test_a_probe_that_cannot_end_itself_is_killed(hanging):
    child = Child(probe("memory"), hanging, 0.5)
    os.kill(child._process.pid, signal.SIGSTOP)  # its own clock stands still too
    memory, _ = child.findings()
    assert memory.status == PROBLEM and memory.text.startswith("no answer in 0.5 s")
    assert is_gone(child)


@pytest.mark.system
def test_a_probe_that_crashes_is_a_problem_and_not_the_end(hanging):
    child = Child(probe("memory"), hanging, 30.0)
    os.kill(child._process.pid, signal.SIGSEGV)
    memory, _ = child.findings()
    assert memory.status == PROBLEM and memory.text == "crashed: SIGSEGV"


@pytest.mark.system
def test_nobody_is_left_when_the_doctor_is_stopped(hanging):
    before = set(psutil.Process().children())  # other tests' process pools keep a tracker
    answers = checkup.diagnose(hanging, 30.0)
    assert next(answers).name == "python"
    children = set(psutil.Process().children()) - before
    assert children
    answers.close()
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


# ---------------------------------------------------------------- software


def installed(folder: Path, name: str, version: str) -> None:
    """Metadata of a package that stands before the real one."""
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_requirements_that_are_not_met_are_named_with_what_is_there():
    wanted = ["jax>=0.10", "numpy>=99", "no-such-package>=1", 'torch>=99; extra == "parity"']
    numpy, absent = machine.unmet_requirements(wanted)
    assert numpy.startswith("numpy>=99 (") and numpy.endswith("is installed)")
    assert absent == "no-such-package>=1 (not installed)"


def test_a_jaxlib_of_another_release_is_a_problem(tmp_path, monkeypatch):
    installed(tmp_path, "jaxlib", "0.4.1")
    monkeypatch.syspath_prepend(tmp_path)
    finding = machine.jax_versions(case(tmp_path))
    assert finding.status == PROBLEM and "0.4.1 is installed" in finding.text and "pip install" in finding.fix


def test_another_libtpu_matters_only_where_there_is_a_tpu(tmp_path, monkeypatch):
    installed(tmp_path, "libtpu", "0.0.1")
    monkeypatch.syspath_prepend(tmp_path)
    assert machine.jax_versions(case(tmp_path, root=str(tmp_path))).status == OK
    finding = machine.jax_versions(case(tmp_path, root=str(with_tpu(tmp_path))))
    assert finding.status == WARNING and "jax[tpu]==" in finding.fix


def test_a_cuda_plugin_that_jax_would_pass_over_is_a_problem(tmp_path, monkeypatch):
    installed(tmp_path, "jax-cuda13-plugin", "0.4.1")
    monkeypatch.syspath_prepend(tmp_path)
    finding = machine.jax_versions(case(tmp_path, root=str(with_gpu(tmp_path))))
    assert finding.status == PROBLEM and "jax[cuda13]==" in finding.fix


# ---------------------------------------------------------------- devices


def test_the_holder_of_the_tpu_is_named_without_its_secrets(tmp_path):
    with_process(with_tpu(tmp_path), 4711, ["python", "-m", "train", f"--token={SECRET}"], "/dev/vfio/0")
    [finding] = accelerators.holder(case(tmp_path, root=str(tmp_path)))
    assert finding.status == PROBLEM and "process 4711 (python -m train)" in finding.text
    assert "kill 4711" in finding.fix and SECRET not in finding.text


@pytest.mark.system
def test_the_holder_of_libtpus_lock_is_named_by_the_kernel(tmp_path):
    lock = tmp_path / accelerators.LOCK
    lock.parent.mkdir()
    lock.touch()
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print('locked', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code, lock], stdin=-1, stdout=-1) as owner:
        assert owner.stdout.readline() == b"locked\n"
        assert machine.lock_owners(lock, Path("/")) == [owner.pid]
        with_tpu(tmp_path)
        (tmp_path / "proc").symlink_to("/proc")
        [held] = accelerators.holder(case(tmp_path, root=str(tmp_path)))
        owner.communicate(b"\n")
    assert held.status == PROBLEM and f"process {owner.pid} (" in held.text
    [free] = accelerators.holder(case(tmp_path, root=str(tmp_path)))
    assert free.status == OK and "left over" in free.text


@pytest.mark.system
def test_a_silent_fall_to_the_cpu_is_a_problem_with_the_package_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    root = str(with_gpu(tmp_path))
    accelerator, arithmetic, _ = Child(probe("accelerator"), case(tmp_path, root=root), 60).findings()
    assert accelerator.status == PROBLEM and "this machine has 1 x NVIDIA GPU" in accelerator.text
    assert accelerator.fix == 'pip install -U "jax[cuda12]"'
    assert arithmetic.status == OK
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    accelerator, *_ = accelerators.compute(case(tmp_path, root=root))
    assert accelerator.status == OK and "as asked" in accelerator.text


@pytest.mark.system
def test_a_platform_that_does_not_start_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    here = case(tmp_path, root=str(with_gpu(tmp_path)))
    accelerator, arithmetic, mesh = Child(probe("accelerator"), here, 60).findings()
    assert (
        accelerator.status == PROBLEM
        and "jax has no devices" in accelerator.text
        and "unset JAX_PLATFORMS" in accelerator.fix
    )
    assert arithmetic.status == mesh.status == NOT_APPLICABLE


@pytest.mark.parametrize("fsdp, batch, status", [(2, None, OK), (3, None, PROBLEM), (2, 12, PROBLEM)])
def test_a_mesh_that_does_not_fit_the_devices_is_a_problem(tmp_path, fsdp, batch, status):
    train = TrainConfig(per_device_train_batch_size=1, global_batch_size=batch)
    config = Config(mesh=MeshConfig(fsdp=fsdp), train=train)
    *_, mesh = accelerators.compute(case(tmp_path, config=config, is_given=True))
    assert (mesh.name, mesh.status) == ("mesh", status)
