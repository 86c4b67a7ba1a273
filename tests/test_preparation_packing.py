"""Packed conversations: nothing is lost on the way to disk and back, and rows are learned as what is in them alone."""

import concurrent.futures
import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt.data import dataset as dataset_module
from jaxgpt.data.chat import with_chat_tokens
from jaxgpt.data.dataset import Batch, PackedRows, open_dataset
from jaxgpt.data.pipeline import add_to_skip_list, eval_batches, read_skip_list, train_batches, train_rows
from jaxgpt.data.tokenizer import train_bpe
from jaxgpt.errors import UserError
from jaxgpt.model import gpt2
from jaxgpt.model.backend import PLAIN
from jaxgpt.model.cpu import CPU
from jaxgpt.model.flash import flash_attention
from jaxgpt.preparation.writer import OPEN_ROWS, PackedWriter
from jaxgpt.settings import MeshConfig
from jaxgpt.training.step import batch_hash, summed_loss

BLOCK = 32
TOKENIZER = with_chat_tokens(train_bpe(["the cat sat on the mat"], 260))


def conversations(count: int, seed: int = 0, longest: int = BLOCK) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, supervised) of random lengths, 1 and `longest` among them; the first token may be supervised, too."""
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([[1, longest], rng.integers(2, longest + 1, count - 2)])
    return [(rng.integers(0, 65, n).astype(np.int32), rng.random(n) < 0.4) for n in lengths]


def write(folder: Path, talks, packing: bool = True, validation=None, block_size: int = BLOCK) -> Path:
    folder.mkdir()
    writer = PackedWriter(folder, TOKENIZER, block_size, packing)
    for split, part in (("train", talks), ("validation", talks[:5] if validation is None else validation)):
        for document, (tokens, supervised) in enumerate(part):
            writer.add(split, tokens, supervised, 2 * int(supervised.sum()), 10 * document)
    writer.finish({"fingerprint": "x", "settings": {}})
    return folder


def found_in(split: PackedRows) -> list[tuple[int, list[int], list[bool]]]:
    return [
        (document, tokens.tolist(), supervised.tolist())
        for number in range(split.num_rows)
        for document, tokens, supervised in split.row(number).conversations()
    ]


def targets(batch: Batch) -> list[int]:
    return sorted(np.asarray(batch.targets_BT)[np.asarray(batch.weights_BT) == 1].tolist())


def learned(talks) -> list[int]:
    """The tokens of the conversations that have to be learned: the supervised ones that follow another token."""
    return sorted(token for tokens, supervised in talks for token in tokens[1:][supervised[1:]].tolist())


# ---------------------------------------------------------------- on disk


@pytest.mark.parametrize("packing", [True, False])
def test_every_conversation_is_there_once_whole_with_its_mask_and_its_document(packing, tmp_path):
    talks = conversations(300)
    dataset = open_dataset(write(tmp_path / "data", talks, packing))
    expected = [(10 * i, tokens.tolist(), supervised.tolist()) for i, (tokens, supervised) in enumerate(talks)]
    found = found_in(dataset.train)
    assert sorted(found) == sorted(expected)
    if not packing:
        assert found == expected  # a row each, in their order
    split = dataset.train
    assert dataset.format == "chat"
    assert (split.num_conversations, split.num_documents) == (300, 300)
    assert split.num_tokens == sum(len(tokens) for tokens, _ in talks)
    assert split.num_supervised == len(learned(talks))
    assert split.num_bytes == 2 * sum(int(supervised.sum()) for _, supervised in talks)
    assert split.targets_per_byte == split.num_supervised / split.num_bytes


def test_packing_fills_the_rows_and_holds_few_of_them_open(tmp_path, monkeypatch):
    talks = conversations(2000)
    most_open = []
    place = PackedWriter._place
    monkeypatch.setattr(
        PackedWriter, "_place", lambda self, *how: place(self, *how) or most_open.append(len(self._open["train"]))
    )
    split = open_dataset(write(tmp_path / "data", talks)).train
    assert split.num_tokens / (split.num_rows * BLOCK) > 0.97
    assert max(most_open) == OPEN_ROWS


def test_the_same_conversations_give_the_same_files(tmp_path):
    one, two = (write(tmp_path / name, conversations(500)) for name in "ab")
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


def test_a_flipped_bit_is_found_and_named(tmp_path):
    folder = write(tmp_path / "data", conversations(20))
    [shard] = folder.glob("*-train.array_record*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(shard.name)):
        open_dataset(folder)


def test_a_conversation_longer_than_a_row_is_no_conversation(tmp_path):
    with pytest.raises(ValueError, match="33 tokens in rows of 32"):
        write(tmp_path / "data", [(np.zeros(33, np.int32), np.ones(33, bool))])


def test_rows_of_another_length_or_without_an_answer_are_refused(tmp_path):
    split = open_dataset(write(tmp_path / "data", conversations(20))).train
    with pytest.raises(UserError, match=r"rows of 32 tokens, but data.block_size = 16"):
        split.check(16)
    silent = open_dataset(write(tmp_path / "silent", [(np.zeros(9, np.int32), np.zeros(9, bool))])).train
    with pytest.raises(UserError, match="no conversation with an answer"):
        silent.check(BLOCK)


# ---------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("packing") / "data", conversations(120), validation=conversations(40, seed=1))


def epoch_of(split: PackedRows, epoch: int, **how) -> Batch:
    size = {"global_batch_size": split.num_rows, "block_size": BLOCK, "rows": range(split.num_rows)}
    return train_rows(split, seed=7, step=epoch, **size, **how)


@pytest.mark.parametrize("cached", [True, False])
def test_an_epoch_has_each_row_once_in_its_own_order_and_learns_what_is_supervised(cached, folder, monkeypatch):
    monkeypatch.setattr(dataset_module, "_CACHE_BYTES", 1 << 30 if cached else 0)
    split = open_dataset(folder).train
    epochs = [epoch_of(split, epoch) for epoch in range(3)]
    in_order = {row.tobytes() for row in split.evaluation_rows(range(split.num_rows), BLOCK).tokens_BT}
    assert len(in_order) == split.num_rows
    for batch in epochs:
        assert {row.tobytes() for row in batch.tokens_BT} == in_order
        assert targets(batch) == learned(conversations(120))
        assert not batch.weights_BT[batch.segments_BT == 0].any()
        assert set(np.unique(batch.weights_BT)) == {0, 1}
    assert len({batch.tokens_BT.tobytes() for batch in epochs}) == 3


def test_threads_read_the_same_rows(folder):
    split, alone = open_dataset(folder).train, open_dataset(folder).train
    expected = [alone.training_rows([(number, 0)], BLOCK) for number in range(split.num_rows)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: split.training_rows([(number, 0)], BLOCK), range(split.num_rows)))
    assert all(np.array_equal(x, y) for one, two in zip(found, expected) for x, y in zip(one, two))


def test_devices_and_accumulation_do_not_change_the_rows(folder):
    split = open_dataset(folder).train
    expected = train_rows(split, seed=7, step=1, global_batch_size=16, block_size=BLOCK, rows=range(16))
    for devices, accumulation in ((1, 1), (8, 2)):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        [batch] = train_batches(
            split,
            **dict(seed=7, start_step=1, stop_step=2, global_batch_size=16, block_size=BLOCK),
            accumulation=accumulation,
            sharding=NamedSharding(mesh, PartitionSpec(None, "data")),
        )
        for got, want in zip(batch, expected, strict=True):
            assert got.dtype == want.dtype
            assert np.array_equal(np.asarray(got).reshape(16, BLOCK), want)


def test_evaluation_has_each_row_once_and_fills_up_with_rows_that_weigh_nothing(folder):
    split = open_dataset(folder).validation
    mesh = Mesh(np.array(jax.devices()), ("data",))
    place = NamedSharding(mesh, PartitionSpec("data"))
    batches = list(eval_batches(split, global_batch_size=16, block_size=BLOCK, sharding=place))
    assert len(batches) == -(-split.num_rows // 16) and split.num_rows % 16
    assert sorted(sum(map(targets, batches), [])) == learned(conversations(40, seed=1))


# ---------------------------------------------------------------- skipping


def test_skipped_rows_weigh_nothing_and_all_else_stays(folder):
    split = open_dataset(folder).train
    size = split.num_rows
    plain = epoch_of(split, 2)
    batch = epoch_of(split, 2, skip=frozenset([2 * size, 2 * size + 3, 5]))  # 5 is a row of the first epoch
    weights_BT = plain.weights_BT.copy()
    weights_BT[[0, 3]] = 0
    assert plain.weights_BT[[0, 3]].any()
    assert np.array_equal(batch.weights_BT, weights_BT)
    assert all(np.array_equal(batch[i], plain[i]) for i in (0, 1, 3))
    assert batch_hash(batch) == batch_hash(plain)


def test_a_skip_list_is_read_and_added_to(tmp_path):
    file = tmp_path / "skip.txt"
    assert read_skip_list(None) == frozenset()
    assert add_to_skip_list(file, [7, 3, 7], "step 1") == [3, 7]
    file.write_text(file.read_text() + "\n 12 # by hand")
    assert add_to_skip_list(file, [3, 40, 12], "step 2") == [40]
    assert file.read_text() == "# step 1\n3\n7\n\n 12 # by hand\n# step 2\n40\n"
    assert read_skip_list(file) == {3, 7, 12, 40}


@pytest.mark.parametrize("line", ["x", "-1", "1 2", "1.5", "²"])
def test_a_line_of_a_skip_list_that_is_no_row_is_named(line, tmp_path):
    (tmp_path / "skip.txt").write_text(f"# rows\n5\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"skip\.txt:3: '{re.escape(line)}' is not a row"):
        read_skip_list(tmp_path / "skip.txt")
    with pytest.raises(UserError, match="cannot be read"):
        read_skip_list(tmp_path / "gone.txt")


# ---------------------------------------------------------------- the loss

MODEL = dataclasses.replace(tiny.MODEL, n_layer=1, n_head=2, n_embd=32, n_positions=BLOCK)
SLOW = pytest.mark.system
BACKENDS = {
    "plain": PLAIN,
    "cpu": CPU,
    "flash": dataclasses.replace(
        PLAIN,
        attend=lambda q, k, v, *, segments_BT=None, **_: flash_attention(q, k, v, segments_BT, interpret=True),
    ),
}


@functools.partial(jax.jit, static_argnames="backend")
def loss_and_gradients(params, batch: Batch, backend: str):
    config = dataclasses.replace(tiny.CONFIG, model=MODEL)
    losses = lambda params: summed_loss(
        config, tiny.VOCAB, lambda part: part, params, batch, gpt2.NO_DROPOUT, BACKENDS[backend]
    )
    return jax.value_and_grad(losses, has_aux=True)(params)


def alone(talks) -> Batch:
    """Each conversation in a row of its own, without segments."""
    tokens, weights = np.zeros((len(talks), BLOCK + 1), np.int32), np.zeros((len(talks), BLOCK), np.float32)
    for row, (talk, supervised) in enumerate(talks):
        tokens[row, : len(talk)] = talk
        weights[row, : len(talk) - 1] = supervised[1:]
    return Batch(tokens[:, :-1], tokens[:, 1:], weights)


@pytest.mark.parametrize("backend", ["plain", "cpu", pytest.param("flash", marks=SLOW)])
def test_packed_rows_are_learned_as_their_conversations_alone(backend, tmp_path):
    talks = conversations(24, longest=BLOCK)
    split = open_dataset(write(tmp_path / "data", talks)).train
    packed = epoch_of(split, 0)
    assert split.num_rows < len(talks) * 0.8 and not packed.segments_BT.all()  # several in a row, and padding
    params = gpt2.init_params(MODEL, tiny.VOCAB, jax.random.key(0))
    (expected, count), gradients = loss_and_gradients(params, alone(talks), "plain")
    (loss, packed_count), packed_gradients = loss_and_gradients(params, packed, backend)
    assert packed_count == count == len(learned(talks))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for got, want in zip(jax.tree.leaves(packed_gradients), jax.tree.leaves(gradients), strict=True):
        assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
    # What is in the padding makes no difference.
    other = packed._replace(tokens_BT=np.where(packed.segments_BT == 0, 7, packed.tokens_BT))
    assert loss_and_gradients(params, other, backend)[0][0] == loss


@pytest.mark.system
def test_a_step_on_packed_rows_is_the_same_on_a_mesh_of_all_axes(folder):
    split = open_dataset(folder).train
    config = dataclasses.replace(tiny.CONFIG, model=MODEL)

    def steps(mesh):
        built = tiny.program(config, mesh)
        state, found = built.init(), []
        for step in range(3):
            batch = train_rows(split, seed=7, step=step, global_batch_size=16, block_size=BLOCK, rows=range(16))
            state, metrics = built.train_step(state, jax.tree.map(lambda x: x.reshape(2, 8, BLOCK), batch))
            found.append(jax.device_get(metrics))
        return found

    for ours, alone in zip(steps(MeshConfig(data=2, fsdp=2, tensor=2)), steps(tiny.ONE_DEVICE), strict=True):
        assert ours["batch_hash"] == alone["batch_hash"] and ours["count"] == alone["count"] > 0
        assert ours["loss_sum"] == pytest.approx(alone["loss_sum"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=SLOW)])
def test_a_step_whose_rows_all_weigh_nothing_is_no_bad_step_and_enters_no_window(name):
    optimizer = dataclasses.replace(tiny.CONFIG.optimizer, name=name)
    faults = dataclasses.replace(tiny.CONFIG.faults, spike_sigma=6.0)
    config = dataclasses.replace(tiny.CONFIG, model=MODEL)
    built = tiny.program(dataclasses.replace(config, optimizer=optimizer, faults=faults))
    state, counts = built.init(), []
    for step in range(4):
        batch = tiny.batch(step)
        if step in (0, 2):
            batch = batch._replace(weights_BT=jnp.zeros_like(batch.weights_BT))
        state, metrics = built.train_step(state, batch)
        assert metrics["bad_step"] == metrics["skipped_steps"] == 0
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))
        counts.append(int(state.recent["count"]))
    assert counts == [0, 1, 1, 2]
