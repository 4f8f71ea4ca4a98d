"""Saved slots: they restore all of a slot, and a file that is damaged or of another model changes nothing.

`KIMI_FUZZ=1000` tries that many damaged files; `KIMI_KILLS=200` kills the server so many times at random moments.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import time
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from llama_server import Answer, Server, serving

from kimi_gguf.engine.builds import Engine
from kimi_gguf.tools.server import PATIENCE

pytestmark = pytest.mark.engine

DAMAGED = int(os.environ.get("KIMI_FUZZ", "24"))
KILLS = int(os.environ.get("KIMI_KILLS", "4"))
PROMPT = "define: elephant\n" + "The largest living land animal, with a trunk and two tusks of ivory. " * 90
COUNT = 16
END = struct.Struct("<QQQQ")  # end of a file: bytes of upstream's part, checksum (two words), magic

Start = Callable[..., AbstractContextManager[Server]]


@pytest.fixture(scope="module")
def gguf(demo_gguf: Callable[[str], Path]) -> Path:
    return demo_gguf("F32")


@pytest.fixture
def start(tmp_path: Path, engine: Engine, gguf: Path) -> Start:
    """Starts a server with one slot, which it saves in the test's folder."""
    return lambda *options: serving(
        engine, tmp_path, gguf, "-np", "1", "--slot-save-path", f"{tmp_path}/", *options
    )


def ask(server: Server, prompt: str = PROMPT) -> Answer:
    return server.complete(prompt, COUNT, cache_prompt=True)


def refusal(server: Server, file: str) -> str | None:
    """The reason why a file was not restored; None: it was restored."""
    try:
        server.slot("restore", file)
    except urllib.error.HTTPError as error:
        assert error.code == 400
        return error.read().decode()
    return None


def checkpoints(server: Server) -> list[int]:
    with_slots = server.get("/slots")
    return [each["n_tokens"] for each in with_slots[0]["checkpoints"]]


def test_a_restored_slot_has_its_checkpoints(start: Start) -> None:
    with start() as server:
        first = ask(server)
        made = checkpoints(server)
        server.slot("save")
    assert len(made) >= 2
    with start() as server:
        server.slot("restore")
        assert checkpoints(server) == made
        again = ask(server)
        shorter = ask(server, PROMPT[: len(PROMPT) * 3 // 4])
    assert again.ids == first.ids
    assert again.timings["prompt_n"] == 4
    assert shorter.timings["cache_n"] >= 1024
    with start() as server:
        assert shorter.ids == ask(server, PROMPT[: len(PROMPT) * 3 // 4]).ids


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, start: Start) -> None:
    with start() as server:
        ask(server)
        (tmp_path / "slot.bin").write_bytes(b"old")
        in_the_way = tmp_path / "slot.bin.part"
        in_the_way.mkdir()
        with pytest.raises(urllib.error.HTTPError):
            server.slot("save")
        assert (tmp_path / "slot.bin").read_bytes() == b"old"
        in_the_way.rmdir()
        server.slot("save")
    assert not (tmp_path / "slot.bin.part").exists()


def test_a_file_of_another_model_or_cache_is_refused(
    tmp_path: Path, engine: Engine, gguf: Path, start: Start
) -> None:
    """A model that differs only in its last byte is another one."""
    other = bytearray(gguf.read_bytes())
    other[-1] ^= 1
    (tmp_path / "other.gguf").write_bytes(other)
    with start() as server:
        ask(server)
        server.slot("save")
    options = ("-np", "1", "--slot-save-path", f"{tmp_path}/")
    with serving(engine, tmp_path, tmp_path / "other.gguf", *options) as server:
        before = ask(server)
        assert "another model" in str(refusal(server, "slot.bin"))
        assert ask(server).timings["prompt_n"] == 4
        assert ask(server).ids == before.ids
    with start("-ctk", "q8_0", "-ctv", "q8_0") as server:
        assert "K cache type: expected q8_0, found f32" in str(refusal(server, "slot.bin"))


def damaged(content: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Truncated files, files with changed bytes, and files with bytes that were removed or added."""
    chance = random.Random(seed)
    (own,) = struct.unpack_from("<Q", content, len(content) - END.size)
    for number in range(count):
        kind = number % 6
        data = bytearray(content)
        place = chance.randrange(len(data))
        if kind == 0:
            del data[place:]
        elif kind == 1:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del data[place : place + chance.randrange(1, 100)]
        elif kind == 3:
            data[place:place] = chance.randbytes(chance.randrange(1, 100))
        elif kind == 4:  # the end is complete: only the checksum shows the damage
            place = chance.randrange(len(data) - END.size)
            data[place : place + 4] = chance.randbytes(4)
        else:  # upstream's part alone, which has no checksum
            del data[own:]
            place = chance.randrange(own)
            del data[place:]
        if data != content:
            yield f"{number}, kind {kind}, at {place}", bytes(data)


def test_a_damaged_file_changes_nothing(tmp_path: Path, start: Start) -> None:
    with start() as server:
        first = ask(server)
        server.slot("save")
        content = (tmp_path / "slot.bin").read_bytes()
        for name, data in damaged(content, DAMAGED, seed=1):
            (tmp_path / "damaged.bin").write_bytes(data)
            assert refusal(server, "damaged.bin"), name
            again = ask(server)
            assert again.timings["prompt_n"] == 4, name
            assert again.ids == first.ids, name


def test_a_file_of_upstream_with_changed_numbers_never_ends_the_server(tmp_path: Path, start: Start) -> None:
    """Upstream's file has no checksum: a changed number can restore another state, but must not end the server."""
    chance = random.Random(2)
    with start() as server:
        ask(server)
        server.slot("save")
        content = (tmp_path / "slot.bin").read_bytes()
        (own,) = struct.unpack_from("<Q", content, len(content) - END.size)
        (tokens,) = struct.unpack_from("<I", content, 8)
        heads = [range(12 + 4 * tokens + 200), range(own - 5000, own), range(own)]
        for number in range(DAMAGED):
            data = bytearray(content[:own])
            place = chance.choice(heads[number % 3]) & ~3
            value = chance.choice([0, 1, 2, -1, 2**31 - 1, chance.getrandbits(31)])
            data[place : place + 4] = struct.pack("<i", value)
            (tmp_path / "damaged.bin").write_bytes(bytes(data[:own]))
            refusal(server, "damaged.bin")
            assert len(ask(server).ids) == COUNT, (place, value)


def test_kept_slots_come_back_after_a_restart(tmp_path: Path, start: Start) -> None:
    other = (
        "define: river\n" + "A large natural stream of water that flows into the sea or into a lake. " * 40
    )
    with start("--keep-slots") as server:
        first, second = ask(server), ask(server, other)
    files = kept(tmp_path)
    assert [file.name[-8:] for file in files] == ["0000.bin", "0001.bin"]
    with start("--keep-slots") as server:
        for prompt, before in ((PROMPT, first), (other, second)):
            again = ask(server, prompt)
            assert again.ids == before.ids
            assert again.timings["prompt_n"] == 4
    files[0].write_bytes(b"not a slot")
    with start("--keep-slots") as server:
        assert f"{files[0].name} is not restored" in server.log.read_text()
        assert ask(server).timings["prompt_n"] + ask(server, other).timings["prompt_n"] > 8
    assert files[0].read_bytes() == b"not a slot"


def kept(folder: Path) -> list[Path]:
    """The files of --keep-slots, oldest prompt first."""
    return sorted(folder.glob("kept-*.bin"))


def test_servers_of_other_models_keep_their_files_in_the_same_folder(
    tmp_path: Path, engine: Engine, gguf: Path, start: Start
) -> None:
    with start("--keep-slots") as server:
        first = ask(server)
    (file,) = kept(tmp_path)
    with start("--keep-slots", "-ctk", "q8_0", "-ctv", "q8_0") as server:
        ask(server)
    assert len(kept(tmp_path)) == 2
    with start("--keep-slots", "-c", "512") as server:  # the prompt does not fit
        ask(server, "define: river\n")
    assert len(kept(tmp_path)) == 3
    assert file in kept(tmp_path)
    with start("--keep-slots") as server:
        again = ask(server)
        (tmp_path / "log").mkdir()
        options = ("-np", "1", "--slot-save-path", f"{tmp_path}/", "--keep-slots")
        with (
            pytest.raises(AssertionError, match="another server uses it"),
            serving(engine, tmp_path / "log", gguf, *options),
        ):
            pass
    assert again.ids == first.ids
    assert again.timings["prompt_n"] == 4


def test_a_server_that_restores_its_slots_can_be_ended(tmp_path: Path, start: Start) -> None:
    prompts = [f"{number} {PROMPT}" for number in range(6)]
    with start("--keep-slots") as server:
        for prompt in prompts:
            ask(server, prompt)
    before = {file: file.read_bytes() for file in kept(tmp_path)}
    assert len(before) == len(prompts)
    with pytest.raises(AssertionError, match="ended with status 0"), start("--keep-slots") as server:
        server.process.terminate()
        server.process.wait(PATIENCE)
    assert set(kept(tmp_path)) == set(before)


def test_a_model_that_is_replaced_while_the_server_runs(
    tmp_path: Path, engine: Engine, gguf: Path, demo_gguf: Callable[[str], Path]
) -> None:
    """The states are those of the old weights."""
    model = tmp_path / "model.gguf"
    options = ("-np", "1", "--slot-save-path", f"{tmp_path}/")
    shutil.copy(gguf, model)
    with serving(engine, tmp_path, model, *options) as server:
        ask(server)
        shutil.copy(demo_gguf("BF16"), tmp_path / "new.gguf")
        (tmp_path / "new.gguf").replace(model)
        server.slot("save")
    with serving(engine, tmp_path, model, *options) as server:
        assert "another model" in str(refusal(server, "slot.bin"))


@pytest.mark.full
def test_kills_at_random_moments(tmp_path: Path, start: Start) -> None:
    """While generating, or saving at SIGTERM: the next server starts, and its answers are those of a new one."""
    chance = random.Random(KILLS)
    prompts = [PROMPT[: len(PROMPT) * part // 4] for part in (2, 3, 4)]
    with start() as server:
        expected = {prompt: ask(server, prompt).ids for prompt in prompts}

    def answers(server: Server) -> None:
        for prompt in chance.choices(prompts, k=4):
            try:
                got = ask(server, prompt)
            except (OSError, AssertionError):
                return  # the server was killed
            assert got.ids == expected[prompt]

    for number in range(KILLS):
        with ThreadPoolExecutor() as pool:
            with (
                pytest.raises(AssertionError, match=r"ended with status (-9|0)"),
                start("--keep-slots") as server,
            ):
                asked = pool.submit(answers, server)
                if number % 2:
                    asked.result()
                    server.process.terminate()
                    time.sleep(
                        chance.uniform(0, 0.1)
                    )  # saving takes less: 0 is the status of a server that has saved
                else:
                    time.sleep(chance.uniform(0, 3))
                server.process.kill()
                server.process.wait()
            asked.result()
    with start("--keep-slots") as server:
        answers(server)
    assert not list(tmp_path.glob("*.part"))
