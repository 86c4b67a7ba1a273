"""A metadata server as the machines of a TPU slice see it, on this machine, and the attributes of real slices.

The attributes have the form of real ones: tpu-env of a v4-256 and of a v6e-1, worker-network-endpoints of a v5p-8
(name:id:address) and of machines of Compute Engine (names), as their users have published them.
"""

import contextlib
import http.server
import math
import threading
from collections.abc import Iterator, Mapping

PREFIX = "/computeMetadata/v1/instance/attributes/"

# kind -> (hosts along each axis, chips of a host along each axis, topology)
KINDS = {
    "v5litepod-1": ("1,1,1", "1,1,1", "1x1"),
    "v5litepod-8": ("1,1,1", "2,4,1", "2x4"),
    "v6e-8": ("1,1,1", "2,4,1", "2x4"),
    "v5litepod-16": ("2,2,1", "2,2,1", "4x4"),
    "v6e-16": ("2,2,1", "2,2,1", "4x4"),
}
HOSTS = {kind: math.prod(map(int, bounds.split(","))) for kind, (bounds, _, _) in KINDS.items()}
CHIPS = {kind: math.prod(map(int, bounds.split(","))) for kind, (_, bounds, _) in KINDS.items()}


def attributes(kind: str, worker: int, slices: int = 1, number: int = 0) -> dict[str, str]:
    """What host `worker` of slice `number` is told; slice n's hosts are 10.0.n.2, 10.0.n.3, ..."""
    hosts, chips, topology = KINDS[kind]
    lines = {
        "ACCELERATOR_TYPE": kind,
        "ALT": "false",
        "CHIPS_PER_HOST_BOUNDS": chips,
        "CONSUMER_PROJECT_ID": "a-project",
        "ENABLE_ICI_RESILIENCY": "true",
        "HOST_BOUNDS": hosts,
        "HEALTH_AGENT_DOCKER_URL": "gcr.io/cloud-tpu-v2-images/tpu_agents:cl_684025707",
        "NODE_ID": f"a-slice-{number}",
        "RUNTIME_VERSION": "v2-alpha-tpuv6e",
        "TOPOLOGY": topology,
        "TPU_CHIPS_PER_PROCESS_BOUNDS": chips,
        "TPU_PROCESS_BOUNDS": hosts,
        "TPU_RUNTIME_METRICS_PORTS": "8431,8432,8433,8434",
        "WORKER_ID": str(worker),
        "WRAP": "false,false,false",
        "ZONE": "us-east5-b",
    }
    if slices > 1:
        lines |= {
            "MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.2:8080",
            "MEGASCALE_NUM_SLICES": str(slices),
            "MEGASCALE_SLICE_ID": str(number),
        }
    return {
        "accelerator-type": kind,
        "agent-worker-number": str(worker),
        "tpu-env": "".join(f"{name}: '{value}'\n" for name, value in lines.items()),
        "worker-network-endpoints": ",".join(f"unknown:unknown:10.0.{number}.{2 + n}" for n in range(HOSTS[kind])),
    }


@contextlib.contextmanager
def metadata_server(told: Mapping[str, str], refuse: int = 0) -> Iterator[tuple[dict[str, str], list[str]]]:
    """({"GCE_METADATA_IP": its address}, the names of the attributes that were asked for).

    The first `refuse` questions are answered with 503, as the real server does while its machine is moved.
    """
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google" and self.path.startswith(PREFIX)
            asked.append(self.path.removeprefix(PREFIX))
            code = 503 if len(asked) <= refuse else 200 if asked[-1] in told else 404
            self.send_response(code)
            self.send_header("Metadata-Flavor", "Google")
            self.end_headers()
            self.wfile.write((told[asked[-1]] if code == 200 else "<html>Error</html>").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}, asked
        finally:
            server.shutdown()
