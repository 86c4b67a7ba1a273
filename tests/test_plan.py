"""`jaxgpt plan` as a user meets it, without the TPU compiler: tables by arithmetic, and mistakes."""

import json
import sys

import pytest

from jaxgpt import plan
from jaxgpt.config import Config, load_config
from jaxgpt.errors import RunFailed, UserError, how_to_install
from jaxgpt.planning import plan_table, planner, topology, verdict
from jaxgpt.planning.compile import CompiledStep
from jaxgpt.planning.plan_search import own_candidate

CONFIG = """
[model]
n_layer = 12
n_head = 12
n_embd = 768
[tokenizer]
vocab_size = 50257
[train]
global_batch_size = 512
per_device_train_batch_size = 16
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs the command without libtpu: (exit code, stdout, stderr)."""
    monkeypatch.setitem(sys.modules, "libtpu", None)
    (tmp_path / "c.toml").write_text(CONFIG)

    def run(*arguments: str):
        code = plan.main(["--config", str(tmp_path / "c.toml"), *arguments])
        return code, *capsys.readouterr()

    return run


def test_without_the_compiler_the_table_is_arithmetic_and_says_so(run, tmp_path):
    code, out, _ = run("--tpu", "v5e-1,v5e-8,v6e-8,v5p-16", "--json", str(tmp_path / "rows.json"))
    assert code == 0
    assert how_to_install("plan") in out
    assert "ARITHMETIC" in out
    assert "data 8, 16 rows x 4 (config)" in out
    assert "usable; arithmetic" in out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["slice"] for row in rows} == {"v5e-1", "v5e-8", "v6e-8", "v5p-16"}
    assert all(row["compiled"] is False and row["cycles"] is None for row in rows)
    for row in rows:
        assert row["tokens_per_step"] == 512 * 1024
        assert row["total_bytes"] == sum(row["memory_bytes"].values())
        assert row["seconds_per_step"]["low"] < row["seconds_per_step"]["calibrated"] < row["seconds_per_step"]["high"]
        assert 0.1 < row["mfu"] < 0.8


def test_the_price_of_a_token_is_chips_times_hours(run, tmp_path):
    prices = tmp_path / "prices.toml"
    prices.write_text('[v5e]\nusd_per_chip_hour = 36.0\ndate = "2026-01"\nsource = "a friend"\n')
    file = tmp_path / "rows.json"
    code, out, _ = run("--tpu", "v5e-8", "--exact", "--prices", str(prices), "--json", str(file))
    assert code == 0
    assert "Price v5e: $36.00 a chip-hour on demand, 2026-01 (a friend)" in out
    [row] = json.loads(file.read_text())
    dollars_a_step = 8 * 36 / 3600 * row["seconds_per_step"]["calibrated"]
    assert row["usd_per_billion_tokens"] == pytest.approx(1e9 * dollars_a_step / row["tokens_per_step"])


def test_the_fastest_settings_are_printed_as_a_config_takes_them(run, tmp_path):
    _, out, _ = run("--tpu", "v5e-8")
    fragment = out.split("The fastest that fits:\n")[1].split("\nPrice")[0]
    file = tmp_path / "fragment.toml"
    file.write_text("\n".join(line.strip() for line in fragment.splitlines()))
    config = load_config(file)
    assert config.train.global_batch_size == 512
    assert config.mesh.data * config.mesh.fsdp == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the slices to plan for, for example --tpu v5e-8"),
        (["--tpu", "v9-8"], "--tpu v9-8: no such slice; known: v4-{8,16"),
        (["--tpu", "v5e-8", "--exact", "--mesh.fsdp", "3"], "3 x 1 = 3 does not divide the 8 devices"),
        (["--tpu", "v5e-256", "--train.global_batch_size", "480"], "480 is not a multiple of the 256 devices"),
        (["--tpu", "v5e-8", "--record", "bound.json"], "--record and --gate need the compiler; libtpu"),
        (["--gate", "nowhere.json"], "--gate nowhere.json: no such file; write it with --record"),
        (["--tpu", "v5e-8", "--prices", "nowhere.toml"], "--prices nowhere.toml: no such file"),
        (["--tpu", "v5e-8", "--budget", "-1"], "--budget"),
        (["--tpu", "v5e-8", "--tokenizer.type", "folder", "--tokenizer.path", "hf:some/one"], "--vocab-size N"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_config_that_fits_nowhere_says_what_would(run):
    large = ["--model.n_layer", "48", "--model.n_head", "25", "--model.n_embd", "1600"]
    code, out, err = run("--tpu", "v5e-1", *large)
    assert code == 2
    assert "nothing fits on v5e-1; by arithmetic this would: v5e-4 with fsdp 4" in err or "v5e-8 with fsdp" in err
    assert "far too large" in out or " no " in out
    code, _, err = run("--tpu", "v5e-8", "--exact", *large)
    assert code == 2
    assert "this would: v5e-8 with fsdp 8" in err  # the slice does, other settings


def test_one_slice_that_cannot_run_the_config_does_not_stop_the_others(run):
    code, out, _ = run(
        "--tpu", "v5e-256,v5e-8", "--train.global_batch_size", "480", "--train.per_device_train_batch_size", "12"
    )
    assert code == 0
    assert "480 is not a multiple of the 256 devices" in out
    assert "data 8, 12 rows x 5 (config)" in out


@pytest.mark.parametrize(
    "text",
    [
        "[v9]\nusd_per_chip_hour = 1.0",
        "[v5e]\nusd_per_chip_hour = 1.0",
        "v5e = 1.2",
        "[v5e",
        '[v5e]\nusd_per_chip_hour = "1"\ndate = ""\nsource = ""',
    ],
)
def test_a_wrong_price_file_is_the_users_mistake(run, tmp_path, text):
    (tmp_path / "prices.toml").write_text(text)
    code, _, err = run("--tpu", "v5e-8", "--prices", str(tmp_path / "prices.toml"))
    assert code == 2
    assert "prices.toml" in err and err.count("\n") == 1


def test_the_prices_that_come_with_the_package_cover_every_chip():
    prices = verdict.read_prices()
    assert set(prices) == set(topology.FAMILIES)
    assert all(price.date.startswith("202") and price.source for price in prices.values())


class Row:
    """As much of a verdict as the gate reads."""

    def __init__(self, cycles, fits=True):
        self.where, self.cycles, self.fits = topology.parse_slice("v5e-8"), cycles, fits


def test_the_gate_lets_two_percent_pass_and_stops_the_rest(tmp_path, capsys):
    bounds = {"v5e-8": {"cycles": 100e6}}
    planner.check_bounds(tmp_path, bounds, [Row(101.9e6)])
    assert "holds" in capsys.readouterr().out
    with pytest.raises(RunFailed, match="v5e-8 takes 102.1 M cycles, 100.0 M were recorded"):
        planner.check_bounds(tmp_path, bounds, [Row(102.1e6)])
    with pytest.raises(RunFailed, match="v5e-8 no longer fits"):
        planner.check_bounds(tmp_path, bounds, [Row(None, fits=False)])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"v5e-8": 3}', '{"v5e-8": {}}'])
def test_a_file_that_no_gate_wrote_is_the_users_mistake(tmp_path, text):
    (tmp_path / "bound.json").write_text(text)
    with pytest.raises(UserError, match="not a file that --record wrote"):
        planner.read_bounds(tmp_path / "bound.json")


@pytest.mark.parametrize(
    ("name", "calibrated"), [("v5e-1", True), ("v6e-1", True), ("v5e-8", False), ("v6e-8", False), ("v5p-16", False)]
)
def test_an_error_band_is_claimed_only_where_measured_runs_are_behind_it(name, calibrated):
    where = topology.parse_slice(name)
    config = Config(train={"global_batch_size": 64, "per_device_train_batch_size": 2})
    hlo = "HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n"
    hlo += '  ROOT %a = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"1500000"}\n}\n'
    candidate = own_candidate(config, 50257, where)
    row = verdict.judge(candidate, CompiledStep(True, {"program": 1}, 1, 2, 0, 1.0, hlo), 50257, {})
    assert row.seconds > 0
    assert (row.low is not None) == (row.high is not None) == calibrated
    assert ("~" in plan_table.table([row], absolute=True)) == (not calibrated)
    assert verdict.CALIBRATION.limits in " ".join(plan_table.calibration_lines())
