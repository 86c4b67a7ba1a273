"""Which of several processes is this one? Read from the environment, or from the metadata server of a Cloud TPU VM.

The rules are those of jax's own detection (jax/_src/clusters). jax.distributed.initialize() cannot be used for it: it
joins at once, and no public function says whom it would join, which the roll call before (join.py) needs to name who
is missing. It also gives a Slurm or Open MPI process one GPU even where it is alone on its host. Two more differences:
a machine without TPU chips asks no server, and signs that contradict each other are an error, because a process that
trains alone by mistake is a second run in the same folder. Imports no jax.
"""

import contextlib
import dataclasses
import http.client
import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from jaxgpt.errors import UserError
from jaxgpt.parallel.accelerator import accelerators

COORDINATOR, NUM_PROCESSES, PROCESS_ID = OWN = ("JAXGPT_COORDINATOR", "JAXGPT_NUM_PROCESSES", "JAXGPT_PROCESS_ID")
SET_OWN = f"set {COORDINATOR}=HOST:PORT, {NUM_PROCESSES} and {PROCESS_ID} on every host"
_ALONE = "set mesh.distributed = off to train on this host alone"
# Open between the hosts of a TPU slice by the rule that Google makes for it; jax's own choice since 0.8.1, 8482, is
# not (github.com/jax-ml/jax/issues/35905). The second is for processes whose own addresses name the first.
_TPU_PORTS = ("8476", "8482")

METADATA = "the TPU's metadata"
# Google's metadata server, in all its virtual machines. By address: a dead name server can cost minutes.
_METADATA_ADDRESS = "169.254.169.254"
_ATTRIBUTES = "computeMetadata/v1/instance/attributes"
_METADATA_SECONDS = 2.0  # for an answer; it takes milliseconds
_TRIES, _PAUSE_SECONDS = 4, 0.5  # the server moves with its machine, and is away for a second then


@dataclasses.dataclass(frozen=True)
class ProcessPlace:
    """Which of how many processes this one is, and where process 0 listens for the others."""

    coordinator: str  # host:port
    num_processes: int
    process_id: int
    said_by: str = dataclasses.field(default="", compare=False)
    hosts: Mapping[int, str] = dataclasses.field(default_factory=dict, compare=False)
    """Process -> its host, as far as known before they join."""
    local_device_ids: tuple[int, ...] | None = dataclasses.field(default=None, compare=False)
    """The GPUs of this process, where it shares its host with other processes; None: all."""

    def address(self) -> tuple[str, int]:
        """(host, port) of the coordinator, as sockets take them."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


class Unclear(UserError):
    """The environment names several hosts, but not clearly enough to join them."""

    def __init__(self, text: str, fix: str):
        super().__init__(f"{text}; {fix}")
        self.text, self.fix = text, fix


def find_place(environment: Mapping[str, str], root: Path = Path("/")) -> ProcessPlace | None:
    """This process's place among others; None where it is alone.

    The first of these that is set counts: our own variables (`jaxgpt launch` sets them), Open MPI, Slurm, a TPU slice.
    `root` is where /dev and /sys of the machine are.

    Raises:
        Unclear: signs contradict each other, or one is missing.
    """
    found = _own(environment)
    if found is None:
        found = _open_mpi(environment, root) or _slurm(environment, root) or _tpu(environment, root)
        port = environment.get("JAX_COORDINATOR_PORT", "")
        if found and port:
            if not _is_port(port):
                raise Unclear(f"JAX_COORDINATOR_PORT = {port!r} is no port", "set it to a number such as 8476")
            found = dataclasses.replace(found, coordinator=f"{found.address()[0]}:{port}")
    if found is None:
        _refuse_a_lonely_pod(environment)
    return found if found and found.num_processes > 1 else None


def _own(environment: Mapping[str, str]) -> ProcessPlace | None:
    given = [name for name in OWN if environment.get(name)]
    if not given:
        return None
    missing = [name for name in OWN if name not in given]
    if missing:
        raise Unclear(f"{given[0]} is set, but {' and '.join(missing)} not", "set all three on every host, or none")
    coordinator, count, process = (environment[name] for name in OWN)
    host, _, port = coordinator.rpartition(":")
    if not host or not _is_port(port):
        raise Unclear(f"{COORDINATOR} = {coordinator!r} is not HOST:PORT", "give it both, such as 10.0.0.1:8476")
    if not count.isdigit() or not process.isdigit() or int(process) >= int(count):
        text = f"{PROCESS_ID} = {process!r} and {NUM_PROCESSES} = {count!r} must be numbers, the first below the second"
        raise Unclear(text, "number the processes 0, 1, ...")
    return ProcessPlace(coordinator, int(count), int(process), COORDINATOR)


def _is_port(text: str) -> bool:
    return text.isdigit() and 0 < int(text) < 65536


# ---------------------------------------------------------------- Open MPI, Slurm, Kubernetes


def _open_mpi(environment: Mapping[str, str], root: Path) -> ProcessPlace | None:
    """As jax/_src/clusters/ompi_cluster.py reads it."""
    count, index = environment.get("OMPI_COMM_WORLD_SIZE", ""), environment.get("OMPI_COMM_WORLD_RANK", "")
    if not count.isdigit() or int(count) < 2:
        return None
    found = re.match(r"(\d+)\.\d+;tcp6?://\[?([^,\]]+?)(?:,|\]|:\d+$)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    if not found or not index.isdigit():
        text = f"OMPI_COMM_WORLD_SIZE = {count}, but Open MPI 5 does not say where the first process is"
        raise Unclear(text, f"{SET_OWN} (its number is $OMPI_COMM_WORLD_RANK)")
    rank, size = (environment.get(f"OMPI_COMM_WORLD_LOCAL_{name}", "") for name in ("RANK", "SIZE"))
    coordinator = f"{found[2]}:{_port_of_job(int(found[1]) // 2**12)}"
    gpus = _share_of_gpus(environment, rank, size, root)
    return ProcessPlace(coordinator, int(count), int(index), "Open MPI", local_device_ids=gpus)


def _slurm(environment: Mapping[str, str], root: Path) -> ProcessPlace | None:
    """As jax/_src/clusters/slurm_cluster.py reads it. The batch script itself is no task of a step."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID")
    job, nodes, index = (environment.get(name, "") for name in names)
    count = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "")
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if not (first and job.isdigit() and count.isdigit() and index.isdigit()):
        return None
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0].split(",")[0]  # 2(x3),1
    gpus = _share_of_gpus(environment, environment.get("SLURM_LOCALID", ""), per_node, root)
    coordinator = f"{first[1]}{first[2] or ''}:{_port_of_job(int(job))}"
    return ProcessPlace(coordinator, int(count), int(index), "Slurm", local_device_ids=gpus)


def _port_of_job(job: int) -> int:
    """The port that jax takes for a job's coordinator."""
    return job % 2**12 + 65535 - 2**12 + 1


def _share_of_gpus(environment: Mapping[str, str], rank: str, size: str, root: Path) -> tuple[int, ...] | None:
    """The GPUs of process `rank` of `size` on this host; None where it sees only its own."""
    if not (rank.isdigit() and size.isdigit() and int(size) > 1):
        return None
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    files = [len(found.device_files) for found in accelerators(root) if found.kind == "gpu"]
    count = len(chosen.split(",")) if chosen else sum(files)
    each, rest = divmod(count, int(size))
    return None if rest or not each else tuple(range(int(rank) * each, int(rank) * each + each))


def _refuse_a_lonely_pod(environment: Mapping[str, str]) -> None:
    """Refuse a pod of a Kubernetes Job, which tells its pods their number but not how many they are."""
    index = environment.get("JOB_COMPLETION_INDEX", "")
    if "KUBERNETES_SERVICE_HOST" in environment and index.isdigit() and int(index) > 0:
        text = f"this is pod {index} of an indexed Kubernetes Job, and nothing says how many pods are one run"
        raise Unclear(text, f"{SET_OWN}, or set mesh.distributed = off where each pod is a run of its own")


# ---------------------------------------------------------------- TPU slices


def _tpu(environment: Mapping[str, str], root: Path) -> ProcessPlace | None:
    """A slice, or several (Multislice: MEGASCALE_*), from variables as GKE sets them, or from the metadata."""
    said_by, workers = _listed_hosts(environment)
    values = dict(environment)
    if not said_by:
        metadata = _ask_metadata(environment, root)
        if metadata is None:
            return None
        said_by, (workers, lines) = METADATA, metadata
        values = lines | values
    slices = _number(values, "MEGASCALE_NUM_SLICES") or 1
    alone = said_by == METADATA and _product(environment, "TPU_PROCESS_BOUNDS", "TPU_HOST_BOUNDS") == 1
    if alone and slices == 1:  # libtpu is set to use this host's chips only, whatever the metadata says
        return None
    _check_hosts(said_by, workers, values)
    if slices == 1 and len(workers) < 2:
        return None
    _check_chips(said_by, values, root)
    index = _number(values, "CLOUD_TPU_TASK_ID", "agent-worker-number", "TPU_WORKER_ID", "WORKER_ID")
    if index is None or index >= len(workers):
        said = "does not say which of them this is" if index is None else f"says that this is number {index} from 0"
        raise Unclear(f"{said_by} names {len(workers)} hosts and {said}", f"set TPU_WORKER_ID, or {SET_OWN}")
    number: int | None = 0
    first = _host(workers[0])
    if slices > 1:
        number, first = _number(values, "MEGASCALE_SLICE_ID"), _host(values.get("MEGASCALE_COORDINATOR_ADDRESS", ""))
        if number is None or number >= slices or not first:
            text = f"MEGASCALE_NUM_SLICES = {slices}, but MEGASCALE_SLICE_ID or MEGASCALE_COORDINATOR_ADDRESS is amiss"
            raise Unclear(text, f"set both on every host, or {SET_OWN}")
    before = (number or 0) * len(workers)
    port = _TPU_PORTS[any(worker.endswith(f":{_TPU_PORTS[0]}") for worker in workers)]
    hosts = {before + worker: _host(name) for worker, name in enumerate(workers)}
    return ProcessPlace(f"{first}:{port}", slices * len(workers), before + index, said_by, hosts)


def _listed_hosts(environment: Mapping[str, str]) -> tuple[str, list[str]]:
    """(the variable that lists the hosts of the slice, the hosts)"""
    path = environment.get("TPU_PROCESS_ADDRESSES_PATH")
    if path:
        try:
            workers = _split(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise Unclear(f"TPU_PROCESS_ADDRESSES_PATH = {path} cannot be read: {error}", "correct it") from None
        if not workers:
            raise Unclear(f"the file of TPU_PROCESS_ADDRESSES_PATH, {path}, names no host", "correct it, or unset it")
        return "TPU_PROCESS_ADDRESSES_PATH", workers
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        text = environment.get(name, "")
        if text.startswith("WARNING"):  # libtpu writes this for "not known" into the environment of child processes
            continue
        if workers := _split(text):
            return name, workers
    return "", []


def _check_hosts(said_by: str, workers: list[str], values: Mapping[str, str]) -> None:
    """Check that the list of hosts is as long as the slice is large: libtpu would wait for the others for ever."""
    hosts = _product(values, "TPU_PROCESS_BOUNDS", "TPU_HOST_BOUNDS", "HOST_BOUNDS")
    if hosts is not None and hosts != max(len(workers), 1):
        kind = values.get("TPU_ACCELERATOR_TYPE") or values.get("ACCELERATOR_TYPE") or "the slice"
        names = f"{said_by} names {len(workers)} host{'' if len(workers) == 1 else 's'}"
        raise Unclear(f"{names}, but {kind} has {hosts} by its bounds", f"{SET_OWN}, or {_ALONE}")


def _check_chips(said_by: str, values: Mapping[str, str], root: Path) -> None:
    """Check that this host has the chips that a host of the slice must have."""
    wanted = _product(values, "TPU_CHIPS_PER_HOST_BOUNDS", "CHIPS_PER_HOST_BOUNDS")
    on_purpose = any(map(values.get, ("TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES", "JAX_FORCE_TPU_INIT")))
    if wanted is None or on_purpose or values.get("JAX_PLATFORMS", "").lower() == "cpu":
        return
    if (seen := _chips(root)) < wanted:  # more is no sign: some chips show up twice on the PCI bus
        text = f"a host of this slice has {wanted} TPU chips, says {said_by}, but {seen} are seen here"
        raise Unclear(text, f"give this container all of them (jaxgpt doctor says more), or {_ALONE}")


def _chips(root: Path) -> int:
    return sum(int(found.what.split()[0]) for found in accelerators(root) if found.kind == "tpu")


def _split(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _host(address: str) -> str:
    return address.split(":")[0].strip()


def _number(values: Mapping[str, str], *names: str) -> int | None:
    """The first of the variables that is a number."""
    return next((int(values[name]) for name in names if values.get(name, "").strip().isdigit()), None)


def _product(values: Mapping[str, str], *names: str) -> int | None:
    """4 for "2,2,1", from the first of the variables that has this form."""
    for name in names:
        if re.fullmatch(r"\d+(,\d+)*", values.get(name, "").replace(" ", "")):
            return math.prod(int(size) for size in values[name].split(","))
    return None


# ---------------------------------------------------------------- the metadata server of a Cloud TPU VM


def _ask_metadata(environment: Mapping[str, str], root: Path) -> tuple[list[str], dict[str, str]] | None:
    """(hosts of the slice in the order of their numbers, the lines of tpu-env and "agent-worker-number").

    None where the server need not be asked, does not exist, or knows of no slice. GCE_METADATA_IP or
    GCE_METADATA_HOST names another server, as in Google's own libraries.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    wanted = "TPU_SKIP_MDS_QUERY" not in environment and (not platforms or "tpu" in platforms.lower().split(","))
    if not wanted or not _chips(root):
        return None
    named = environment.get("GCE_METADATA_IP") or environment.get("GCE_METADATA_HOST")
    server = named or _METADATA_ADDRESS
    try:
        if not named and not _is_googles(root):  # it may be so all the same, in a container that does not show it
            try:
                _attribute(server, "worker-network-endpoints", tries=1)
            except OSError:
                return None
        endpoints, lines = _attribute(server, "worker-network-endpoints"), _attribute(server, "tpu-env")
        if endpoints is None and lines is None:
            return None
        index = _attribute(server, "agent-worker-number") or _attribute(server, "worker-id")
    except OSError as error:
        text = f"whether this TPU VM has other hosts, its metadata server must say: {error}"
        raise Unclear(text, f"try again; or {_ALONE}") from None
    pairs = (line.split(":", 1) for line in (lines or "").splitlines() if ":" in line)  # HOST_BOUNDS: '2,2,1'
    values = {name.strip(): value.strip().strip("'\"") for name, value in pairs}
    if index:
        values["agent-worker-number"] = index.strip()
    # "name:id:10.0.0.2,name:id:10.0.0.3" or "host-0,host-1"
    return [worker.split(":")[-1] for worker in _split(endpoints or "")], values


def _is_googles(root: Path) -> bool:
    """Whether the machine's firmware names Google. Needs no network."""
    for name in ("sys_vendor", "product_name"):
        with contextlib.suppress(OSError):  # no such file in some containers
            if "Google" in (root / "sys/class/dmi/id" / name).read_text():
                return True
    return False


def _attribute(server: str, name: str, tries: int = _TRIES) -> str | None:
    """The text of an attribute of this machine; None where it has no such attribute. OSError: no answer."""
    request = urllib.request.Request(f"http://{server}/{_ATTRIBUTES}/{name}", headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would answer for its own machine
    while True:
        tries -= 1
        try:
            with opener.open(request, timeout=_METADATA_SECONDS) as answer:
                return answer.read(1 << 20).decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 404:
                return None
            if not tries:
                raise OSError(f"{server} did not answer: {error}") from None
        time.sleep(_PAUSE_SECONDS)
