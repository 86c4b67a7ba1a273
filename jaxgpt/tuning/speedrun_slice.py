"""What a speedrun would train on a TPU slice, by the TPU compiler on this machine: size, tokens, time, price."""

from collections.abc import Callable
from typing import Protocol

from jaxgpt.config import Config, load_config
from jaxgpt.errors import UserError
from jaxgpt.model.sizes import parameter_count
from jaxgpt.tuning import speedrun_plan
from jaxgpt.tuning.speed_probe import StepTime, flops_of_step
from jaxgpt.tuning.speedrun_plan import SpeedrunPlan

OTHER_MINUTES = 10.0  # preparing, compiling, evaluating and scoring
_MFU = 0.5  # of a size before the compiler has seen it
_ROWS = 16  # of each device in one go, at most


class Machine(Protocol):
    """A slice, as planning/planner.py describes it."""

    @property
    def devices(self) -> int: ...
    @property
    def peak_flops(self) -> float: ...
    @property
    def usd_per_hour(self) -> float | None: ...
    @property
    def step_seconds(self) -> Callable[[Config, int], float | None]: ...


def print_slice_plan(minutes: float, name: str, machine: Machine) -> None:
    """Choose a size, compile it for the slice, choose again by what was found, and print the plan.

    Raises:
        UserError: the time is too short, or the size does not fit.
    """
    devices, seconds = machine.devices, 60 * (minutes - OTHER_MINUTES)
    frame = speedrun_plan.frame_for(minutes, devices, is_cpu=False)
    if seconds < 60:
        raise UserError(
            f"{minutes:g} minutes: at least {OTHER_MINUTES + 1:g} on a TPU, of which {OTHER_MINUTES:g} prepare"
        )
    measured = [StepTime(machine.peak_flops * devices * _MFU, 1.0, 0.0)]
    found: dict[tuple[int, int], float] = {}
    while len(found) < 3:
        best = speedrun_plan.candidates(seconds, measured, frame)[0]
        size = best.n_layer, best.n_embd
        if size in found:
            break
        length = frame.length(best.tokens)
        plan = SpeedrunPlan(*size, length, length, None, seconds)
        settings = speedrun_plan.settings_of(plan, "pretrain", {}, ".", 0, frame)
        rows = next(n for n in range(min(_ROWS, length.rows // devices), 0, -1) if length.rows // devices % n == 0)
        config = load_config(None, settings | {"train.per_device_train_batch_size": rows})
        print(f"compiling {size[0]} layers of {size[1]} for {name} ...", flush=True)
        taken = machine.step_seconds(config, frame.vocab_size)
        if taken is None:
            raise UserError(f"{name}: a step of {size[0]} layers of {size[1]} does not fit; see python -m jaxgpt.plan")
        flops = flops_of_step(config, frame.vocab_size, length.rows)
        measured = [*(measured if found else []), StepTime(flops, taken, 0.0)]
        found[size] = taken
    rate = frame.token_rate(*size, measured)
    pretrain, chat = frame.shares(seconds, rate)
    count, hours = parameter_count(frame.model(*size), frame.vocab_size), minutes / 60
    print(f"slice    {name}: {rate * speedrun_plan.SLOWER:,.0f} tokens a second by the compiler")
    print(f"model    {count / 1e6:,.0f} M parameters: {size[0]} layers of {size[1]}, rows of {frame.n_positions}")
    print(f"tokens   {pretrain / 1e9:.2f} billion of pretraining, {chat / 1e6:.0f} million of chat")
    print(f"time     {hours:.1f} h, {OTHER_MINUTES:g} minutes of it to prepare, compile and score")
    if price := machine.usd_per_hour:
        print(f"price    {price * hours:,.0f} USD at {price:.2f} an hour")
    print("loss     not predicted: the law was measured for smaller models (tuning/measured_losses.toml)")
