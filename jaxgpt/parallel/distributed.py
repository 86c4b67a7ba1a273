"""Several processes as one run: joining, leaving, and agreeing on the next action.

Every process first answers a roll call on the coordinator's port, so that a start that fails names who is missing;
only then does jax join them. A process that fails to join never goes on alone: that would be several runs in one
folder. Nothing here changes a single process.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.clusters import K8sCluster  # asks Kubernetes; jax has no public way to it
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt.errors import HostLost, RunFailed, UserError
from jaxgpt.parallel.accelerator import accelerators, jax_platforms
from jaxgpt.parallel.cluster_env import NUM_PROCESSES, SET_OWN, ProcessPlace, find_place
from jaxgpt.parallel.host_watch import abandon_coordination, coordination_client, publish_host
from jaxgpt.parallel.join import is_loopback, roll_call

JOIN_TIMEOUT = "JAXGPT_JOIN_TIMEOUT"
_CONNECT_SECONDS = 60  # for jax to connect processes that have just answered the roll call
_SHUTDOWN_SECONDS = 10  # for jax to disconnect processes that have just met at a barrier
_LEAVE_SECONDS = 30.0  # for processes that have left their PeerWatch together


def join(setting: str, host_timeout_seconds: float, root: Path = Path("/")) -> None:
    """Make this process one of the processes that the environment names; call it before anything touches a device.

    `setting` is mesh.distributed: off never joins, auto joins where the environment or the machine names several
    processes, on insists. JAXGPT_COORDINATOR (host:port), JAXGPT_NUM_PROCESSES and JAXGPT_PROCESS_ID, which
    `jaxgpt launch` sets, go before the variables of Open MPI, Slurm or a TPU slice. JAXGPT_JOIN_TIMEOUT is the time to
    wait for all, 300 seconds by default. `root` is where /dev and /sys are.

    Raises:
        UserError: the environment contradicts itself, or mesh.distributed = "on" finds no other processes.
        HostLost: not all processes came in time, or they differ in what they are; names them.
        RunFailed: all came, but jax sees another number of processes.
    """
    place = place_in(os.environ, setting, root)
    if place is None:
        return
    seconds = os.environ.get(JOIN_TIMEOUT) or "300"
    try:
        timeout = float(seconds)
    except ValueError:
        raise UserError(f"{JOIN_TIMEOUT} = {seconds!r} is not a number of seconds") from None
    roll_call(place, timeout, _must_be_the_same(root))
    # jax's own handler of SIGTERM would replace the one that saves the state (training/signals.py).
    jax.config.update("jax_enable_preemption_service", False)
    host, port = place.address()
    jax.distributed.initialize(
        place.coordinator,
        place.num_processes,
        place.process_id,
        local_device_ids=place.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=_CONNECT_SECONDS,
        coordinator_bind_address=f"{host}:{port}" if is_loopback(host) else None,
        # PeerWatch is quicker and names the host; jax's own check ends the process with a C++ stack trace.
        heartbeat_timeout_seconds=int(60 + 4 * host_timeout_seconds),
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
    publish_host()
    if jax.process_count() != place.num_processes:
        raise RunFailed(
            f"{place.num_processes} processes joined, but jax sees {jax.process_count()}: these would be separate "
            "runs in one folder; check that JAX_PLATFORMS names the same platform everywhere, and TPU_PROCESS_BOUNDS "
            "and TPU_HOST_BOUNDS the whole slice"
        )


def leave(ok: bool) -> None:
    """Disconnect from the other processes; bounded, also when they are gone.

    `ok` says that all processes end together, finished or asked to stop: then they wait for each other, so that none
    sees the coordinator disappear. A process that fails does not wait. Does nothing for a single process.
    """
    if coordination_client() is None:
        return
    if ok:
        with contextlib.suppress(RuntimeError, ValueError, HostLost):  # the others are gone
            barrier("leave", _LEAVE_SECONDS)
            jax.distributed.shutdown()
            return
    abandon_coordination()


def place_in(environment: Mapping[str, str], setting: str, root: Path = Path("/")) -> ProcessPlace | None:
    """The process's place by `environment` and the machine; None where it is alone. Errors are those of `join`."""
    if setting == "off":
        return None
    found = find_place(environment, root)
    if found is None and setting == "on" and not environment.get(NUM_PROCESSES):
        found = _by_kubernetes(environment)
        if found is None:
            raise UserError(
                f"mesh.distributed = on, but nothing here names other processes; {SET_OWN}, use jaxgpt launch on "
                "one machine, or set mesh.distributed = off"
            )
    return found


def _by_kubernetes(environment: Mapping[str, str]) -> ProcessPlace | None:
    """The place in an indexed Job, asked of Kubernetes itself.

    Only for mesh.distributed = "on": it needs the package kubernetes and the right to read pods, jobs and services.
    """
    if "KUBERNETES_SERVICE_HOST" not in environment:
        return None
    try:
        if not K8sCluster.is_env_present():  # no package kubernetes
            return None
        port = environment.get("JAX_COORDINATOR_PORT") or None
        coordinator = K8sCluster.get_coordinator_address(60, port)
        count, process = K8sCluster.get_process_count(), K8sCluster.get_process_id()
    except (RuntimeError, ValueError, OSError) as error:  # jax turns the package's errors into a RuntimeError
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"mesh.distributed = on, but Kubernetes does not tell: {reason}; {SET_OWN}") from None
    return ProcessPlace(coordinator, count, process, "Kubernetes") if count > 1 else None


def _must_be_the_same(root: Path) -> dict[str, str]:
    """Versions and chips; processes that differ in them would hang long after they have joined."""
    same = {"jax": jax.__version__}
    if jax_platforms().lower() != "cpu":
        tpus = [found.what for found in accelerators(root) if found.kind == "tpu"]
        same["TPU chips"] = tpus[0] if tpus else "none"
    return same


def is_alone() -> bool:
    """Whether this process is the whole run. Starts no device."""
    return coordination_client() is None


def is_writer() -> bool:
    """Whether this process writes the files that the run writes once: process 0 does."""
    return jax.process_index() == 0


def barrier(name: str, timeout_seconds: float) -> None:
    """Wait until all processes are here, without the devices. `name` may be used again.

    Raises:
        HostLost: not all came in time.
    """
    client = coordination_client()
    if client is None:
        return
    try:
        client.wait_at_barrier(f"jaxgpt/{name}", int(timeout_seconds * 1000))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise HostLost(f"not all processes reached {name!r} within {timeout_seconds:g} s: {reason}") from None


def broadcast_from_writer(value: int) -> int:
    """The `value` (0 <= value < 2**62) that process 0 passed; every process has to call this."""
    if jax.process_count() == 1:
        return value
    halves = np.array(divmod(value, 2**31), np.int32)  # jax has no 64-bit integers by default
    high, low = multihost_utils.broadcast_one_to_all(halves).tolist()
    return high * 2**31 + low


class StopVote:
    """Tells all processes at the same step that one of them was asked to stop, without waiting.

    Every process calls `poll` once per step, in the same order with everything else that uses the devices. The devices
    add up the flags after the step that was just dispatched, and `poll` reads the sum of the call before, which has
    long been ready: so the answer is one step late.
    """

    def __init__(self) -> None:
        self._alone = jax.process_count() == 1
        if self._alone:
            return
        devices = Mesh(np.array(jax.devices()), ("device",))
        self._by_device = NamedSharding(devices, PartitionSpec("device"))
        self._add = jax.jit(jnp.sum, out_shardings=NamedSharding(devices, PartitionSpec()))
        self._pending = self._vote(False)

    def poll(self, requested: bool) -> bool:
        """Whether some process had passed True to the call before this one; alone, `requested` itself."""
        if self._alone:
            return requested
        before, self._pending = self._pending, self._vote(requested)
        return int(before.addressable_data(0)) > 0

    def _vote(self, requested: bool) -> jax.Array:
        flags = np.full(jax.local_device_count(), requested, np.int32)
        return self._add(jax.make_array_from_process_local_data(self._by_device, flags))
