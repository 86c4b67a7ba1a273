"""The compilation cache and the compiler's options. Caches are tried in processes of their own, as users meet them."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxgpt.parallel import compiler
from jaxgpt.parallel.accelerator import cache_folder
from jaxgpt.parallel.compiler import compiler_options, initial_values_options, use_compilation_cache

TRAIN = """
import sys, jax
from jaxgpt.parallel.compiler import use_compilation_cache
print("folder", use_compilation_cache())
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
import dataclasses, tiny
model = dataclasses.replace(tiny.MODEL, n_layer=1)
program = tiny.program(dataclasses.replace(tiny.CONFIG, model=model))
state, losses = program.init(), []
for step in range(3):
    before = state.params["wte"]
    state, metrics = program.train_step(state, tiny.batch(step))
    losses.append(metrics["loss_sum"].item().hex())
    assert before.is_deleted(), "the state is not donated"
print("losses", *losses)
print("hits", sum(name.endswith("cache_hits") for name in hits))
"""


def run(directory, code: str = TRAIN) -> dict[str, str]:
    """What a fresh process prints, {first word: rest}, and its warnings."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))
    }
    environment["HOME"] = str(directory)
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines()) | {"errors": done.stderr}


@pytest.mark.system
def test_a_second_start_takes_the_programs_from_the_cache_and_computes_the_same_bits(tmp_path):
    directory = tmp_path / "not there yet" / "xla"
    first, second = run(directory), run(directory)
    assert first["hits"] == "0"
    assert int(second["hits"]) >= 2  # the initial state and the step
    assert second["losses"] == first["losses"]
    assert second["errors"] == ""  # XLA would tell of a program for another CPU here
    assert any("train_step" in path.name for path in directory.rglob("*-cache"))


@pytest.fixture
def settings(monkeypatch):
    """jax's settings as they were before the test; call it with the folder of this machine's compiled programs."""
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_enable_compilation_cache", True)
    yield lambda folder: monkeypatch.setattr(compiler, "cache_folder", lambda: folder)
    for name, value in before.items():
        jax.config.update(name, value)
    compiler.compilation_cache.reset_cache()


def test_a_folder_that_cannot_be_written_is_one_warning_and_no_cache(tmp_path, settings, caplog):
    (tmp_path / "file").write_text("")
    settings(tmp_path / "file" / "xla")
    assert use_compilation_cache() is None
    [record] = caplog.records
    assert "cannot be kept in" in record.getMessage() and "\n" not in record.getMessage()
    assert jax.config.jax_compilation_cache_dir is None
    assert jax.jit(lambda x: x + 1)(jnp.zeros(3)).tolist() == [1, 1, 1]


def test_a_damaged_entry_is_compiled_anew(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(compiler, "_MIN_COMPILE_SECONDS", 0)
    settings(tmp_path)
    folder = use_compilation_cache()
    compute = lambda: jax.jit(lambda x: jnp.sin(x) * 3)(jnp.ones(7)).tolist()
    expected = compute()
    entries = list(folder.glob("*-cache"))
    assert entries
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:50])
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        assert compute() == expected


def test_the_folder_is_the_machines_and_jaxs_own_variables_go_first(tmp_path, settings, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = use_compilation_cache()
    assert folder.parent == tmp_path / ".cache/jaxgpt/xla" == cache_folder()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")
    assert use_compilation_cache() is None is cache_folder()
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    assert use_compilation_cache() == tmp_path / "mine" == cache_folder()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/xla")
    assert cache_folder() is None


def test_another_cpu_has_a_folder_of_its_own_and_only_the_owner_may_write_there(tmp_path, settings, monkeypatch):
    settings(tmp_path)
    ours = use_compilation_cache()
    assert use_compilation_cache() == ours
    if os.name == "posix":
        assert ours.stat().st_mode & 0o077 == 0
    read = compiler.Path.read_text
    other = lambda path, **how: read(path, **how).replace("flags", "flags amx")
    monkeypatch.setattr(compiler.Path, "read_text", other)
    assert use_compilation_cache() != ours
    monkeypatch.setattr(compiler.Path, "read_text", read)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(999)), raising=False)
    assert use_compilation_cache() != ours


def test_a_cache_that_is_too_large_loses_its_oldest_entries(tmp_path, settings, monkeypatch):
    settings(tmp_path)
    folder = use_compilation_cache()
    for age in range(10):
        entry = folder / f"program{age}-cache"
        entry.write_bytes(bytes(100))
        os.utime(entry, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(compiler, "_MAX_BYTES", 1000)
    use_compilation_cache()
    assert len(list(folder.iterdir())) == 10
    monkeypatch.setattr(compiler, "_MAX_BYTES", 800)
    use_compilation_cache()
    assert sorted(path.name for path in folder.iterdir()) == [f"program{age}-cache" for age in range(4)]


DEVICES = [[SimpleNamespace(platform=platform)] * count for platform in ("cpu", "gpu", "tpu") for count in (1, 8)]


@pytest.mark.parametrize("devices", DEVICES, ids=lambda devices: f"{devices[0].platform}-{len(devices)}")
def test_this_jax_knows_every_option(devices, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    lowered = jax.jit(lambda x: x + 1).lower(jnp.zeros(3))
    for options in (compiler_options(devices), initial_values_options(devices)):
        lowered.compile(compiler_options=options)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options={"xla_nonsense": True})
