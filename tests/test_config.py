"""Settings: found wrong at once and in one line, resolved from files and command line, each one read."""

import ast
import dataclasses
from pathlib import Path

import pytest

import jaxgpt
from jaxgpt import cli, config
from jaxgpt.config import Config, load_config, sections
from jaxgpt.errors import UserError
from jaxgpt.settings import DataConfig, ModelConfig, TrainConfig
from jaxgpt.training import resume

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
        ("[train]\nmax_steps = 50\n", {}, ["warmup_steps = 100", "max_steps = 50"]),
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
        ("[tokenizer]\nspecial_tokens = ['a', 3]\n", {}, ["tokenizer.special_tokens = 3", "a list of text"]),
        ("", {"tokenizer.special_tokens": '["a", '}, ["command line", """'["a", '""", "a list of text"]),
        ("", {"tokenizer.special_tokens": "a,,b"}, ["tokenizer.special_tokens", "empty"]),
        ("base = 'config.toml'\n", {}, ["comes back to itself"]),
        ("base = 'nothing.toml'\n", {}, ["nothing.toml", "no such config file"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(write, text, overrides, words):
    path = write("config.toml", text)
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


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
        "optimizer.learning_rate": (6e-4, 1e-3, "forced"),
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
