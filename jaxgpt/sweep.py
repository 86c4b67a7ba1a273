"""Find better settings: `python -m jaxgpt.sweep --config C --vary optimizer.learning_rate=1e-4..1e-2:7`.

Trains the model again and again with other settings and compares the validation losses. Trials that differ only in
numbers that the compiled step takes as arguments (rates, decay, seeds) share one compilation, and small ones run side
by side. What is recorded is not run again: a sweep that was stopped goes on when the same command is given.

--vary KEY=A,B,C is a list, KEY=A..B a range, KEY=A..B:7 a range cut into seven points; settings that belong together
vary together: --vary model.n_layer+model.n_embd+model.n_head=2+64+2,4+128+4. Without --vary: the learning rate, from
an eighth to eight times the config's. The folder gets trials.jsonl, report.html and best.toml, a config file.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgpt import cli
from jaxgpt.config import Config
from jaxgpt.errors import Interrupted, UserError


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser("sweep", __doc__)
    add = parser.add_argument
    add("--vary", metavar="KEY=VALUES", nargs="+", action="extend", default=[], help="what to vary, see above")
    add("--method", choices=["grid", "random", "halving", "tpe"],
        help="every combination; random ones; random ones of which a third goes on at each rung; Optuna's estimator "
        "[grid where all are lists, else random]")  # fmt: skip
    add("--trials", metavar="N", type=int, help="trials of random (20), halving (27) and tpe (30)")
    add("--seed", metavar="S", type=int, default=0, help="of what is drawn; the model's is train.seed [%(default)s]")
    add("--workdir", metavar="DIR", type=Path, help="folder [runs/NAME-sweep, or runs/NAME-learning-rate]")
    add("--side-by-side", metavar="N", type=int, help="trials that run at once in one program [what suits the device]")
    add("--predict", metavar="PARAMETERS", type=int,
        help="where 4 sizes or more are tried: predict the loss of this many parameters without embeddings "
        "[twice the largest]")  # fmt: skip
    add("--find-learning-rate", action="store_true", help="instead: one short run whose learning rate rises all along")
    add("--json", metavar="FILE", type=Path, help="write what was found there, too")
    cli.add_config_arguments(parser)
    arguments = parser.parse_args(argv)
    config = cli.config_from(arguments)
    _check_arguments(arguments)
    kind = "learning-rate" if arguments.find_learning_rate else "sweep"
    arguments.workdir = arguments.workdir or Path("runs") / f"{Path(arguments.config).stem}-{kind}"
    from jaxgpt.parallel.accelerator import keep_freed_memory

    keep_freed_memory()  # before jax starts its threads
    if arguments.find_learning_rate:
        find_learning_rate(config, arguments)
    else:
        sweep(config, arguments)


def _check_arguments(arguments: argparse.Namespace) -> None:
    for name, least in (("trials", 1), ("side_by_side", 1), ("predict", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: {least} or more")
    alone = ("vary", "method", "trials", "predict", "side_by_side")
    given = [f"--{name.replace('_', '-')}" for name in alone if getattr(arguments, name)]
    if arguments.find_learning_rate and given:
        raise UserError(f"--find-learning-rate is one run and takes no {given[0]}; sweep afterwards")


# ---------------------------------------------------------------- the sweep


def sweep(config: Config, arguments: argparse.Namespace) -> None:
    """Run the trials that are not recorded yet, and tell what all of them say.

    Raises:
        UserError: the input is wrong; found before anything is written.
        Interrupted: told to stop; what was recorded stays.
    """
    from jaxgpt.storage.lease import Lease
    from jaxgpt.tuning import sweep_folder as recording

    # 1. All that can be wrong with the input, and what an earlier start of this sweep has left.
    search = asked_search(config, arguments)
    asked = {
        "method": search.method,
        "variables": {variable.name: variable.text for variable in search.space.variables},
        "seed": search.seed,
        "trials": search.trials,
    }
    folder = arguments.workdir
    before = recording.earlier(folder)
    if before:
        recording.check_same(folder, before, asked, config)
        search = dataclasses.replace(search, together=before["together"], rungs=tuple(before["rungs"]))
        if search.next_round(found := recording.Records(folder)) is None:
            print(f"sweep    {folder}: all {len(found.latest())} trials are done; this is what they say", flush=True)
            return conclude(search, found, arguments)
    config_of = lambda point: search.space.config(point)

    # 2. Devices and data, as for `train`; with them what the config leaves open.
    bench = prepare_bench(config, [config_of(point) for point in search.known_points()])
    side_by_side, search = settled(search, bench, arguments, before)

    # 3. The trials.
    folder.mkdir(parents=True, exist_ok=True)
    with Lease(folder):
        recording.start(folder, asked | {"together": search.together, "rungs": search.rungs}, config)
        found = recording.Records(folder)
        describe(search, bench, found, side_by_side, folder)
        try:
            run_rounds(search, found, bench, side_by_side, folder)
        except Interrupted:
            if found.latest():
                conclude(search, found, arguments)
            raise
        conclude(search, found, arguments)


def asked_search(config: Config, arguments: argparse.Namespace):
    """The search that the command line asks for, every setting of it checked as far as it is known.

    Raises:
        UserError: a variable, a value or a combination of them is wrong.
    """
    from jaxgpt.tuning import search as searching
    from jaxgpt.tuning.scaling import check_sizes
    from jaxgpt.tuning.space import Space, corners, grid, read_space

    variables = read_space(arguments.vary, config)
    overrides = {key: value for key, value in vars(arguments).items() if "." in key}
    space = Space(arguments.config, overrides, variables).fixed(config)
    default = "random" if arguments.trials or any(variable.is_range for variable in variables) else "grid"
    method = arguments.method or default
    if method == "grid":
        trials = len(grid(variables))
        if arguments.trials not in (None, trials):
            raise UserError(f"--trials {arguments.trials}: the grid has {trials} points; leave it out")
    else:
        trials = arguments.trials or searching.DEFAULT_TRIALS[method]
    if method == "tpe":
        searching.check_estimator()
    for variable in variables if method == "halving" else ():
        if length := {"train.max_steps", "train.num_train_epochs"} & set(variable.keys):
            raise UserError(
                f"--method halving compares after equal numbers of steps, so {length.pop()} cannot be varied"
            )
    if method == "halving" and config.train.max_steps:
        searching.rungs_of(config, trials)  # if it is not known yet: once the data is there
    search = searching.Search(method, space, arguments.seed, trials, together=1)
    points = search.known_points()
    space.check([*points, *(corners(variables) if method != "grid" else ())])
    if arguments.predict:
        check_sizes([space.config(point).model for point in points])
    return search


def settled(search, bench, arguments: argparse.Namespace, before: dict):
    """(trials side by side, the search with what follows from devices and data)"""
    from jaxgpt.tuning import trial_runner
    from jaxgpt.tuning.search import rungs_of

    configs, known = bench.configs, (bench.dataset.vocab_size, bench.mesh, search.trials)
    count = arguments.side_by_side or trial_runner.side_by_side(configs[0], *known)
    if before:
        return count, search  # its blocks and rungs stay what they were
    rungs = ()
    if search.method == "halving":
        lengths = sorted({config.train.max_steps for config in configs})
        if len(lengths) > 1:
            raise UserError(
                f"--method halving compares after equal numbers of steps, but num_train_epochs gives {lengths[0]} to "
                f"{lengths[-1]}; set --train.max_steps"
            )
        rungs = rungs_of(configs[0], search.trials)
    together = max(min(count, search.trials // 5), 1)  # the estimator learns between blocks: five of them at least
    return count, dataclasses.replace(search, together=together, rungs=rungs)


# ---------------------------------------------------------------- devices and data


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all trials share."""

    configs: list[Config]
    """Of the trials known beforehand, resolved."""
    dataset: object
    mesh: object
    shards: int
    """Parts that the mesh splits a batch into."""
    weights: dict | None
    """Parameters that every trial starts from, on the host; None for fresh ones."""

    def resolved(self, config: Config) -> Config:
        """`config` with batch, block size and number of steps as numbers."""
        from jaxgpt.training.step import resolve_batch, resolve_steps

        windows = self.dataset.train.rows_per_epoch(config.block_size)
        return resolve_steps(resolve_batch(config, self.shards), windows)


def prepare_bench(config: Config, trials: Sequence[Config]) -> Bench:
    """Devices, data and weights, checked for every one of the `trials`.

    Raises:
        UserError: as `train` says it.
    """
    from jaxgpt.data.dataset import open_dataset
    from jaxgpt.model.huggingface import locate
    from jaxgpt.parallel import distributed
    from jaxgpt.parallel.accelerator import refuse_silent_cpu
    from jaxgpt.parallel.compiler import use_compilation_cache
    from jaxgpt.parallel.mesh import batch_shards, build_mesh
    from jaxgpt.preparation.make_dataset import given_tokenizer, prepare
    from jaxgpt.training import resume
    from jaxgpt.training.step import lay_out, resolve_batch

    if distributed.place_in(os.environ, config.mesh.distributed) is not None:
        raise UserError("sweep runs in one process; start it on one host, or set --mesh.distributed off")
    weights = [resume.weights_to_start_from(trial, None) for trial in _one_of_each(trials, "model")][0]
    tokenizer = given_tokenizer(config, locate)
    resume.check_tokenizer(weights, tokenizer)
    refuse_silent_cpu()
    mesh = build_mesh(config.mesh)
    use_compilation_cache(config.train.compilation_cache_dir)
    for trial in _one_of_each(trials, "train"):
        resolve_batch(trial, batch_shards(mesh))
    dataset = open_dataset(prepare(config, tokenizer), verify=config.data.verify)
    dataset = resume.check_data(Path(), None, weights, dataset)
    for trial in _one_of_each(trials, "model"):
        laid = lay_out(trial, dataset.vocab_size, mesh)
    bench = Bench([], dataset, mesh, batch_shards(mesh), read_weights(weights, dataset.vocab_size, laid))
    return dataclasses.replace(bench, configs=[bench.resolved(trial) for trial in trials])


def _one_of_each(trials: Sequence[Config], section: str) -> list[Config]:
    """Of trials that are alike in a section, the first."""
    return list({getattr(trial, section): trial for trial in reversed(trials)}.values())


def read_weights(weights, vocab_size: int, laid) -> dict | None:
    """The parameters that init names, on the host."""
    if weights is None:
        return None
    import jax

    from jaxgpt.training import resume

    struct = lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)
    target = jax.tree.map(struct, laid.shapes, laid.param_shardings)
    return jax.device_get(resume.read_weights(weights, vocab_size, target))


# ---------------------------------------------------------------- running


def describe(search, bench: Bench, found, side_by_side: int, folder: Path) -> None:
    """What is going to happen, before it does."""
    config = bench.configs[0]
    how = {"grid": "every combination", "random": "drawn at random", "tpe": f"proposed {search.together} at a time"}
    how["halving"] = f"successive halving, a third goes on after each of the steps {', '.join(map(str, search.rungs))}"
    together = f"up to {side_by_side} side by side" if side_by_side > 1 else "one after another"
    print(f"sweep    {search.trials} trials, {how[search.method]}; {together}; in {folder}")
    for variable in search.space.variables:
        print(f"vary     {variable.name}: {variable.describe()}")
    print(
        f"trial    {config.train.max_steps:,} steps of {config.train.global_batch_size * config.block_size:,} tokens, "
        f"evaluated every {config.eval.eval_steps:,}"
    )
    if search.rungs and search.rungs[0] <= 2 * (warm_up := config.optimizer.warmup_steps):
        print(
            f"doubt    the first trials are dropped at step {search.rungs[0]}, and the warm-up takes {warm_up}: small "
            "learning rates have hardly begun by then; fewer --trials, or a later --eval.eval_steps"
        )
    if done := found.latest():
        print(f"resume   {len(done)} trials are recorded")
    sys.stdout.flush()


def run_rounds(search, found, bench: Bench, side_by_side: int, folder: Path) -> None:
    """Run what is left, recording each trial as it ends."""
    from tqdm import tqdm

    from jaxgpt.tuning import sweep_table
    from jaxgpt.tuning.sweep_folder import Record
    from jaxgpt.tuning.trial_runner import Runner, Trial

    say = lambda text: tqdm.write(text, file=sys.stdout)
    runner = Runner(folder, bench.dataset, bench.mesh, side_by_side, bench.weights, say)
    ended = len(found.ended())
    with tqdm(total=search.trials, initial=ended, desc="trials", unit="trial", disable=None) as bar:
        while (now := search.next_round(found)) is not None:
            for record in found.latest():
                if record.number not in now.alive:
                    runner.forget(record.number)
            trials = [Trial(number, bench.resolved(search.space.config(point))) for number, point in now.points.items()]
            for result in runner.run(trials, now.until):
                record = Record(settings=now.points[result.number], **dataclasses.asdict(result))
                found.add(record)
                bar.update(len(found.ended()) - bar.n)
                best = sweep_table.best(found)
                bar.set_postfix_str(f"best {best.loss:.4f}" if best else "")
                if bar.disable:
                    print(sweep_table.one_line(search.space, record), flush=True)
    for record in found.latest():
        runner.forget(record.number)


# ---------------------------------------------------------------- what it says


def conclude(search, found, arguments: argparse.Namespace) -> None:
    """The table, the winner as a config file, the pictures; also of a sweep that was stopped."""
    from jaxgpt.reporting import sweep_page
    from jaxgpt.tuning import scaling, sweep_folder, sweep_table

    space, folder = search.space, arguments.workdir
    sizes = sweep_table.sizes(space, found)
    law = scaling.of_sizes(sizes, arguments.predict)
    matter, doubts = sweep_table.effects(space, found), sweep_table.doubts(space, found)
    if search.method == "halving":
        matter = []  # the trials that finished were chosen, so their means say little
    print(sweep_table.table(space, found))
    if len(matter) > 1:
        print(
            "matters  "
            + ", ".join(f"{variable.label} {nats:.4f}" for variable, nats in matter)
            + " nats between values"
        )
    if said := scaling.report(sizes, law):
        print(said)
    for doubt in doubts:
        print(f"doubt    {doubt}")
    winner = sweep_table.best(found)
    if winner is None:
        print("best     no trial has finished with a loss yet")
    else:
        file = sweep_folder.write_best(folder, space, winner, command_with)
        print(f"best     trial {winner.number}, validation loss {winner.loss:.4f}: {file}")
        print(f"train    {command_with(file)}")
    print(f"report   {sweep_page.write_page(folder, sweep_page.Sweep(search, found, law, matter, doubts))}", flush=True)
    if arguments.json:
        _write_json(arguments.json, _as_json(search, found, winner, law))


def command_with(file: Path) -> str:
    return f"python -m jaxgpt.train --config {file} --workdir {file.parent}-best"


def _as_json(search, found, winner, law) -> dict:
    return {
        "method": search.method,
        "variables": {variable.name: variable.text for variable in search.space.variables},
        "best": dataclasses.asdict(winner) if winner else None,
        "trials": [dataclasses.asdict(record) for record in found.ranking()],
        "scaling": dataclasses.asdict(law) if law else None,
    }


def _write_json(file: Path, content: dict) -> None:
    try:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {file} cannot be written ({error.strerror})") from None


# ---------------------------------------------------------------- the range finder


def find_learning_rate(config: Config, arguments: argparse.Namespace) -> None:
    """One run whose learning rate rises at every step (Smith 2017, section 3.3): which rates are worth a sweep?"""
    from jaxgpt.reporting import sweep_page
    from jaxgpt.storage.files import write_file
    from jaxgpt.storage.lease import Lease
    from jaxgpt.tuning import learning_rate, sweep_folder

    folder = arguments.workdir
    if sweep_folder.earlier(folder):
        raise UserError(f"{folder} holds a sweep, whose report would be lost; choose another --workdir")
    if config.init.from_checkpoint or config.init.from_huggingface:
        raise UserError("--find-learning-rate trains from fresh weights; leave [init] out")
    bench = prepare_bench(config, [config])
    folder.mkdir(parents=True, exist_ok=True)
    with Lease(folder):
        found = learning_rate.find(bench.configs[0], bench.dataset, bench.mesh)
        write_file(folder / sweep_page.RANGE_TEST, json.dumps(dataclasses.asdict(found)))
        report = sweep_page.write_page(folder, None)
    low, high = sorted([found.steepest / 4, max(found.highest_safe, found.steepest) * 2])
    print(f"range    {len(found.rates)} steps, learning rate {found.rates[0]:.2g} to {found.rates[-1]:.2g}")
    print(f"steepest {found.steepest:.2g}: where the loss fell fastest, a good peak for a schedule")
    print(f"safe     {found.highest_safe:.2g}: a tenth of the rate at which the loss was lowest")
    vary = f"optimizer.learning_rate={low:.1g}..{high:.1g}:7"
    print(f"next     python -m jaxgpt.sweep --config {arguments.config} --vary {vary}")
    print(f"report   {report}", flush=True)
    if arguments.json:
        _write_json(arguments.json, dataclasses.asdict(found))


if __name__ == "__main__":
    sys.exit(main())
