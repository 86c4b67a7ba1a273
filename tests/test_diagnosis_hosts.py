"""What the environment says of other hosts, and whether the coordinator answers: real sockets on this machine."""

import http.server
import os
import socket
import threading

import pytest
from machines import SECRET, with_tpu

from jaxgpt.config import Config, MeshConfig
from jaxgpt.diagnosis import hosts
from jaxgpt.diagnosis.finding import NOT_APPLICABLE, OK, PROBLEM, WARNING, Case


@pytest.fixture
def alone(monkeypatch):
    """No variable that speaks of other hosts."""
    spoken = ("JAXGPT_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "GCE_")
    for name in list(os.environ):
        if name.startswith(spoken) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def ask_hosts(monkeypatch, address: str, index: int = 1, **variables: str):
    names = dict(zip(hosts.OWN, (address, "2", str(index)), strict=True)) | variables
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    [finding] = hosts.joined(Case(Config(), "run"))
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
        ({"JAXGPT_COORDINATOR": "a:1"}, "JAXGPT_NUM_PROCESSES, JAXGPT_PROCESS_ID not"),
        (dict(zip(hosts.OWN, ("a", "2", "0"))), "no HOST:PORT"),
        (dict(zip(hosts.OWN, ("a:1", "2", "2"))), "JAXGPT_PROCESS_ID = 2"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "does not say where"),
    ],
)
def test_variables_that_do_not_fit_together_are_named(variables, text):
    with pytest.raises(hosts.Unclear) as unclear:
        hosts.group_of(variables)
    assert text in unclear.value.args[0] and unclear.value.args[1]


def test_slurm_and_open_mpi_are_read_as_jax_reads_them():
    """The expected values are those of jax's own classes, jax/_src/clusters."""
    from jax._src.clusters import SlurmCluster

    for nodes, first in [("node[007-015],b", "node007"), ("a,b", "a"), ("tpu-[1,3]", "tpu-1")]:
        slurm = dict(SLURM_JOB_ID="70001", SLURM_STEP_NODELIST=nodes, SLURM_NTASKS="4", SLURM_PROCID="2")
        group = hosts.group_of(slurm)
        assert (group.processes, group.index, group.host) == (4, 2, first)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in slurm.items():
                patch.setenv(name, value)
            assert SlurmCluster.get_coordinator_address(1, None) == f"{group.host}:{group.port}"
    uri = "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"
    mpi = dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="1", OMPI_MCA_orte_hnp_uri=uri)
    assert hosts.group_of(mpi).host == "10.96.0.1"


def test_a_tpu_vm_asks_its_metadata_who_the_others_are(alone, tmp_path):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"w0:1:10.0.0.2,w1:2:10.0.0.3" if "worker-network-endpoints" in self.path else b"")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        group = hosts.group_of(address, with_tpu(tmp_path))
        server.shutdown()
    assert (group.processes, group.host, group.said_by) == (2, "10.0.0.2", hosts.METADATA)
    assert hosts.group_of(address, tmp_path / "no-tpu") is None  # not even asked


def test_slices_of_a_tpu_count_all_their_hosts(tmp_path):
    one = {"TPU_WORKER_HOSTNAMES": "w0,w1,w2", "TPU_WORKER_ID": "1", "JAX_COORDINATOR_PORT": "1234"}
    group = hosts.group_of(one, tmp_path)
    assert (group.processes, group.index, group.host, group.port) == (3, 1, "w0", 1234)
    two = one | {
        "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "a0:8080",
    }  # fmt: skip
    group = hosts.group_of(two, tmp_path)
    assert (group.processes, group.index, group.host) == (6, 4, "a0")


@pytest.mark.parametrize("setting, status", [("on", PROBLEM), ("auto", NOT_APPLICABLE), ("off", NOT_APPLICABLE)])
def test_a_run_that_insists_on_others_has_to_have_some(alone, setting, status):
    config = Config(mesh=MeshConfig(distributed=setting))
    [finding] = hosts.joined(Case(config, "run", root="/nowhere"))
    assert finding.status == status
