"""pytest plugin under which upstream_tests.py runs llama-cpp-python's own tests, without a network.

UPSTREAM_MODELS: folders (os.pathsep between them) with the files the tests would download; a test
whose file is in none of them is skipped by that name. UPSTREAM_PATCHED: 1 or 0, which library has
to be loaded. UPSTREAM_RAZOR=1: the tests get razor_local's Llama in place of llama_cpp's.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RAZOR = os.environ["UPSTREAM_RAZOR"] == "1"
n_active = 0  # contexts in which local heads held less than every token


def hf_hub_download(repo_id: str, filename: str, **options: Any) -> str:
    name = Path(filename).name
    for folder in os.environ["UPSTREAM_MODELS"].split(os.pathsep):
        if (path := Path(folder) / name).is_file():
            return str(path)
    pytest.skip(f"needs {name} of {repo_id}")


hub = ModuleType("huggingface_hub")
hub.hf_hub_download = hf_hub_download
sys.modules["huggingface_hub"] = hub
if find_spec("scipy") is None:  # imported by the tests, used by none
    sys.modules["scipy"] = ModuleType("scipy")
    sys.modules["scipy.special"] = ModuleType("scipy.special")
    sys.modules["scipy.special"].log_softmax = None

if RAZOR:
    import razor_local  # before llama_cpp

    class Llama(razor_local.Llama):
        """With a context so long that razor saves something: the tests ask for 32 or 64 tokens."""

        def __init__(self, model_path: str, n_ctx: int = 512, **options: Any) -> None:
            global n_active
            super().__init__(model_path, n_ctx=max(n_ctx, 1024), **options)
            if not options.get("vocab_only"):
                n_active += self.memory().active


import llama_cpp  # noqa: E402

if RAZOR:
    llama_cpp.Llama = Llama


def pytest_sessionstart() -> None:
    patched = hasattr(llama_cpp.llama_cpp._lib, "llama_razor_build_info")
    if patched != (os.environ["UPSTREAM_PATCHED"] == "1"):
        pytest.exit(f"the loaded library is {'' if patched else 'not '}patched", returncode=3)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if RAZOR and n_active == 0:
        print("\nrazor was active in no context")
        session.exitstatus = 4
