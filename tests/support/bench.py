"""Helpers of tests of benchmarks: a model, quick options, a report with known figures."""

from __future__ import annotations

import copy
from pathlib import Path

from razor_local.bench.figures import Report
from razor_local.bench.report import format_report
from tests.support.tiny_models import TinySpec, razor_kv

SPEC = TinySpec("llama", 3, 4, 2, 64, n_ctx_train=4096)
MASK = ((0, 0), (1, 0), (1, 1))
KV = razor_kv(MASK, window_min=100, window_divisor=0)
QUICK = ["-r", "3", "--seconds", "0.05", "-t", "2"]

HEAD = {
    "version": 1,
    "date": "2026-01-02 03:04:05 +0000",
    "code": {"version": "0.1.0", "commit": "0123456789ab"},
    "machine": {
        "cpu": "A CPU", "cores": 2, "memory_total": 24 << 30, "system": "Linux", "python": "3",
        "load_average": 0.5, "energy_meters": ["package-0"],
    },
    "model": {
        "file": "m.gguf", "name": "a shape, random weights", "arch": "llama",
        "random_weights": True, "fingerprint": "ab", "file_bytes": 9, "weights_bytes": 7 << 20,
        "n_layer": 2, "kv_heads": 20, "retrieval_kv_heads": 3, "retrieval_sha256": "cd",
        "window_min": 1000, "window_divisor": 5, "sink_tokens": 4,
    },
    "setup": {"n_threads": 2, "n_gpu_layers": 0, "full_cache": "the same library, razor off"},
    "settings": {"types": [["f16", "f16"], ["q8_0", "q4_0"]], "n_ctx": 0},
    "library": {
        "build": {"version": "1.2.3", "sha256": "ef", "options": "cpu"}, "cpu_features": "",
        "backends": ["CPU"], "devices": [{"name": "CPU", "description": "A CPU", "type": "CPU"}],
    },
}  # fmt: skip


def record(kind: str, depth: int, types=("f16", "f16"), side="", **fields) -> dict:
    n_ctx = 33280 if depth > 8192 else 8704
    return {
        "kind": kind,
        "type_k": types[0],
        "type_v": types[1],
        "n_ctx": n_ctx,
        "depth": depth,
        "side": side,
    } | fields


def both(razor: list[float], full: list[float], **others: list[float]) -> dict:
    return {"razor": razor, "full": full} | others


def make_report() -> Report:
    """Make a report of two types with known figures.

    Prefill takes 1 + depth/1000 ms per token with the full cache, and 1 + depth/4000 with razor.
    """
    records = []
    for types in (("f16", "f16"), ("q8_0", "q4_0")):
        more = {} if types == ("f16", "f16") else {"full_f16": [30.0, 33.0, 36.0]}
        for depth in (0, 512, 8192, 32768):
            records.append(
                record(
                    "decode",
                    depth,
                    types,
                    ms=both([10.0, 11.0, 12.0], [20.0, 33.0, 48.0], **more),
                    read_bytes=both(1, 2),
                    read_ms=both(5.0, 11.0),
                )
            )
        records.append(record("prompt", 512, types, tokens=512, ms=both([500.0], [750.0])))
        for depth in (0, 8192, 32768):
            middle = depth + 50
            ms = both([100 + middle / 40] * 2, [100 + middle / 10] * 2)
            records.append(record("prefill", depth, types, tokens=100, ms=ms))
        for n_ctx_of in (8192, 32768):
            for side, n in (("razor", 3 << 20), ("full", 6 << 20), ("full_f16", 12 << 20)):
                fields = {"kv_bytes": n, "peak_rss": n * 10, "device": None}
                records.append(record("memory", n_ctx_of, types, side, **fields))
        ms = {"razor": [10.0, 10.0, 14.0, 10.0, 20.0]}
        records.append(record("fold", 8192, types, start=1, ms=ms, folds_at=[2]))
        energy = {"razor": {"tokens": 4, "joules": 20.0, "seconds": 0.5}}
        records.append(record("energy", 8192, types, energy=energy))
    real = {
        "seconds": both(6.0, 12.0),
        "ms": both([10.0], [20.0]),
        "random_ms": both([11.0], [19.0]),
    }
    records.append(record("real_prefill", 4000, **real))
    return Report(copy.deepcopy(HEAD), records)


def saved(report: Report, path: Path) -> Path:
    path.write_text(format_report(report, "json"))
    return path
