"""What the environment says of other hosts, and whether the coordinator answers: real sockets on this machine."""

import json
import os
import socket

import pytest
from fake_metadata import attributes, metadata_server
from machines import SECRET, with_tpu

from jaxgpt.config import Config
from jaxgpt.diagnosis import machine
from jaxgpt.diagnosis.finding import NOT_APPLICABLE, OK, PROBLEM, WARNING, Case
from jaxgpt.parallel.cluster_env import METADATA, OWN, find_place
from jaxgpt.settings import MeshConfig


@pytest.fixture
def alone(monkeypatch):
    """No variable that speaks of other hosts."""
    spoken = ("JAXGPT_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "GCE_")
    for name in list(os.environ):
        if name.startswith(spoken) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def ask_hosts(monkeypatch, address: str, index: int = 1, **variables: str):
    names = dict(zip(OWN, (address, "2", str(index)), strict=True)) | variables
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    [finding] = machine.joined(Case(Config(), "run"))
    return finding


def test_a_coordinator_is_reached_refused_or_not_there(alone, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        finding = ask_hosts(monkeypatch, address)
        assert finding.status == OK and "listens" in finding.text
        assert ask_hosts(monkeypatch, address, index=0).status == WARNING  # its own port is taken
    assert ask_hosts(monkeypatch, address).text.endswith("no run listens there yet")
    nowhere = ask_hosts(monkeypatch, "no-such-host.invalid:1234")
    assert nowhere.status == PROBLEM and "has no address" in nowhere.text


def test_a_proxy_is_in_the_way_unless_the_host_is_spared(alone, monkeypatch):
    proxy = f"http://user:{SECRET}@proxy.invalid:3128"
    finding = ask_hosts(monkeypatch, "127.0.0.1:9", http_proxy=proxy)
    assert finding.status == WARNING and "unset http_proxy" in finding.fix
    assert SECRET not in finding.to_json()
    assert ask_hosts(monkeypatch, "127.0.0.1:9", no_proxy="localhost,127.0.0.1").status == OK


@pytest.mark.parametrize(
    "variables, text",
    [
        ({"JAXGPT_COORDINATOR": "a:1"}, "JAXGPT_NUM_PROCESSES and JAXGPT_PROCESS_ID not"),
        (dict(zip(OWN, ("a", "2", "0"))), "is not HOST:PORT"),
        (dict(zip(OWN, ("a:1", "2", "2"))), "JAXGPT_PROCESS_ID = '2'"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "does not say where"),
    ],
)
def test_variables_that_do_not_fit_together_are_named(alone, monkeypatch, variables, text):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    [finding] = machine.joined(Case(Config(), "run"))
    assert finding.status == PROBLEM and text in finding.text and finding.fix


def test_slurm_and_open_mpi_are_read_as_jax_reads_them():
    """The expected values are those of jax's own classes, jax/_src/clusters."""
    from jax._src.clusters import SlurmCluster

    for nodes, first in [("node[007-015],b", "node007"), ("a,b", "a"), ("tpu-[1,3]", "tpu-1")]:
        slurm = dict(SLURM_JOB_ID="70001", SLURM_STEP_NODELIST=nodes, SLURM_NTASKS="4", SLURM_PROCID="2")
        group = find_place(slurm)
        assert (group.num_processes, group.process_id, group.address()[0]) == (4, 2, first)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in slurm.items():
                patch.setenv(name, value)
            assert SlurmCluster.get_coordinator_address(1, None) == group.coordinator
    uri = "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"
    mpi = dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="1", OMPI_MCA_orte_hnp_uri=uri)
    assert find_place(mpi).address()[0] == "10.96.0.1"


def test_a_tpu_vm_asks_its_metadata_who_the_others_are(alone, monkeypatch, tmp_path):
    told = attributes("v6e-16", 1)
    told["worker-network-endpoints"] = told["worker-network-endpoints"].replace("10.0.0.2", "127.0.0.1")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    with metadata_server(told) as (server, questions):
        monkeypatch.setenv("GCE_METADATA_IP", server["GCE_METADATA_IP"])
        [finding] = machine.joined(Case(Config(), "run", root=str(with_tpu(tmp_path / "tpu", chips=4))))
        assert finding.status == OK  # auto joins them
        assert f"process 1 of 4, says {METADATA}; coordinator 127.0.0.1:8476" in finding.text
        assert json.loads(finding.to_json())["facts"]["hosts"]["2"] == "10.0.0.4"
        asked = len(questions)
        [finding] = machine.joined(Case(Config(), "run", root=str(tmp_path / "no-tpu")))
        assert finding.status == NOT_APPLICABLE and len(questions) == asked


@pytest.mark.parametrize("setting, status", [("on", PROBLEM), ("auto", NOT_APPLICABLE), ("off", NOT_APPLICABLE)])
def test_a_run_that_insists_on_others_has_to_have_some(alone, setting, status):
    config = Config(mesh=MeshConfig(distributed=setting))
    [finding] = machine.joined(Case(config, "run", root="/nowhere"))
    assert finding.status == status
