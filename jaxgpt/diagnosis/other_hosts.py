"""Is this one of several hosts, and does the one that they all have to reach answer?"""

import dataclasses
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxgpt.diagnosis.finding import NOT_APPLICABLE, OK, PROBLEM, WARNING, Case, Finding
from jaxgpt.parallel.cluster_env import OWN, Place, Unclear, group_of

_PATIENCE = 5.0  # seconds for a connection


def joined(case: Case) -> Iterator[Finding]:
    """Finds "hosts": who the coordinator is, whether it has an address and answers, and what may be in the way."""
    setting = case.config.mesh.distributed
    if setting == "off":
        yield Finding("hosts", NOT_APPLICABLE, "mesh.distributed = off: this process trains alone")
        return
    try:
        group = group_of(os.environ, Path(case.root))
    except Unclear as unclear:
        yield Finding("hosts", PROBLEM, unclear.text, unclear.fix)
        return
    if group is None and setting == "on":
        text = "mesh.distributed = on, but the environment names no other processes"
        yield Finding("hosts", PROBLEM, text, f"set {', '.join(OWN)} on every host, or use jaxgpt launch")
        return
    if group is None:
        yield Finding("hosts", NOT_APPLICABLE, "one host: the environment names no others")
        return
    facts = dataclasses.asdict(group)
    text = f"process {group.process_id} of {group.num_processes}, says {group.said_by}; coordinator {group.coordinator}"
    status, more, fix = _reach(group)
    proxies = proxies_in_the_way(os.environ, group.address()[0])
    if status == OK and proxies:
        status, more = WARNING, f"{more}; {', '.join(proxies)} can make jax.distributed hang"
        fix = f"unset {' '.join(proxies)}, or export no_proxy={group.address()[0]}"
    yield Finding("hosts", status, f"{text} {more}", fix, facts)


def _reach(group: Place) -> tuple[str, str, str]:
    """(status, what happened, fix) of a connection to the coordinator. Nobody listens before a run has begun."""
    host, port = group.address()
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        return PROBLEM, f"has no address: {error}", "correct the name, or put it into /etc/hosts on every host"
    try:
        with socket.socket(*address[:3]) as connection:
            connection.settimeout(_PATIENCE)
            connection.connect(address[4])
    except ConnectionRefusedError:
        return OK, "answers, and no run listens there yet", ""
    except OSError as error:
        fix = f"start that host, and open port {port} between the hosts (firewall, network tag)"
        return PROBLEM, f"cannot be reached: {error}", fix
    if group.process_id == 0:
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
