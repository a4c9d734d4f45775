"""What the code that loads the library loads besides (else see unit/test_imports.py)."""

from __future__ import annotations

import pytest

from razor_local.cli.params import DEFAULT_MODEL
from tests.support.loaded import CALL, slow_packages

LLAMA = "from razor_local import Llama"
RUN = f"{LLAMA}\nnext(Llama({str(DEFAULT_MODEL)!r}).create_completion('a', stream=True))"
CHAT = f"""from razor_local import Chat, Llama, Sampling
list(Chat(Llama({str(DEFAULT_MODEL)!r}), max_tokens=4, sampling=Sampling(temp=0)).say('Hi'))"""
NATIVE = {"numpy", "llama_cpp", "jinja2"}
CASES = {  # code, and what of SLOW it may load
    "import Llama": (LLAMA, NATIVE),
    "run Llama": (RUN, NATIVE),
    "chat": (CHAT, NATIVE),
    "fit": (CALL.format(["fit", str(DEFAULT_MODEL)]), {"rich", *NATIVE}),
}


@pytest.mark.parametrize(("code", "allowed"), CASES.values(), ids=CASES)
def test_slow_packages_are_loaded_where_they_are_used(code, allowed, tmp_path) -> None:
    assert slow_packages(code, tmp_path) <= allowed
