"""A pytest plugin with which upstream_tests.py runs llama-cpp-python's own tests offline.

UPSTREAM_MODELS: folders (separated by os.pathsep) with the files that the tests would download. A
test whose file is missing is skipped with its name. UPSTREAM_PATCHED: 1 if the patched library must
be loaded, 0 for the stock one. UPSTREAM_RAZOR=1: replace llama_cpp's Llama by razor_local's.
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
n_active = 0  # contexts in which razor was active


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
        """A Llama whose context is long enough for razor: the tests ask for 32 or 64 tokens."""

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
