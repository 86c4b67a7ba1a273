"""metrics.jsonl holds one strict JSON object a step through any kill and resume; views agree."""

import io
import json
import os
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxgpt.errors import UserError
from jaxgpt.settings import LogConfig
from jaxgpt.training import metrics
from jaxgpt.training.metrics import MetricLog, TimeSplit, peak_flops, read_metrics

QUIET = LogConfig(tensorboard=False)


def write_steps(workdir, steps, start_step=0, log=QUIET, **values):
    with MetricLog(workdir, log, total_steps=100, start_step=start_step, is_writer=True) as run:
        for step in steps:
            run.write(step, {"loss": step / 7, **values})


def strict(line):
    """Parse as RFC 8259 does: NaN and Infinity are errors."""
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


class Terminal(io.StringIO):
    def isatty(self):
        return True


# ---------------------------------------------------------------- peak FLOP/s


def test_peak_flops_is_that_of_one_jax_device_not_of_one_chip():
    assert peak_flops("TPU v3") == 61.5e12  # 123 a chip of two devices
    assert peak_flops("TPU7x") == 1153.5e12  # 2307 a chip of two devices
    assert peak_flops("TPU v4") == 275e12  # one device a chip


@pytest.mark.parametrize("one, other", [("TPU v5 lite", "TPU v5e"), ("TPU v6 lite", "TPU v6e"), ("TPU v5", "TPU v5p")])
def test_peak_flops_knows_both_names_of_a_tpu(one, other):
    assert peak_flops(one) == peak_flops(other) is not None


@pytest.mark.parametrize(
    "kind, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_peak_flops_of_gpus_is_the_dense_figure(kind, teraflops):
    assert peak_flops(kind) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "",
        "TPU v9",
        "NVIDIA H200 NVL",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    ],
)
def test_peak_flops_is_none_rather_than_that_of_a_relative(kind):
    assert peak_flops(kind) is None


# ---------------------------------------------------------------- time split


def test_time_split_adds_up_each_activity_and_take_starts_anew(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 3.0, 3.5, 4.0, 9.0, 10.0, 12.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    split = TimeSplit()
    with split("data"):
        pass  # 1 to 3
    with split("data"):
        pass  # 3 to 3.5
    with split("save"):
        pass  # 4 to 9
    assert split.take() == {
        "seconds_data": 2.5,
        "seconds_step": 0.0,
        "seconds_eval": 0.0,
        "seconds_save": 5.0,
        "seconds_total": 10.0,
    }
    assert split.take() == dict.fromkeys(("seconds_data", "seconds_step", "seconds_eval", "seconds_save"), 0.0) | {
        "seconds_total": 2.0
    }


def test_time_split_counts_an_activity_up_to_the_moment_of_asking_and_its_rest_the_next_time(monkeypatch):
    """The loop reads the metrics of a step, and asks, while it waits in "step": the wait belongs to the steps read."""
    clock = iter([0.0, 1.0, 6.0, 8.0, 9.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    split = TimeSplit()
    with split("step"):  # 1 to 8
        first = split.take()  # at 6
    second = split.take()  # at 9
    assert (first["seconds_step"], first["seconds_total"]) == (5.0, 6.0)
    assert (second["seconds_step"], second["seconds_total"]) == (2.0, 3.0)


def test_time_split_counts_an_activity_that_raises_and_lets_the_exception_pass():
    split = TimeSplit()
    with pytest.raises(StopIteration), split("data"):
        time.sleep(0.01)
        raise StopIteration
    assert split.take()["seconds_data"] >= 0.01


def test_time_split_refuses_an_activity_it_does_not_know():
    with pytest.raises(KeyError):
        TimeSplit()("sleep")


# ---------------------------------------------------------------- metrics.jsonl


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    with MetricLog(tmp_path, QUIET, 100, 0, is_writer=True) as run:
        run.write(10, {"loss": 1 / 3, "sample": "中文 🎉\u2028x"})
        assert read_metrics(tmp_path) == [{"step": 10, "loss": 1 / 3, "sample": "中文 🎉\u2028x"}]


def test_numpy_and_jax_scalars_are_written_with_every_digit(tmp_path):
    write_steps(tmp_path, [1], a=np.float32(0.1), b=np.int64(2**53 + 1), c=jnp.float32(0.1), d=None, e=True)
    line = read_metrics(tmp_path)[0]
    assert line["a"] == line["c"] == float(np.float32(0.1))
    assert (line["b"], line["d"], line["e"]) == (2**53 + 1, None, True)


def test_not_finite_figures_are_null_and_named_and_the_line_stays_strict_json(tmp_path):
    write_steps(tmp_path, [1], grad_norm=float("nan"), eval_loss=float("inf"), mfu=0.5)
    line = strict((tmp_path / "metrics.jsonl").read_bytes())
    assert line["grad_norm"] is None and line["eval_loss"] is None and line["mfu"] == 0.5
    assert line["nonfinite"] == {"grad_norm": "nan", "eval_loss": "inf"}


def test_half_a_character_in_a_sample_does_not_end_the_run(tmp_path):
    write_steps(tmp_path, [1], log=LogConfig(), sample="ok \ud83c")
    assert read_metrics(tmp_path)[0]["sample"] == "ok ?"


def test_resume_cuts_the_steps_that_will_run_again_so_no_step_is_there_twice(tmp_path):
    write_steps(tmp_path, range(10, 60, 10))
    write_steps(tmp_path, range(40, 80, 10), start_step=30)
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 30, 40, 50, 60, 70]


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_line_torn_at_any_byte_is_left_out_by_reading_and_removed_by_resuming(tmp_path, cut):
    write_steps(tmp_path, [10, 20], sample="中文 🎉")
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    path.write_bytes(whole[: second + cut])
    torn = second + cut < len(whole) - 1  # only the line break lost: still a whole object
    assert [line["step"] for line in read_metrics(tmp_path)] == ([10] if torn else [10, 20])
    write_steps(tmp_path, [30], start_step=20)
    assert [strict(line)["step"] for line in path.read_bytes().splitlines()] == ([10, 30] if torn else [10, 20, 30])


def test_a_run_from_step_0_does_not_keep_the_lines_of_one_that_never_saved(tmp_path):
    write_steps(tmp_path, [0, 10])
    write_steps(tmp_path, [0, 5])
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 5]


def test_a_kill_while_the_file_is_cut_leaves_the_old_file_whole(tmp_path, monkeypatch):
    write_steps(tmp_path, [10, 20, 30])
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricLog(tmp_path, QUIET, 100, 10, is_writer=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_file_with_nothing_to_cut_is_not_rewritten(tmp_path, monkeypatch):
    write_steps(tmp_path, [10, 20])
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("rewritten"))
    write_steps(tmp_path, [30], start_step=20)


def test_processes_that_are_not_the_writer_write_and_print_nothing(tmp_path, capsys):
    with MetricLog(tmp_path / "run", LogConfig(), 100, 0, is_writer=False) as run:
        run.advance(1)
        run.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_reading_a_folder_without_metrics_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: no such file"):
        read_metrics(tmp_path)


# ---------------------------------------------------------------- views


def events(workdir):
    """(step, tag, value) of every TensorBoard record; the framing is length, crc, data, crc."""
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            content = content[12 + length + 4 :]
            if event.HasField("session_log"):
                yield event.step, "start", None
            for value in event.summary.value:
                text = value.tensor.string_val
                yield event.step, value.tag, text[0].decode() if text else value.simple_value


def test_tensorboard_gets_numbers_as_scalars_and_samples_as_text_that_keeps_its_lines(tmp_path):
    write_steps(
        tmp_path,
        [7],
        log=LogConfig(),
        eval_loss=0.5,
        sample="if x:\n  y",
        batch_hash="ab",
        mfu=None,
    )
    records = {tag.removesuffix("/text_summary"): (step, value) for step, tag, value in events(tmp_path)}
    assert records["train/loss"] == (7, 1.0)
    assert records["eval/loss"] == (7, 0.5)
    assert records["train/sample"] == (7, "    if x:\n      y")
    assert not any("hash" in tag or "mfu" in tag for tag in records)


def test_tensorboard_hides_on_resume_what_is_run_again(tmp_path):
    write_steps(tmp_path, [10], start_step=5, log=LogConfig())
    assert (6, "start", None) in list(events(tmp_path))


def test_wandb_continues_the_same_run_after_a_resume_and_learns_that_a_run_failed(tmp_path, monkeypatch):
    started, logged, ended = [], [], []
    run = types.SimpleNamespace(
        define_metric=lambda *_, **__: None,
        log=logged.append,
        finish=lambda exit_code: ended.append(exit_code),
    )
    fake = types.SimpleNamespace(init=lambda **kw: started.append(kw) or run, __spec__=True)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = LogConfig(tensorboard=False, wandb_project="p")
    write_steps(tmp_path, [10], log=log)
    with pytest.raises(ZeroDivisionError), MetricLog(tmp_path, log, 100, 10, is_writer=True):
        raise ZeroDivisionError
    assert started[0]["id"] == started[1]["id"] and started[0]["resume"] == "allow"
    assert logged == [{"train/step": 10, "train/loss": 10 / 7}]
    assert ended == [0, 1]


TRAIN = {
    "loss": 2.41309,
    "grad_norm": 0.93,
    "learning_rate": 6e-4,
    "tokens_per_second": 31000.2,
    "mfu": None,
}


def test_without_a_terminal_every_call_prints_one_aligned_line(tmp_path, capsys):
    with MetricLog(tmp_path, QUIET, 2000, 0, is_writer=True) as run:
        run.advance(119)
        run.write(120, TRAIN)
        run.write(1240, TRAIN | {"loss": 1.5, "mfu": 0.4123, "tokens_per_second": 131000.0})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step  120/2000 | loss 2.4131 | grad_norm  0.93 | lr 6.0e-04 | ")
    assert first.endswith(" |    31,000 tok/s | mfu – | 0:00")
    assert second.startswith("step 1240/2000 | loss 1.5000 | ")
    assert second.endswith(" |   131,000 tok/s | mfu 41.2% | 0:00<0:00")
    assert first.index("tok/s") == second.index("tok/s")


def test_time_left_is_reckoned_from_the_pace_after_the_first_line(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 300.0, 310.0])  # 300 s of compilation, then 10 s for 10 steps
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    with MetricLog(tmp_path, QUIET, 4020, 0, is_writer=True) as run:
        run.write(10, {"loss": 1.0})
        run.write(20, {"loss": 1.0})
    assert capsys.readouterr().out.splitlines()[1].endswith("| 5:10<1:06:40")


def test_a_sample_stands_under_its_line_and_cannot_send_control_codes(tmp_path, capsys):
    with MetricLog(tmp_path, QUIET, 100, 0, is_writer=True) as run:
        run.write(50, {"eval_loss": 2.0, "eval_perplexity": 7.389, "sample": "a\n中\x1b[2J\x07"})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step  50/100 | eval_loss 2.0000 | perplexity 7.39 | 0:00")
    assert lines[1:] == ["    a", "    中�[2J�"]


def test_a_character_that_stdout_cannot_print_does_not_end_the_run(tmp_path, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    write_steps(tmp_path, [1], sample="中", mfu=None)
    assert "    ?" in stdout.buffer.getvalue().decode()


def test_on_a_terminal_training_moves_the_bar_and_evaluations_are_printed_above_it(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    with MetricLog(tmp_path, QUIET, 20, 10, is_writer=True) as run:
        for step in range(11, 21):
            run.advance(step)
        run.write(20, TRAIN)
        run.write(20, {"eval_loss": 2.0})
    shown = screen.getvalue()
    assert "10/20" in shown and "20/20" in shown
    assert "loss 2.4131, lr 6.0e-04, 31,000 tok/s" in shown
    assert "step 20/20 | eval_loss 2.0000" in shown
    assert "| loss 2.4131" not in shown


@pytest.mark.system
def test_tensorboard_files_are_written_without_importing_torch_where_it_is_installed(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("print('torch was imported')")
    code = (
        "import sys; from pathlib import Path\n"
        "from jaxgpt.settings import LogConfig; from jaxgpt.training.metrics import MetricLog\n"
        "with MetricLog(Path(sys.argv[1]), LogConfig(), 10, 0, is_writer=True) as log:\n"
        "    log.write(1, {'loss': 1.0, 'sample': 'text'})\n"
        "print('now'); import torch\n"  # the user's own import still works
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["now", "torch was imported"]
    assert "torch was imported" not in done.stdout.splitlines()[:-1]
    assert list((tmp_path / "run" / "tensorboard").iterdir())
