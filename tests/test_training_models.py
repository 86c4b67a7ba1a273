"""Models in and out: what is read, what is refused in one line, and that nothing half-written gets a name."""

import json
import logging
import pickle
import socket
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import save_as_run

from jaxgpt.config import Config
from jaxgpt.data.tokenizer import train_bpe
from jaxgpt.errors import UserError
from jaxgpt.model import gpt2, huggingface
from jaxgpt.model.huggingface import NAMES, locate, locate_tokenizer, open_model, read_params, write_model
from jaxgpt.settings import ModelConfig
from jaxgpt.storage import manifest
from jaxgpt.training import models
from jaxgpt.training.models import LoadedModel, check_logits, export_model, load_model

MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=16, n_positions=12, dtype="float32")
VOCAB = 300
TOKENIZER = train_bpe(["no merges"], 257)


def random_params(model=MODEL, vocab_size=VOCAB, seed=0):
    rng = np.random.default_rng(seed)
    _, shapes, _ = gpt2.abstract_model(model, vocab_size)
    params = jax.tree.map(lambda s: 0.3 * rng.standard_normal(s.shape, np.float32), shapes)
    params["wte"][vocab_size:] = 0.0
    return params


def same(ours, theirs) -> bool:
    equal = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), ours, theirs)
    return jax.tree.all(equal)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A complete Hugging Face folder without digests, as others write it; a test breaks one thing in it."""
    export_model(tmp_path / "hf", MODEL, VOCAB, random_params(), TOKENIZER)
    (tmp_path / "hf" / manifest.NAME).unlink()
    return tmp_path / "hf"


def change_config(folder: Path, **settings) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", {"format": "pt"})


def refusal(folder: Path) -> str:
    """The one line with which the folder is refused."""
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000, 1])
def test_reading_what_was_written_gives_the_same_bits(tmp_path, max_shard_bytes):
    params = random_params()
    params["wpe"][0, :3] = [-0.0, 1e-42, 3e38]
    write_model(tmp_path, MODEL, VOCAB, params, end_of_text=5, max_shard_bytes=max_shard_bytes)
    model = open_model(tmp_path)
    assert (model.config, model.vocab_size) == (MODEL, VOCAB)
    assert same(read_params(model), params)

    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == {10**9: 1, 20_000: 3, 1: len(model.files)}[max_shard_bytes]
    stored = {name: (file.name, tensor) for file in files for name, tensor in load_file(file).items()}
    assert {tensor.dtype for _, tensor in stored.values()} == {np.dtype(np.float32)}
    assert stored["transformer.wte.weight"][1].shape == (VOCAB, 16)  # the padding stays at home
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file for name, (file, _) in stored.items()}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in stored.values())


def test_each_array_is_handed_over_once_and_what_comes_back_is_kept(folder):
    handed = []

    def place(path, array):
        handed.append(path)
        return array.shape

    params = read_params(open_model(folder), place)
    assert sorted(handed) == sorted(NAMES)
    assert params["blocks"]["attn"]["c_attn"]["kernel"] == (2, 16, 3, 2, 8)
    assert params["wte"] == (384, 16)


def test_names_without_the_prefix_masks_and_a_tied_head_are_read(folder):
    def as_openai_stored_it(tensors):
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 12, 12), bool))
            tensors[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
        return tensors | {"lm_head.weight": tensors["wte.weight"]}

    change_tensors(folder, as_openai_stored_it)
    assert same(load_model(folder).params, random_params())


def test_a_head_of_its_own_is_refused(folder):
    def untie(tensors):
        head = tensors["transformer.wte.weight"].copy()
        head[-1, -1] += 1e-3
        return tensors | {"lm_head.weight": head}

    change_tensors(folder, untie)
    assert "lm_head.weight differs from wte.weight" in refusal(folder)


def test_half_precision_is_read_as_float32(folder):
    change_tensors(folder, lambda tensors: {name: tensor.astype(np.float16) for name, tensor in tensors.items()})
    expected = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), random_params())
    assert same(load_model(folder).params, expected)


def test_settings_are_taken_from_the_config_and_absent_ones_have_transformers_defaults(folder, caplog):
    change_config(folder, n_positions=12, attn_pdrop=0.2, embd_pdrop=0.2, resid_pdrop=0.2)
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    for name in ("scale_attn_weights", "tie_word_embeddings", "activation_function", "n_inner"):
        del settings[name]
    settings["num_hidden_layers"], settings["num_attention_heads"] = settings.pop("n_layer"), settings.pop("n_head")
    file.write_text(json.dumps(settings | {"reorder_and_upcast_attn": True, "n_inner": 64}))
    config = open_model(folder).config
    assert (config.n_layer, config.n_head, config.dropout) == (2, 2, 0.2)
    assert not caplog.records

    change_config(folder, attn_pdrop=0.1)
    with caplog.at_level(logging.WARNING):
        assert open_model(folder).config.dropout == 0.0
    assert "[0.2, 0.1, 0.2] differ" in caplog.text


def test_a_hugging_face_folder_is_a_model_like_any_other(folder):
    model = load_model(folder)
    assert (model.step, model.vocab_size, model.config.model) == (0, VOCAB, MODEL)
    assert model.tokenizer.digest == TOKENIZER.digest
    assert model.tokenizer.vocab_size == 257  # a checkpoint may have rows that no token uses yet
    assert same(model.params, random_params())


def test_transformers_reads_the_exported_tokenizer(folder):
    import transformers  # a dependency of the package: slow to import, never missing

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = "def ñ(): 🎉\r\n\x00"
    assert theirs.encode(text) == TOKENIZER.encode(text)
    assert theirs.model_max_length == 12 and theirs.eos_token_id == TOKENIZER.end_of_text


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"activation_function": "relu"}, "activation_function = 'relu'"),
        ({"activation_function": "gelu"}, "activation_function = 'gelu'"),  # by erf: another function
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"n_inner": 128}, "n_inner = 128 cannot be represented; only 4 x n_embd = 64 can"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is set"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map is set"),
        ({"n_head": 3}, "n_head = 3 does not divide n_embd = 16"),
        ({"n_layer": "two"}, "n_layer = 'two' is not a whole number above 0"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"attn_pdrop": 1.5}, "not three rates"),
        ({"n_positions": 13}, "tensor wpe.weight has shape (12, 16), but config.json asks for (13, 16)"),
        ({"vocab_size": 301}, "tensor wte.weight has shape (300, 16), but config.json asks for (301, 16)"),
        ({"n_layer": 3}, "tensor h.2.ln_1.weight is missing"),
        ({"n_layer": 1}, "tensor h.1.ln_1.weight is no part of GPT-2 with 1 layers"),
    ],
)
def test_a_config_that_cannot_be_represented_is_refused_by_name(folder, settings, told):
    change_config(folder, **settings)
    assert told in refusal(folder)


@pytest.mark.parametrize(
    "change, told",
    [
        (
            lambda t: {name: t[name] for name in t if "1.mlp.c_fc.weight" not in name},
            "tensor h.1.mlp.c_fc.weight is missing",
        ),
        (lambda t: t.update(score=np.zeros(3)), "tensor score is no part of GPT-2"),
        (
            lambda t: t.update({"transformer.h.0.attn.c_attn.weight": np.zeros((48, 16), np.float32)}),
            "tensor h.0.attn.c_attn.weight has shape (48, 16), but config.json asks for (16, 48)",
        ),
        (
            lambda t: t.update({"transformer.ln_f.bias": np.zeros(16, np.int8)}),
            "tensor ln_f.bias has type I8; only F32, F16, BF16",
        ),
        (lambda t: t.update({"ln_f.bias": np.zeros(16, np.float32)}), "is stored twice"),
        (lambda t: t["transformer.h.1.ln_1.weight"].__setitem__(3, np.nan), "tensor h.1.ln_1.weight holds NaN or Inf"),
        (lambda t: t["transformer.wte.weight"].__setitem__((2, 5), -np.inf), "tensor wte.weight holds NaN or Inf"),
        (
            lambda t: t.update({"transformer.wpe.weight": np.full((12, 16), 7e4).astype(np.float16)}),
            "tensor wpe.weight holds NaN or Inf",
        ),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(folder, change, told):
    change_tensors(folder, change)
    assert told in refusal(folder)


@pytest.mark.parametrize("length", [0, 5, 400, -1])
def test_a_file_that_was_cut_off_is_refused(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    assert "model.safetensors: broken or cut off" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "[]", "\0", '{"weight_map": 3}'])
def test_broken_json_is_refused(folder, content):
    write_model(folder, MODEL, VOCAB, random_params(), 0, max_shard_bytes=20_000)
    (folder / "model.safetensors").unlink()
    open_model(folder)
    (folder / "model.safetensors.index.json").write_text(content)
    assert "not an index of safetensors" in refusal(folder)
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json"):
        open_model(folder)


@pytest.mark.parametrize("name", ["model-00009-of-00009.safetensors", "../hf/model.safetensors"])
def test_a_shard_that_is_not_in_the_folder_is_refused(folder, name):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}))
    assert f"names {name}, which is not in" in refusal(folder)


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was run')",)


def test_a_pickle_is_refused_unread_and_the_way_to_convert_it_is_told(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful()))
    told = refusal(folder)
    assert "pytorch_model.bin" in told and "can run code" in told and "save_pretrained" in told


def test_a_folder_without_weights_says_what_was_looked_for(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    assert "looked for model.safetensors and model.safetensors.index.json" in refusal(folder)
    (folder / "config.json").unlink()
    assert "is not a jaxgpt run" in refusal(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    export_model(tmp_path / "hf", MODEL, 200, random_params(vocab_size=200), TOKENIZER)
    assert "the tokenizer has 257 tokens, but config.json has vocab_size = 200" in refusal(tmp_path / "hf")


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(folder, tmp_path, monkeypatch) -> Path:
    """A cache as huggingface_hub lays it out, holding the model org/tiny; there is no network."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    model = cache / "models--org--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "snapshots").mkdir()
    revision = "0123456789abcdef0123456789abcdef01234567"
    folder.rename(model / "snapshots" / revision)
    for name in ("main", "v1"):
        (model / "refs" / name).write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return model / "snapshots" / revision


def test_a_hub_name_is_found_in_the_local_cache(hub, monkeypatch, tmp_path):
    assert locate("org/tiny") == locate("hf:org/tiny") == locate("org/tiny@v1") == locate("hf:org/tiny@v1") == hub
    assert same(load_model("hf:org/tiny").params, random_params())
    # A folder of that name goes before the hub, unless "hf:" says which is meant.
    monkeypatch.chdir(tmp_path)
    Path("org/tiny").mkdir(parents=True)
    assert locate("org/tiny") == Path("org/tiny")
    assert locate("hf:org/tiny") == hub


def test_a_tokenizer_comes_without_the_weights(monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.append(options) or "x")
    for find in (locate, locate_tokenizer):
        find("hf:org/tiny")
    with_weights, without = (any("safetensors" in name for name in options["allow_patterns"]) for options in asked)
    assert with_weights and not without


@pytest.mark.parametrize(
    "name", ["org/other", "hf:org/other", "org/tiny@v2", "hf:a b", "hf:../x", "hf:", "./gpt2", "/gpt2", "~/no/gpt2"]
)
def test_a_name_that_leads_nowhere_is_refused_in_one_line(hub, name):
    with pytest.raises(UserError) as error:
        locate(name)
    assert str(error.value).startswith(name) and "\n" not in str(error.value)


# ---------------------------------------------------------------- writing


def test_a_run_folder_is_read_back_as_it_was_written(tmp_path, folder):
    model = load_model(folder)
    save_as_run(tmp_path / "runs" / "imported", model)
    for path in (tmp_path / "runs" / "imported", tmp_path / "runs" / "imported" / "checkpoints" / "0"):
        again = load_model(path)
        assert (again.config, again.vocab_size, again.step) == (model.config, VOCAB, 0)
        assert again.tokenizer.digest == TOKENIZER.digest
        assert same(again.params, model.params)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["imported"]


def test_large_arrays_are_read_one_by_one_and_give_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "CHUNK_BYTES", 2000)
    save_as_run(tmp_path / "run", LoadedModel(Config(model=MODEL), VOCAB, random_params(), TOKENIZER, 0))
    calls = []
    monkeypatch.setattr(models, "_release_memory", lambda: calls.append(1))
    assert same(load_model(tmp_path / "run").params, random_params())
    assert len(calls) > 5


def test_a_folder_that_holds_something_is_not_written_over(folder, tmp_path):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for write in (
        lambda: export_model(folder, MODEL, VOCAB, random_params(seed=1), TOKENIZER),
        lambda: save_as_run(folder, load_model(folder)),
    ):
        with pytest.raises(UserError, match="exists already"):
            write()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    with pytest.raises(UserError, match="exists already"):
        export_model(folder / "config.json", MODEL, VOCAB, random_params(), TOKENIZER)


@pytest.mark.parametrize("replace", [False, True])
def test_a_write_that_fails_leaves_nothing_and_a_replaced_folder_as_it_was(folder, tmp_path, replace):
    target = folder if replace else tmp_path / "new"
    left = iter(range(9))

    def whole(leaf):
        next(left)  # the tenth array cannot be fetched
        return np.asarray(leaf)

    with pytest.raises((StopIteration, RuntimeError)):
        export_model(target, MODEL, VOCAB, random_params(seed=1), TOKENIZER, replace=replace, whole=whole)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert same(load_model(folder).params, random_params())


def test_a_folder_is_replaced_when_that_is_asked_for(folder, tmp_path):
    (folder / "of-an-older-export").touch()
    leftover = tmp_path / f".hf.{socket.gethostname()}.{2**22 + 1}.0.partial"  # of a process that was killed
    leftover.mkdir()
    (leftover / "model.safetensors").touch()
    export_model(folder, MODEL, VOCAB, random_params(seed=1), TOKENIZER, replace=True)
    assert same(load_model(folder).params, random_params(seed=1))
    assert not (folder / "of-an-older-export").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_replacement_killed_between_its_renames_loses_no_export(folder, tmp_path):
    folder.rename(tmp_path / ".hf.old")

    def whole(leaf):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        export_model(folder, MODEL, VOCAB, random_params(seed=1), TOKENIZER, replace=True, whole=whole)
    assert same(load_model(folder).params, random_params())


def test_a_process_that_is_not_the_writer_fetches_every_array_in_the_writers_order_and_writes_nothing(tmp_path):
    fetched = {True: [], False: []}
    for is_writer, seen in fetched.items():

        def whole(leaf, seen=seen):
            seen.append(leaf.sum())
            return leaf

        folder = tmp_path / str(is_writer)
        export_model(folder, MODEL, VOCAB, random_params(), TOKENIZER, whole=whole, is_writer=is_writer)
    assert fetched[True] == fetched[False] and len(fetched[True]) == len(NAMES)
    assert [path.name for path in tmp_path.iterdir()] == ["True"]


def test_the_check_sees_every_array(folder):
    params, config = random_params(), load_model(folder).config.model
    expected = check_logits(config, VOCAB, params)
    assert expected.shape == (12, VOCAB)  # as many tokens as there are positions, at most 16
    assert check_logits(config, VOCAB, jax.tree.map(np.copy, params)).tobytes() == expected.tobytes()
    for path in NAMES:
        changed = jax.tree.map(np.copy, params)
        huggingface.leaf_at(changed, path)[...] *= 1.01
        assert check_logits(config, VOCAB, changed).tobytes() != expected.tobytes(), path
