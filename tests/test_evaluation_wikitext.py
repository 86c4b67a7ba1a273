"""WikiText as the harness scores it: pages, their detokenized text, windows that score each token once."""

import json
import math

import pytest

from jaxgpt.data.tokenizer import train_bpe
from jaxgpt.errors import UserError
from jaxgpt.evaluation.scoring import Score
from jaxgpt.evaluation.wikitext import Pages, detokenize, read_pages, rolling

FIRST = """ = Robert Boulter = 

 Robert Boulter is an English film , stage and radio actor . In 2001 , he earned $ 1 @,@ 000 @.@ 5 ; it 's a lot ! 
 = = Career = = 
 The " well @-@ known " play ( 2006 ) ; his [ own ] and the actors ' own . 

"""  # noqa: W291 - so it stands in the file
LENGTHS = (0, 1, 7, 8, 9, 16, 21)
SECOND = " = 2011 = \n \n A year : cold ( 5 ° C ) . "


def test_a_page_is_scored_as_it_would_have_been_written():
    assert detokenize(FIRST) == (
        " = Robert Boulter =\n\nRobert Boulter is an English film, stage and radio actor. In 2001, he earned "
        "$ 1,000.5; it's a lot!\n== Career ==\nThe \"well-known\" play (2006); his [own] and the actors' own.\n\n"
    )
    assert detokenize(SECOND) == " = 2011 =\n\nA year: cold (5°C). "


@pytest.mark.system  # the harness takes seconds to import
def test_it_is_the_harnesss_text():
    harness = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    for page in (FIRST, SECOND, FIRST + SECOND, "s ' = = = = x = = = = { a } ' b ' N 's"):
        assert detokenize(page) == harness.wikitext_detokenizer({"page": page})


def test_the_original_file_is_cut_at_its_top_headings_and_jsonl_holds_pages(tmp_path):
    raw, jsonl = tmp_path / "wiki.test.raw", tmp_path / "pages.jsonl"
    raw.write_text(f" \n{FIRST}{SECOND}", encoding="utf-8")
    jsonl.write_text("".join(json.dumps({"page": page}) + "\n" for page in (FIRST[:-1], SECOND)), encoding="utf-8")
    assert read_pages(raw).pages == [FIRST[:-1], SECOND] == read_pages(jsonl).pages


@pytest.mark.system
def test_the_windows_are_the_harnesss():
    utils = pytest.importorskip("lm_eval.utils")
    for length in LENGTHS:
        tokens = list(range(1, length + 1))
        theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(tokens, 0, 8, 1))
        assert [(one.context, one.target) for one in rolling(tokens, 0, 8)] == list(theirs)


@pytest.mark.parametrize("length", LENGTHS)
def test_windows_score_each_token_once_and_the_last_one_is_moved_back_to_be_full(length):
    tokens, block = list(range(1, length + 1)), 8
    requests = list(rolling(tokens, 0, block))
    assert [token for request in requests for token in request.target] == tokens
    for request in requests:
        read = [*request.context, *request.target][:-1]
        assert len(read) == min(block, length)
        assert read == [0, *tokens][read[0] : read[0] + len(read)]  # what stands before the targets, without a gap
    assert all(len(request.context) == 1 for request in requests[:-1])


def test_the_figures_are_per_word_and_per_byte_of_the_file():
    pages = Pages(["a bc  d", "é"])  # 3 + 1 words, 7 + 2 bytes
    found = pages.results([Score(-3.0, False, 0), Score(-6.0, False, 0)])
    assert found["word_perplexity"] == pytest.approx(math.exp(9 / 4))
    assert found["byte_perplexity"] == pytest.approx(math.exp(1.0))
    assert found["bits_per_byte"] == pytest.approx(1 / math.log(2))
    assert (found["questions"], found["cut"]) == (2, 0)
    tokenizer = train_bpe(["a bc"], 257)
    targets = [request.target for request in pages.requests(tokenizer, 4)]
    assert tokenizer.decode(token for target in targets for token in target) == "a bc  dé"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.raw", " \n\n", "a.raw: no page in it"),
        ("a.raw", b"\xff", "not UTF-8 at byte 0"),
        ("a.jsonl", '{"page": "a"}\n{"text": "b"}\n', 'a.jsonl:2: not an object with a text "page"'),
        ("a.jsonl", "[1]\n", "a.jsonl:1: not an object"),
    ],
)
def test_a_bad_file_is_one_line(name, content, complaint, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=complaint):
        read_pages(tmp_path / name)
