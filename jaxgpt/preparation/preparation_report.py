"""report.html and report.json of a prepared dataset: its content, what was left out or changed, with examples.

The page needs no network and no script. Jinja2 escapes everything: a document may contain `<script>`.
"""

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment

from jaxgpt.config import Config
from jaxgpt.data.chat import plain_texts
from jaxgpt.data.dataset import SPLITS, Split, TokenDataset
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.data.tokenizer_folder import has_tokenizer, load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.preparation.chunks import WorkFolder, read_json, read_rows
from jaxgpt.preparation.cleaning import STEPS as CLEANING_STEPS
from jaxgpt.preparation.duplicates import STEPS as DUPLICATE_STEPS
from jaxgpt.preparation.sources import text_parts
from jaxgpt.preparation.splitting import SplitPlan
from jaxgpt.preparation.stages import EXAMPLES, add_counts, shortened
from jaxgpt.settings import sources_of

FILES = ("report.html", "report.json")
_PAGE = Path(__file__).with_suffix(".html")
_SAMPLE_BYTES = 1_000_000  # of text, on which two tokenizers are compared
_GPT2_END_OF_TEXT = 50_256
_OFF = 0.01  # a share that differs by more from what was asked is worth a line
_MEASURED_SECONDS = 1.0
_MEASURED_ROWS = 64  # a batch


def collect(
    config: Config,
    work: WorkFolder,
    facts: dict[str, Any],
    plan: dict[str, Any],
    counts: dict[str, dict[str, int]],
    tokenizer: Tokenizer,
    settings: dict[str, object],
) -> dict[str, Any]:
    """The report from the files in the work folder; it does not depend on which process did what."""
    tokens = [read_json(work.counts("tokens", number)) for number in range(len(facts["rows"]))]
    learned = "num_supervised" if config.data.format == "chat" else "num_tokens"
    num_bytes, num_tokens = (sum(split[name] for split in counts.values()) for name in ("num_bytes", learned))
    report = {
        "settings": json.loads(json.dumps(settings)),
        "read": {"documents": facts["documents"], "rows": sum(facts["rows"]), "bytes": sum(facts["bytes"])},
        "mixture": facts["mixture"],
        "bad_records": _bad_records([facts, *tokens]),
        "steps": _steps(config, work, facts, plan),
        "overlap": plan["overlap"],
        "splits": counts,
        "divided": plan["divided"],
        "sources": _sources(config, tokens),
        "vocabulary": tokenizer.vocab_size,
        "bytes_per_token": round(num_bytes / max(num_tokens, 1), 4),
        "gpt2": _beside_gpt2(config, sample := _sample(config, work, plan), tokenizer),
        "round_trip": _round_trip(sample, tokenizer),
    }
    if config.data.format == "chat":
        report["conversations"] = {name: sum(chunk[name] for chunk in tokens) for name in ("augmented", "cut")}
        parts, texts = report["sources"], text_parts(config.data)
        if texts:
            of_text = sum(parts[number]["num_documents"] for number in texts)
            of_all = sum(part["num_documents"] for part in parts)
            report["kinds"] = {"texts": of_text, "conversations": of_all - of_text}
        report["forms"] = {
            kind: ", ".join(f"{name} ({count:,})" for name, count in counts.items())
            for kind, counts in facts.get("conversations", {}).items()
        }
    report["warnings"] = _warnings(config, report, plan)
    return report


def _warnings(config: Config, report: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    """Lines about shares that are off by more than a point."""
    train, held = (report["splits"][split]["num_tokens"] for split in SPLITS)
    share, asked, found = held / (train + held), config.data.validation_fraction, []
    if not plan["is_given"] and not config.augmentation.copies and abs(share - asked) > _OFF:
        found.append(
            f"{share:.1%} of the tokens are held out, not data.validation_fraction = {asked:.1%}: the text is too "
            "short, or the lengths of its documents too different, to be divided closer"
        )
    if "kinds" in report and not report["kinds"]["conversations"]:
        found.append("no conversation is left, so nothing but text is learned")
    sizes = report["mixture"]["num_bytes"]
    shares = [(source["source"], size / sum(sizes), source["weight"]) for source, size in zip(report["sources"], sizes)]
    told = "{:.1%} of the text comes from {}, whose weight is {:.1%}: its documents, or others', are too few for that"
    return found + [told.format(part, name, wanted) for name, part, wanted in shares if abs(part - wanted) > _OFF]


def epochs(config: Config, dataset: TokenDataset) -> dict[str, object]:
    """{"epochs": {...}}: passes over the training split that the config asks for, as far as it decides them."""
    train, size = config.train, dataset.fit(config).block_size
    rows = dataset.train.rows_per_epoch(size)
    found: dict[str, object] = {"rows": rows, "block_size": size}
    if train.max_steps is None:
        return {"epochs": found | {"epochs": train.num_train_epochs}}
    if train.global_batch_size:
        batch, for_what = train.global_batch_size, "train.global_batch_size"
    elif isinstance(train.per_device_train_batch_size, int):
        batch, for_what = train.per_device_train_batch_size * (train.gradient_accumulation_steps or 1), "one device"
    else:
        return {"epochs": found | {"unknown": "the batch is chosen once the devices are known"}}
    return {"epochs": found | {"epochs": round(train.max_steps * batch / rows, 3), "for": f"{for_what}: {batch} rows"}}


def host(config: Config, dataset: TokenDataset, needed: dict[str, int]) -> dict[str, object]:
    """Tokens a second that one process of this host reads, beside those that each TPU slice in `needed` trains."""
    size = dataset.fit(config).block_size
    found = read_speed(dataset.train, size)
    parts = [f"one process reads {_big(found)} tokens/s at T = {size:,}"]
    for name, tokens in needed.items():
        ratio = found / tokens
        verdict = f"this machine feeds it {ratio:.1f} times over" if ratio >= 1 else "this machine is too slow for it"
        parts.append(f"{name} is estimated to train {_big(tokens)} tokens/s a host: {verdict}")
    slices = [{"slice": name, "tokens_per_second": tokens} for name, tokens in needed.items()]
    return {"tokens_per_second": round(found), "slices": slices, "line": "; ".join(parts)}


def read_speed(split: Split, block_size: int, seconds: float = _MEASURED_SECONDS) -> float:
    """Tokens a second of the training pipeline in this process, from the files to the arrays of a batch."""
    from jaxgpt.data.pipeline import train_rows  # imports JAX, which a preparation needs nowhere else

    def read_batch(step: int) -> None:
        rows = range(_MEASURED_ROWS)
        train_rows(split, seed=0, step=step, global_batch_size=_MEASURED_ROWS, block_size=block_size, rows=rows)

    read_batch(0)  # opens files
    step, started = 1, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        read_batch(step)
        step += 1
    return (step - 1) * _MEASURED_ROWS * block_size / elapsed


def _big(value: float) -> str:
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.0f} k"


def _bad_records(parts: list[dict]) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for part in parts:
        for reason, more in part.get("bad", {}).items():
            there = found.setdefault(reason, {"count": 0, "where": []})
            there["count"] += more["count"]
            there["where"] = (there["where"] + more["where"])[:EXAMPLES]
    return found


def _steps(config: Config, work: WorkFolder, facts: dict, plan: dict) -> list[dict]:
    """The effect of each cleaning step, in order; documents dropped by one step do not reach the next ones."""
    if plan["stage"] == "read":
        return []
    found: dict[str, dict[str, Any]] = {}
    for number in range(len(facts["rows"])):
        for name, counts in read_json(work.counts("clean", number))["steps"].items():
            examples = {kind: counts.pop(kind, []) for kind in ("changes", "drops")}
            add_counts(found, name, **{"changed": 0, "dropped": 0, "dropped_bytes": 0} | counts)
            for kind, more in examples.items():
                found[name][kind] = (found[name].get(kind, []) + more)[:EXAMPLES]
    for name, repeats in plan["repeats"].items():
        if getattr(config.cleaning, name):
            pairs = [[shortened(_row(work, plan, row)) for row in pair] for pair in repeats["pairs"]]
            drops = [f"{dropped}\n\nrepeats\n\n{kept}" for dropped, kept in pairs]
            found[name] = {"dropped": repeats["dropped"], "drops": drops}
    steps, left = [], sum(facts["rows"])
    for name in (name for name in CLEANING_STEPS + DUPLICATE_STEPS if name in found):
        step = {"step": name, "documents_in": left, "changed": 0, "dropped": 0} | found[name]
        left -= step["dropped"]
        steps.append(step | {"documents_out": left})
    return steps


def repeats(plan: SplitPlan) -> dict[str, dict]:
    """{step: {"dropped": how many, "pairs": the first rows dropped, each with the one that it repeats}}."""
    of, near = plan.repeats
    found = {}
    for step, is_near in zip(DUPLICATE_STEPS, (False, True), strict=True):
        (rows,) = ((of >= 0) & (near == is_near)).nonzero()
        found[step] = {"dropped": len(rows), "pairs": [[row, int(of[row])] for row in rows[:EXAMPLES].tolist()]}
    return found


def _row(work: WorkFolder, plan: dict, row: int) -> str:
    """The text of a row after cleaning."""
    chunk = next(number for number, end in enumerate(plan["first"][1:]) if row < end)
    return read_rows(work.rows(plan["stage"], chunk), ("texts",)).texts[row - plan["first"][chunk]]


def _sources(config: Config, tokens: list[dict]) -> list[dict]:
    """Documents, bytes and tokens of each part of the mixture, and its share of them."""
    parts: dict[str, dict] = {}
    for chunk in tokens:
        for part, counted in chunk["parts"].items():
            add_counts(parts, part, **counted)
    given = sources_of(config.data)
    all_tokens = sum(part["num_tokens"] for part in parts.values()) or 1
    all_weights = sum(source.weight for source in given)
    return [
        {
            "source": source.source + (f" {source.path}" if source.path else ""),
            "weight": round(source.weight / all_weights, 4),
            "share_of_tokens": round(parts.get(str(number), {}).get("num_tokens", 0) / all_tokens, 4),
            **(parts.get(str(number)) or dict.fromkeys(("num_documents", "num_bytes", "num_tokens"), 0)),
        }
        for number, source in enumerate(given)
    ]


# ---------------------------------------------------------------- beside GPT-2's tokenizer


def _beside_gpt2(config: Config, texts: list[str], tokenizer: Tokenizer) -> dict[str, object]:
    """Bytes per token of this tokenizer and of GPT-2's own on the same text, if that one is on this machine."""
    folder = _gpt2_folder(config)
    if folder is None:
        return {"unknown": "GPT-2's tokenizer is not on this machine (neither tokenizer.path nor the cache of hf:gpt2)"}
    other = load_tokenizer(folder)
    size = sum(len(text.encode()) for text in texts)
    try:
        ours, theirs = (sum(map(len, kind.encode_batch(texts))) for kind in (tokenizer, other))
    except UserError as error:
        return {"unknown": str(error)}
    return {
        "sample_bytes": size,
        "bytes_per_token": round(size / max(ours, 1), 4),
        "gpt2_bytes_per_token": round(size / max(theirs, 1), 4),
    }


def _round_trip(texts: list[str], tokenizer: Tokenizer) -> dict[str, object]:
    """The share of characters that are lost or new when tokens become text again, and a place where that happens."""
    texts, changed, example = [text[:4000] for text in texts[:: 1 + len(texts) // 250]], 0, None
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        if (back := tokenizer.decode(ids)) != text:
            before, after = Counter(text), Counter(back)
            changed += max((before - after).total(), (after - before).total(), 1)
            start = max(0, len(os.path.commonprefix([text, back])) - 10)
            example = example or [text[start : start + 40], back[start : start + 40]]
    return {"changed": changed / max(sum(map(len, texts)), 1), "example": example}


def round_trip_line(report: dict) -> str | None:
    """What of the text does not come back from its tokens; None if all of it does, or nobody looked."""
    found = report.get("round_trip") or {}
    if not found.get("changed"):
        return None
    (text, back), share = found["example"], max(found["changed"], 0.0001)
    return f"{share:.2%} of the characters change on their way through the tokenizer: {text!r} comes back as {back!r}"


def _sample(config: Config, work: WorkFolder, plan: dict) -> list[str]:
    texts: list[str] = []
    for number in range(len(plan["first"]) - 1):  # an even share of each chunk
        rows = read_rows(work.rows(plan["stage"], number), ("texts",))
        share, taken = _SAMPLE_BYTES // (len(plan["first"]) - 1), 0
        for text in rows.texts:
            if taken >= share:
                break
            text = "\n".join(plain_texts(text, config.chat)) if config.data.format == "chat" else text
            texts.append(text[: share - taken])
            taken += len(texts[-1])
    return texts


def _gpt2_folder(config: Config) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = config.tokenizer.path
    candidates = [Path(path)] if path and not path.startswith("hf:") else []
    for name in ("gpt2", "openai-community/gpt2"):
        if isinstance(cached := try_to_load_from_cache(name, "tokenizer.json"), str):
            candidates.append(Path(cached).parent)
    for folder in candidates:
        if has_tokenizer(folder) and load_tokenizer(folder).end_of_text == _GPT2_END_OF_TEXT:
            return folder
    return None


# ---------------------------------------------------------------- as text


def as_text(final: Path, report: dict) -> str:
    """The report on one screen: what was read, the effect of each step, the content of the dataset."""
    read, lines = report["read"], [f"prepared data: {final} (vocabulary {report['vocabulary']:,})"]
    lines.append(f"  read       documents {read['documents']:,}, bytes {read['bytes']:,}")
    for reason, bad in report["bad_records"].items():
        lines.append(f"  left out   {bad['count']:,}: {reason} ({bad['where'][0] if bad['where'] else 'somewhere'})")
    lines += [f"  {kind:<10} {found}" for kind, found in report.get("forms", {}).items()]
    for step in report["steps"]:
        lines.append(
            f"  {step['step']:<18} changed {step['changed']:,}, dropped {step['dropped']:,} of {step['documents_in']:,}"
        )
    if report["overlap"]:
        lines.append(f"  overlap    {report['overlap']:,} of these would be learned and repeat what is held out")
    if conversations := report.get("conversations"):
        lines.append(
            f"  changed copies {conversations['augmented']:,}, long ones that were cut {conversations['cut']:,}"
        )
    if kinds := report.get("kinds"):
        lines.append(f"  kinds      {_kinds_line(kinds)}")
    for split, count in report["splits"].items():
        documents, size, tokens = count["num_documents"], count["num_bytes"], count["num_tokens"]
        if "num_rows" in count:
            each = f"rows {count['num_rows']:,}, learned tokens {count['num_supervised'] / max(tokens, 1):.1%}"
        else:
            each = f"{size / max(tokens, 1):.2f} bytes per token"
        lines.append(f"  {split:<10} documents {documents:,}, bytes {size:,}, tokens {tokens:,}, {each}")
    if report["divided"]:
        lines.append(f"  divided    documents {report['divided']:,}: their ends are in validation")
    if len(report["sources"]) > 1:
        ended_by = report["mixture"]["ended_by"]
        if ended_by is not None:
            lines.append(f"  the mixture ends where {report['sources'][ended_by]['source']} is used up")
        for source in report["sources"]:
            share = f"{source['share_of_tokens']:.1%} of the tokens, weight {source['weight']:.1%}"
            lines.append(f"  {source['source']}: tokens {source['num_tokens']:,}, {share}")
    gpt2 = report["gpt2"]
    if "gpt2_bytes_per_token" in gpt2:
        ours, theirs = gpt2["bytes_per_token"], gpt2["gpt2_bytes_per_token"]
        lines.append(f"  compression {ours:.2f} bytes per token; GPT-2's own tokenizer {theirs:.2f} on the same text")
    if changed := round_trip_line(report):
        lines.append(f"  warning    {changed}")
    lines.append(f"  epochs     {_epochs_line(report['epochs'])}")
    if feed := report.get("host"):
        lines.append(f"  host       {feed['line']}")
    lines += [f"  warning    {line}" for line in report["warnings"]]
    return "\n".join([*lines, f"  report     {final / FILES[0]}"])


def _kinds_line(kinds: dict[str, int]) -> str:
    return f"texts {kinds['texts']:,}, of which every token is learned; conversations {kinds['conversations']:,}"


def _epochs_line(epochs: dict) -> str:
    rows = f"{epochs['rows']:,} rows of {epochs['block_size']:,} tokens an epoch"
    if "unknown" in epochs:
        return f"{rows}; {epochs['unknown']}"
    return f"{epochs['epochs']:g} ({rows}" + (f", {epochs['for']} a step)" if "for" in epochs else ")")


# ---------------------------------------------------------------- the page


def write(folder: Path, report: dict) -> None:
    """Write both files into `folder`."""
    page = Environment(autoescape=True, trim_blocks=True).from_string(_PAGE.read_text(encoding="utf-8"))
    gpt2 = report["gpt2"]
    facts = {
        "epochs": _epochs_line(report["epochs"]),
        "vocabulary": f"{report['vocabulary']:,}",
        "bytes per token": f"{report['bytes_per_token']:.3f}",
        "GPT-2's own tokenizer on the same text": gpt2.get("unknown") or f"{gpt2['gpt2_bytes_per_token']:.3f}",
        "text through the tokenizer and back": round_trip_line(report) or "unchanged",
        "host": report["host"]["line"] if "host" in report else "not measured: jaxgpt prepare measures it",
    } | {f"conversations {name}": f"{value:,}" for name, value in report.get("conversations", {}).items()}
    facts |= {"documents": _kinds_line(report["kinds"])} if "kinds" in report else {}
    facts |= {f"warning {number}": line for number, line in enumerate(report["warnings"], 1)}
    facts |= report.get("forms", {})
    html = page.render(report=report, facts=list(facts.items()))
    (folder / "report.html").write_text(html, encoding="utf-8", errors="replace")
    text = json.dumps(report, indent=2, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8", errors="replace")


def read(folder: Path) -> dict[str, Any]:
    """The report of a dataset; {} if a version of jaxgpt without reports made it."""
    file = folder / "report.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
