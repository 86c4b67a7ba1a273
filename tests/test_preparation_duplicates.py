"""Exact duplicates are found all, near ones as often as MinHash promises; the first one stays."""

import math
import subprocess
import sys

import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.preparation import duplicates
from jaxgpt.preparation.duplicates import algorithm, bands, find_repeats, is_on, signature, signature_bytes
from jaxgpt.settings import CleaningConfig

EXACT = CleaningConfig(drop_duplicates=True)
NEAR = CleaningConfig(near_duplicates=0.8)
BOTH = CleaningConfig(drop_duplicates=True, near_duplicates=0.8)
ENGLISH = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness"
CHINESE = "那是最美好的时代，那是最糟糕的时代；那是智慧的年头，那是愚昧的年头；那是信仰的时期，那是怀疑的时期。"


def repeats(texts, settings, validation=()):
    signatures = np.array([np.frombuffer(signature(text, settings), np.uint8) for text in texts])
    assert signatures.shape == (len(texts), signature_bytes(settings))
    is_validation = np.array([number in validation for number in range(len(texts))])
    found = find_repeats(signatures, is_validation, settings)
    assert not found.near[found.of < 0].any()
    return found.of.tolist(), found.near.tolist()


def random_text(rng, size: int) -> str:
    """Of so many characters that no shingle is there twice."""
    return "".join(map(chr, rng.integers(0x4E00, 0x9FFF, size)))


def pair(rng, jaccard: float, size: int = 300) -> tuple[str, str]:
    """Two texts of `size` shingles each, whose sets have this Jaccard similarity."""
    shared = round(2 * size * jaccard / (1 + jaccard))
    common = random_text(rng, shared + 4)
    return common + random_text(rng, size - shared), common + random_text(rng, size - shared)


def promised(jaccard: float, settings: CleaningConfig) -> float:
    """The share of such pairs that is found: they share a band, and enough of the 128 values agree."""
    num_bands, rows = bands(settings.near_duplicates)
    enough = range(math.ceil(128 * settings.near_duplicates), 129)
    agree = sum(math.comb(128, n) * jaccard**n * (1 - jaccard) ** (128 - n) for n in enough)
    return agree * (1 - (1 - jaccard**rows) ** num_bands)


def test_exact_duplicates_are_those_of_every_letter_and_the_first_one_stays():
    texts = ["a", "b", "a", "", "A", "b", "a", "", "a "]
    assert repeats(texts, EXACT) == ([-1, -1, 0, -1, -1, 1, 0, 3, -1], [False] * 9)


def test_all_exact_duplicates_are_found():
    numbers = np.random.default_rng(0).integers(0, 300, 1000).tolist()
    first = {}
    expected = [-1 if first.setdefault(n, place) == place else first[n] for place, n in enumerate(numbers)]
    assert repeats([f"text {n}" for n in numbers], EXACT)[0] == expected


@pytest.mark.parametrize("settings", [EXACT, NEAR])
def test_a_training_document_that_repeats_a_validation_document_is_dropped(settings):
    texts = [ENGLISH, CHINESE, ENGLISH, ENGLISH]
    assert repeats(texts, settings, validation=[2])[0] == [2, -1, -1, 2]


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_a_small_change_is_a_near_duplicate_in_any_script(text):
    other = text.replace(text[20], "X", 1)
    texts = [text, text[::-1], other, text]
    assert repeats(texts, BOTH) == ([-1, -1, 0, 0], [False, False, True, False])
    assert repeats(texts, EXACT)[0] == [-1, -1, -1, 0]
    assert repeats(texts, NEAR) == ([-1, -1, 0, 0], [False, False, True, True])


@pytest.mark.parametrize("jaccard", [0.65, 0.74, 0.8, 0.86, 0.95])
def test_pairs_of_a_known_similarity_are_found_as_often_as_promised(jaccard):
    rng, count = np.random.default_rng(1), 250
    texts = [text for _ in range(count) for text in pair(rng, jaccard)]
    of, _ = repeats(texts, NEAR)
    assert set(of[::2]) == {-1}  # no pair resembles another one
    assert {found for place, found in enumerate(of[1::2]) if found != 2 * place} <= {-1}
    found = np.mean(np.array(of[1::2]) >= 0)
    expected = promised(jaccard, NEAR)
    assert found == pytest.approx(expected, abs=0.03 + 3 * math.sqrt(expected * (1 - expected) / count))


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97, 0.999])
def test_bands_look_at_nearly_all_pairs_at_the_limit_and_at_few_far_below(threshold):
    num_bands, rows = bands(threshold)
    looked_at = lambda jaccard: 1 - (1 - jaccard**rows) ** num_bands
    assert num_bands * rows <= 128 and looked_at(threshold) >= 0.99
    assert looked_at(threshold / 3) < 0.8 or threshold < 0.5


def test_a_chain_of_changes_is_compared_with_what_is_kept():
    rng = np.random.default_rng(1)
    words = [random_text(rng, 8) for _ in range(62)]
    chain = ["".join(words[start : start + 50]) for start in (0, 6, 12)]  # neighbours 0.78 alike, the ends 0.61
    assert repeats(chain, CleaningConfig(near_duplicates=0.7))[0] == [-1, 0, -1]


def test_an_exact_duplicate_of_a_near_one_points_at_what_is_kept():
    other = ENGLISH.replace("best", "rest")
    assert repeats([ENGLISH, other, other], BOTH) == ([-1, 0, 0], [False, True, False])


@pytest.mark.parametrize("text", ["", "a", "中", "abcd", "abcde"])
def test_short_texts_have_signatures_too(text):
    assert repeats([text, "something else", text], NEAR)[0] == [-1, -1, 0]


def test_the_signature_of_a_long_text_is_that_of_its_shingles_wherever_it_is_hashed(monkeypatch):
    text = random_text(np.random.default_rng(0), 1000)
    whole = signature(text, NEAR)
    monkeypatch.setattr(duplicates, "_CHUNK", 7)
    assert signature(text, NEAR) == whole


@pytest.mark.system
def test_signatures_are_the_same_in_every_process():
    code = (
        "from jaxgpt.settings import CleaningConfig; from jaxgpt.preparation.duplicates import signature\n"
        f"print(signature({ENGLISH + CHINESE!r}, CleaningConfig(near_duplicates=0.5)).hex())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == signature(ENGLISH + CHINESE, NEAR).hex()


def test_many_documents_that_begin_alike_are_still_told_apart(monkeypatch):
    monkeypatch.setattr(duplicates, "_BUCKET", 3)
    rng = np.random.default_rng(0)
    begin = random_text(rng, 150)
    texts = [begin + random_text(rng, 150) for _ in range(60)]
    assert set(repeats(texts, NEAR)[0]) == {-1}
    assert repeats([*texts, texts[0]], NEAR)[0][-1] == 0


def test_a_missing_library_is_named_with_the_fix(monkeypatch):
    assert not is_on(CleaningConfig()) and is_on(EXACT) and is_on(NEAR)
    monkeypatch.setitem(sys.modules, "rensa", None)
    assert algorithm(EXACT) == "blake2b"
    with pytest.raises(UserError, match=r"needs the package rensa: pip install -e '.*\[clean\]'"):
        algorithm(NEAR)
