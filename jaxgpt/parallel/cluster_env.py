"""Is this one of several processes, and which? As the environment says it, or the metadata of a Cloud TPU VM.

train joins what is found here, and doctor shows it. The rules are those of jax's own detection (jax/_src/clusters),
with three differences: nothing here waits for a host; a machine without TPU chips asks nobody; and signs that
contradict each other are an error, because a process that goes on alone by mistake is a run of its own in the same
folder. Imports no jax.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

from jaxgpt.errors import UserError
from jaxgpt.parallel.accelerator import accelerators
from jaxgpt.parallel.tpu_metadata import METADATA, SliceMetadata, slice_metadata

COORDINATOR, NUM_PROCESSES, PROCESS_ID = OWN = ("JAXGPT_COORDINATOR", "JAXGPT_NUM_PROCESSES", "JAXGPT_PROCESS_ID")
SET_OWN = f"set {COORDINATOR}=HOST:PORT, {NUM_PROCESSES} and {PROCESS_ID} on every host"
_ALONE = "set mesh.distributed = off to train on this host alone"
# Open between the hosts of a TPU slice by the rule that Google makes for it; jax's own choice since 0.8.1, 8482, is
# not (github.com/jax-ml/jax/issues/35905). The second is for processes whose own addresses name the first.
_TPU_PORTS = ("8476", "8482")


@dataclasses.dataclass(frozen=True)
class Place:
    """Which of how many processes this one is, and where process 0 listens for the others."""

    coordinator: str
    """host:port"""
    num_processes: int
    process_id: int
    said_by: str = dataclasses.field(default="", compare=False)
    hosts: Mapping[int, str] = dataclasses.field(default_factory=dict, compare=False)
    """Process -> its host, of those that are known before they join."""
    local_device_ids: tuple[int, ...] | None = dataclasses.field(default=None, compare=False)
    """The GPUs that are this process's, where it shares its host with other processes; None: all."""

    def address(self) -> tuple[str, int]:
        """(host, port) of the coordinator, as sockets take them."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


class Unclear(UserError):
    """The environment speaks of several hosts, and not clearly enough to join them."""

    def __init__(self, text: str, fix: str):
        super().__init__(f"{text}; {fix}")
        self.text, self.fix = text, fix


def group_of(environment: Mapping[str, str], root: Path = Path("/")) -> Place | None:
    """This process's place among others; None where it is alone.

    The first that speaks counts: our own variables (`jaxgpt launch` sets them), Open MPI, Slurm, a TPU slice.
    `root` is where /dev and /sys of the machine are.

    Raises:
        Unclear: signs contradict each other, or one is missing.
    """
    place = _own(environment)
    if place is None:
        place = _open_mpi(environment, root) or _slurm(environment, root) or _tpu(environment, root)
        port = environment.get("JAX_COORDINATOR_PORT", "")
        if place and port:
            if not port.isdigit() or not 0 < int(port) < 65536:
                raise Unclear(f"JAX_COORDINATOR_PORT = {port!r} is no port", "set it to a number such as 8476")
            place = dataclasses.replace(place, coordinator=f"{place.address()[0]}:{port}")
    if place is None:
        _refuse_a_lonely_pod(environment)
    return place if place and place.num_processes > 1 else None


def _own(environment: Mapping[str, str]) -> Place | None:
    given = [name for name in OWN if environment.get(name)]
    if not given:
        return None
    missing = [name for name in OWN if name not in given]
    if missing:
        raise Unclear(f"{given[0]} is set, but {' and '.join(missing)} not", "set all three on every host, or none")
    coordinator, count, process = (environment[name] for name in OWN)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise Unclear(f"{COORDINATOR} = {coordinator!r} is not HOST:PORT", "give it both, such as 10.0.0.1:8476")
    if not count.isdigit() or not process.isdigit() or int(process) >= int(count):
        text = f"{PROCESS_ID} = {process!r} and {NUM_PROCESSES} = {count!r} must be numbers, the first below the second"
        raise Unclear(text, "number the processes 0, 1, ...")
    return Place(coordinator, int(count), int(process), COORDINATOR)


# ---------------------------------------------------------------- Open MPI, Slurm, Kubernetes


def _open_mpi(environment: Mapping[str, str], root: Path) -> Place | None:
    """As jax/_src/clusters/ompi_cluster.py reads it."""
    count, index = environment.get("OMPI_COMM_WORLD_SIZE", ""), environment.get("OMPI_COMM_WORLD_RANK", "")
    if not count.isdigit() or int(count) < 2:
        return None
    found = re.match(r"(\d+)\.\d+;tcp6?://\[?([^,\]]+?)(?:,|\]|:\d+$)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    if not found or not index.isdigit():
        text = f"OMPI_COMM_WORLD_SIZE = {count}, but Open MPI 5 does not say where the first process is"
        raise Unclear(text, f"{SET_OWN} (its number is $OMPI_COMM_WORLD_RANK)")
    gpus = _share_of_gpus(
        environment, environment.get("OMPI_COMM_WORLD_LOCAL_RANK"), environment.get("OMPI_COMM_WORLD_LOCAL_SIZE"), root
    )
    coordinator = f"{found[2]}:{_port_of_job(int(found[1]) // 2**12)}"
    return Place(coordinator, int(count), int(index), "Open MPI", local_device_ids=gpus)


def _slurm(environment: Mapping[str, str], root: Path) -> Place | None:
    """As jax/_src/clusters/slurm_cluster.py reads it. Not the batch script itself, which is no task of a step."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID")
    job, nodes, index = (environment.get(name, "") for name in names)
    count = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "")
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if not (first and job.isdigit() and count.isdigit() and index.isdigit()):
        return None
    per_node = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    gpus = _share_of_gpus(environment, environment.get("SLURM_LOCALID"), per_node and per_node[0], root)
    coordinator = f"{first[1]}{first[2] or ''}:{_port_of_job(int(job))}"
    return Place(coordinator, int(count), int(index), "Slurm", local_device_ids=gpus)


def _port_of_job(job: int) -> int:
    """The port that jax takes for a job's coordinator."""
    return job % 2**12 + 65535 - 2**12 + 1


def _share_of_gpus(environment: Mapping[str, str], rank, size, root: Path) -> tuple[int, ...] | None:
    """The GPUs of process `rank` of `size` on this host; None where it sees no more than its own.

    jax takes the GPU of the process's number on its host even where that process is the only one there, or has been
    given its GPU by the scheduler already.
    """
    if not (str(rank).isdigit() and str(size).isdigit() and int(size) > 1):
        return None
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    files = [len(found.device_files) for found in accelerators(root) if found.kind == "gpu"]
    count = len(chosen.split(",")) if chosen else sum(files)
    each, rest = divmod(count, int(size))
    return None if rest or not each else tuple(range(int(rank) * each, int(rank) * each + each))


def _refuse_a_lonely_pod(environment: Mapping[str, str]) -> None:
    """A Kubernetes Job tells its pods their number, and not how many they are."""
    index = environment.get("JOB_COMPLETION_INDEX", "")
    if "KUBERNETES_SERVICE_HOST" in environment and index.isdigit() and int(index) > 0:
        text = f"this is pod {index} of an indexed Kubernetes Job, and nothing says how many pods are one run"
        raise Unclear(text, f"{SET_OWN}, or set mesh.distributed = off where each pod is a run of its own")


# ---------------------------------------------------------------- TPU slices


def _tpu(environment: Mapping[str, str], root: Path) -> Place | None:
    """A slice, or several of them (Multislice: MEGASCALE_*): of variables as GKE sets them, or of the metadata."""
    said_by, workers = _listed(environment)
    told = dict(environment)
    if not said_by:
        asked = _ask_metadata(environment, root)
        if asked is None:
            return None
        said_by, workers, told = METADATA, asked.workers, asked.values | told
    slices = _number(told, "MEGASCALE_NUM_SLICES") or 1
    alone = said_by == METADATA and _product(environment, "TPU_PROCESS_BOUNDS", "TPU_HOST_BOUNDS") == 1
    if alone and slices == 1:  # libtpu was told to use this host's chips only, whatever the metadata says
        return None
    _check_hosts(said_by, workers, told)
    if slices == 1 and len(workers) < 2:
        return None
    _check_chips(said_by, told, root)
    index = _number(told, "CLOUD_TPU_TASK_ID", "agent-worker-number", "TPU_WORKER_ID", "WORKER_ID")
    if index is None or index >= len(workers):
        said = "does not say which of them this is" if index is None else f"says that this is number {index} from 0"
        raise Unclear(f"{said_by} names {len(workers)} hosts and {said}", f"set TPU_WORKER_ID, or {SET_OWN}")
    number, first = 0, _host(workers[0])
    if slices > 1:
        number, first = _slice_number(told, slices), _host(told.get("MEGASCALE_COORDINATOR_ADDRESS", ""))
        if number is None or not first:
            text = f"MEGASCALE_NUM_SLICES = {slices}, but MEGASCALE_SLICE_ID or MEGASCALE_COORDINATOR_ADDRESS is amiss"
            raise Unclear(text, f"set both on every host, or {SET_OWN}")
    before = number * len(workers)
    port = _TPU_PORTS[any(worker.endswith(f":{_TPU_PORTS[0]}") for worker in workers)]
    hosts = {before + worker: _host(name) for worker, name in enumerate(workers)}
    return Place(f"{first}:{port}", slices * len(workers), before + index, said_by, hosts)


def _listed(environment: Mapping[str, str]) -> tuple[str, list[str]]:
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
        if text.startswith("WARNING"):  # libtpu's words for "not known", in the environment of its child processes
            continue
        if workers := _split(text):
            return name, workers
    return "", []


def _ask_metadata(environment: Mapping[str, str], root: Path) -> SliceMetadata | None:
    """What the metadata server says of the slice; None where it need not be asked, or says nothing."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if "TPU_SKIP_MDS_QUERY" in environment or (platforms and "tpu" not in platforms.lower().split(",")):
        return None
    try:
        return slice_metadata(environment, root) if _chips(root) else None
    except OSError as error:
        text = f"whether this TPU VM has other hosts, its metadata server must say: {error}"
        raise Unclear(text, f"try again; or {_ALONE}") from None


def _check_hosts(said_by: str, workers: list[str], told: Mapping[str, str]) -> None:
    """Whether the list of the hosts is as long as the slice is large: libtpu would wait for the others for ever."""
    hosts = _product(told, "TPU_PROCESS_BOUNDS", "TPU_HOST_BOUNDS", "HOST_BOUNDS")
    if hosts is not None and hosts != max(len(workers), 1):
        kind = told.get("TPU_ACCELERATOR_TYPE") or told.get("ACCELERATOR_TYPE") or "the slice"
        names = f"{said_by} names {len(workers)} host{'' if len(workers) == 1 else 's'}"
        raise Unclear(f"{names}, but {kind} has {hosts} by its bounds", f"{SET_OWN}, or {_ALONE}")


def _check_chips(said_by: str, told: Mapping[str, str], root: Path) -> None:
    """Whether this host has the chips that a host of the slice must have."""
    wanted = _product(told, "TPU_CHIPS_PER_HOST_BOUNDS", "CHIPS_PER_HOST_BOUNDS")
    on_purpose = told.get("TPU_VISIBLE_CHIPS") or told.get("TPU_VISIBLE_DEVICES") or told.get("JAX_FORCE_TPU_INIT")
    if wanted is None or on_purpose or told.get("JAX_PLATFORMS", "").lower() == "cpu":
        return
    if (seen := _chips(root)) < wanted:  # more is no sign: some chips show up twice on the PCI bus
        text = f"a host of this slice has {wanted} TPU chips, says {said_by}, but {seen} are seen here"
        raise Unclear(text, f"give this container all of them (jaxgpt doctor says more), or {_ALONE}")


def _slice_number(told: Mapping[str, str], slices: int) -> int | None:
    number = _number(told, "MEGASCALE_SLICE_ID")
    return number if number is not None and number < slices else None


def _chips(root: Path) -> int:
    return sum(int(found.what.split()[0]) for found in accelerators(root) if found.kind == "tpu")


def _split(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _host(address: str) -> str:
    return address.split(":")[0].strip()


def _number(told: Mapping[str, str], *names: str) -> int | None:
    """The first of the variables that is a number."""
    return next((int(told[name]) for name in names if told.get(name, "").strip().isdigit()), None)


def _product(told: Mapping[str, str], *names: str) -> int | None:
    """4 for "2,2,1", of the first of the variables that is such a thing."""
    for name in names:
        if re.fullmatch(r"\d+(,\d+)*", told.get(name, "").replace(" ", "")):
            return math.prod(int(size) for size in told[name].split(","))
    return None
