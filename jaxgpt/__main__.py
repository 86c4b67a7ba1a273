"""`jaxgpt VERB ...` is `python -m jaxgpt.VERB ...`."""

import importlib
import sys

from jaxgpt import __version__, errors

VERBS = {
    "speedrun": "from nothing to a chat model in the time you have",
    "doctor": "can this machine do the job? one line and one fix for each thing that is wrong",
    "prepare": "text -> cleaned, tokenized dataset",
    "plan": "what fits a TPU slice, how fast, at what price: asked of the TPU compiler, without a TPU",
    "train": "pretrain, continue or fine-tune",
    "sweep": "find better settings: many short trainings, compared",
    "evaluate": "loss of a text, questions with answers, what the model writes",
    "compare": "runs beside each other: settings that differ, curves, final numbers",
    "encode": "a text as tokens: ids, pieces, how many characters each",
    "decode": "token ids as a text",
    "sample": "text from a prompt",
    "serve": "answers over HTTP: OpenAI's API, a web page",
    "replay": "the texts of one step's batch, each with its loss, and a skip list",
    "convert": "Hugging Face folder to run folder, and back",
    "drill": "kill a run again and again, and show that nothing is lost",
    "launch": "several processes on this machine, as a pod's hosts would be",
}


def main() -> int:
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in VERBS:
        if verb in ("train", "sweep", "launch", "speedrun"):
            errors.stop_at_once(lambda: importlib.import_module("jaxgpt.parallel.join").tell_stopped)
        code = importlib.import_module(f"jaxgpt.{verb}").main(sys.argv[2:])
        if verb in ("train", "speedrun"):
            from jaxgpt import cli

            cli.leave(code)
        return code
    if verb == "--version":
        print(__version__)
        return 0
    listed = "\n".join(f"  {name:<10}{text}" for name, text in VERBS.items())
    usage = f"usage: jaxgpt VERB [options]\n\n{listed}\n\njaxgpt VERB --help tells a verb's options."
    if verb in ("-h", "--help"):
        print(usage)
        return 0
    print(f"error: there is no verb {verb!r}\n{usage}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
