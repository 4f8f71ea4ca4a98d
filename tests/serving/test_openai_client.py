"""The server with the official `openai` client: answers, streams, tools, JSON, limits, errors, concurrent requests."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from llama_server import EXACT

from kimi_gguf.engine.builds import Engine
from kimi_gguf.engine.progress import reporting
from kimi_gguf.tools.prompt_cache import chat_template
from kimi_gguf.tools.server import RunningServer, running

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
def servers(
    tmp_path_factory: pytest.TempPathFactory, engine: Engine, demo_gguf: Callable[[str], Path]
) -> Iterator[dict[str, RunningServer]]:
    """A server for each chat format."""
    with reporting() as reporter, ExitStack() as stack:
        started = {}
        for template in TEMPLATES:
            options = ["--jinja", "--chat-template-file", str(chat_template(reporter, template))]
            options += ["--api-key", KEY, "--alias", MODEL, "--metrics"]
            command = (engine.bin / "llama-server", "--model", demo_gguf("F32"), *EXACT, *options)
            log = tmp_path_factory.mktemp("server") / "server.log"
            started[template] = stack.enter_context(running(log, *command))
        yield started
        assert all(server.process.poll() is None for server in started.values()), "a server ended"


@pytest.fixture
def server(servers: dict[str, RunningServer]) -> RunningServer:
    return servers[TEMPLATES[0]]


@pytest.fixture(params=TEMPLATES)
def any_format(request: pytest.FixtureRequest, servers: dict[str, RunningServer]) -> RunningServer:
    return servers[request.param]


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


def test_json_follows_its_schema(any_format: RunningServer) -> None:
    answer = ask(connect(any_format), response_format=ANIMAL, max_tokens=100, extra_body=CALL)
    check_animal(answer.choices[0].message.content)


@pytest.mark.parametrize("template", TEMPLATES[1:])
def test_json_and_calls_after_reasoning(template: str, servers: dict[str, RunningServer]) -> None:
    """The reasoning is ended after four tokens."""
    budget = {"thinking_budget_tokens": 4, "parallel_tool_calls": False}
    client = connect(servers[template])
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


def test_kimi_k3_is_told_what_is_expected(servers: dict[str, RunningServer]) -> None:
    """Its template has texts for a schema and for required calls."""
    request = {"messages": [{"role": "user", "content": "define: elephant"}], "tools": [WEATHER]}

    def prompt(**more: object) -> str:
        return str(post(servers[TEMPLATES[1]], "/apply-template", {**request, **more})["prompt"])

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


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"{}", b'{"messages": 1}', b'{"messages": []}', b'{"messages": [{"role": "king"}]}',
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
