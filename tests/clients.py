"""A conversation with a server by other people's Python packages: `python tests/clients.py PACKAGE URL TURNS`.

Prints [the answers, the answers when they are streamed, the version of openai] as JSON. The packages send back each
answer in the form that they gave it in. It runs in an environment without jaxgpt.
"""

import json
import sys

OPTIONS = {"model": "tiny-chat", "max_tokens": 8, "temperature": 0}


def openai_answers(url: str, turns: list[str], stream: bool) -> list[str]:
    import openai

    chats = openai.OpenAI(base_url=url, api_key="none", max_retries=0).chat.completions
    messages: list = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        if stream:
            with chats.stream(messages=messages, stream_options={"include_usage": True}, **OPTIONS) as events:
                try:
                    answer = events.get_final_completion()
                except openai.LengthFinishReasonError as error:
                    answer = error.completion
        else:
            answer = chats.create(messages=messages, **OPTIONS)
        assert answer.usage.completion_tokens > 0
        messages.append(answer.choices[0].message)
    # All fields with their nulls, as people store conversations.
    stored = [one if isinstance(one, dict) else one.model_dump() for one in messages]
    again = chats.create(messages=stored[:-1], **OPTIONS)
    assert again.choices[0].message.content == stored[-1]["content"]
    return [one["content"] for one in stored[1::2]]


def langchain_answers(url: str, turns: list[str], stream: bool) -> list[str]:
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=url, api_key="none", stream_usage=True, max_retries=0, **OPTIONS)
    messages: list = []
    for turn in turns:
        messages.append(HumanMessage([{"type": "text", "text": turn}], name="bob"))
        if stream:
            first, *others = model.stream(messages)
            messages.append(sum(others, first))
        else:
            messages.append(model.invoke(messages))
    return [one.content for one in messages[1::2]]


if __name__ == "__main__":
    package, url, turns = sys.argv[1:]
    answers = {"openai": openai_answers, "langchain": langchain_answers}[package]
    import openai

    told = [answers(url, json.loads(turns), stream) for stream in (False, True)]
    print(json.dumps([*told, openai.__version__]))
