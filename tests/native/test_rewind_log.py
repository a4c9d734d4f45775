"""The rewind log of Llama: where it is, how large it may become, and what it saves."""

from __future__ import annotations

import re
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from razor_local import Llama, UnsupportedError, rewind_log
from razor_local.chat import Chat, chat_template
from razor_local.cli import main
from razor_local.cli.chat import DEFAULT_MODEL
from razor_local.cli.chat_status import stats
from razor_local.rewind_log import RewindLog, choose_rewind_log
from tests.support.texts import FACT, QUESTION, text_with

GIB = 1 << 30


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rewind_log, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def open_llama(**options):
    return closing(Llama(DEFAULT_MODEL, n_ctx=2048, **options))


def prompt(llama, n):
    return llama.tokenize(text_with(FACT, 2 * n).encode(), add_bos=False)[:n]


def logits(llama):
    return llama._last_logits().copy()


@pytest.mark.parametrize("where", ["auto", "disk", "ram"])
def test_what_was_folded_is_not_evaluated_again(where, cache) -> None:
    with open_llama(rewind=where) as llama, open_llama(rewind="off") as without:
        tokens = prompt(llama, 1900)
        for one in (llama, without):
            assert one.prefill(tokens) == (0, 1900, True)
        assert llama.stats().n_rollback == 1900
        memory = llama.memory()
        assert memory.rewind == ("ram" if where == "ram" else "disk")
        assert memory.rewind_why is None
        assert 0 < memory.rewind_bytes <= memory.rewind_limit <= 4 * GIB
        assert memory.kv_bytes == without.memory().kv_bytes
        assert cache.exists() == (where != "ram") and not list(cache.glob("*"))
        assert llama.prefill(tokens[:700]) == (699, 1, True)
        assert without.prefill(tokens[:700]) == (0, 700, True)
        np.testing.assert_allclose(logits(llama), logits(without), atol=0.05)
        # also where eval() goes back
        llama.n_tokens = 400
        llama.eval(tokens[400:420])
        assert llama.stats().n_tokens == 420
        # and as before without a log
        memory = without.memory()
        assert (memory.rewind, memory.rewind_bytes) == ("off", 0)
        assert memory.rewind_why == "rewind='off'"


def test_an_edited_message_reads_nothing_before_it() -> None:
    with open_llama() as llama:
        chat = Chat(llama, chat_template(llama), max_tokens=20)
        for text in (text_with(FACT), text_with(FACT), QUESTION):
            list(chat.say(f"{text[:2500]}\n\n{QUESTION}"))
        before = chat.n_used
        chat.undo()
        chat.undo()
        list(chat.say("another message"))
        assert chat.last.n_evaluated < 40 < before - chat.n_used
        assert chat.last.n_reused > 256


def test_a_template_that_drops_the_last_thoughts() -> None:
    """500 tokens are dropped after 4,000: as with a full cache, only what follows is evaluated."""
    reused = {}
    for razor in (True, False):
        with closing(Llama(DEFAULT_MODEL, n_ctx=8192, razor=razor)) as llama:
            tokens = prompt(llama, 4700)
            question, thoughts, answer = tokens[:4000], tokens[4000:4500], tokens[4500:4540]
            llama.prefill(question + thoughts + answer)
            reused[razor] = llama.prefill(question + answer + tokens[4540:])
    assert reused[True] == reused[False] == (4000, 200, True)


def test_the_limit_drops_the_oldest_part() -> None:
    with open_llama(rewind="ram", rewind_limit=1 << 20) as llama:
        tokens = prompt(llama, 1900)
        llama.prefill(tokens)
        assert 0 < llama.memory().rewind_bytes <= llama.memory().rewind_limit == 1 << 20
        n = llama.stats().n_rollback
        assert 64 < n < 1900
        assert llama.prefill(tokens[: 1900 - n + 1]).n_reused == 1900 - n
        assert llama.prefill(tokens[:100]).n_reused == 0


@pytest.mark.skipif(sys.platform != "linux", reason="uses /dev and /proc")
def test_a_folder_that_cannot_be_used(monkeypatch) -> None:
    monkeypatch.setattr(rewind_log, "cache_folder", lambda: Path("/dev/null/cache"))
    with open_llama() as llama:
        memory = llama.memory()
        assert memory.rewind == "off"
        assert memory.rewind_why.startswith("the user's cache folder cannot be used (")
    with pytest.raises(UnsupportedError, match="cannot be used .* or pass rewind='ram'$"):
        open_llama(rewind="disk")
    monkeypatch.setattr(rewind_log, "cache_folder", lambda: Path("/proc/self"))  # read-only
    assert choose_rewind_log("auto", None, False)[0] == RewindLog()


def test_a_full_disk_ends_the_log(disk, monkeypatch) -> None:
    monkeypatch.setattr(rewind_log, "cache_folder", lambda: disk)
    with open_llama(rewind_limit=GIB) as llama, open_llama(rewind="off") as without:
        tokens = prompt(llama, 1900)
        (disk / "ballast").write_bytes(bytes(900_000))
        for one in (llama, without):
            one.prefill(tokens)
        memory = llama.memory()
        assert memory.rewind_why == "No space left on device" and memory.rewind_bytes == 0
        np.testing.assert_array_equal(logits(llama), logits(without))
        assert llama.stats() == without.stats()
        assert llama.prefill(tokens[:300]) == (0, 300, True)


def test_a_full_cache_needs_no_log() -> None:
    with open_llama(razor=False) as llama:
        memory = llama.memory()
        assert (memory.rewind, memory.rewind_bytes) == ("off", 0)


def test_choices(monkeypatch, cache) -> None:
    monkeypatch.setattr(rewind_log, "available_ram", lambda: 20 * GIB)
    usage = type("Usage", (), {"free": 500 * GIB})
    monkeypatch.setattr(rewind_log.shutil, "disk_usage", lambda _: usage)
    disk = RewindLog("disk", 4 * GIB, str(cache))
    assert choose_rewind_log("auto", None, False) == (disk, "")
    assert choose_rewind_log("disk", None, True) == (disk, "")
    assert choose_rewind_log("ram", None, False) == (RewindLog("ram", 2 * GIB), "")
    assert choose_rewind_log("ram", 5, True) == (RewindLog("ram", 5), "")
    log, why = choose_rewind_log("auto", None, True)
    assert log == RewindLog() and why.startswith("the cache is on a device; rewind='ram'")


def test_the_line_in_stats() -> None:
    back = "rewind +the cache can go back by"
    lines = {
        "disk": rf"{back} 1,900 tokens, with a log of \d+\.\d MiB on disk",
        "ram": rf"{back} 1,900 tokens, with a log of \d+\.\d MiB of memory",
        "off": rf"{back} \d+ tokens; no log: rewind='off'",
    }
    for where, line in lines.items():
        with open_llama(rewind=where) as llama:
            chat = Chat(llama, chat_template(llama))
            llama.prefill(prompt(llama, 1900))
            assert re.search(f"^{line}$", stats(llama, chat), re.MULTILINE)
    with open_llama(razor=False) as llama:
        line = r"^rewind +the full cache can go back to any token$"
        assert re.search(line, stats(llama, Chat(llama, None)), re.MULTILINE)


def test_options_of_commands() -> None:
    args = ["run", "-p", "hi", "-n", "1", "-c", "1024"]
    for more in (["--rewind", "ram", "--rewind-limit", "3M"], ["--rewind", "off"]):
        assert CliRunner().invoke(main, [*args, *more]).exit_code == 0
    done = CliRunner().invoke(main, [*args, "--rewind-limit", "0"])
    assert done.exit_code == 1 and done.stderr.splitlines()[-1] == (
        "Error: --rewind-limit is 0, expected a number of bytes from 1; for no log pass --rewind"
        " off"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewind": "yes"}, "rewind is 'yes', expected 'auto', 'disk', 'ram' or 'off'"),
        ({"rewind_limit": 0}, "rewind_limit is 0, expected a number of bytes from 1; for no log"),
        ({"rewind_limit": 1.5}, "rewind_limit is 1.5, expected a number of bytes"),
    ],
)
def test_refused_arguments(options, message) -> None:
    with pytest.raises(UnsupportedError, match=message):
        open_llama(**options)
