"""The server with the official `openai` client: answers, streams, tools, JSON, limits, errors, concurrent requests."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from llama_server import EXACT

from kimi_gguf.bench.prompt_cache import chat_template
from kimi_gguf.bench.server import RunningServer, running
from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.progress import reporting

pytestmark = pytest.mark.engine

KEY = "secret"
MODEL = "demo"
TEMPLATES = ("moonshotai-Kimi-K2", "Kimi-K3", "inclusionai-ling-3.0-flash")
# the demo generates reasoning without end
CALL = {
    "reasoning_format": "none",
    "chat_template_kwargs": {"thinking": False, "enable_thinking": False},
    "parallel_tool_calls": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"hourly": {"type": "boolean"}, "days": {"type": "integer"}},
            "required": ["hourly", "days"],
            "additionalProperties": False,
        },
    },
}

ANIMAL: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "animal",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {
                "word": {"type": "string", "maxLength": 6},
                "legs": {"type": "integer", "maximum": 9},
            },
            "required": ["word", "legs"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, engine: Engine, demo_gguf: Callable[[str], Path]
) -> Iterator[RunningServer]:
    with serving(TEMPLATES[0], tmp_path_factory.mktemp("server"), engine, demo_gguf("F32")) as started:
        yield started


@pytest.fixture(scope="module", params=TEMPLATES)
def any_format(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    engine: Engine,
    demo_gguf: Callable[[str], Path],
) -> Iterator[RunningServer]:
    """A server for each chat format."""
    with serving(request.param, tmp_path_factory.mktemp("server"), engine, demo_gguf("F32")) as started:
        yield started


@contextmanager
def serving(template: str, folder: Path, engine: Engine, gguf: Path) -> Iterator[RunningServer]:
    with reporting() as reporter:
        path = chat_template(reporter, template)
    options = [
        "--jinja",
        "--chat-template-file",
        str(path),
        "--api-key",
        KEY,
        "--alias",
        MODEL,
        "--metrics",
    ]
    command = (engine.bin / "llama-server", "--model", gguf, *EXACT, *options)
    with running(folder / "server.log", *command) as started:
        yield started
        assert started.process.poll() is None, "the server ended"


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return connect(server)


def connect(server: RunningServer, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key=key, max_retries=0, timeout=120
    )


def ask(client: openai.OpenAI, text: str = "define: elephant", **more: Any) -> Any:
    request = {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 12,
    }
    return client.chat.completions.create(**(request | more))


def test_chat(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert [model.id for model in client.models.list()] == [MODEL]


def test_a_stream_is_the_same_text(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ask(client).choices[0].message.content
    assert chunks[-1].usage.completion_tokens > 0


def test_a_required_tool_is_called(any_format: RunningServer) -> None:
    client = connect(any_format)
    answer = ask(client, tools=[WEATHER], tool_choice="required", max_tokens=400, extra_body=CALL)
    assert answer.choices[0].finish_reason == "tool_calls"
    call = check_weather(answer)
    result = [
        {"role": "user", "content": "weather"},
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    assert ask(client, tools=[WEATHER], messages=result).choices[0].message is not None


def check_weather(answer: Any) -> Any:
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"hourly", "days"}
    assert isinstance(arguments["hourly"], bool) and isinstance(arguments["days"], int)
    return call


def test_ids_of_calls(client: openai.OpenAI) -> None:
    """Kimi K2's format has them."""
    answer = ask(client, tools=[WEATHER], tool_choice="required", max_tokens=400, extra_body=CALL)
    assert check_weather(answer).id.startswith("functions.get_weather:")


def test_tools_in_a_stream(client: openai.OpenAI) -> None:
    deltas = [
        call
        for chunk in ask(
            client, tools=[WEATHER], tool_choice="required", max_tokens=400, stream=True, extra_body=CALL
        )
        for call in (chunk.choices[0].delta.tool_calls or [] if chunk.choices else [])
    ]
    assert deltas[0].function.name == "get_weather"
    assert set(json.loads("".join(each.function.arguments or "" for each in deltas))) == {"hourly", "days"}


def test_tools_may_be_left_alone(client: openai.OpenAI) -> None:
    message = ask(client, tools=[WEATHER], tool_choice="auto").choices[0].message
    assert message.content or message.tool_calls


def test_json_follows_its_schema(any_format: RunningServer) -> None:
    answer = ask(connect(any_format), response_format=ANIMAL, max_tokens=100, extra_body=CALL)
    check_animal(answer.choices[0].message.content)


@pytest.mark.parametrize("template", TEMPLATES[1:])
def test_json_and_calls_after_reasoning(
    template: str, tmp_path: Path, engine: Engine, demo_gguf: Callable[[str], Path]
) -> None:
    """The reasoning is ended after four tokens."""
    budget = {"thinking_budget_tokens": 4, "parallel_tool_calls": False}
    with serving(template, tmp_path, engine, demo_gguf("F32")) as server:
        client = connect(server)
        answer = ask(client, response_format=ANIMAL, max_tokens=400, extra_body=budget)
        assert answer.choices[0].message.reasoning_content
        check_animal(answer.choices[0].message.content)
        answer = ask(client, tools=[WEATHER], tool_choice="required", max_tokens=400, extra_body=budget)
        assert answer.choices[0].message.reasoning_content
        check_weather(answer)


@pytest.mark.parametrize(
    ("choice", "start", "called"),
    [("auto", "<", True), ("auto", "{", False), ("required", "{", True), ("none", "<", False)],
)
def test_tools_and_json(choice: str, start: str, called: bool, any_format: RunningServer) -> None:
    """The model prefers to start like a call or like JSON, and gets what the request allows."""
    bias = {token(any_format, start): 100}
    answer = ask(
        connect(any_format),
        tools=[WEATHER],
        tool_choice=choice,
        response_format=ANIMAL,
        logit_bias=bias,
        max_tokens=400,
        extra_body=CALL,
    )
    (first,) = answer.choices
    if called:
        assert first.finish_reason == "tool_calls"
        assert not first.message.content
        check_weather(answer)
    else:
        assert first.finish_reason == "stop"
        assert not first.message.tool_calls
        check_animal(first.message.content)


def test_kimi_k3_is_told_what_is_expected(
    tmp_path: Path, engine: Engine, demo_gguf: Callable[[str], Path]
) -> None:
    """Its template has texts for a schema and for required calls."""
    request = {"messages": [{"role": "user", "content": "define: elephant"}], "tools": [WEATHER]}
    with serving(TEMPLATES[1], tmp_path, engine, demo_gguf("F32")) as server:

        def prompt(**more: object) -> str:
            found = post(server, "/apply-template", {**request, **more})["prompt"]
            assert isinstance(found, str)
            return found

        assert "must match the following schema" in prompt(response_format=ANIMAL)
        assert '"maximum":9' in prompt(response_format=ANIMAL)
        assert "You MUST call tools" in prompt(tool_choice="required", response_format=ANIMAL)
        assert "must match" not in prompt(tool_choice="required", response_format=ANIMAL)
        assert "MUST" not in prompt()


def post(server: RunningServer, path: str, content: dict[str, Any]) -> Any:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    url = f"http://127.0.0.1:{server.port}{path}"
    with urllib.request.urlopen(
        urllib.request.Request(url, json.dumps(content).encode(), headers), timeout=60
    ) as answer:
        return json.load(answer)


def token(server: RunningServer, text: str) -> int:
    """The id of a text that is one token."""
    (found,) = post(server, "/tokenize", {"content": text})["tokens"]
    return int(found)


def check_animal(text: str) -> None:
    found = json.loads(text)
    assert set(found) == {"word", "legs"}
    assert isinstance(found["word"], str) and len(found["word"]) <= 6
    assert isinstance(found["legs"], int) and found["legs"] <= 9


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=3, max_tokens=4)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    for token in tokens:
        best = max(token.top_logprobs, key=lambda each: each.logprob)
        assert len(token.top_logprobs) == 3
        assert token.token == best.token and token.logprob == pytest.approx(best.logprob)
        assert token.logprob <= 0


def test_a_cancelled_stream_frees_its_slot(server: RunningServer, client: openai.OpenAI) -> None:
    for _ in range(8):  # twice as many as there are slots
        stream = ask(client, stream=True, max_tokens=4000, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
    began = time.monotonic()
    assert ask(client).choices[0].message.content
    assert time.monotonic() - began < 60
    assert wait_for(lambda: not any(slot["is_processing"] for slot in slots(server)))


def slots(server: RunningServer) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/slots", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def wait_for(done: Callable[[], bool]) -> bool:
    """Whether `done` returns true within 60 seconds."""
    end = time.monotonic() + 60
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_wrong_keys_are_refused(server: RunningServer) -> None:
    for key in ("wrong", KEY + "x", KEY[:-1]):
        with pytest.raises(openai.AuthenticationError):
            ask(connect(server, key))


def test_a_prompt_that_does_not_fit_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "elephant " * 20000)
    assert "exceed" in str(caught.value)
    assert ask(client).choices[0].message.content


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b'"text"', b"{}", b'{"messages": 1}', b'{"messages": []}', b'{"messages": [{"role": "king"}]}',
     b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": "many"}',
     b'{"messages": [{"role": "user", "content": "a"}], "temperature": []}',
     b'{"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_schema"}}',
     b'{"messages": [{"role": "user", "content": "a"}], "tools": [1]}',
     b"\xff\xfe", b"[" * 100000, b""],
)  # fmt: skip
def test_invalid_requests_are_refused(server: RunningServer, client: openai.OpenAI, content: bytes) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, content, headers), timeout=60)
    assert 400 <= caught.value.code < 500
    assert json.load(caught.value)["error"]["message"]
    assert ask(client).choices[0].message.content


def test_a_hundred_requests_at_once(server: RunningServer) -> None:
    """Each question gets the answer that it gets when it is asked alone."""
    questions = [f"define: {word}" for word in ("elephant", "river", "ivory", "walk", "stone")]
    alone = {question: ask(connect(server), question).choices[0].message.content for question in questions}
    gate = threading.Barrier(100)

    def one(number: int) -> tuple[str, str]:
        client, question = connect(server), questions[number % len(questions)]
        gate.wait()
        return question, ask(client, question, timeout=600).choices[0].message.content

    with ThreadPoolExecutor(100) as pool:
        for question, answer in pool.map(one, range(100)):
            assert answer == alone[question]


def test_metrics_count_what_was_done(server: RunningServer, client: openai.OpenAI) -> None:
    def metrics() -> dict[str, float]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.port}/metrics", headers={"Authorization": f"Bearer {KEY}"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if line and line[0] != "#"}

    before = metrics()
    used = ask(client, "define: a word that was not asked before").usage
    after = metrics()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["llamacpp:tokens_predicted_total"] == used.completion_tokens
    cached = used.prompt_tokens_details.cached_tokens
    assert grown["llamacpp:prompt_tokens_total"] == used.prompt_tokens - cached
