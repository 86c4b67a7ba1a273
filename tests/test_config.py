"""Settings: found wrong at once and in one line, resolved from files and command line, each one read."""

import ast
import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxgpt
from jaxgpt import cli, config
from jaxgpt.config import Config, load_config, sections
from jaxgpt.errors import UserError
from jaxgpt.settings import DataConfig, ModelConfig, TrainConfig
from jaxgpt.training import resume
from jaxgpt.training.step import resolve_batch, resolve_steps

PART = "{source='text', path='a'}"
CONFIGS = sorted((Path(jaxgpt.__file__).parent.parent / "configs").glob("*.toml"))


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    load_config(path)
    assert path.read_text().startswith("# "), "a config begins with what it is, its command and its result"


def test_command_line_goes_before_file_and_file_before_base(write):
    write("base.toml", "[model]\nn_layer = 2\nn_head = 2\nn_embd = 64\n[train]\nseed = 1\n")
    child = write("child.toml", 'base = "base.toml"\n[model]\nn_layer = 3\n[train]\nmax_steps = 200\n')
    built = load_config(child, {"model.n_head": "4", "optimizer.learning_rate": "1e-3", "train.max_steps": "none"})
    assert (built.model.n_layer, built.model.n_head, built.model.n_embd) == (3, 4, 64)
    assert built.train.max_steps is None
    assert built.train.seed == 1
    assert built.optimizer.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("[optimizer\n", {}, ["TOML syntax error", "line 1"]),
        ("[optimizer]\nlearnig_rate = 1.0\n", {}, ["optimizer.learnig_rate", "did you mean optimizer.learning_rate?"]),
        ("[optimizr]\nlearning_rate = 1.0\n", {}, ["[optimizr]", "did you mean optimizer?"]),
        ("[model]\nlearning_rate = 1.0\n", {}, ["model.learning_rate", "did you mean optimizer.learning_rate?"]),
        ("learning_rate = 1.0\n", {}, ["learning_rate", "did you mean optimizer.learning_rate?"]),
        ("[model]\nn_layer = 0\n", {}, ["model.n_layer = 0", "int > 0"]),
        ("[model]\nn_layer = 1.5\n", {}, ["model.n_layer = 1.5", "int > 0"]),
        ("[model]\ndtype = 'float16'\n", {}, ["model.dtype = 'float16'", "float32, bfloat16"]),
        ("", {"model.scan_layers": "maybe"}, ["command line", "model.scan_layers = 'maybe'", "true or false"]),
        ("", {"train.sed": "1"}, ["command line", "train.sed", "did you mean train.seed?"]),
        ("", {"optimizer.learning_rate": "nan"}, ["optimizer.learning_rate", "float > 0"]),
        ("[model]\nn_head = 7\n", {}, ["n_head = 7", "n_embd = 768"]),
        ("[data]\nblock_size = 2048\n", {}, ["block_size = 2048", "n_positions = 1024"]),
        ("[mesh]\ntensor = 5\n", {}, ["tensor = 5", "n_head = 12"]),
        ("[checkpoint]\nsave_steps = 30\n[eval]\neval_steps = 20\n", {}, ["save_steps = 30", "eval_steps = 20"]),
        ("[train]\nmax_steps = 50\n[optimizer]\nwarmup_steps = 51\n", {}, ["warmup_steps = 51", "max_steps = 50"]),
        ("[data]\nsource = 'text'\n", {}, ["data.path"]),
        ("[tokenizer]\ntype = 'folder'\n", {}, ["tokenizer.path"]),
        (
            "[init]\nfrom_checkpoint = 'a'\nfrom_huggingface = 'b'\n",
            {},
            ["from_checkpoint = a", "from_huggingface = b"],
        ),
        ("[tokenizer]\nspecial_tokens = ['a', '']\n", {}, ["tokenizer.special_tokens", "empty"]),
        ("[tokenizer]\nspecial_tokens = ['a', 'b', 'a']\n", {}, ["tokenizer.special_tokens", "'a' 2 times"]),
        ("[tokenizer]\nspecial_tokens = 3\n", {}, ["tokenizer.special_tokens = 3", "a list of text"]),
        ("[tokenizer]\nspecial_tokens = ['a', 3]\n", {}, ["tokenizer.special_tokens[1] = 3, but it must be text"]),
        ("", {"tokenizer.special_tokens": '["a", '}, ["command line", """'["a", '""", "a list of text"]),
        ("", {"tokenizer.special_tokens": "a,,b"}, ["tokenizer.special_tokens", "empty"]),
        ("base = 'config.toml'\n", {}, ["comes back to itself"]),
        ("base = 'nothing.toml'\n", {}, ["nothing.toml", "no such config file"]),
        ("base = 5\n", {}, ["base = 5", "the name of another config file"]),
        ("base = ['x.toml']\n", {}, ["base = ['x.toml']", "the name of another config file"]),
        ("base = ''\n", {}, ["base = ''", "the name of another config file"]),
        ('base = "x\\u0000y"\n', {}, ["base = ", "the name of another config file"]),
        ("base = '.'\n", {}, ["not a readable TOML file", "directory"]),
        ("[data]\nsource = []\n", {}, ["data.source = [] names no source"]),
        ("", {"data.source": "[]"}, ["data.source = [] names no source"]),
        ("[data]\nsource = ['text']\n", {}, ["data.source[0] = 'text', but it must be", "source, path, text_field"]),
        (f"[data]\nsource = [{PART}, {{source='text', weight=0}}]\n", {}, ["data.source[1].weight = 0", "float > 0"]),
        (f"[data]\nsource = [{PART}, {{source='text', pth='b'}}]\n", {}, ["data.source[1].pth", "did you mean path?"]),
        ("[data]\nsource = [{path='b'}]\n", {}, ["data.source[0].source is missing"]),
        ("[data]\nsource = [{source='jsnl', path='b'}]\n", {}, ["[0].source = 'jsnl'", "did you mean jsonl?"]),
        ("[data]\nsource = 'txt'\n", {}, ["data.source = 'txt'", "tfds:NAME", "did you mean text?"]),
        ("[data]\nformat = 'chats'\n", {}, ["one of text, chat", "did you mean chat?"]),
        ("[optimizer]\nlr_scheduler_type = 'cosin'\n", {}, ["constant, linear, cosine", "did you mean cosine?"]),
        (
            "[data]\nsource = 'text'\npath = ['a.txt', 'b.txt']\n",
            {},
            ["data.path = ['a.txt', 'b.txt']", "their folder"],
        ),
        ('[data]\npath = "C:\\temp"\n', {}, ["data.path", "control character", "'C:\\temp'"]),
        ('[data]\npath = "C:\\data"\n', {}, ["TOML syntax error", "write a Windows path in single quotes"]),
        ("[model]\nn_layer = true\n", {}, ["model.n_layer = true", "int > 0"]),
        ("[optimizer]\nlearning_rate = false\n", {}, ["optimizer.learning_rate = false", "float > 0"]),
        (f"[model]\nn_layer = 0x{'f' * 5000}\n", {}, ["a value that fills pages", "int > 0"]),
        (f"[model]\nn_layer = {'9' * 5000}\n", {}, ["digits"]),
        (f"[model]\nn_layer = {'[' * 5000}\n", {}, ["nested too deeply"]),
        (f"[model]\n{'a.' * 5000}b = 1\n", {}, ["no config file"]),
        (f"# {'a' * 200_000}\n", {}, ["no config file"]),
        ("", {"tokenizer.special_tokens": "[" * 100_000}, ["command line", "a list of text"]),
        ("", {"log.profile": f"1:{'9' * 5000}"}, ["command line", "log.profile"]),
        ("", {"data.num_threads": "2"}, ["data.num_threads is no longer a setting"]),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line_that_names_it(write, text, overrides, words):
    path = write("config.toml", text)
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("\ufeff[model]\nn_layer = 3\n".encode(), None),  # as Windows' editor writes UTF-8
        (b"[model]\r\nn_layer = 3\r\n", None),
        ("[model]\nn_layer = 3\n".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("[model]\nn_layer = 3\n".encode("utf-16-be"), "UTF-16; save it as UTF-8"),
        ("[model]\nn_layer = 3  # 三层\n".encode("gb18030"), "config.toml:2: not UTF-8"),
        ("# année\n".encode("latin-1"), "config.toml:1: not UTF-8"),
    ],
)
def test_a_file_in_another_encoding_is_read_or_named(tmp_path, content, words):
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    if words is None:
        assert load_config(path).model.n_layer == 3
    else:
        with pytest.raises(UserError, match=words):
            load_config(path)


def test_the_home_folder_may_be_written_as_a_tilde_in_every_path(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/wang")
    names = [name for name, field in config.config_fields().items() if "_expand" in str(field.type)]
    assert {"data.path", "tokenizer.path", "data.prepared_dir", "data.skip_list", "augmentation.synonyms"} < {*names}
    overrides = {name: "~/x" for name in names if name not in ("data.source", "eval.tasks", "init.from_huggingface")}
    built = config.flatten(load_config(None, overrides))
    assert {built[name] for name in overrides} == {"/home/wang/x"}
    text = '[eval]\ntasks = ["choices=~/own.jsonl"]\n[data]\nsource = [{source="text", path="~/a"}]\n'
    built = load_config(write("config.toml", text))
    assert built.eval.tasks == ("choices=/home/wang/own.jsonl",)
    assert built.data.source[0].path == "/home/wang/a"
    assert load_config(None, {"init.from_huggingface": "~/gpt2"}).init.from_huggingface == "/home/wang/gpt2"
    assert load_config(None, {"tokenizer.path": "hf:gpt2"}).tokenizer.path == "hf:gpt2"


def test_settings_of_earlier_versions_do_nothing_and_are_named(write, caplog):
    path = write("config.toml", "[data]\nnum_threads = 8\nprefetch_batches = 8\nmax_bytes = 5\n")
    assert load_config(path) == load_config(None, {"data.max_bytes": "5"})
    for name in ("num_threads", "prefetch_batches"):
        assert f"config.toml: data.{name} is no longer a setting; leave it out" in caplog.text
    old = json.loads(config.to_json(Config()))
    del old["sha256"]
    old["data"] |= {"num_threads": 8, "prefetch_batches": 8}
    assert config.from_json(json.dumps(old)) == Config()


NO_CONFIGS = [b"\xff\xfe{}", "{年".encode("gb18030"), b'{"a":' * 5000, b"[]", b'{"model": {"x": 1}}']


@pytest.mark.parametrize("content", NO_CONFIGS, ids=lambda content: str(content[:20]))
def test_a_config_json_that_cannot_be_read_is_one_line(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: not a config of ") as error:
        config.read_json(path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="nothing.json: No such file"):
        config.read_json(tmp_path / "nothing.json")


# ---------------------------------------------------------------- what follows from the length of the run


@pytest.mark.parametrize(
    ("steps", "given", "found"),  # warmup_steps, eval_steps, save_steps
    [
        (3, {}, (0, 1, 1)),
        (28, {}, (2, 2, 2)),
        (600, {}, (60, 60, 60)),
        (20_000, {}, (100, 500, 500)),
        (30, {"checkpoint.save_steps": "10000"}, (3, 4, 10000)),  # only the end is saved: evaluated all the same
        (3000, {"checkpoint.save_steps": "100"}, (100, 100, 100)),
        (20_000, {"checkpoint.save_steps": "1000"}, (100, 500, 1000)),
        (20_000, {"checkpoint.save_steps": "997"}, (100, 997, 997)),
        (20_000, {"eval.eval_steps": "300"}, (100, 300, 300)),
        (20_000, {"eval.eval_steps": "50"}, (100, 50, 500)),
        (20_000, {"eval.eval_steps": "1000000", "checkpoint.keep_best": "false"}, (100, 1_000_000, 500)),
        (20_000, {"checkpoint.save_steps": "7", "checkpoint.keep_best": "false"}, (100, 500, 7)),
        (50, {"optimizer.lr_scheduler_type": "warmup_stable_decay", "optimizer.decay_rate": "1.0"}, (0, 5, 5)),
        (50, {"optimizer.warmup_steps": "20"}, (20, 5, 5)),
    ],
)
def test_what_is_not_set_follows_the_length_of_the_run(steps, given, found):
    for length in ({"train.max_steps": str(steps)}, {"train.num_train_epochs": "0.5"}):
        resolved = resolve_steps(resolve_batch(load_config(None, given | length), 1), 16 * steps)
        assert (resolved.optimizer.warmup_steps, resolved.eval.eval_steps, resolved.checkpoint.save_steps) == found
        assert resolved.train.max_steps == steps and resolved.tokenizer.vocab_size == 8192
        assert not resolved.checkpoint.keep_best or found[2] % found[1] == 0
        assert resolve_steps(resolved, 16 * steps) == resolved


def test_a_warm_up_longer_than_the_epochs_is_told_with_what_the_user_set():
    given = load_config(None, {"optimizer.warmup_steps": "100", "train.num_train_epochs": "3"})
    with pytest.raises(UserError, match=r"warmup_steps = 100 .* = 30, which train.num_train_epochs = 3 gives"):
        resolve_steps(resolve_batch(given, 1), 80)


def test_each_optimizer_has_a_learning_rate_of_its_own():
    rate = lambda *given: load_config(None, dict(given)).optimizer.peak_learning_rate
    muon = ("optimizer.name", "muon")
    assert (rate(), rate(muon), rate(muon, ("optimizer.learning_rate", "0.1"))) == (6e-4, 0.015, 0.1)


def test_a_run_that_goes_on_keeps_what_is_left_open_as_it_was(tmp_path):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "checkpoints" / "5" / "manifest.sha256").touch()
    values = {"optimizer.warmup_steps": 100, "eval.eval_steps": 500, "checkpoint.save_steps": 500}
    values |= {"train.max_steps": 200, "train.global_batch_size": 8, "optimizer.learning_rate": 1e-3}
    old = load_config(None, {name: str(value) for name, value in values.items()})
    (tmp_path / "config.json").write_text(config.to_json(old))

    def kept(**overrides: str) -> tuple[float | None, ...]:
        now = load_config(None, {name.replace("__", "."): value for name, value in overrides.items()})
        flat = config.flatten(resume.as_before(now, tmp_path))
        return tuple(flat[name] for name in resume.KEPT)

    assert kept() == (8, 1e-3, 100, 500, 500)
    assert kept(eval__eval_steps="20", optimizer__warmup_steps="0") == (8, 1e-3, 0, 20, None)
    assert kept(train__max_steps="50") == (8, 1e-3, None, 500, 500)  # a warm-up of 100 steps would not fit
    assert resume.resume_conflicts(old, resume.as_before(Config(), tmp_path)) == {}
    assert resume.as_before(Config(), tmp_path / "new") == Config()


# ---------------------------------------------------------------- files that nobody would think of

TEXT = """base = "base.toml"
[model]
n_layer = 2
n_head = 2
n_embd = 64
[tokenizer]
type = "bpe"
special_tokens = ["<|a|>", "b c"]
[data]
source = [{source = "text", path = "~/a", weight = 0.5}, {source = "stdlib"}]
prepared_dir = "C:/data"
[optimizer]
learning_rate = 6e-4
[train]
max_steps = 1_000
per_device_train_batch_size = "auto"
[checkpoint]
save_steps = 100
[log]
profile = "10:13"
"""
ODD = [
    "",
    "0",
    "-1",
    "1e999",
    "nan",
    "true",
    "'x'",
    "[]",
    "{}",
    "[[[[1]]]]",
    '"\\u0000"',
    "0x" + "f" * 4000,
    "9" * 5000,
]
ODD += [
    "1979-05-27",
    '"""\n"""',
    "none",
    "[{source='text'}]",
    "{a.b = 1}",
    "=",
    "[",
    "\ufeff",
    "中文",
    "~",
    "\t",
    "a.b",
]
FIELDS = sorted(config.config_fields())
PIECES = st.sampled_from([*ODD, *TEXT.split(), *(name.split(".")[1] for name in FIELDS)]) | st.text(max_size=5)
EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 40), PIECES), max_size=4)
ENCODINGS = st.sampled_from(["utf-8"] * 12 + ["utf-16", "utf-16-le", "gb18030", "utf-8-sig"])
OPTIONS = st.dictionaries(st.sampled_from([*FIELDS, "x", "model.x"]), PIECES, max_size=3)


def edited(text: str, edits: list[tuple[int, int, str]]) -> str:
    """`text` with some parts of it replaced."""
    for place, length, piece in edits:
        at = place % (len(text) + 1)
        text = text[:at] + piece + text[at + length :]
    return text


def fuzz(folder: Path, examples: int) -> None:
    """Config files, options and config.json that are nearly right: each is a Config, or a UserError in time."""
    (folder / "base.toml").write_text("[train]\nseed = 3\n")
    right = config.to_json(load_config(None, {"data.source": json.dumps([{"source": "text", "path": "a"}])}))

    @settings(max_examples=examples, deadline=10_000, derandomize=True, database=None)
    @given(EDITS, ENCODINGS, OPTIONS, EDITS)
    def one(edits, encoding, overrides, others):
        file, saved = folder / "config.toml", folder / "config.json"
        file.write_bytes(edited(TEXT, edits).encode(encoding, "replace"))
        saved.write_bytes(edited(right, others).encode(encoding, "replace"))
        ways = (lambda: load_config(file), lambda: load_config(None, overrides), lambda: config.read_json(saved))
        for way in ways:
            with contextlib.suppress(UserError):
                built = way()
                assert config.from_json(config.to_json(built)) == built
                resolve_steps(resolve_batch(built, 8), 100)

    one()


def test_a_config_is_read_or_refused_whatever_it_holds(tmp_path, caplog):
    fuzz(tmp_path, 70)  # files of three kinds each


@pytest.mark.system
def test_thousands_of_configs_are_read_or_refused_whatever_they_hold(tmp_path, caplog):
    fuzz(tmp_path, 2000)


@pytest.mark.parametrize("text", ["<|a|>,b c", " <|a|> , b c ", '["<|a|>", "b c"]', ' ["<|a|>",\n"b c"]'])
def test_a_list_is_the_same_from_file_json_and_commas(write, text):
    path = write("config.toml", '[tokenizer]\nspecial_tokens = ["<|a|>", "b c"]\n')
    in_file = load_config(path)
    assert in_file.tokenizer.special_tokens == ("<|a|>", "b c")
    assert load_config(None, {"tokenizer.special_tokens": text}) == in_file
    assert config.from_json(config.to_json(in_file)) == in_file
    assert load_config(path, {"tokenizer.special_tokens": ""}) == Config()


def test_json_alone_can_hold_a_comma_in_a_list():
    built = load_config(None, {"tokenizer.special_tokens": '["<a, b>"]'})
    assert built.tokenizer.special_tokens == ("<a, b>",)


def test_missing_config_suggests_the_nearest(write, tmp_path):
    write("quickstart.toml", "")
    with pytest.raises(UserError, match=r"did you mean .*quickstart\.toml"):
        load_config(tmp_path / "quikstart.toml")


def test_json_gives_the_same_config_back():
    original = Config(model=ModelConfig(n_layer=3), train=TrainConfig(max_steps=123456))
    assert config.from_json(config.to_json(original)) == original


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.n_layer = 3


# ---------------------------------------------------------------- what may change between two starts

RUN = Config(
    data=DataConfig(block_size=64), train=TrainConfig(max_steps=500, global_batch_size=8, gradient_accumulation_steps=1)
)


def changed(old: Config, **settings) -> Config:
    for name, value in settings.items():
        section, field = name.split("__")
        old = dataclasses.replace(old, **{section: dataclasses.replace(getattr(old, section), **{field: value})})
    return old


def kinds(old: Config, **settings) -> dict[str, str]:
    return {name: change.kind for name, change in resume.resume_conflicts(old, changed(old, **settings)).items()}


def test_every_setting_stands_in_one_class_once():
    entries = [entry for names in resume.ON_RESUME.values() for entry in names]
    settings = config.flatten(Config())
    sections = {name.split(".")[0] for name in settings}
    assert set(entries) <= settings.keys() | sections, "a class names a setting that does not exist"
    for name in settings:
        stands = entries.count(name) + entries.count(name.split(".")[0])
        assert stands == 1, f"{name} stands {stands} times in resume.ON_RESUME; decide on one class"


def test_a_difference_is_named_with_its_class_and_both_values():
    new = changed(RUN, log__logging_steps=3, optimizer__learning_rate=1e-3, model__n_layer=3)
    differences = resume.resume_conflicts(RUN, new)
    assert differences == {
        "log.logging_steps": (10, 3, "free"),
        "optimizer.learning_rate": (None, 1e-3, "forced"),
        "model.n_layer": (12, 3, "refused"),
    }
    assert str(differences["model.n_layer"]) == "was 12, now 3"
    assert resume.resume_conflicts(RUN, RUN) == {}


def test_what_a_config_leaves_open_is_no_difference():
    assert kinds(RUN, data__block_size=None, train__max_steps=None, train__global_batch_size=None) == {}


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"mesh__fsdp": 2}, "free"),  # a pod of another shape
        ({"mesh__distributed": "on"}, "free"),
        ({"train__per_device_train_batch_size": 4, "train__gradient_accumulation_steps": 2}, "free"),
        ({"data__path": "elsewhere", "tokenizer__path": "elsewhere"}, "free"),
        ({"data__verify": "sizes"}, "free"),
        ({"model__attention": "xla", "model__remat": "block", "model__scan_layers": True}, "free"),
        ({"faults__on_bad_step": "skip"}, "free"),  # the answer to a run that stopped
        ({"model__dropout": 0.1}, "forced"),
        ({"model__dtype": "float32"}, "forced"),
        ({"optimizer__max_grad_norm": 0.0}, "forced"),
        ({"train__global_batch_size": 16}, "refused"),
        ({"data__block_size": 32}, "refused"),
        ({"data__validation_fraction": 0.1}, "refused"),
        ({"train__seed": 1}, "refused"),
        ({"optimizer__name": "muon"}, "refused"),
        ({"init__from_checkpoint": "elsewhere"}, "refused"),
    ],
)
def test_each_change_has_the_class_that_its_consequences_ask_for(settings, kind):
    assert kinds(RUN, **settings) == {name.replace("__", "."): kind for name in settings}


def test_more_steps_are_free_only_where_the_learning_rate_does_not_know_them():
    for shape in ("cosine", "linear", "warmup_stable_decay"):
        assert kinds(changed(RUN, optimizer__lr_scheduler_type=shape), train__max_steps=600) == {
            "train.max_steps": "forced"
        }
    for shape in resume.ENDLESS:
        run = changed(RUN, optimizer__lr_scheduler_type=shape)
        assert kinds(run, train__max_steps=600) == {"train.max_steps": "free"}
        both = {"train__max_steps": 600, "optimizer__lr_scheduler_type": "cosine"}
        assert set(kinds(run, **both).values()) == {"forced"}


def test_every_setting_has_help_and_is_read_by_the_package():
    package = Path(jaxgpt.__file__).parent
    read = {
        node.attr
        for path in package.rglob("*.py")
        if path.name not in ("config.py", "cli.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    for name, cls in sections().items():
        for field in dataclasses.fields(cls):
            assert cls.__pydantic_fields__[field.name].description, f"{name}.{field.name} has no help"
            if f"{name}.{field.name}" != "data.block_size":  # read through Config.block_size
                assert field.name in read, f"{name}.{field.name} is read nowhere"


def test_unknown_arguments_exit_with_2_and_suggest(capsys):
    @cli.command
    def main(argv):
        parser = cli.parser("test", "")
        cli.add_config_arguments(parser)
        cli.config_from(parser.parse_args(argv))

    assert main(["--confg", "x"]) == 2
    assert "did you mean --config?" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--config", "x", "--train.sed", "1"]) == 2
    assert "did you mean train.seed?" in capsys.readouterr().err
