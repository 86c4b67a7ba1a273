"""Which of several processes this one is: slices, single hosts and laptops, as their machines say it; and real
processes that find each other so."""

import itertools
import json
import os
import socket
import time

import jax
import numpy as np
import pytest
from fake_metadata import CHIPS, HOSTS, KINDS, attributes, metadata_server
from machines import with_gpu, with_tpu
from processes import started

from jaxgpt.errors import EXIT_WATCHDOG, HostLost, UserError
from jaxgpt.parallel.cluster_env import METADATA, ProcessPlace, Unclear, find_place
from jaxgpt.parallel.distributed import place_in
from jaxgpt.parallel.join import roll_call
from jaxgpt.parallel.mesh import AXES, build_mesh
from jaxgpt.settings import MeshConfig

# What GKE gives a pod of a v6e-16 slice.
GKE = {
    "TPU_ACCELERATOR_TYPE": "v6e-16",
    "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1",
    "TPU_HOST_BOUNDS": "2,2,1",
    "TPU_SKIP_MDS_QUERY": "true",
    "TPU_TOPOLOGY": "4x4",
    "TPU_WORKER_HOSTNAMES": ",".join(f"train-slice-0-{n}.train" for n in range(4)),
    "TPU_WORKER_ID": "2",
}


@pytest.fixture
def vm(tmp_path):
    """The folders of a TPU VM, by its chips."""
    return lambda kind: with_tpu(tmp_path / kind, CHIPS[kind])


def with_google(root):
    (root / "sys/class/dmi/id").mkdir(parents=True)
    (root / "sys/class/dmi/id/sys_vendor").write_text("Google\n")
    return root


def asked(told, root, setting="auto", **variables):
    """The place of a machine whose metadata is `told`."""
    with metadata_server(told) as (environment, _):
        return place_in(environment | variables, setting, root)


# ---------------------------------------------------------------- TPU VMs: the metadata


@pytest.mark.parametrize("kind", ["v5litepod-16", "v6e-16"])
def test_each_host_of_a_slice_knows_its_number_and_the_first(vm, kind):
    root = vm(kind)
    places = [asked(attributes(kind, worker), root) for worker in range(4)]
    assert places == [ProcessPlace("10.0.0.2:8476", 4, worker) for worker in range(4)]
    assert {place.said_by for place in places} == {METADATA}
    assert places[3].hosts == {worker: f"10.0.0.{2 + worker}" for worker in range(4)}
    assert asked(attributes(kind, 1), root, JAX_COORDINATOR_PORT="1234") == ProcessPlace("10.0.0.2:1234", 4, 1)


@pytest.mark.parametrize("kind", ["v6e-16", "v6e-8"])
def test_hosts_of_two_slices_are_numbered_through_and_meet_at_the_first(vm, kind):
    root, hosts = vm(kind), HOSTS[kind]
    every = itertools.product(range(2), range(hosts))
    places = [asked(attributes(kind, worker, 2, number), root) for number, worker in every]
    assert places == [ProcessPlace("10.0.0.2:8476", 2 * hosts, process) for process in range(2 * hosts)]
    assert places[hosts].hosts[hosts] == "10.0.1.2"  # of the other slice's hosts it knows none by name


def test_what_is_found_is_what_jax_finds(vm, monkeypatch):
    """But for the port, where jax's own choice is behind the firewall."""
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster

    pytest.importorskip("requests")  # jax asks with it
    told = attributes("v5litepod-16", 3, 2, 1)
    with metadata_server(told) as (environment, _):
        ours = find_place(environment, vm("v5litepod-16"))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert GceTpuCluster.get_coordinator_address(1, "8476") == ours.coordinator
        assert (GceTpuCluster.get_process_count(), GceTpuCluster.get_process_id()) == (ours.num_processes, 7)
        assert ours.process_id == 7


@pytest.mark.parametrize(
    "changes",
    [
        {"worker-network-endpoints": ",".join(f"vm-{n}" for n in range(4))},  # names, of Compute Engine
        {"agent-worker-number": None, "worker-id": "2"},
        {"agent-worker-number": None},  # tpu-env has it too
        {"tpu-env": None},  # as on some spot machines: jax-ml/jax#24399
    ],
)
def test_slices_are_known_in_every_form_of_the_metadata(vm, changes):
    told = {name: text for name, text in (attributes("v6e-16", 2) | changes).items() if text}
    place = asked(told, vm("v6e-16"))
    first = changes.get("worker-network-endpoints", "10.0.0.2").split(",")[0]
    assert place == ProcessPlace(f"{first}:8476", 4, 2)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if HOSTS[kind] == 1])
def test_a_single_host_trains_at_once(vm, kind):
    began = time.monotonic()
    assert asked(attributes(kind, 0), vm(kind)) is None
    assert time.monotonic() - began < 1


def test_a_machine_without_a_tpu_asks_nobody(tmp_path):
    with metadata_server(attributes("v6e-16", 0)) as (environment, questions):
        for root in (tmp_path, with_gpu(tmp_path / "gpu"), with_google(tmp_path / "google")):
            assert place_in(environment, "auto", root) is None
        assert not questions


@pytest.mark.parametrize(
    "variables",
    [
        {"TPU_SKIP_MDS_QUERY": "1"},
        {"JAX_PLATFORMS": "cpu"},  # the TPU is not used, so its other hosts are not either
        {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS": "2,2,1"},  # libtpu's way to use one host
        {"TPU_HOST_BOUNDS": "1,1,1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},  # Colab, Kaggle
        {"TPU_WORKER_HOSTNAMES": "WARNING: could not tell, so set it, please", "TPU_SKIP_MDS_QUERY": "1"},  # libtpu
    ],
)
def test_a_host_that_was_told_to_go_alone_does(vm, variables):
    assert asked(attributes("v6e-16", 0), vm("v6e-16"), **variables) is None


def test_a_server_that_is_away_for_a_moment_is_asked_again(vm):
    with metadata_server(attributes("v6e-16", 1), refuse=1) as (environment, _):
        assert place_in(environment, "auto", vm("v6e-16")) == ProcessPlace("10.0.0.2:8476", 4, 1)


def test_a_silent_server_is_an_error_on_googles_machines_and_no_matter_elsewhere(vm, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr("jaxgpt.parallel.cluster_env._METADATA_ADDRESS", address)
    monkeypatch.setattr("jaxgpt.parallel.cluster_env._PAUSE_SECONDS", 0.01)
    root = vm("v6e-16")
    assert place_in({}, "auto", root) is None
    with pytest.raises(UserError, match=f"{address} did not answer.*mesh.distributed = off") as silent:
        place_in({}, "auto", with_google(root))
    assert "\n" not in str(silent.value)
    assert place_in({}, "off", root) is None


# ---------------------------------------------------------------- signs that do not fit together


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"worker-network-endpoints": "a:b:10.0.0.2"}, "names 1 host, but v6e-16 has 4 by its bounds"),
        ({"worker-network-endpoints": None}, "names 0 hosts, but v6e-16 has 4"),
        ({"agent-worker-number": "4"}, "names 4 hosts and says that this is number 4"),
    ],
)
def test_metadata_that_contradicts_itself_is_an_error(vm, changes, complaint):
    told = {name: text for name, text in (attributes("v6e-16", 0) | changes).items() if text}
    with pytest.raises(Unclear, match=complaint):
        asked(told, vm("v6e-16"))


def test_a_host_that_lacks_chips_is_an_error(tmp_path):
    with pytest.raises(Unclear, match="4 TPU chips, says the TPU's metadata, but 2 are seen here"):
        asked(attributes("v6e-16", 0), with_tpu(tmp_path, chips=2))
    with pytest.raises(Unclear, match="but 0 are seen here"):
        place_in(GKE, "auto", tmp_path / "container")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"TPU_WORKER_ID": ""}, "TPU_WORKER_HOSTNAMES names 4 hosts and does not say which"),
        ({"TPU_WORKER_ID": "4"}, "says that this is number 4"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, "names 1 host, but v6e-16 has 4"),
        ({"TPU_HOST_BOUNDS": "1,1,1"}, "names 4 hosts, but v6e-16 has 1"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_NUM_SLICES = 2, but MEGASCALE_SLICE_ID or"),
        ({"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "2"}, "MEGASCALE_NUM_SLICES = 2, but"),
        ({"JAX_COORDINATOR_PORT": "http"}, "JAX_COORDINATOR_PORT = 'http' is no port"),
        ({"TPU_PROCESS_ADDRESSES_PATH": "/nowhere"}, "TPU_PROCESS_ADDRESSES_PATH = /nowhere cannot be read"),
    ],
)
def test_variables_that_contradict_each_other_are_an_error(vm, changes, complaint):
    with pytest.raises(Unclear, match=complaint):
        place_in(GKE | changes, "auto", vm("v6e-16"))


def test_a_pod_of_a_job_that_does_not_say_how_many_it_has_is_an_error():
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    with pytest.raises(Unclear, match="pod 1 of an indexed Kubernetes Job"):
        place_in(pod, "auto")
    assert place_in(pod | {"JOB_COMPLETION_INDEX": "0"}, "auto") is None  # a Job of one pod
    assert place_in(pod, "off") is None


def test_kubernetes_is_asked_only_where_that_is_insisted_on(monkeypatch):
    from jax._src.clusters import K8sCluster

    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    answers = {
        "is_env_present": lambda: True,
        "get_coordinator_address": lambda timeout, port: f"train-0.train:{port or 55527}",
        "get_process_count": lambda: 2,
        "get_process_id": lambda: 0,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(K8sCluster, name, answer)
    assert place_in(pod, "auto") is None
    assert place_in(pod, "on") == ProcessPlace("train-0.train:55527", 2, 0)

    def may_not(*_):
        raise RuntimeError("Kubernetes API Error: 403\nForbidden")

    monkeypatch.setattr(K8sCluster, "get_process_count", may_not)
    with pytest.raises(UserError, match="Kubernetes does not tell: Kubernetes API Error: 403 Forbidden; set JAXGPT_"):
        place_in(pod, "on")


# ---------------------------------------------------------------- GKE, and processes that share a host


def test_a_pod_of_gke_is_told_by_its_variables(vm):
    root = vm("v6e-16")
    assert place_in(GKE, "auto", root) == ProcessPlace("train-slice-0-0.train:8476", 4, 2)
    second = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "a.train:8080"}
    assert place_in(GKE | second, "auto", root) == ProcessPlace("a.train:8476", 8, 6)


def test_the_hosts_may_be_listed_in_a_file(vm, tmp_path):
    (tmp_path / "hosts").write_text("10.0.0.7:8471,10.0.0.8:8471\n")
    listed = {"TPU_PROCESS_ADDRESSES_PATH": str(tmp_path / "hosts"), "TPU_WORKER_ID": "1"}
    assert place_in(listed, "auto", vm("v6e-16")) == ProcessPlace("10.0.0.7:8476", 2, 1)
    (tmp_path / "hosts").write_text("\n")
    with pytest.raises(Unclear, match="names no host"):
        place_in(listed, "auto")


def test_several_processes_on_the_chips_of_one_host_leave_each_other_their_ports(vm):
    addresses = {"TPU_PROCESS_ADDRESSES": "localhost:8476,localhost:8477", "TPU_PROCESS_BOUNDS": "1,2,1"}
    place = place_in(addresses | {"CLOUD_TPU_TASK_ID": "1", "TPU_VISIBLE_CHIPS": "2,3"}, "auto", vm("v6e-8"))
    assert place == ProcessPlace("localhost:8482", 2, 1)


@pytest.mark.parametrize(
    ("local", "tasks", "visible", "gpus"),
    [
        ("1", "2(x2)", "0,1,2,3", (2, 3)),
        ("1", "2(x2)", "0", None),  # the scheduler gave each its own
        ("0", "1(x4)", "0,1,2,3", None),  # jax would take one and leave three
    ],
)
def test_processes_that_share_a_host_share_its_gpus(local, tasks, visible, gpus):
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}
    slurm |= {"SLURM_LOCALID": local, "SLURM_STEP_TASKS_PER_NODE": tasks, "CUDA_VISIBLE_DEVICES": visible}
    assert find_place(slurm).local_device_ids == gpus


# ---------------------------------------------------------------- the mesh over slices


@pytest.mark.parametrize("shape", [(8, 1, 1), (4, 2, 1), (2, 4, 1), (2, 2, 2)])
def test_only_data_crosses_from_slice_to_slice(shape):
    devices = jax.devices()[::2] + jax.devices()[1::2]  # in no order that would do by itself
    mesh = build_mesh(MeshConfig(**dict(zip(AXES, shape, strict=True))), devices, lambda device: device.id % 2)
    slices = np.vectorize(lambda device: device.id % 2)(mesh.devices)
    assert mesh.devices.shape == shape and set(slices.flat) == {0, 1}
    assert all(len(set(slices[row].flat)) == 1 for row in range(shape[0]))


def test_an_axis_that_would_cross_slices_is_refused():
    halves = lambda device: device.id // 4
    with pytest.raises(UserError, match="mesh.data = 1 cannot be split over 2 slices of 4 devices"):
        build_mesh(MeshConfig(fsdp=8), None, halves)
    with pytest.raises(UserError, match=r"different numbers of devices: \{0: 4, 1: 3\}"):
        build_mesh(MeshConfig(), jax.devices()[:7], halves)


@pytest.mark.system
def test_the_devices_of_tpu_slices_say_which_they_are_in(monkeypatch):
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (extra: plan)")
    from jax.experimental import topologies

    quiet = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
    for name, value in (quiet | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}).items():
        monkeypatch.setenv(name, value)
    devices = topologies.get_topology_desc("v5e:2x4", platform="tpu", num_slices=2).devices
    mesh = build_mesh(MeshConfig(fsdp=4, tensor=2), devices[::-1])
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 2}
    assert np.array_equal(slices, np.broadcast_to([[[0]], [[1]]], slices.shape))
    with pytest.raises(UserError, match="must divide a slice"):
        build_mesh(MeshConfig(fsdp=16), devices)


# ---------------------------------------------------------------- real processes

HOST = """
import json, os, sys, time
from pathlib import Path
from jaxgpt import cli
from jaxgpt.parallel import distributed

@cli.command
def main(argv=None):
    root, mesh = Path(sys.argv[1]), json.loads(sys.argv[2])
    import jax
    os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # jax sets it, because this machine has no chips
    jax.config.update("jax_platforms", "tpu,cpu" if mesh is None else "cpu")
    distributed.join("auto", 2.0, root)
    import numpy as np
    from jax.experimental import mesh_utils
    from jax.sharding import NamedSharding, PartitionSpec
    from jaxgpt.settings import MeshConfig
    from jaxgpt.parallel.mesh import build_mesh
    if mesh is None:
        return
    slice_of = lambda device: device.process_index
    built = build_mesh(MeshConfig(**mesh), slice_of=slice_of)
    inner = [built.shape["data"] // 2, built.shape["fsdp"], built.shape["tensor"]]
    theirs = mesh_utils.create_hybrid_device_mesh(inner, [2, 1, 1], process_is_granule=True)
    sharding = NamedSharding(built, PartitionSpec(("data", "fsdp")))
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(built, PartitionSpec()))(
        jax.make_array_from_callback((4,), sharding, lambda index: np.arange(4.0, dtype=np.float32)[index]))
    facts = {"of": jax.process_count(), "process": jax.process_index(), "as jax": bool((built.devices == theirs).all())}
    facts["slices"] = np.vectorize(slice_of)(built.devices).tolist()
    print(json.dumps(facts | {"sum": float(total)}), flush=True)
    distributed.leave(True)

sys.exit(main())
"""


def environment_of(**variables) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY")}
    return kept | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAXGPT_JOIN_TIMEOUT": "20"} | variables


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return str(unused.getsockname()[1])


@pytest.mark.system
def test_two_slices_find_each_other_by_their_metadata_and_only_data_crosses(tmp_path, vm):
    """Two hosts that know of each other from two metadata servers alone; their two devices each are a slice."""
    root, port = vm("v6e-8"), free_port()
    places = [attributes("v6e-8", 0, 2, number) for number in range(2)]
    for told in places:
        told["tpu-env"] = told["tpu-env"].replace("10.0.0.2:8080", "127.0.0.1:8080")
    command = ["-c", HOST, root, json.dumps({"fsdp": 2})]
    with metadata_server(places[0]) as (first, _), metadata_server(places[1]) as (second, _):
        machines = [environment_of(JAX_COORDINATOR_PORT=port, **server) for server in (first, second)]
        with started(tmp_path / "output", [command] * 2, machines) as processes:
            assert [processes.code(number) for number in range(2)] == [0, 0], processes.output(0)
            outputs = [json.loads(processes.output(number).splitlines()[-1]) for number in range(2)]
    for number, facts in enumerate(outputs):
        assert (facts["of"], facts["process"], facts["as jax"], facts["sum"]) == (2, number, True, 6.0)
        assert facts["slices"] == [[[0], [0]], [[1], [1]]]  # data x fsdp x tensor


def test_a_host_whose_others_do_not_come_names_them(vm, capfd, monkeypatch):
    """The commonest mistake with a pod: the command was started on one of its hosts."""
    monkeypatch.setattr("jaxgpt.parallel.join._NOTICE_SECONDS", 0.2)
    told = attributes("v6e-16", 0)
    told["worker-network-endpoints"] = "a:b:127.0.0.1,a:b:10.0.0.3,a:b:10.0.0.4,a:b:10.0.0.5"
    place = asked(told, vm("v6e-16"), JAX_COORDINATOR_PORT=free_port())
    with pytest.raises(HostLost) as lost:
        roll_call(place, 0.5)
    missing = "process 1 (10.0.0.3), 2 (10.0.0.4), 3 (10.0.0.5) of 4 within 0.5 s at 127.0.0.1:"
    assert f"no sign of {missing}" in str(lost.value) and "start the same command on every host" in str(lost.value)
    [notice] = capfd.readouterr().err.splitlines()  # long before that, for whoever looks at the screen
    assert notice.startswith(f"waiting for {missing}")


@pytest.mark.system
def test_hosts_of_which_one_lacks_its_chips_do_not_join(tmp_path):
    """jax would run on the CPU there, and the others wait for it for ever."""
    variables = {"TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.1", "JAX_COORDINATOR_PORT": free_port()}
    machines = [environment_of(TPU_WORKER_ID=str(number), **variables) for number in range(2)]
    roots = [with_tpu(tmp_path / "whole", chips=4), tmp_path / "bare"]
    commands = [["-c", HOST, root, "null"] for root in roots]
    with started(tmp_path / "output", commands, machines) as processes:
        assert [processes.code(number) for number in range(2)] == [EXIT_WATCHDOG] * 2
        outputs = [processes.output(number) for number in range(2)]
    assert all("TPU chips: none in process 1 on " in text and "4 x TPU v5e in process 0" in text for text in outputs)
