"""Compare the speed of two builds of the library, in processes that take turns.

    python -m tests.tools.compare_builds FOLDER_A FOLDER_B [MODEL.gguf] [--rounds N] [--threads N]

Each folder contains libllama, as RAZOR_LOCAL_LIB does. Each round evaluates a prompt and decodes
tokens with A and with B, in one process each. The program prints the median ratio of the speeds
(B to A) and the middle half of the ratios. Without MODEL, it uses the built-in model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

RUN = """
import json, sys, time
from razor_local import Llama
n_threads = int(sys.argv[2]) or None
llama = Llama(sys.argv[1], n_ctx=2048, n_batch=512, n_threads=n_threads, n_threads_batch=n_threads)
tokens = [1 + i * 7919 % 1000 for i in range(1024)]
llama.eval(tokens[:64])
begin = time.perf_counter()
llama.eval(tokens[64:1024])
middle = time.perf_counter()
for token in tokens[:128]:
    llama.eval([token])
end = time.perf_counter()
print(json.dumps({"prompt": 960 / (middle - begin), "decode": 128 / (end - middle)}))
"""


def main() -> None:
    from razor_local.cli.chat import DEFAULT_MODEL

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs=2, type=Path)
    parser.add_argument("model", nargs="?", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0, help="0: one for each physical core")
    arguments = parser.parse_args()
    speeds: list[list[dict[str, float]]] = []
    for i in range(arguments.rounds):
        order = [0, 1] if i % 2 == 0 else [1, 0]
        found = {
            k: measure(arguments.folders[k], arguments.model, arguments.threads) for k in order
        }
        speeds.append([found[0], found[1]])
    for kind in ("prompt", "decode"):
        ratios = [b[kind] / a[kind] for a, b in speeds]
        a, b = (statistics.median(pair[k][kind] for pair in speeds) for k in (0, 1))
        low, _, high = statistics.quantiles(ratios, n=4)
        print(
            f"{kind}: A {a:.2f} tok/s, B {b:.2f} tok/s,"
            f" B/A {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"
        )


def measure(folder: Path, model: Path, n_threads: int) -> dict[str, float]:
    env = {**os.environ, "RAZOR_LOCAL_LIB": str(folder)}
    command = [sys.executable, "-c", RUN, str(model), str(n_threads)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
