"""What OpenAI published of its four GPT-2 models, to stand beside a result: Radford et al. 2019, table 3.

The paper's first two sizes are named 117M and 345M there; they have 124 and 355 million parameters.
"""

SIZES = ("GPT-2 124M", "GPT-2 355M", "GPT-2 774M", "GPT-2 1.5B")
PAPER = "Radford et al. 2019, table 3"
_OWN_DETOKENIZER = "OpenAI's own detokenizer, which was not published: it does not compare exactly"
_OWN_LAMBADA = "OpenAI's own version of the text; its accuracy leaves out stop words: it does not compare exactly"

_FIGURES: dict[str, list[tuple[str, str, tuple[float, ...]]]] = {
    "lambada": [
        ("perplexity", f"LAMBADA; {_OWN_LAMBADA}", (35.13, 15.60, 10.87, 8.63)),
        ("acc", f"LAMBADA; {_OWN_LAMBADA}", (0.4599, 0.5548, 0.6012, 0.6324)),
    ],
    "cbt": [
        ("acc", "CBT-CN, common nouns", (0.8765, 0.9235, 0.9345, 0.9330)),
        ("acc", "CBT-NE, named entities", (0.834, 0.871, 0.880, 0.8905)),
    ],
    "wikitext": [
        ("word_perplexity", f"WikiText-2; {_OWN_DETOKENIZER}", (29.41, 22.76, 19.93, 18.34)),
        ("word_perplexity", f"WikiText-103; {_OWN_DETOKENIZER}", (37.50, 26.37, 22.05, 17.48)),
    ],
}
_SAME = {"lambada_openai": "lambada", "lambada_standard": "lambada"}  # the harness's names


def published(task: str) -> list[dict[str, object]]:
    """[{"model", "metric", "value", "source"}, ...] of the task or text of this name; [] where nothing was."""
    return [
        {"model": model, "metric": metric, "value": value, "source": f"{PAPER}: {of}"}
        for metric, of, values in _FIGURES.get(_SAME.get(task, task), [])
        for model, value in zip(SIZES, values, strict=True)
    ]


def with_published(result: dict) -> dict:
    """A task's result with the published figures of the same task, if there are some."""
    figures = published(result["task"])
    return {**result, "published": figures} if figures else result
