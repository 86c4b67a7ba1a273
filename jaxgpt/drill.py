"""Kill a run again and again, and show that nothing is lost: `python -m jaxgpt.drill --config C --kills 100`.

An undisturbed run comes first. Then the same run is started again and again, each time killed at a random instant
(SIGKILL, and every fourth time SIGTERM), with --points also at every named point of saving, cleaning up and resuming,
until that many kills are survived. Each time it reaches its end, its state, the loss of every step and the hash of
every batch are compared with the undisturbed run's: on the same devices they have to be equal to the last bit.

Exit code 0: all were equal; 1: something differed, and the table says what.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.errors import UserError
from jaxgpt.storage.files import check_new, write_file


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("drill", __doc__)
    parser.add_argument("--workdir", metavar="DIR", type=Path, help="where the runs go [default drills/NAME]")
    parser.add_argument("--kills", metavar="N", type=int, default=20, help="kills at random instants [20]")
    parser.add_argument("--points", metavar="N", type=int, default=0, help="kills at each named point [0]")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the random instants [0]")
    devices = "CPU devices of one start after another, such as 1,2,4 [default: as they are]"
    parser.add_argument("--devices", metavar="N,N", default="", help=devices)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures to FILE, for programs")
    cli.add_config_arguments(parser)
    arguments = parser.parse_args(argv)
    config = cli.config_from(arguments)
    workdir = arguments.workdir or Path("drills") / Path(arguments.config).stem
    check_new(workdir)
    counts = [int(number) for number in arguments.devices.split(",") if number]
    batch = config.train.global_batch_size
    if counts and (batch is None or any(batch % number for number in counts)):
        raise UserError(f"--devices {arguments.devices}: set train.global_batch_size to a multiple of each")

    from jaxgpt.diagnosis.kill_drill import Drill, DrillPlan, table

    overrides = {name: value for name, value in vars(arguments).items() if "." in name}
    kills = (arguments.kills, arguments.points, arguments.seed)
    report = Drill(DrillPlan(arguments.config, config, overrides, workdir, *kills, counts)).run()
    print(table(report))
    if arguments.json:
        write_file(arguments.json, json.dumps(dataclasses.asdict(report), indent=2))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
