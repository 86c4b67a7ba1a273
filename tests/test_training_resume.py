"""Going on with a run: what may differ from its first start, what needs --force, and the data it has to find."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxgpt import train
from jaxgpt.config import Config, load_config, to_json
from jaxgpt.data.dataset import SPLITS, open_dataset
from jaxgpt.data.tokenizer import Tokenizer, char_tokenizer
from jaxgpt.data.tokenizer_folder import load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.preparation.make_dataset import prepare
from jaxgpt.preparation.writer import DatasetWriter
from jaxgpt.settings import OptimizerConfig, TrainConfig
from jaxgpt.storage import manifest
from jaxgpt.training import resume
from jaxgpt.training.optimizer import arguments, build_optimizer, schedule
from jaxgpt.training.resume import CHANGES, ENDLESS, ON_RESUME, check_workdir, record_changes

OLD = Config(optimizer=OptimizerConfig(learning_rate=0.01), train=TrainConfig(max_steps=500, global_batch_size=8))


def changed(config: Config, **settings) -> Config:
    for name, value in settings.items():
        section, field = name.split("__")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{field: value})}
        )
    return config


@pytest.fixture
def workdir(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(to_json(OLD))
    (tmp_path / "checkpoints" / "300" / "params").mkdir(parents=True)
    (tmp_path / "checkpoints" / "300" / "optimizer").mkdir()
    manifest.write(tmp_path / "checkpoints" / "300")
    return tmp_path


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def untouched(before: dict[Path, bytes]) -> bool:
    return all(path.read_bytes() == content for path, content in before.items())


# ---------------------------------------------------------------- settings


def test_a_free_change_is_accepted_silently_and_kept(workdir, capsys):
    changes = check_workdir(changed(OLD, mesh__fsdp=2, log__logging_steps=5), workdir)
    record_changes(workdir, 300, changes)
    assert capsys.readouterr() == ("", "")
    [line] = (workdir / CHANGES).read_text().splitlines()
    assert json.loads(line) == {"step": 300, "changes": {"mesh.fsdp": [1, 2], "log.logging_steps": [10, 5]}}


def test_no_change_leaves_no_trace(workdir, tmp_path):
    before = files(workdir)
    record_changes(workdir, 300, check_workdir(OLD, workdir))
    assert files(workdir) == before
    assert check_workdir(OLD, tmp_path / "new") == {}


def test_a_change_of_what_follows_is_refused_and_with_force_printed_and_kept(workdir, capsys):
    new = changed(OLD, optimizer__learning_rate=0.5, train__max_steps=600)
    before = files(workdir)
    with pytest.raises(UserError) as error:
        check_workdir(new, workdir)
    assert "\n" not in str(error.value)
    for words in ("optimizer.learning_rate was 0.01, now 0.5", "train.max_steps was 500, now 600", "--force"):
        assert words in str(error.value)
    assert files(workdir) == before
    for number in (1, 2):
        record_changes(workdir, 300, check_workdir(new, workdir, force=True))
        printed = capsys.readouterr().out
        assert "optimizer.learning_rate was 0.01, now 0.5, from step 300 on" in printed
        lines = [json.loads(line) for line in (workdir / CHANGES).read_text().splitlines()]
        assert len(lines) == number
        assert lines[-1]["changes"] == {"optimizer.learning_rate": [0.01, 0.5], "train.max_steps": [500, 600]}


@pytest.mark.parametrize("force", [False, True])
def test_another_experiment_is_refused_even_with_force(force, workdir):
    new = changed(OLD, model__n_layer=3, train__seed=1, model__dropout=0.1, log__logging_steps=5)
    with pytest.raises(UserError) as error:
        check_workdir(new, workdir, force)
    message = str(error.value)
    assert "\n" not in message
    assert "belongs to another experiment: model.n_layer was 12, now 3, train.seed was 42, now 1;" in message
    assert "--force would accept only: model.dropout was 0.0, now 0.1" in message
    assert "logging_steps" not in message


def test_a_run_of_the_muon_that_had_a_rate_of_its_own_is_refused_by_name_and_other_old_runs_go_on(workdir):
    for name in ("adamw", "muon"):
        config = changed(OLD, optimizer__name=name)
        old = json.loads(to_json(config))
        old["optimizer"]["muon_learning_rate"] = 0.02  # it was written by every run, whatever its optimizer
        (workdir / "config.json").write_text(json.dumps({key: old[key] for key in old if key != "sha256"}))
        if name == "adamw":
            assert check_workdir(config, workdir) == {}
    with pytest.raises(
        UserError, match=r"earlier version's muon .*, whose state cannot go on; .* init.from_checkpoint"
    ):
        check_workdir(config, workdir, force=True)


def test_an_end_before_the_steps_that_are_done_is_refused(workdir):
    (workdir / "config.json").write_text(to_json(changed(OLD, optimizer__lr_scheduler_type="constant")))
    new = changed(OLD, optimizer__lr_scheduler_type="constant", train__max_steps=299)
    with pytest.raises(UserError, match=r"train.max_steps = 299, but .* has done 300 steps; set it to 300 or more"):
        check_workdir(new, workdir, force=True)
    assert check_workdir(changed(new, train__max_steps=300), workdir)["train.max_steps"].kind == "free"


OTHER = {
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "min_lr_rate": 0.0,
    "decay_rate": 0.9,
    "weight_decay": 0.0,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 0.5,
    "max_grad_norm": 0.0,
    "adam_mu_dtype": "bfloat16",
}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_optimizer_setting_may_be_forced_exactly_when_the_stored_state_still_fits(name):
    def state(settings: dict) -> list:
        params = {"blocks": {"mlp": {"c_fc": {"kernel": jnp.ones((1, 3, 5)), "bias": jnp.ones((1, 5))}}}}
        config = Config(optimizer=OptimizerConfig(**settings), train=TrainConfig(max_steps=500))
        optimizer = build_optimizer(config, arguments(config))
        leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(optimizer.init, params))
        return [(path, leaf.shape, leaf.dtype) for path, leaf in leaves]

    base = {"name": name}
    other = OTHER | {"name": {"adamw": "muon", "muon": "adamw"}[name]}
    assert set(other) == {field.name for field in dataclasses.fields(OptimizerConfig)}
    for setting, value in other.items():
        fits = state(base | {setting: value}) == state(base)
        assert fits == (f"optimizer.{setting}" in ON_RESUME["forced"]), setting


def test_the_schedules_called_endless_are_those_that_do_not_know_the_last_step():
    for shape in ("constant", "linear", "cosine", "inverse_sqrt", "warmup_stable_decay"):
        config = OptimizerConfig(lr_scheduler_type=shape, warmup_steps=10)
        given = arguments(Config(optimizer=config))
        rates = [[float(schedule(config, steps, 1.0, given)(n)) for n in range(0, 100, 9)] for steps in (100, 200)]
        assert (rates[0] == rates[1]) == (shape in ENDLESS), shape


# ---------------------------------------------------------------- whole runs: the data


@pytest.fixture(scope="module")
def run(tmp_path_factory, trained) -> tuple[Path, list[str]]:
    """A copy of the session's trained run, run/, with data of its own, and the arguments that resume it."""
    copy = trained.copy(tmp_path_factory.mktemp("resume") / "trained")
    shutil.rmtree(copy.folder / "prepared")
    assert train.main(copy.arguments) == 0  # prepares the data again, and trains no more
    (copy.run / CHANGES).unlink()  # the data has moved
    return copy.folder, copy.arguments


@pytest.fixture
def nothing_compiled(monkeypatch):
    """Fails the test as soon as a training program is built."""

    def build(*_, **__):
        raise AssertionError("a program was built")

    monkeypatch.setattr("jaxgpt.training.start.build_program", build)


def prepared(folder: Path) -> Path:
    [path] = (folder / "prepared").iterdir()
    return path


@pytest.fixture
def data(run):
    """The prepared folder of the run, put back after the test."""
    path = prepared(run[0])
    shutil.copytree(path, run[0] / "whole")
    yield path
    shutil.rmtree(path)
    (run[0] / "whole").rename(path)


def replace(data: Path, tokenizer: Tokenizer, fingerprint: str, settings: dict) -> None:
    """Put another dataset, with nothing wrong in itself, in the place of a prepared one."""
    shutil.rmtree(data)
    data.mkdir()
    writer = DatasetWriter(data, tokenizer)
    for split in SPLITS:
        writer.add(split, tokenizer.encode("the cat sat on the mat " * 90), 2000, starts_document=True)
    writer.finish({"fingerprint": fingerprint, "settings": settings})


def refused(arguments: list[str], capsys, *words: str) -> None:
    assert train.main(arguments) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in error


def test_a_flipped_bit_in_the_data_stops_a_start_before_anything_is_compiled(run, data, capsys, nothing_compiled):
    folder, arguments = run
    before = files(folder / "run")
    [shard] = data.glob("*train*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    refused(arguments, capsys, f"{shard}: changed (sha256", f"delete {data} and prepare again")
    fresh = [*arguments[:2], "--workdir", str(folder / "fresh")]
    refused(fresh, capsys, f"{shard}: changed")
    assert not (folder / "fresh").exists()
    assert untouched(before)
    with pytest.raises(AssertionError, match="a program was built"):
        train.main([*arguments, "--data.verify", "sizes"])  # asked not to look


def test_shards_of_another_tokenizer_are_refused_although_they_belong_together(run, data, capsys, nothing_compiled):
    folder, arguments = run
    whole = open_dataset(data)
    other = char_tokenizer([(folder / "text.txt").read_text().replace("v", "w")])  # of the same size
    replace(data, other, whole.fingerprint, whole.settings)
    assert manifest.problems(data) == []
    assert prepare(load_config(Path(arguments[1]))) == data
    before = files(folder / "run")
    refused(arguments, capsys, str(data), "tokenizer_digest was", "choose another --workdir")
    assert untouched(before)
    shutil.rmtree(data / "tokenizer")
    load_tokenizer(folder / "whole" / "tokenizer").save(data / "tokenizer")
    refused(arguments, capsys, "tokenizer/tokenizer.json: changed")
    manifest.write(data)
    refused(arguments, capsys, "does not match the prepared data beside it")


def test_shards_of_another_text_are_refused_although_they_belong_together(run, data, capsys, nothing_compiled):
    replace(data, load_tokenizer(data / "tokenizer"), "0" * 64, open_dataset(data).settings)
    refused(run[1], capsys, str(data), "data_fingerprint was", "choose another --workdir")


def test_a_damaged_description_of_the_data_is_one_line_and_no_traceback(run, data, capsys, nothing_compiled):
    _, arguments = run
    for name in ("dataset_info.json", "features.json", "metadata.json"):
        content = (data / name).read_bytes()
        for damage in (b"", b"{", content[:-5], b"\xff" + content, b"[]"):
            (data / name).write_bytes(damage)
            for verify in ("digests", "sizes"):
                refused([*arguments, "--data.verify", verify], capsys, f"{name}: changed")
        (data / name).unlink()
        refused(arguments, capsys, "prepare")
        (data / name).write_bytes(content)


# ---------------------------------------------------------------- whole runs: the settings


def test_a_run_goes_on_with_a_forced_change_and_remembers_it(run, tmp_path, capsys):
    folder, arguments = run
    workdir = tmp_path / "forced"
    shutil.copytree(folder / "run", workdir)
    again = [*arguments[:2], "--workdir", str(workdir), "--train.max_steps", "7", "--optimizer.learning_rate", "0.5"]
    before = files(workdir)
    refused(again, capsys, "optimizer.learning_rate was 0.01, now 0.5", "train.max_steps was 6, now 7", "--force")
    refused([*again, "--force", "--train.seed", "1"], capsys, "train.seed was 7, now 1")
    assert untouched(before)
    assert not (workdir / CHANGES).exists()
    assert train.main([*again, "--force"]) == 0
    assert "optimizer.learning_rate was 0.01, now 0.5, from step 6 on" in capsys.readouterr().out
    [line] = map(json.loads, (workdir / CHANGES).read_text().splitlines())
    assert line["step"] == 6
    assert line["changes"] == {"optimizer.learning_rate": [0.01, 0.5], "train.max_steps": [6, 7]}
    assert json.loads((workdir / "config.json").read_text())["optimizer"]["learning_rate"] == 0.5
    assert resume.finished_steps(workdir)[-1] == 7
    assert train.main(again) == 0  # they are the run's settings now
    assert len((workdir / CHANGES).read_text().splitlines()) == 1
