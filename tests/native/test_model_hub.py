"""Downloads by name from a hub on loopback: whole files alone get a name, whatever happens."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from razor_local.model_setup import DEFAULT_MODEL
from tests.support.hub_server import CHUNK, COMMIT, Hub, Repo, command, environment, run, wait_for
from tests.support.tiny_models import TinySpec, make_split_model

MODEL = DEFAULT_MODEL.read_bytes()
SHA256 = hashlib.sha256(MODEL).hexdigest()
SIZE = f"{len(MODEL) / 2**20:.1f} MiB"
NAME = "hf:owner/tiny-GGUF"


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    server.repos["owner/tiny-GGUF"] = Repo(
        {
            "README.md": b"# tiny",
            "mmproj-tiny-Q4_K_M.gguf": b"GGUF projector",
            "tiny-F16.gguf": b"GGUF not asked for",
            "tiny-Q4_K_M.gguf": MODEL,
        }
    )
    try:
        yield server
    finally:
        server.close()


def repo_folder(home: Path) -> Path:
    return home / "hf" / "hub" / "models--owner--tiny-GGUF"


def blobs(home: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (repo_folder(home) / "blobs").glob("*")}


def assert_no_model(home: Path) -> None:
    assert not [path for path in home.rglob("*.gguf")]
    assert all(name.endswith(".incomplete") for name in blobs(home))


def one_line(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The error of a command: one line, the last one."""
    assert done.returncode == code, done.stderr
    *before, line = done.stderr.splitlines()
    assert line.startswith("Error: ") and not any("Error" in text for text in before), done.stderr
    assert "Traceback" not in done.stderr
    return line.removeprefix("Error: ")


def test_a_pasted_address(hub, tmp_path) -> None:
    """A URL selects the file that it names, on the hub that HF_ENDPOINT names."""
    name = "hf:owner/tiny-GGUF/tiny-F16.gguf"
    address = "https://huggingface.co/owner/tiny-GGUF/blob/main/tiny-F16.gguf"
    done = run(hub, tmp_path, "models", "pull", address)
    assert done.returncode == 0 and f"downloading {name} (" in done.stderr, done.stderr
    assert done.stdout.rstrip().endswith("/tiny-F16.gguf")
    for same in (address, name):
        assert run(hub, tmp_path, "models", "path", same).stdout == done.stdout
    missing = address.replace("F16", "F32")
    assert one_line(run(hub, tmp_path, "models", "pull", missing)) == (
        f"owner/tiny-GGUF has no whole model for {name.replace('F16', 'F32')}; it has F16, Q4_K_M"
    )
    assert run(hub, tmp_path, "models", "rm", address, "--yes").returncode == 0
    assert_no_model(tmp_path)


def test_chat_with_a_repository(hub, tmp_path) -> None:
    """The model is announced, downloaded once, and answers; other programs find it."""
    text = "The secret code of Marlow is 48213.\nWhat is the secret code of Marlow?"
    options = ["--temp", "0", "-c", "1024"]
    done = run(hub, tmp_path, "chat", NAME, *options, message=text)
    assert done.returncode == 0 and "48213" in done.stdout, done.stderr
    assert done.stderr.startswith(
        f"downloading {NAME} (tiny-Q4_K_M.gguf of {hub.url}/owner/tiny-GGUF, {SIZE}, license"
        f" apache-2.0) to {tmp_path}/hf/hub\n"
    )
    path = repo_folder(tmp_path) / "snapshots" / COMMIT / "tiny-Q4_K_M.gguf"
    assert path.is_symlink() and path.read_bytes() == MODEL
    assert blobs(tmp_path) == {SHA256: len(MODEL)}
    assert (repo_folder(tmp_path) / "refs" / "main").read_text() == COMMIT
    assert [path for _, path, _ in hub.requests] == [
        "/api/models/owner/tiny-GGUF",
        f"/owner/tiny-GGUF/resolve/{COMMIT}/tiny-Q4_K_M.gguf",
    ]

    hub.requests.clear()
    again = run(hub, tmp_path, "chat", "-hf", "owner/tiny-GGUF:q4_k_m", *options, message=text)
    assert again.stdout == done.stdout and "downloading" not in again.stderr
    assert hub.requests == []  # what is here needs no network

    code = "import huggingface_hub as h; print(h.hf_hub_download(*{!r}, local_files_only=True))"
    seen = subprocess.run(
        [sys.executable, "-c", code.format(("owner/tiny-GGUF", "tiny-Q4_K_M.gguf"))],
        env=environment(hub, tmp_path),
        capture_output=True,
        text=True,
    )
    assert seen.stdout.strip() == str(path), seen.stderr


def test_python(hub, tmp_path) -> None:
    """resolve() downloads and reports its progress; Llama.from_pretrained() works, too."""
    code = f"""
import warnings; warnings.simplefilter("ignore")
from pathlib import Path
from razor_local import Llama
from razor_local.models import resolve
seen, announced = [], []
path = resolve({NAME!r}, lambda *n: seen.append(n), announced.append)
assert seen[-1][:2] == ({len(MODEL)},) * 2 and seen == sorted(seen), seen[-3:]
assert [(what.n_bytes, what.license) for what in announced] == [({len(MODEL)}, "apache-2.0")]
assert resolve(path) == path
llama = Llama.from_pretrained("owner/tiny-GGUF", "tiny-Q4*.gguf", n_ctx=512)
assert Path(llama.model_path) == path and llama.memory().n_ctx == 512
print(llama.create_completion("The", max_tokens=1)["usage"]["completion_tokens"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(hub, tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.stdout == "1\n", done.stderr
    assert hub.downloads() == [("tiny-Q4_K_M.gguf", "")]


def test_quantizations(hub, tmp_path) -> None:
    done = run(hub, tmp_path, "models", "pull", f"{NAME}:f16")
    assert done.returncode == 0 and done.stdout.endswith("/tiny-F16.gguf\n"), done.stderr
    assert one_line(run(hub, tmp_path, "models", "pull", f"{NAME}:Q9_X")) == (
        f"owner/tiny-GGUF has no whole model for {NAME}:Q9_X; it has F16, Q4_K_M"
    )
    hub.repos["owner/none"] = Repo({"model.safetensors": b""})
    assert "owner/none has no GGUF files" in one_line(run(hub, tmp_path, "fit", "hf:owner/none"))


def test_split_files(hub, tmp_path) -> None:
    """All parts are fetched, the first one is the model, and llama.cpp finds the others."""
    folder = tmp_path / "split"
    folder.mkdir()
    first = make_split_model(folder, TinySpec()).name
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    hub.repos["owner/split"] = Repo(files)
    done = run(hub, tmp_path, "fit", "hf:owner/split", "-c", "512")
    assert done.returncode == 0 and "MiB of weights" in done.stdout, done.stderr
    assert f"({first} and {len(files) - 1} more of {hub.url}/owner/split, " in done.stderr
    assert sorted(hub.downloads()) == [(name, "") for name in files]
    path = run(hub, tmp_path, "models", "path", "hf:owner/split:split").stdout.strip()
    assert path.endswith(f"/{first}")
    Path(path).with_name(list(files)[-1]).unlink()
    done = run(hub, tmp_path, "models", "path", "hf:owner/split")
    assert "is not on this machine" in one_line(done)
    hub.repos["owner/split"].files.popitem()
    assert "has no whole model" in one_line(run(hub, tmp_path, "models", "pull", "hf:owner/split"))


# -- what goes wrong


def test_a_connection_that_breaks_is_continued(hub, tmp_path) -> None:
    hub.repos["owner/tiny-GGUF"].cuts = [20 * CHUNK]
    done = run(hub, tmp_path, "models", "pull", NAME)
    assert done.returncode == 0 and done.stdout.endswith("/tiny-Q4_K_M.gguf\n"), done.stderr
    assert len(done.stderr.splitlines()) == 1  # what is downloaded
    (_, first), (_, second) = hub.downloads()
    assert first == "" and second == f"bytes={20 * CHUNK}-"
    assert Path(done.stdout.strip()).read_bytes() == MODEL


def test_a_later_command_goes_on_where_one_stopped(hub, tmp_path) -> None:
    """A hub that goes away for good, another one that cannot continue files, and Ctrl-C."""
    repo = hub.repos["owner/tiny-GGUF"]
    repo.cuts = [10 * CHUNK, 0, 0, 0, 0, 0, 0]
    assert one_line(run(hub, tmp_path, "models", "pull", NAME)).startswith(
        f"the connection to {hub.url} broke off ("
    )
    assert_no_model(tmp_path)
    assert blobs(tmp_path) == {f"{SHA256}.incomplete": 10 * CHUNK}
    listed = run(hub, tmp_path, "models")
    assert f"unfinished: {NAME}, 0.6 MiB so far" in listed.stderr

    repo.cuts, sent = [], []
    repo.at = lambda n: sent.append(n) if n < 20 * CHUNK else wait_for(lambda: child.poll())
    child = subprocess.Popen(
        command("models", "pull", NAME), env=environment(hub, tmp_path), stderr=subprocess.PIPE
    )
    wait_for(lambda: blobs(tmp_path)[f"{SHA256}.incomplete"] > 20 * CHUNK)
    child.send_signal(signal.SIGINT)
    stderr = child.communicate(timeout=60)[1].decode()
    assert child.returncode == 1 and "Traceback" not in stderr
    assert stderr.endswith("Interrupted; run the same command again to continue.\n\nAborted!\n")
    assert_no_model(tmp_path)

    repo.at = None
    (there,) = blobs(tmp_path).values()
    hub.requests.clear()
    done = run(hub, tmp_path, "models", "pull", NAME)
    assert done.returncode == 0, done.stderr
    assert f", {(len(MODEL) - there) / 2**20:.1f} MiB, license" in done.stderr
    assert hub.downloads() == [("tiny-Q4_K_M.gguf", f"bytes={there}-")]
    assert Path(done.stdout.strip()).read_bytes() == MODEL


def test_a_server_without_ranges(hub, tmp_path) -> None:
    repo = hub.repos["owner/tiny-GGUF"]
    repo.cuts, repo.ranges = [10 * CHUNK], False
    done = run(hub, tmp_path, "models", "pull", NAME)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == MODEL


def test_a_token_is_not_sent_elsewhere(hub, tmp_path) -> None:
    """As the real hub does, this one sends the client to another server for the file."""
    storage = Hub()
    storage.repos["owner/tiny-GGUF"] = Repo({"tiny-Q4_K_M.gguf": MODEL}, cuts=[10 * CHUNK])
    hub.repos["owner/tiny-GGUF"].elsewhere = storage.url
    done = run(hub, tmp_path, "models", "pull", NAME, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == MODEL
    assert hub.tokens == {"Bearer hf_secret"} and storage.tokens == {None}
    assert [what for _, what in storage.downloads()] == ["", f"bytes={10 * CHUNK}-"]
    storage.close()


def test_a_file_outside_of_its_folder(hub, tmp_path) -> None:
    for path in ("../../../x-Q4_K_M.gguf", str(tmp_path / "x-Q4_K_M.gguf")):
        hub.repos["owner/tiny-GGUF"].files = {path: MODEL}
        line = one_line(run(hub, tmp_path, "models", "pull", NAME))
        assert line == f"owner/tiny-GGUF has a file that is called {path}; use another one"
        assert not list(tmp_path.rglob("*.gguf"))


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (MODEL[:-1] + bytes([MODEL[-1] ^ 1]), "tiny-Q4_K_M.gguf of owner/tiny-GGUF arrived"),
        (MODEL[:-1000], f"sent {len(MODEL) - 1000:,} bytes of tiny-Q4_K_M.gguf, expected"),
        (MODEL + b"more", f"sent more than the {len(MODEL):,} bytes of tiny-Q4_K_M.gguf"),
    ],
)
def test_another_content_than_announced(hub, tmp_path, sent, message) -> None:
    repo = hub.repos["owner/tiny-GGUF"]
    repo.sent = {"tiny-Q4_K_M.gguf": sent}
    assert message in one_line(run(hub, tmp_path, "models", "pull", NAME))
    assert_no_model(tmp_path)
    repo.sent = {}
    done = run(hub, tmp_path, "models", "pull", NAME)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == MODEL


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"status": 403, "error_code": "GatedRepo"}, "owner/tiny-GGUF is gated: accept its terms"),
        ({"status": 403}, "does not let this account read owner/tiny-GGUF"),
        ({"status": 404}, "has no such repository or file in owner/tiny-GGUF"),
        ({"status": 500}, "answers with status 500 for owner/tiny-GGUF; try later"),
        (
            {"list_status": 401, "error_code": "Invalid credentials in Authorization header"},
            "does not accept the access token; correct HF_TOKEN or unset it",
        ),
        ({"list_status": 401}, "has no public model owner/tiny-GGUF; correct the name, or set"),
        ({"list_status": 404, "error_code": "RepoNotFound"}, "has no public model owner/tiny"),
        ({"commit": "main"}, "names no commit of owner/tiny-GGUF"),
    ],
)
def test_refusals_are_one_sentence(hub, tmp_path, how, message) -> None:
    for name, value in how.items():
        setattr(hub.repos["owner/tiny-GGUF"], name, value)
    assert message in one_line(run(hub, tmp_path, "models", "pull", NAME, HF_TOKEN="hf_x"))
    assert_no_model(tmp_path)


def test_no_network_and_offline(hub, tmp_path) -> None:
    offline = {"HF_HUB_OFFLINE": "1"}
    assert one_line(run(hub, tmp_path, "inspect", NAME, **offline)) == (
        f"{NAME} is not on this machine, and HF_HUB_OFFLINE forbids to download it; unset"
        " HF_HUB_OFFLINE or pass the path of a GGUF file"
    )
    assert hub.requests == []
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = one_line(run(hub, tmp_path, "inspect", NAME, **nowhere))
    assert done.startswith("http://127.0.0.1:9 cannot be reached (") and done.count(";") == 1
    done = run(hub, tmp_path, "inspect", NAME, HF_ENDPOINT=f"{hub.url}/nothing")
    assert one_line(done).endswith("correct the name or HF_ENDPOINT")
    assert run(hub, tmp_path, "models", "pull", NAME).returncode == 0
    for without in (offline, nowhere):
        done = run(hub, tmp_path, "inspect", NAME, **without)
        assert done.returncode == 0 and done.stderr == ""


def test_full_disk(hub, disk) -> None:
    """Refused before it begins; and where the disk fills up meanwhile, what arrived is kept."""
    line = one_line(run(hub, disk, "models", "pull", NAME))
    assert line == (
        f"{disk}/hf/hub has 1 MiB free, tiny-Q4_K_M.gguf needs {len(MODEL) / 2**20:.0f} MiB; free"
        " some space"
    )
    repo = hub.repos["owner/tiny-GGUF"]
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)

    def fill(n: int) -> None:
        if n == 10 * CHUNK:
            (disk / "ballast").write_bytes(bytes(5 << 20))

    repo.at = fill
    line = one_line(run(hub, disk, "models", "pull", NAME))
    assert line == (
        f"{disk}/hf/hub: No space left on device; what was downloaded of tiny-Q4_K_M.gguf is kept,"
        " free some space and run the same command again"
    )
    assert_no_model(disk)
    (disk / "ballast").unlink()
    repo.at = None
    hub.requests.clear()
    done = run(hub, disk, "models", "pull", NAME)
    assert done.returncode == 0, done.stderr
    assert hub.downloads()[0][1].startswith("bytes=")
    assert Path(done.stdout.strip()).read_bytes() == MODEL


def test_two_at_once(hub, tmp_path) -> None:
    """The second one waits for the first and takes its file."""
    repo, second = hub.repos["owner/tiny-GGUF"], []

    def start(n: int) -> None:
        if n == 10 * CHUNK and not second:
            second.append(
                subprocess.Popen(command("models", "pull", NAME), env=environment(hub, tmp_path))
            )

    repo.at = start
    assert run(hub, tmp_path, "models", "pull", NAME).returncode == 0
    assert second[0].wait(timeout=60) == 0
    assert len(hub.downloads()) == 1 and blobs(tmp_path) == {SHA256: len(MODEL)}


# -- what is here


def test_list_and_remove(hub, tmp_path) -> None:
    for quant in ("F16", "Q4_K_M"):
        run(hub, tmp_path, "models", "pull", f"{NAME}:{quant}")
    listed = json.loads(run(hub, tmp_path, "models", "--json").stdout)
    snapshot = repo_folder(tmp_path) / "snapshots" / COMMIT
    assert listed == [
        {"name": None, "path": str(DEFAULT_MODEL), "bytes": len(MODEL), "razor_profile": True,
         "razor_profile_source": "file", "license": "MIT"},
        {"name": f"{NAME}:F16", "path": str(snapshot / "tiny-F16.gguf"), "bytes": 18,
         "razor_profile": None, "razor_profile_source": None, "license": None},
        {"name": f"{NAME}:Q4_K_M", "path": str(snapshot / "tiny-Q4_K_M.gguf"),
         "bytes": len(MODEL), "razor_profile": True, "razor_profile_source": "file",
         "license": "MIT"},
    ]  # fmt: skip
    table = run(hub, tmp_path, "models").stdout.splitlines()
    assert table[1].startswith("(built in)") and table[2].split()[3] == "damaged"
    assert table[3].split() == [f"{NAME}:Q4_K_M", *SIZE.split(), "file", "MIT",
                                str(snapshot / "tiny-Q4_K_M.gguf")]  # fmt: skip

    done = run(hub, tmp_path, "models", "rm", f"{NAME}:F16")
    assert done.returncode == 2 and "pass --yes" in done.stderr
    (snapshot / "config.json").write_text("of another program")
    assert run(hub, tmp_path, "models", "rm", f"{NAME}:F16", "--yes").returncode == 0
    assert blobs(tmp_path) == {SHA256: len(MODEL)}
    done = run(hub, tmp_path, "models", "rm", NAME, "-y")
    assert done.stderr == f"{NAME}: {SIZE} freed\n" and blobs(tmp_path) == {}
    assert [path.name for path in snapshot.iterdir()] == ["config.json"]
    assert "is not on this machine" in one_line(run(hub, tmp_path, "models", "rm", NAME, "-y"))
    assert "is not on this machine" in one_line(run(hub, tmp_path, "models", "path", NAME))


def test_remove_what_is_unfinished_and_keep_what_is_shared(hub, tmp_path) -> None:
    repo = hub.repos["owner/tiny-GGUF"]
    (repo_folder(tmp_path) / "blobs").mkdir(parents=True)
    (repo_folder(tmp_path) / "blobs" / f"{SHA256}.incomplete").write_bytes(MODEL[: 10 * CHUNK])
    assert run(hub, tmp_path, "models", "rm", NAME, "-y").stderr == f"{NAME}: 0.6 MiB freed\n"
    assert not repo_folder(tmp_path).exists()

    repo.files["copy-Q8_0.gguf"] = MODEL  # the same content under two names
    for quant in ("Q4_K_M", "Q8_0"):
        assert run(hub, tmp_path, "models", "pull", f"{NAME}:{quant}").returncode == 0
    assert len(hub.downloads()) == 1  # of the second one nothing was missing
    run(hub, tmp_path, "models", "rm", f"{NAME}:Q8_0", "-y")
    done = run(hub, tmp_path, "models", "path", f"{NAME}:Q4_K_M")
    assert Path(done.stdout.strip()).read_bytes() == MODEL
    run(hub, tmp_path, "models", "rm", f"{NAME}:Q4_K_M", "-y")
    assert not repo_folder(tmp_path).exists()


def test_a_newer_commit(hub, tmp_path) -> None:
    """pull asks for it, and other commands take what is here; files that are equal are kept."""
    run(hub, tmp_path, "models", "pull", NAME)
    repo = hub.repos["owner/tiny-GGUF"]
    repo.commit = "f" * 40
    hub.requests.clear()
    assert COMMIT in run(hub, tmp_path, "models", "path", NAME).stdout
    done = run(hub, tmp_path, "models", "pull", NAME)
    assert done.stdout.strip() == str(
        repo_folder(tmp_path) / "snapshots" / repo.commit / "tiny-Q4_K_M.gguf"
    )
    assert done.stderr == "" and hub.downloads() == []
    assert len(json.loads(run(hub, tmp_path, "models", "--json").stdout)) == 2  # listed once


def test_the_catalog_names_files_by_their_sha256(hub, tmp_path) -> None:
    name = "smollm2:360m"
    from razor_local.models.catalog import entries

    entry = entries()[name]
    hub.repos[entry.repo] = Repo({entry.file: MODEL, "other-Q4_K_M.gguf": b"other"})
    line = one_line(run(hub, tmp_path, "models", "pull", name))
    assert line == (
        f"{entry.file} in {entry.repo} is not the file that the catalog names (its sha256 is"
        f" {SHA256[:12]}…, expected {entry.sha256[:12]}…); take it as it is now with"
        f" hf:{entry.repo}:Q4_K_M"
    )
    assert hub.downloads() == []
    del hub.repos[entry.repo].files[entry.file]
    line = one_line(run(hub, tmp_path, "models", "pull", name))
    assert line == f"{entry.repo} has no whole model for {name}; it has Q4_K_M"


@pytest.mark.skipif(os.name != "posix", reason="a terminal of its own")
def test_progress_on_a_terminal(hub, tmp_path) -> None:
    """The bar is on stderr and nothing of huggingface_hub's own."""
    import pty

    hub.repos["owner/tiny-GGUF"].at = lambda n: time.sleep(0.02)
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        command("models", "pull", NAME),
        env=environment(hub, tmp_path, TERM="xterm", COLUMNS="100"),
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 1 << 16)
        except OSError:
            break
        if not data:
            break
        shown += data
    os.close(ours)
    assert child.wait(timeout=60) == 0
    child.stdout.close()
    assert f"downloading {NAME} ".encode() in shown and b"\xe2\x94\x81" in shown
    assert b"B/s" not in shown
