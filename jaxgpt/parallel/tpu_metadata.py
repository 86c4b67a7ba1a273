"""What the metadata server of a Cloud TPU VM says of its slice: no variable of such a machine speaks of the others.

The server is asked by its address, because a name server that is not there can keep a program waiting for minutes.
Whoever calls this has seen TPU chips, so a laptop never asks.
"""

import dataclasses
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

METADATA = "the TPU's metadata"
_ADDRESS = "169.254.169.254"  # of Google's metadata server, in every virtual machine of theirs
_ATTRIBUTES = "computeMetadata/v1/instance/attributes"
_SECONDS = 2.0  # for an answer; it takes milliseconds
_TRIES, _PAUSE = 4, 0.5  # the server moves with its machine, and is away for a second then


@dataclasses.dataclass(frozen=True)
class SliceMetadata:
    """The hosts of the slice in the order of their numbers, and what else is said of it."""

    workers: list[str]
    values: dict[str, str]
    """The lines of the attribute tpu-env, such as HOST_BOUNDS, and "agent-worker-number"."""


def slice_metadata(environment: Mapping[str, str], root: Path = Path("/")) -> SliceMetadata | None:
    """What the server says; None where there is none, or where it knows nothing of a slice.

    GCE_METADATA_IP or GCE_METADATA_HOST names another server, as in Google's own libraries.

    Raises:
        OSError: the machine is Google's, and its server does not answer.
    """
    named = environment.get("GCE_METADATA_IP") or environment.get("GCE_METADATA_HOST")
    server = named or _ADDRESS
    if not named and not _is_googles(root):  # perhaps it is all the same, in a container that does not show it
        try:
            _attribute(server, "worker-network-endpoints", tries=1)
        except OSError:
            return None
    endpoints, lines = _attribute(server, "worker-network-endpoints"), _attribute(server, "tpu-env")
    if endpoints is None and lines is None:
        return None
    values = _lines(lines or "")
    index = _attribute(server, "agent-worker-number") or _attribute(server, "worker-id")
    if index:
        values["agent-worker-number"] = index.strip()
    return SliceMetadata(_workers(endpoints or ""), values)


def _is_googles(root: Path) -> bool:
    """Whether the machine's firmware names Google: no network is needed for that."""
    for name in ("sys_vendor", "product_name"):
        try:
            if "Google" in (root / "sys/class/dmi/id" / name).read_text():
                return True
        except OSError:  # no such file in some containers
            continue
    return False


def _attribute(server: str, name: str, tries: int = _TRIES) -> str | None:
    """The text of an attribute of this machine; None where it has no such attribute.

    Raises:
        OSError: no answer.
    """
    request = urllib.request.Request(f"http://{server}/{_ATTRIBUTES}/{name}", headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would tell of its own machine
    while True:
        tries -= 1
        try:
            with opener.open(request, timeout=_SECONDS) as answer:
                return answer.read(1 << 20).decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 404:
                return None
            if not tries:
                raise OSError(f"{server} did not answer: {error}") from None
        time.sleep(_PAUSE)


def _workers(endpoints: str) -> list[str]:
    """Of "name:id:10.0.0.2,name:id:10.0.0.3" or of "host-0,host-1"."""
    return [worker.strip().split(":")[-1] for worker in endpoints.split(",") if worker.strip()]


def _lines(text: str) -> dict[str, str]:
    """{"HOST_BOUNDS": "2,2,1"} of lines such as HOST_BOUNDS: '2,2,1'"""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip().strip("'\"") for name, value in pairs}
