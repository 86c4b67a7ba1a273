"""Can this machine do the job? `python -m jaxgpt.doctor`; the experiment too: `... --config configs/quickstart.toml`.

One line for each thing that a run needs, and one that mends it where something is wrong. Each probe has a process of
its own and little time, so that one that hangs is named and the others still answer. Exit code 1 when there is a
problem; a warning is none. On a TPU slice of several hosts, run it on all of them at once.
"""

import argparse
import contextlib
import json
import math
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxgpt import __version__, cli
from jaxgpt.config import load_config
from jaxgpt.diagnosis.finding import OK, PROBLEM, STATUSES, Case, Finding
from jaxgpt.diagnosis.probe_process import Child, Probe
from jaxgpt.errors import EXIT_DONE, EXIT_FAILED, UserError

PROBES = (
    Probe(("python", "jax"), "software", "versions", "make a fresh virtual environment and pip install jaxgpt into it"),
    Probe(("holder",), "devices", "holder", "end the processes that hold the TPU; else restart the machine"),
    Probe(("memory", "open files"), "host", "resources", "restart the machine"),
    Probe(("hosts",), "hosts", "joined", "check the name server (/etc/resolv.conf) and the network between the hosts"),
    Probe(
        ("run folder", "disk room"), "experiment", "run_folder",
        "its file system does not answer: check its server and mount, or choose another --workdir",
    ),
    Probe(("prepared data",), "experiment", "data", "check the file system of data.prepared_dir and data.path"),
    Probe(("compile cache",), "experiment", "compile_cache", "choose another train.compilation_cache_dir"),
    Probe(
        ("accelerator", "arithmetic", "mesh"), "devices", "compute",
        "free the device (line holder); on several hosts run doctor on all at once; a slow start: --timeout 120",
    ),
)  # fmt: skip
_TO_BE_FREE = "holder"  # asked before jax takes the TPU itself


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("doctor", __doc__)
    add = parser.add_argument
    add("--expect", choices=("tpu", "gpu", "cpu"), help="what jax has to find; another device is a problem")
    add("--timeout", metavar="S", type=_seconds, default=30.0, help="seconds for each probe [default 30]")
    add("--workdir", metavar="DIR", help="run folder [default runs/NAME of the config]")
    add("--json", metavar="FILE", type=Path, help="write what was found for programs")
    cli.add_config_arguments(parser)
    parser.usage = "%(prog)s [--config FILE] [options] [--section.field value ...]"
    arguments = parser.parse_args(argv)
    case = case_of(arguments)
    if arguments.json and not arguments.json.parent.is_dir():
        raise UserError(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    started, findings = time.monotonic(), []
    with contextlib.closing(diagnose(case, arguments.timeout)) as answers:
        for finding in answers:
            print(line(finding), flush=True)
            findings.append(finding)
    seconds = time.monotonic() - started
    print(summary(findings, seconds))
    if arguments.json:
        write_json(arguments.json, findings, seconds)
    return EXIT_FAILED if any(finding.status == PROBLEM for finding in findings) else EXIT_DONE


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return value


def case_of(arguments: argparse.Namespace) -> Case:
    overrides = {key: value for key, value in vars(arguments).items() if "." in key}
    config = load_config(arguments.config, overrides)
    name = Path(arguments.config).stem if arguments.config else ""
    return Case(
        config, arguments.workdir or str(Path("runs") / name), bool(arguments.config or overrides), arguments.expect
    )


def diagnose(case: Case, seconds: float) -> Iterator[Finding]:
    """Ask every probe, all at once but for jax, which waits until it is known who holds the TPU."""
    children: list[Child] = []
    try:
        for probe in PROBES:
            if probe is PROBES[-1]:
                next(child for child in children if _TO_BE_FREE in child.probe.names).wait()
            children.append(Child(probe, case, seconds))
        for child in children:
            yield from child.findings()
    finally:  # also of a reader that stops here, or Ctrl-C
        for child in children:
            child.kill()


def line(finding: Finding) -> str:
    status = {"not applicable": "-"}.get(finding.status, finding.status)
    text = f"{status:<8} {finding.name:<14} {finding.text}"
    return f"{text}\n{'':8} {'':14} fix: {finding.fix}" if finding.fix else text


def summary(findings: Sequence[Finding], seconds: float) -> str:
    counts = {status: sum(finding.status == status for finding in findings) for status in STATUSES}
    bad = [f"{counts[name]} {name}{'s' * (counts[name] > 1)}" for name in ("problem", "warning") if counts[name]]
    return f"\n{', '.join(bad) or 'nothing is wrong'}, {counts[OK]} ok, in {seconds:.1f} s"


def write_json(file: Path, findings: Sequence[Finding], seconds: float) -> None:
    report = {
        "jaxgpt": __version__,
        "host": socket.gethostname(),
        "seconds": round(seconds, 2),
        "healthy": not any(finding.status == PROBLEM for finding in findings),
        "findings": [json.loads(finding.to_json()) for finding in findings],
    }
    try:
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {file} cannot be written ({error})") from None


if __name__ == "__main__":
    sys.exit(main())
