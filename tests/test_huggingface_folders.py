"""Hugging Face folders with ends and chat templates of their own: they stop and chat here as in transformers.

So they do as they are, converted in both directions, and after a fine-tuning.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from test_tokenizer_folders import TURN, bert_json, bpe, pair, write

from jaxgpt import train
from jaxgpt.data import chat
from jaxgpt.data.tokenizer import END_OF_TEXT
from jaxgpt.inference.decoder import build_decoder, generate
from jaxgpt.inference.prompts import ChatPrompts
from jaxgpt.inference.sampling import SamplingOptions
from jaxgpt.settings import ChatConfig
from jaxgpt.training.models import convert, load_model

pytestmark = pytest.mark.system

CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELPFUL = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + CHATML
ZEPHYR = (
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n{% else %}\n"
    "{{ '<|assistant|>\n' + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>\n' }}{% endif %}\n{% endfor %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% endif %}{% endfor %}"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n### Response:\n"
    "{%- else %}\n{{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>bot\n{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>bot\n{% endif %}"
)
BERT = "{% for m in messages %}{{ m.content }}[SEP]{% endfor %}"


class Case(NamedTuple):
    """What a folder declares; `end` is the token that the model makes soon."""

    end: str
    settings: dict
    template: str | list | None = None
    generation: list[str] | str | None = None  # eos_token_id of generation_config.json, by name
    config: list[str] | str | None = None  # of config.json
    tokens: tuple[str, ...] = (END_OF_TEXT, *TURN)
    special: bool = True
    file: bool = True  # the template is in chat_template.jinja


CASES = {
    "eos of the tokenizer": Case(
        "<|end|>", {"eos_token": "<|end|>"}, None, "<|end|>", "<|end|>", (END_OF_TEXT, "<|end|>")
    ),
    "list of ends": Case("<|im_end|>", {"eos_token": END_OF_TEXT}, HELPFUL, ["<|im_end|>", END_OF_TEXT], END_OF_TEXT),
    "list in config.json": Case("<|im_end|>", {}, CHATML, None, ["<|im_end|>", END_OF_TEXT]),
    "template in the settings": Case("<|im_end|>", {"eos_token": "<|im_end|>"}, HELPFUL, "<|im_end|>", file=False),
    "several templates": Case(
        "<|im_end|>",
        {"eos_token": "<|im_end|>"},
        [{"name": "default", "template": HELPFUL}, {"name": "tool_use", "template": "{{ tools }}"}],
        "<|im_end|>",
    ),
    "zephyr": Case("</s>", {"eos_token": "</s>"}, ZEPHYR, "</s>", "</s>", ("<s>", "</s>")),
    "llama": Case("</s>", {"eos_token": "</s>", "bos_token": "<s>"}, LLAMA, "</s>", "</s>", ("<s>", "</s>")),
    "alpaca": Case(END_OF_TEXT, {"eos_token": END_OF_TEXT}, ALPACA, END_OF_TEXT, END_OF_TEXT, (END_OF_TEXT,)),
    "generation mark": Case("<|im_end|>", {"eos_token": END_OF_TEXT}, MARKED, ["<|im_end|>", END_OF_TEXT], END_OF_TEXT),
    "our template": Case("<|im_end|>", {"eos_token": END_OF_TEXT}, None, ["<|im_end|>", END_OF_TEXT], END_OF_TEXT),
    "added_tokens.json": Case("<|im_end|>", {"eos_token": "<|im_end|>"}, CHATML, "<|im_end|>", tokens=()),
    "bert": Case("[SEP]", {"eos_token": "[SEP]", "tokenizer_class": "BertTokenizer"}, BERT, "[SEP]", tokens=()),
    "eos alone": Case(END_OF_TEXT, {}, None, END_OF_TEXT, END_OF_TEXT, (END_OF_TEXT,)),
}
USER = {"role": "user", "content": "Line 3 says"}
TURNS = [USER, {"role": "assistant", "content": "Hello World"}, {"role": "user", "content": "Line 7"}]
ANSWERED = [*TURNS, {"role": "assistant", "content": "says"}]
NEW = 10


def make(folder: Path, case: Case) -> Path:
    """The folder, whose model makes `case.end` as its fourth token or later after the conversation."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder.mkdir()
    if "Bert" in str(case.settings):
        bert_json(folder)
    elif not case.tokens:
        size = len(pair(folder))
        write(folder, added_tokens={"<|im_end|>": size, "<|im_start|>": size + 1})
    else:
        write(folder, bpe(*case.tokens))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} if case.tokens else {"tokenizer_class": "GPT2Tokenizer"}
    settings |= case.settings
    if case.template and (isinstance(case.template, list) or not case.file):
        settings["chat_template"] = case.template
    elif case.template:
        (folder / "chat_template.jinja").write_text(str(case.template))
    write(folder, tokenizer_config=settings)
    write(folder, config={"model_type": "gpt2"})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shape = dict(n_positions=128, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    prompt = theirs_prompt(tokenizer, TURNS) if case.template else tokenizer.encode("Line 3", add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids(case.end)
    for seed in range(50):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), initializer_range=0.6, **shape, **ends))
        greedy = lambda model: model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW)[0]
        other = greedy(model)[len(prompt) + 4].item()
        with torch.no_grad():  # the two tokens change places
            model.transformer.wte.weight[[end, other]] = model.transformer.wte.weight[[other, end]]
        if end in (made := greedy(model)[len(prompt) :].tolist())[3:] and end not in made[:3]:
            break
    model.save_pretrained(folder)
    for name, eos in (("config.json", case.config), ("generation_config.json", case.generation)):
        content = json.loads((folder / name).read_text())
        if eos is None and name.startswith("generation"):
            (folder / name).unlink()
            continue
        content["eos_token_id"] = tokenizer.convert_tokens_to_ids(eos) if eos else None
        (folder / name).write_text(json.dumps(content))
    return folder


def theirs_prompt(tokenizer, messages: list[dict]) -> list[int]:
    return list(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
    )


def ours(path: Path, case: Case) -> list:
    """[(prompt, what follows it, whether it stopped), ...] of a conversation and of a text."""
    model = load_model(path)
    decoder = build_decoder(
        model.config.model, model.vocab_size, model.params, model.tokenizer.end_of_text, ends=model.tokenizer.ends
    )
    found = []
    for is_chat in (True, False) if case.template else (False,):
        prompt, stops = model.tokenizer.encode("Line 3"), ()
        if is_chat:
            prompts = ChatPrompts(model.tokenizer, 128, str(path))
            prompt, stops = prompts.encode(TURNS), (prompts.end_of_turn,)
        options = SamplingOptions(max_new_tokens=NEW, temperature=0.0, stop_token_ids=stops)
        [[made]] = generate(decoder, [prompt], options)
        found.append((prompt, made.tokens, made.finish_reason == "stop"))
    return found


def theirs(path: Path, case: Case) -> list:
    """The same of transformers, which reads everything in the folder by itself."""
    import torch
    from transformers import AutoTokenizer, GPT2LMHeadModel

    tokenizer, model = AutoTokenizer.from_pretrained(path), GPT2LMHeadModel.from_pretrained(path)
    found = []
    for is_chat in (True, False) if case.template else (False,):
        prompt = theirs_prompt(tokenizer, TURNS) if is_chat else tokenizer.encode("Line 3", add_special_tokens=False)
        made = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW)[0, len(prompt) :].tolist()
        ends = model.generation_config.eos_token_id
        stopped = made[-1] in (ends if isinstance(ends, list) else [ends])
        found.append((prompt, made[:-1] if stopped else made, stopped))
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_folder_stops_and_chats_as_in_transformers_converted_and_fine_tuned(name, tmp_path):
    from transformers import AutoTokenizer

    case = CASES[name]
    folder = make(tmp_path / "given", case)
    expected = theirs(folder, case)
    assert [stopped for _, _, stopped in expected][0] and len(expected[0][1]) >= 3
    assert ours(folder, case) == expected
    convert(str(folder), tmp_path / "run", None)
    assert ours(tmp_path / "run", case) == expected
    convert(str(tmp_path / "run"), tmp_path / "back", None)
    assert ours(tmp_path / "back", case) == theirs(tmp_path / "back", case) == expected

    record = {"messages": ANSWERED}
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for _ in range(20)))
    config = f"""
[model]
n_layer = 1
n_head = 2
n_embd = 32
n_positions = 128
dtype = "float32"
[tokenizer]
type = "folder"
path = "{folder}"
[init]
from_huggingface = "{folder}"
[data]
source = "jsonl"
format = "chat"
path = "{tmp_path}/chats.jsonl"
prepared_dir = "{tmp_path}/prepared"
block_size = 96
validation_fraction = 0.2
[optimizer]
learning_rate = 1e-4
warmup_steps = 1
[train]
max_steps = 2
per_device_train_batch_size = 1
[checkpoint]
save_steps = 2
[eval]
eval_steps = 2
sample_tokens = 0
[log]
tensorboard = false
"""
    (tmp_path / "config.toml").write_text(config)
    assert train.main(["--config", str(tmp_path / "config.toml"), "--workdir", str(tmp_path / "tuned")]) == 0
    tuned = tmp_path / "tuned" / "hf"
    assert ours(tmp_path / "tuned", case) == ours(tuned, case) == theirs(tuned, case)
    if not case.template:
        return
    tokenizer, model = AutoTokenizer.from_pretrained(tuned), load_model(tuned)
    assert tokenizer.apply_chat_template(ANSWERED, tokenize=False) == AutoTokenizer.from_pretrained(
        folder
    ).apply_chat_template(ANSWERED, tokenize=False)
    encoder = chat.ChatEncoder(model.tokenizer, ChatConfig(), 96)
    [made] = encoder.encode(chat.to_text(ANSWERED))
    assert made.tokens.tolist() == list(
        tokenizer.apply_chat_template(ANSWERED, tokenize=True, return_dict=True)["input_ids"]
    )
    learned = made.tokens[made.supervised].tolist()
    expected = f"HelloWorld{case.end}says{case.end}"
    assert model.tokenizer.decode(learned).replace(" ", "") in (expected, expected.replace("HelloWorld", "helloworld"))
    assert learned.count(model.tokenizer.end_of_turn) == 2
    assert np.flatnonzero(made.supervised)[0] == len(encoder.prompt(ANSWERED[:1]))
