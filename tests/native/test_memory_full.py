"""Errors of insufficient memory: one sentence, with contexts that fit.

The memory of a child process is limited, so that its allocations fail.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from razor_local import MemoryFullError, llama_options
from razor_local.cli.chat import DEFAULT_MODEL
from razor_local.llama import Llama
from razor_local.native.loaded import C

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit address space"),
    pytest.mark.skipif(C.llama_supports_gpu_offload(), reason="devices take address space"),
]

# runs the code in sys.argv[2] with sys.argv[1] MiB of additional address space
LIMITED = f"""
import resource, sys, psutil
from razor_local import Llama
import razor_local.fit
from razor_local.cli import main
MODEL = {str(DEFAULT_MODEL)!r}
room = psutil.Process().memory_info().vms + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (room, room))
try:
    exec(sys.argv[2])
except razor_local.MemoryFullError as error:
    print(error)
"""
# 6 KiB of KV cache per token: 576 MiB
KV = "n_ctx=98304, razor=False"


def limited(n_mib: int, code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", LIMITED, str(n_mib), code]
    return subprocess.run(command, input="hello", capture_output=True, text=True)


def runs(n_mib: int, options: str) -> None:
    """Check that a context that an error named as fitting can be created and computes an answer."""
    code = f"Llama(MODEL, {options}).create_completion('hello ' * 200); print('ok')"
    done = limited(n_mib, code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", ""), options


def fitting(sentence: str, pattern: str) -> tuple[int, int]:
    """Return the context that fits with the requested types, and the one with smaller types."""
    match = re.fullmatch(pattern, sentence)
    assert match, sentence
    return int(match[1]), int(match[2])


def test_more_than_is_free_is_refused_before_it_is_allocated():
    done = limited(1500, "Llama(MODEL, n_ctx=1048576, razor=False)")
    small, large = fitting(
        done.stdout,
        r"the KV cache of 1,048,576 tokens takes 6\.0 GiB and 1\.[45] GiB of memory are free; with"
        r" 1 GiB to spare, n_ctx=(\d+) fits, or n_ctx=(\d+), type_k='q8_0', type_v='q8_0'\n",
    )
    assert 1024 <= small < large
    runs(1500, f"n_ctx={large}, razor=False, type_k='q8_0', type_v='q8_0'")


@pytest.mark.parametrize(
    ("n_mib", "options"),
    [
        (550, KV),  # the KV cache, or the buffers after it, cannot be allocated
        (590, KV),
        (700, f"{KV}, n_batch=8192, n_ubatch=8192"),  # the compute buffers cannot
        (800, f"{KV}, logits_all=True"),  # the arrays of the bindings cannot
    ],
)
def test_an_allocation_that_fails(n_mib, options):
    done = limited(n_mib, f"Llama(MODEL, {options})")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 1
    small, large = fitting(
        done.stdout.rpartition("; ")[2],
        r"n_ctx=(\d+) fits, or n_ctx=(\d+), type_k='q8_0', type_v='q8_0'\n",
    )
    assert 1024 <= small < large <= 98304
    others = options.partition(",")[2]
    runs(n_mib, f"n_ctx={small},{others}")
    runs(n_mib, f"n_ctx={large}, type_k='q8_0', type_v='q8_0',{others}")


def test_the_command_line_names_its_options():
    done = limited(1500, "main(['chat', MODEL, '-c', '1048576', '--no-razor'])")
    assert done.returncode == 1 and done.stdout == ""
    fitting(
        done.stderr.splitlines()[-1].rpartition("; ")[2],
        r"with 1 GiB to spare, -c (\d+) fits, or -c (\d+) -ctk q8_0 -ctv q8_0",
    )


def test_where_not_even_planning_is_possible():
    done = limited(20, "Llama(MODEL, n_ctx=8192)")
    assert done.returncode == 0 and done.stdout.endswith(
        "; use a smaller n_ctx, or type_k='q8_0', type_v='q8_0'\n"
    )


def test_other_types_and_models_for_which_nothing_fits(monkeypatch):
    def refused(n_free: int, **options: object) -> str:
        monkeypatch.setattr(llama_options, "available_ram", lambda: 0)
        monkeypatch.setattr("psutil.swap_memory", lambda: type("Swap", (), {"free": 0}))
        monkeypatch.setattr("razor_local.available_memory.available_ram", lambda *_: n_free)
        with pytest.raises(MemoryFullError) as caught:
            Llama(DEFAULT_MODEL, n_ctx=8192, razor=False, **options)
        return str(caught.value).rpartition("free; ")[2]

    two = refused(30 << 20, type_k="q8_0", type_v="q8_0")
    assert re.fullmatch(r"(n_ctx=\d+, type_k='(q\d_0)', type_v='\2'( fits, or )?){2}", two)
    # a quantized V cache needs flash attention
    assert re.fullmatch(r"n_ctx=\d+ fits", refused(30 << 20, flash_attn=False))
    assert "even a context of 256 tokens needs" in refused(1 << 20)
