"""Slices by the names they are rented under; no compiler is needed for them."""

import sys

import pytest

from jaxgpt.errors import UserError
from jaxgpt.parallel.chips import CHIPS
from jaxgpt.planning.topology import (
    FAMILIES,
    NoTpuCompiler,
    compile_only_devices,
    known_slices,
    parse_slice,
    parse_slices,
)


@pytest.mark.parametrize(
    ("name", "topology", "chips", "hosts", "devices"),
    [
        ("v5e-1", "v5e:1x1", 1, 1, 1),
        ("v5e-8", "v5e:2x4", 8, 1, 8),
        ("v5litepod-16", "v5e:4x4", 16, 4, 16),
        ("v5e-256", "v5e:16x16", 256, 64, 256),
        ("v6e-8", "v6e:2x4", 8, 1, 8),
        ("v4-8", "v4:2x2x1", 4, 1, 4),  # the number counts cores, two of which are one jax device
        ("v5p-16", "v5p:2x2x2", 8, 2, 8),
        ("v5p-128", "v5p:4x4x4", 64, 16, 64),
        ("tpu7x-8", "tpu7x:2x2x1", 4, 1, 8),  # two jax devices a chip
        ("v5p:2x2x4", "v5p:2x2x4", 16, 4, 16),
        ("V5E-4", "v5e:2x2", 4, 1, 4),
    ],
)
def test_a_rented_name_is_a_topology(name, topology, chips, hosts, devices):
    where = parse_slice(name)
    assert (where.topology, where.chips, where.hosts, where.devices) == (topology, chips, hosts, devices)


@pytest.mark.parametrize(
    ("name", "wrap"), [("v5e-8", 0), ("v5e-128", 1), ("v5e-256", 2), ("v5p-16", 0), ("v5p-128", 3)]
)
def test_axes_close_to_rings_on_whole_pods_and_cubes(name, wrap):
    assert sum(parse_slice(name).wrap) == wrap


def test_every_known_slice_is_found_by_its_name():
    for family in FAMILIES:
        assert known_slices(family)
        for where in known_slices(family):
            assert parse_slice(where.name) == where


def test_every_family_has_a_chip_whose_memory_it_does_not_exceed():
    assert set(FAMILIES) == set(CHIPS)
    for family, cut in FAMILIES.items():
        assert 0.85 * CHIPS[family].hbm_bytes < cut.hbm_gib * 2**30 <= CHIPS[family].hbm_bytes


@pytest.mark.parametrize("name", ["v9-8", "v5e", "8", "h100-8", "v5e-8x", "v5e--8"])
def test_an_unknown_chip_lists_what_is_known(name):
    with pytest.raises(UserError, match="no such slice") as error:
        parse_slice(name)
    assert all(f"{family.rented}-{{" in str(error.value) for family in FAMILIES.values())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["v5e-3", "v5p-4", "v5p-7", "v5e-2x4", "v5e-512"])
def test_an_unknown_size_lists_the_sizes_of_that_chip(name):
    with pytest.raises(UserError, match="no such slice") as error:
        parse_slice(name)
    assert f"known: {name[:3]}-{{" in str(error.value)
    assert "tpu7x-{" not in str(error.value)


def test_a_shape_with_the_wrong_number_of_axes_is_refused():
    with pytest.raises(UserError, match="v5p slices have 3 axes"):
        parse_slice("v5p:2x2")


def test_a_list_keeps_its_order_and_is_not_empty():
    assert [where.name for where in parse_slices("v6e-8, v5e-1,")] == ["v6e-8", "v5e-1"]
    with pytest.raises(UserError, match="--tpu names no slice"):
        parse_slices(" , ")


def test_a_missing_compiler_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(NoTpuCompiler, match=r"pip install -e '.*\[plan\]'"):
        compile_only_devices(parse_slice("v5e-8"))
