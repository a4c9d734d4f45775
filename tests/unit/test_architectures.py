"""docs/architectures.md is what its program writes, and lists every architecture."""

from __future__ import annotations

import json

import pytest

from razor_local import layer_caches, model_shape
from tests.tools import architectures
from tests.tools.architectures import FAILS, PAGE, REFUSED, RESULTS, RUNS

FOUND = json.loads(RESULTS.read_text())


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == architectures.page(FOUND)


def test_every_architecture_of_the_pin_is_listed() -> None:
    try:
        names = architectures.architectures()
    except FileNotFoundError:
        pytest.skip("the pinned sdist is not on this machine")
    assert sorted(FOUND) == names


def test_nothing_fails() -> None:
    assert [arch for arch, found in FOUND.items() if found["result"] == FAILS] == []


def test_tables_of_architectures_have_no_unknown_name() -> None:
    named = {*layer_caches.SLIDING, *layer_caches.HYBRID, *model_shape.UNSUPPORTED_ARCHS}
    assert named <= set(FOUND)


@pytest.mark.parametrize("arch", sorted({*layer_caches.SLIDING, *layer_caches.HYBRID}))
def test_families_with_other_layers_run(arch: str) -> None:
    """step35 has no test model."""
    if arch != "step35":
        assert FOUND[arch]["result"] == RUNS


@pytest.mark.parametrize("arch", sorted(model_shape.UNSUPPORTED_ARCHS))
def test_refused_by_header_and_library(arch: str) -> None:
    assert FOUND[arch]["result"] in (REFUSED, architectures.UNTRIED)
