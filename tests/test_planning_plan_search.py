"""What is tried on a slice, in which order, and what is left out. The compiler is a stand-in here: it counts rows."""

import dataclasses
import itertools

import pytest

from jaxgpt.config import Config
from jaxgpt.errors import UserError
from jaxgpt.planning import plan_search
from jaxgpt.planning.compile import CompiledStep
from jaxgpt.planning.plan_search import Limits, candidates, own_candidate
from jaxgpt.planning.topology import parse_slice
from jaxgpt.settings import MeshConfig, ModelConfig, TrainConfig

VOCAB = 50257
SMALL = Config(train=TrainConfig(global_batch_size=512, per_device_train_batch_size=16))
LARGE = dataclasses.replace(SMALL, model=ModelConfig(n_layer=48, n_head=25, n_embd=1600))
SLICE = parse_slice("v5e-8")


@pytest.fixture
def tried(monkeypatch):
    """Rows and settings in the order of compiling; 32 rows fit without remat, any number with it."""
    seen = []

    def compile_step(config, vocab_size, where, cache):
        rows = config.train.per_device_train_batch_size
        seen.append((config.mesh.fsdp, rows, config.model.remat, config.model.scan_layers))
        fits = config.model.remat != "none" or rows <= 32
        return CompiledStep(fits, {}, 1, 2, 0, 1.0, "HloModule")

    monkeypatch.setattr(plan_search, "compile_step", compile_step)
    return seen


def run(limits: Limits, config: Config = SMALL):
    return plan_search.search(config, VOCAB, SLICE, limits, None)


def test_every_candidate_takes_the_same_sequences_a_step_on_all_devices():
    found = candidates(SMALL, VOCAB, SLICE)
    assert len({c.label for c in found}) == len(found) > 20
    for candidate in found:
        shape = candidate.shape
        assert shape.data * shape.fsdp * shape.tensor == 8
        assert shape.rows * shape.accumulation * shape.data * shape.fsdp == 512


def test_a_small_model_is_first_tried_whole_and_a_large_one_split():
    assert candidates(SMALL, VOCAB, SLICE)[0].shape.fsdp == 1
    assert candidates(SMALL, VOCAB, SLICE)[0].config.model.remat == "none"
    assert not candidates(SMALL, VOCAB, SLICE)[0].config.model.scan_layers
    assert candidates(LARGE, VOCAB, SLICE)[0].shape.fsdp == 8  # whole, its state is larger than a chip


def test_what_arithmetic_finds_far_too_large_is_no_candidate():
    assert candidates(LARGE, VOCAB, parse_slice("v5e-1")) == []
    limit = SLICE.hbm_bytes
    found = candidates(LARGE, VOCAB, SLICE)
    assert all(c.guessed_bytes <= 1.5 * limit for c in found)
    too_large = [c.guessed_bytes > limit for c in found]
    assert too_large == sorted(too_large)  # those a little too large come last


def test_the_configs_own_settings_are_compiled_first_and_alone_if_asked(tried):
    found = run(Limits(exact=True))
    assert tried == [(1, 16, "none", False)]
    assert found.tried[0][0].own
    assert not found.untried


def test_a_search_ends_after_so_many_programs_and_tells_what_it_left(tried):
    found = run(Limits(candidates=3))
    assert len(tried) == 3
    assert tried[0] == (1, 16, "none", False)
    assert found.untried


def test_a_search_ends_when_its_time_is_up(tried, monkeypatch):
    clock = itertools.count(0, 100)
    monkeypatch.setattr(plan_search.time, "perf_counter", lambda: next(clock))
    found = run(Limits(seconds=450))
    assert 1 < len(tried) < 4
    assert found.untried


def test_sizes_that_another_size_decides_are_not_compiled(tried):
    run(Limits(seconds=1e9))
    by_kind = {}
    for fsdp, rows, remat, scan in tried[1:]:
        by_kind.setdefault((fsdp, remat, scan), []).append(rows)
    assert sorted(by_kind[1, "none", False]) == [32, 64]  # 64 does not fit, 32 does: below it nothing can be faster
    assert all(rows == sorted(rows) for _, rows in by_kind.items())  # of what fits, larger sizes only


def test_settings_that_the_slice_cannot_run_are_told_and_others_tried(tried):
    broken = dataclasses.replace(SMALL, mesh=MeshConfig(fsdp=3))
    found = run(Limits(candidates=1), broken)
    assert "3 x 1 = 3 does not divide the 8 devices" in found.refused
    assert len(tried) == 1
    with pytest.raises(UserError, match="does not divide"):
        run(Limits(exact=True), broken)


def test_a_batch_that_no_mesh_of_the_slice_divides_is_refused(tried):
    odd = dataclasses.replace(SMALL, train=TrainConfig(global_batch_size=480, per_device_train_batch_size=1))
    with pytest.raises(UserError, match="480 is not a multiple of the 256 devices that share it; 512 is"):
        plan_search.search(odd, VOCAB, parse_slice("v5e-256"), Limits(), None)
    assert not tried


def test_an_automatic_batch_is_the_largest_that_fits_by_arithmetic():
    auto = dataclasses.replace(SMALL, train=TrainConfig(global_batch_size=512, per_device_train_batch_size="auto"))
    own = own_candidate(auto, VOCAB, SLICE)
    assert own.guessed_bytes <= SLICE.hbm_bytes
    assert own.shape.rows in (32, 64)
