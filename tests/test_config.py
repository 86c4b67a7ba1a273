"""Settings: found wrong at once and in one line, resolved from files and command line, each one read."""

import ast
import dataclasses
from pathlib import Path

import pytest

import jaxgpt
from jaxgpt import cli, config
from jaxgpt.config import Config, ModelConfig, TrainConfig, UserError

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
    cli.load_config(path)
    assert path.read_text().startswith("# "), "a config begins with what it is, its command and its result"


def test_command_line_goes_before_file_and_file_before_base(write):
    write("base.toml", "[model]\nn_layer = 2\nn_head = 2\nn_embd = 64\n[train]\nseed = 1\n")
    child = write("child.toml", 'base = "base.toml"\n[model]\nn_layer = 3\n[train]\nmax_steps = 200\n')
    built = cli.load_config(child, {"model.n_head": "4", "optimizer.learning_rate": "1e-3", "train.max_steps": "none"})
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
        cli.load_config(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("text", ["<|a|>,b c", " <|a|> , b c ", '["<|a|>", "b c"]', ' ["<|a|>",\n"b c"]'])
def test_a_list_is_the_same_from_file_json_and_commas(write, text):
    path = write("config.toml", '[tokenizer]\nspecial_tokens = ["<|a|>", "b c"]\n')
    in_file = cli.load_config(path)
    assert in_file.tokenizer.special_tokens == ("<|a|>", "b c")
    assert cli.load_config(None, {"tokenizer.special_tokens": text}) == in_file
    assert config.from_json(config.to_json(in_file)) == in_file
    assert cli.load_config(path, {"tokenizer.special_tokens": ""}) == Config()


def test_json_alone_can_hold_a_comma_in_a_list():
    built = cli.load_config(None, {"tokenizer.special_tokens": '["<a, b>"]'})
    assert built.tokenizer.special_tokens == ("<a, b>",)


def test_missing_config_suggests_the_nearest(write, tmp_path):
    write("quickstart.toml", "")
    with pytest.raises(UserError, match=r"did you mean .*quickstart\.toml"):
        cli.load_config(tmp_path / "quikstart.toml")


def test_json_gives_the_same_config_back():
    original = Config(model=ModelConfig(n_layer=3), train=TrainConfig(max_steps=123456))
    assert config.from_json(config.to_json(original)) == original


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.n_layer = 3


def test_resume_conflicts_names_what_computes_something_else():
    old = Config(train=TrainConfig(max_steps=500, global_batch_size=8))
    same = dataclasses.replace(old, mesh=config.MeshConfig(fsdp=2), train=TrainConfig())
    assert config.resume_conflicts(old, same) == {}  # the mesh is free, and what `same` leaves open is no conflict
    other = dataclasses.replace(old, model=ModelConfig(n_layer=3))
    assert config.resume_conflicts(old, other) == {"model.n_layer": (12, 3)}


def test_every_setting_has_help_and_is_read_by_the_package():
    package = Path(jaxgpt.__file__).parent
    read = {
        node.attr
        for path in package.rglob("*.py")
        if path.name not in ("config.py", "cli.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    for name, cls in cli.sections().items():
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
