"""Docstrings of installed packages as documents, and their mixture with the standard library."""

import importlib.metadata
from pathlib import Path

import pytest

from jaxgpt.errors import UserError
from jaxgpt.preparation import docstrings
from jaxgpt.preparation.documents import BadRecords
from jaxgpt.preparation.sources import Reading, describe, documents, short_name, source_key
from jaxgpt.settings import DataConfig, SourceConfig, sources_of

LONG = "Returns the {name} of a thing.\n\n" + "    It is explained here at some length, so that it counts. " * 5


def install(site: Path, name: str, files: dict[str, bytes], version: str = "1.0", record: bool = True) -> None:
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if record:
        (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(content)


def module(*names: str, code: str = "") -> bytes:
    functions = [f'def {name}():\n    """{LONG.format(name=name)}"""\n' for name in names]
    return ("\n".join(functions) + code).encode()


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder of packages that stands for those of the machine."""
    own = importlib.metadata.distributions
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: own(path=[str(tmp_path)]))
    return tmp_path


def test_a_document_is_the_docstrings_of_a_module_and_what_is_left_out_is_counted(site):
    own, method = LONG.format(name="class"), LONG.format(name="method")
    methods = f'class K:\n    """{own}"""\n    def m(self):\n        """{method}"""\n'
    files = {
        "one/a.py": module("first", "second", code="def short():\n    '''Too short.'''\n"),
        "one/b.py": module("second", "third"),
        "one/methods.py": methods.encode(),
        "one/broken.py": module("broken") + b"def f(:\n",
        "one/code.py": module("rare", code="x = 1\n" * 2000),  # hardly any prose
        "one/latin.py": b"# coding: latin-1\n" + module("latin").replace(b"It", b"\xe9t"),
        "one/tests/c.py": module("tested"),
        "one/nul.py": module("nul").replace(b"thing", b"\\0thing"),
    }
    install(site, "one", files)
    install(site, "two", {"two/a.py": module("fourth")})
    install(site, "three", {"three/a.py": module("nobody")}, record=False)
    bad = BadRecords()
    found = [document.text for document in docstrings.documents(bad)]
    text = "\n".join(found)
    for name in ("first", "second", "third", "class", "method", "fourth"):
        assert text.count(f"Returns the {name} of a thing.\n\nIt is explained") == 1, name
    assert "Too short" not in text and "\xe9t is explained" in text
    assert not any(f"the {name} of" in text for name in ("broken", "rare", "tested", "nul", "nobody"))
    together = [each for each in found if "the class of" in each]
    assert len(together) == 1 and together[0].index("the class of") < together[0].index("the method of")
    assert {reason: counted["count"] for reason, counted in bad.summary().items()} == {
        "not read, files with little prose": 1,
        "not read, tests, and copies of other packages": 1,
        "not read, packages without a list of their files": 1,
        "not read, docstrings that another module has": 1,
        "not read, files that this Python cannot read": 1,
        "not read, docstrings that are no text": 1,
    }


def test_the_same_packages_give_the_same_documents_and_others_another_key(site):
    for number in range(12):
        install(site, f"p{number}", {f"p{number}/m.py": module(f"n{number}")})
    first, key = list(docstrings.documents(BadRecords())), source_key(DataConfig(source="docstrings"))
    assert first == list(docstrings.documents(BadRecords())) and len(first) == 12
    assert [each.text for each in first] != sorted(each.text for each in first)
    assert key == source_key(DataConfig(source="docstrings"))
    install(site, "more", {"more/m.py": module("more")})
    assert source_key(DataConfig(source="docstrings")) != key
    assert [each for each in docstrings.documents(BadRecords()) if "more" not in each.text] == first


def test_builtin_is_three_parts_of_prose_beside_one_of_code(site):
    install(site, "one", {f"one/{number}.py": module(f"n{number}") for number in range(200)})
    data, reading = DataConfig(source="builtin", max_bytes=40_000), Reading()
    found = list(documents(data, reading=reading))
    assert reading.num_bytes == [30_000, 10_000]
    assert {document.part for document in found} == {0, 1}
    assert (short_name(data), describe(data)) == ("builtin", 'data.source = "builtin"')
    with pytest.raises(UserError, match='data.source = "docstrings" holds no conversations'):
        source_key(DataConfig(source="builtin", format="chat"))
    mixed = DataConfig(source=(SourceConfig(source="text", path="a.txt"), SourceConfig(source="builtin", weight=2.0)))
    shares = [(part.source, part.weight) for part in sources_of(mixed)]
    assert shares == [("text", 1.0), ("docstrings", 1.5), ("stdlib", 0.5)]
