"""report.html of a sweep: every trial is to be seen, axes say what they measure, and odd sweeps are drawn, too."""

import json
import math
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from jaxgpt.config import load_config
from jaxgpt.reporting import sweep_page
from jaxgpt.tuning import learning_rate, scaling, sweep_table
from jaxgpt.tuning.search import Search
from jaxgpt.tuning.space import Space, grid, read_space
from jaxgpt.tuning.sweep_folder import Records, TrialRecord
from jaxgpt.tuning.sweep_table import Findings

RATE = "optimizer.learning_rate"


class Page(HTMLParser):
    """The texts of a page, those of its figures apart, and what it would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.drawn, self.written, self.fetched, self._depth = [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._depth += tag == "svg"
        self.fetched += [v for k, v in attributes if k in ("src", "href") and not (v or "").startswith("#")]

    def handle_endtag(self, tag):
        self._depth -= tag == "svg"

    def handle_data(self, data):
        (self.drawn if self._depth else self.written).append(data.strip())


def made(folder, *words, loss=lambda settings: 3.0, status=lambda settings: "finished") -> str:
    file = folder / "base.toml"
    file.write_text("[data]\nblock_size = 16\n[model]\nn_layer = 1\nn_head = 1\nn_embd = 32\n")
    space = Space(str(file), {}, read_space(words, load_config(file)))
    points, records = grid(space.variables), Records(folder)
    for number, settings in enumerate(points):
        known = None if status(settings) == "diverged" else loss(settings)
        curve = [[10, 5.0], [20, known]] if known else [[10, 9.0]]
        count = scaling.without_embeddings(space.config(settings).model)
        records.add(TrialRecord(number, settings, 20, status(settings), known, curve, curve, count + 100, 1234, 1.5))
    law = scaling.fit_sizes(sweep_table.sizes(space, records), None)
    search = Search("grid", space, 0, len(points))
    found = Findings(search, records, law, sweep_table.effects(space, records), sweep_table.doubts(space, records))
    return sweep_page.write_page(folder, found).read_text(encoding="utf-8")


def valley(settings) -> float:
    return 3 + math.log10(float(settings[RATE]) / 1e-3) ** 2


def test_the_page_shows_every_trial_and_names_its_axes(tmp_path):
    text = made(tmp_path, f"{RATE}=1e-4,1e-3,1e-2", "optimizer.name=adamw,muon", loss=valley)
    seen = Page(text)
    for label in ("validation loss (nats per token)", "peak learning rate (per step)", "optimizer step"):
        assert label in seen.drawn
    assert "6 of 6 trials" in " ".join(seen.written) and "3.0000" in seen.written
    assert {"adamw", "muon", "1e-4", "0.001", "0.01"} <= set(seen.drawn)
    assert not seen.fetched and "<script" not in text


def test_what_diverged_is_marked_and_does_not_stretch_the_axis(tmp_path):
    status = lambda settings: "diverged" if float(settings[RATE]) > 0.5 else "finished"
    loss = lambda settings: 300.0 if float(settings[RATE]) > 0.05 else valley(settings)
    text = made(tmp_path, f"{RATE}=1e-4,3e-4,1e-3,3e-3,1e-2,1e-1,1", loss=loss, status=status)
    assert "Crosses at the top edge diverged." in text and "Triangles at the top edge lie above." in text
    assert "diverged" in Page(text).written
    assert sweep_page.ceiling([3.0, 3.1, 3.2, 300.0]) < 4 and sweep_page.ceiling([3.0, 3.1, math.inf]) == pytest.approx(
        3.1
    )


def test_a_law_is_drawn_with_its_interval(tmp_path):
    sizes = "model.n_embd=32,64,128,256"
    text = made(tmp_path, sizes, loss=lambda settings: 2 + 8 / int(settings["model.n_embd"]) ** 0.5)
    seen = Page(text)
    assert {"90% interval", "fitted law", "predicted", "parameters without embeddings"} <= set(seen.drawn)
    assert "scaling law" in seen.written


@pytest.mark.parametrize("words", [[f"{RATE}=1e-3"], ["optimizer.name=adamw"], ["model.dropout=0,0.1"]])
def test_one_value_and_equal_losses_are_drawn(tmp_path, words):
    assert made(tmp_path, *words).count("<svg") >= 2


def test_a_sweep_of_which_all_diverged_is_told(tmp_path):
    text = made(tmp_path, f"{RATE}=1,2", status=lambda settings: "diverged")
    assert "diverged" in text and "best validation loss" not in text


def test_a_range_test_is_drawn_with_its_suggestion(tmp_path):
    found = {"rates": [1e-6 * 2**n for n in range(20)], "losses": [5 - 0.1 * n for n in range(18)] + [6.0, math.nan]}
    (tmp_path / learning_rate.RANGE_TEST).write_text(json.dumps(found | {"steepest": 1e-3, "highest_safe": 0.013}))
    text = sweep_page.write_page(tmp_path, None).read_text(encoding="utf-8")
    assert {"steepest: 0.001", "learning rate (per step)", "training loss (nats per token)"} <= set(Page(text).drawn)
    for part in text.split("<svg")[1:]:
        ET.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")


def test_text_from_settings_is_escaped(tmp_path):
    (tmp_path / "best.toml").write_text("<b>bold</b>")
    assert "&lt;b&gt;bold" in made(tmp_path, f"{RATE}=1e-3,1e-2", loss=valley)
