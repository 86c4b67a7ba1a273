"""Is this one of several hosts, and does the one that they all have to reach answer?"""

import dataclasses
import os
import re
import socket
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxgpt.diagnosis.finding import NOT_APPLICABLE, OK, PROBLEM, WARNING, Case, Finding
from jaxgpt.parallel.accelerator import accelerators

METADATA = "the TPU's metadata"
OWN = ("JAXGPT_COORDINATOR", "JAXGPT_NUM_PROCESSES", "JAXGPT_PROCESS_ID")
_TPU_PORT = 8482  # jax's coordinator on a TPU slice
_PATIENCE = 5.0  # seconds for a connection
_ENDPOINTS = "computeMetadata/v1/instance/attributes/worker-network-endpoints"


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes that this one belongs to, as the environment tells."""

    said_by: str
    processes: int
    index: int | None
    host: str
    """The coordinator: the host whose process 0 all others connect to."""
    port: int


class Unclear(Exception):
    """The environment says that there are several hosts, and not all that is needed to join them. (text, fix)"""


def joined(case: Case) -> Iterator[Finding]:
    """Finds "hosts": who the coordinator is, whether it has an address and answers, and what may be in the way."""
    setting = case.config.mesh.distributed
    if setting == "off":
        yield Finding("hosts", NOT_APPLICABLE, "mesh.distributed = off: this process trains alone")
        return
    try:
        group = group_of(os.environ, Path(case.root))
    except Unclear as unclear:
        yield Finding("hosts", PROBLEM, *unclear.args)
        return
    if group is None and setting == "on":
        text = "mesh.distributed = on, but the environment names no other processes"
        yield Finding("hosts", PROBLEM, text, f"set {', '.join(OWN)} on every host, or use jaxgpt launch")
        return
    if group is None:
        yield Finding("hosts", NOT_APPLICABLE, "one host: the environment names no others")
        return
    facts = dataclasses.asdict(group)
    index = "" if group.index is None else f"process {group.index} of "
    text = f"{index}{group.processes}, says {group.said_by}; coordinator {group.host}:{group.port}"
    status, more, fix = _reach(group)
    if status == OK and group.said_by == METADATA and setting == "auto":
        status, more = WARNING, f"{more}; train joins these hosts only when told to"
        fix = "set mesh.distributed = on"
    proxies = proxies_in_the_way(os.environ, group.host)
    if status == OK and proxies:
        status, more = WARNING, f"{more}; {', '.join(proxies)} can make jax.distributed hang"
        fix = f"unset {' '.join(proxies)}, or export no_proxy={group.host}"
    yield Finding("hosts", status, f"{text} {more}", fix, facts)


def _reach(group: Group) -> tuple[str, str, str]:
    """(status, what happened, fix) of a connection to the coordinator. Nobody listens before a run has begun."""
    try:
        address = socket.getaddrinfo(group.host, group.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        return PROBLEM, f"has no address: {error}", "correct the name, or put it into /etc/hosts on every host"
    try:
        with socket.socket(*address[:3]) as connection:
            connection.settimeout(_PATIENCE)
            connection.connect(address[4])
    except ConnectionRefusedError:
        return OK, "answers, and no run listens there yet", ""
    except OSError as error:
        fix = f"start that host, and open port {group.port} between the hosts (firewall, network tag)"
        return PROBLEM, f"cannot be reached: {error}", fix
    if group.index == 0:
        fix = "end the run that is under way, or choose another port"
        return WARNING, "is this host, and something listens there already", fix
    return OK, "listens", ""


def proxies_in_the_way(environment: Mapping[str, str], host: str) -> list[str]:
    """Names of the proxy variables that gRPC would follow to `host`. Their values may hold a password."""
    spared = environment.get("no_proxy", "") + "," + environment.get("NO_PROXY", "")
    if any(end.strip() and host.endswith(end.strip().lstrip("*")) for end in spared.split(",")):
        return []
    wanted = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
    return sorted(name for name, value in environment.items() if name.lower() in wanted and value)


# ---------------------------------------------------------------- what the environment says


def group_of(environment: Mapping[str, str], root: Path = Path("/")) -> Group | None:
    """The group of processes; None for one process alone.

    Raises:
        Unclear: the variables contradict each other, or one is missing.
    """
    group = _own(environment)
    if group is None:
        group = _slurm(environment) or _open_mpi(environment) or _tpu(environment, root)
        port = environment.get("JAX_COORDINATOR_PORT", "")
        if group and port.isdigit():
            group = dataclasses.replace(group, port=int(port))
    return group if group and group.processes > 1 else None


def _own(environment: Mapping[str, str]) -> Group | None:
    given = [name for name in OWN if environment.get(name)]
    if not given:
        return None
    missing = [name for name in OWN if name not in given]
    if missing:
        raise Unclear(
            f"{', '.join(given)} given, {', '.join(missing)} not", "set all three, or none; jaxgpt launch does"
        )
    address, count, index = (environment[name] for name in OWN)
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise Unclear(f"JAXGPT_COORDINATOR = {address} is no HOST:PORT", "give it a port, such as 10.0.0.1:9876")
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        text = f"JAXGPT_PROCESS_ID = {index} of JAXGPT_NUM_PROCESSES = {count}"
        raise Unclear(text, "number the processes 0, 1, ... below their count")
    return Group("JAXGPT_COORDINATOR", int(count), int(index), host.strip("[]"), int(port))


def _slurm(environment: Mapping[str, str]) -> Group | None:
    """As jax/_src/clusters/slurm_cluster.py reads it."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
    job, nodes, count, index = (environment.get(name, "") for name in names)
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if not (first and job.isdigit() and count.isdigit() and index.isdigit()):
        return None
    return Group("SLURM", int(count), int(index), first[1] + (first[2] or ""), _ephemeral(int(job)))


def _open_mpi(environment: Mapping[str, str]) -> Group | None:
    """As jax/_src/clusters/ompi_cluster.py reads it."""
    count, index = environment.get("OMPI_COMM_WORLD_SIZE", ""), environment.get("OMPI_COMM_WORLD_RANK", "")
    if not count.isdigit() or int(count) < 2:
        return None
    found = re.match(r"(\d+)\.\d+;tcp6?://\[?([^,\]]+?)(?:,|\]|:\d+$)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    if not found:
        text = f"OMPI_COMM_WORLD_SIZE = {count}, but Open MPI 5 does not say where the first process is"
        raise Unclear(text, f"set {', '.join(OWN)} for each process")
    return Group("Open MPI", int(count), int(index or 0), found[2], _ephemeral(int(found[1]) // 2**12))


def _tpu(environment: Mapping[str, str], root: Path) -> Group | None:
    """A slice, or several of them (Multislice: MEGASCALE_*)."""
    said_by, workers = tpu_workers(environment, root)
    if not workers:
        return None
    slices, number = environment.get("MEGASCALE_NUM_SLICES", ""), environment.get("MEGASCALE_SLICE_ID", "0")
    slices = int(slices) if slices.isdigit() else 1
    index = environment.get("TPU_WORKER_ID", "")
    index = int(index) + int(number) * len(workers) if index.isdigit() and number.isdigit() else None
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]
    return Group(said_by, slices * len(workers), index, first.split(":")[0], _TPU_PORT)


def _ephemeral(job: int) -> int:
    """The port that jax takes for a job's coordinator."""
    return job % 2**12 + 65535 - 2**12 + 1


def tpu_workers(environment: Mapping[str, str], root: Path) -> tuple[str, list[str]]:
    """(who says so, the hosts of the slice): from the environment (GKE), or from the machine's metadata (a TPU VM)."""
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if workers := [worker.strip() for worker in environment.get(name, "").split(",") if worker.strip()]:
            return name, workers
    if "TPU_SKIP_MDS_QUERY" in environment or not any(found.kind == "tpu" for found in accelerators(root)):
        return "", []
    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(f"http://{server}/{_ENDPOINTS}", headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=_PATIENCE) as answer:
            text = answer.read(1 << 20).decode()
    except (OSError, ValueError):  # no such server: this is no virtual machine of Google's
        return "", []
    return METADATA, [worker.split(":")[-1] for worker in text.split(",") if worker]
