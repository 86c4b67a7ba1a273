"""The input of a probe (Case) and its answer (Finding). Both travel between processes as JSON."""

import dataclasses
import json
from typing import Any

from jaxgpt.config import Config, from_json, to_json

OK, WARNING, PROBLEM, NOT_APPLICABLE = STATUSES = ("ok", "warning", "problem", "not applicable")


@dataclasses.dataclass(frozen=True)
class Case:
    """The machine and the experiment to look at."""

    config: Config  # the experiment's settings, or the defaults where none is given
    workdir: str  # its run folder, as the user wrote it
    is_given: bool = False  # the user gave settings; without them there is no model to measure
    expect: str | None = None  # tpu, gpu or cpu, where the user says what jax has to find
    root: str = "/"  # where /dev, /proc and /sys are read

    def to_json(self) -> str:
        return json.dumps(vars(self) | {"config": to_json(self.config)})

    @staticmethod
    def from_json(text: str) -> "Case":
        fields = json.loads(text)
        return Case(**fields | {"config": from_json(fields["config"])})


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the doctor's answer, and one line with the fix where something is wrong."""

    name: str
    status: str
    text: str
    fix: str = ""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # the numbers behind the line, for programs

    def __post_init__(self) -> None:
        assert self.status in STATUSES, self.status
        assert bool(self.fix) == (self.status in (WARNING, PROBLEM)), self
        for name in ("text", "fix"):  # a message of a library or the system may have several lines
            object.__setattr__(self, name, " ".join(getattr(self, name).split()))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))
