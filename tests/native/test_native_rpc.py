"""Layers on RPC servers: two servers on this machine compute what it computes alone."""

from __future__ import annotations

import re
import time
from contextlib import closing

import numpy as np
import pytest

from razor_local import Llama, RazorError
from razor_local.model_setup import DEFAULT_MODEL
from razor_local.native import rpc
from razor_local.native.loaded import library
from tests.support.rpc import RpcServer, answer
from tests.support.texts import FACT, text_with

pytestmark = pytest.mark.skipif(not rpc.is_supported(), reason="a build with RAZOR_RPC=OFF")

N_CTX = 2048


@pytest.fixture
def upstream_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute locally with the operations that servers compute with."""
    monkeypatch.setenv("RAZOR_LOCAL_CPU_ATTENTION", "off")


def all_logits(n: int = 1500, **options: object) -> np.ndarray:
    """Return the logits after each token of a text, through several folds."""
    with closing(Llama(DEFAULT_MODEL, n_ctx=N_CTX, n_threads=2, **options)) as llama:
        tokens = llama.tokenize(text_with(FACT, 2 * n).encode(), add_bos=False)[:n]
        logits = np.concatenate([rows.copy() for rows in llama.eval_logits(tokens)])
        assert not llama.memory().active or llama.stats().n_folded > 0
    return logits


@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
def test_servers_compute_the_same_logits(addresses: str, upstream_attention: None, kv: str) -> None:
    types = {"type_k": kv, "type_v": kv}
    want = all_logits(**types)
    got = all_logits(rpc_servers=addresses, **types)
    assert np.array_equal(got, want)


def test_full_caches_on_servers(addresses: str) -> None:
    want = all_logits(300, razor=False)
    got = all_logits(300, razor=False, rpc_servers=addresses)
    assert np.array_equal(got, want)


def test_some_layers_stay_on_this_machine(addresses: str, upstream_attention: None) -> None:
    want = all_logits()
    got = all_logits(rpc_servers=addresses, n_gpu_layers=3)
    assert np.array_equal(got, want)


def test_local_layers_keep_razors_attention(addresses: str) -> None:
    with closing(Llama(DEFAULT_MODEL, n_ctx=N_CTX)) as llama:
        want = answer(llama)
    for options in ({"n_gpu_layers": 3}, {"offload_kqv": False}):
        llama = Llama(DEFAULT_MODEL, n_ctx=N_CTX, rpc_servers=addresses, **options)
        with closing(llama):
            assert llama.memory().own_attention
            assert not llama.memory().device_attention
            assert answer(llama) == want


def test_the_cache_of_layers_on_servers_is_there(addresses: str) -> None:
    with closing(Llama(DEFAULT_MODEL, n_ctx=N_CTX)) as llama:
        here = llama.memory()
    with closing(Llama(DEFAULT_MODEL, n_ctx=N_CTX, rpc_servers=addresses)) as llama:
        there = llama.memory()
        places = library.memory(llama.ctx)
    remote = [place for place in places if re.match(rb"RPC0\[127", place.name)]
    assert there.kv_bytes == here.kv_bytes == sum(place.cache for place in remote)
    assert len(remote) == len(there.devices) == 2
    assert all(place.cache > 0 and place.weights > 0 and not place.is_host for place in remote)
    assert sum(place.cache for place in places if place.is_host) == 0
    assert (here.devices, here.rewind, there.rewind) == ((), "disk", "off")


def test_a_lost_server_is_reported() -> None:
    with RpcServer() as server, closing(Llama(DEFAULT_MODEL, n_ctx=N_CTX)) as other:
        want = answer(other)
        llama = Llama(DEFAULT_MODEL, n_ctx=N_CTX, rpc_servers=server.address)
        stream = llama.create_completion("The", max_tokens=1000, temperature=0, stream=True)
        next(stream)
        server.kill()
        start = time.monotonic()
        sentence = f"the connection to the RPC server {server.address} was lost"
        with pytest.raises(RazorError, match=sentence):
            list(stream)
        for use in (llama.save_state, lambda: answer(llama), lambda: llama.eval([1])):
            with pytest.raises(RazorError, match=sentence):
                use()
        assert time.monotonic() - start < 10
        assert answer(other) == want
        with pytest.raises(RazorError, match="first close the models that used it"):
            Llama(DEFAULT_MODEL, n_ctx=N_CTX, rpc_servers=server.address)
        llama.close()
        with RpcServer(int(server.address.split(":")[1])):
            with closing(Llama(DEFAULT_MODEL, n_ctx=N_CTX, rpc_servers=server.address)) as llama:
                assert answer(llama) == want
