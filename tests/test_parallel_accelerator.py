"""The signs of an accelerator, on copies of /dev, /sys and /proc; and the refusal to train on the CPU in its place."""

import jax
import pytest
from machines import with_gpu, with_tpu

from jaxgpt.errors import UserError
from jaxgpt.parallel.accelerator import accelerators, asks_for_cpu, nvidia_driver, refuse_silent_cpu


def test_a_tpu_is_known_by_its_chips_and_not_by_googles_network_card(tmp_path):
    with_tpu(tmp_path, chips=4)
    [found] = accelerators(tmp_path)
    assert (found.kind, found.what) == ("tpu", "4 x TPU v5e")
    assert found.device_files == ("/dev/vfio/0", "/dev/vfio/1", "/dev/vfio/2", "/dev/vfio/3")
    card = tmp_path / "other/sys/bus/pci/devices/0000:00:03.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x1ae0\n")
    (card / "device").write_text("0x0042\n")
    assert accelerators(tmp_path / "other") == []


def test_an_old_tpu_driver_shows_device_files_alone(tmp_path):
    (tmp_path / "dev/accel").mkdir(parents=True)  # of the kernel's other accelerators: no TPU
    assert accelerators(tmp_path) == []
    for number in range(4):
        (tmp_path / f"dev/accel{number}").touch()
    assert accelerators(tmp_path)[0].what == "4 x TPU"


def test_a_gpu_counts_unless_it_is_hidden_on_purpose(tmp_path, monkeypatch):
    with_gpu(tmp_path)
    assert accelerators(tmp_path)[0].device_files == ("/dev/nvidia0",)
    assert nvidia_driver(tmp_path) == "570.86.15"
    open_modules = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    (tmp_path / "proc/driver/nvidia/version").write_text(open_modules)
    assert nvidia_driver(tmp_path) == "580.65.06"
    assert nvidia_driver(tmp_path / "nowhere") is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert accelerators(tmp_path) == []


@pytest.mark.parametrize(
    "platforms, asked", [("cpu", True), ("tpu,cpu", True), ("", False), (None, False), ("tpu", False)]
)
def test_who_asks_for_the_cpu(platforms, asked):
    assert asks_for_cpu(platforms) is asked


@pytest.fixture
def unasked():
    """As if JAX_PLATFORMS were not set: jax runs on the CPU because it found nothing else."""
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield
    jax.config.update("jax_platforms", before)


def test_a_silent_fall_to_the_cpu_is_refused_in_one_line_with_its_fix(tmp_path, unasked):
    with_gpu(tmp_path / "gpu")
    with pytest.raises(UserError) as refused:
        refuse_silent_cpu(tmp_path / "gpu")
    line = str(refused.value)
    assert "1 x NVIDIA GPU (/dev/nvidia0), but jax sees only the CPU" in line
    assert 'pip install -U "jax[cuda12]"' in line  # driver 570 is too old for CUDA 13
    assert "JAX_PLATFORMS=cpu" in line


def test_a_machine_without_an_accelerator_trains_on_its_cpu(tmp_path, unasked):
    refuse_silent_cpu(tmp_path)


def test_a_fall_to_the_cpu_that_was_asked_for_is_none(tmp_path):
    with_tpu(tmp_path)
    refuse_silent_cpu(tmp_path)  # the tests run with JAX_PLATFORMS=cpu


def test_a_container_without_the_device_file_was_not_given_the_tpu(tmp_path, unasked):
    with_tpu(tmp_path, files=False)
    assert accelerators(tmp_path)[0].device_files == ()
    refuse_silent_cpu(tmp_path)
