"""The README's statements about commands, options and bytes are true."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from razor_local import ModelShape, Profile, make_plan, read_model_shape, read_profile
from razor_local.cli import main
from razor_local.cli.chat import DEFAULT_MODEL, chat

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_commands_exist():
    context = click.Context(main)
    named = set(re.findall(r"razor-local ([a-z]+(?:-[a-z]+)*)", README))
    assert {"chat", "convert", "inspect", "doctor"} <= named
    for name in named:
        assert main.get_command(context, name) is not None, name


def test_chat_options_exist():
    known = {option for parameter in chat.params for option in parameter.opts}
    (listed,) = re.findall(r"Options mean what they mean in llama.cpp: `([^`]+)`", README)
    assert len(listed.split()) > 10 and set(listed.split()) <= known


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
def test_bytes_of_the_built_in_model(kv_type):
    plan = make_plan(
        read_model_shape(DEFAULT_MODEL), read_profile(DEFAULT_MODEL), 8192, kv_type, kv_type
    )
    row = f"| {kv_type} | {plan.kv_bytes_full:,} | {plan.kv_bytes:,} | {plan.share * 100:.0f} % |"
    assert row in README


@pytest.mark.parametrize("n_ctx", [8192, 32768, 131072])
def test_bytes_of_an_8b_shape(n_ctx):
    shape = ModelShape("llama", 32, (32,) * 32, (8,) * 32, 128, 128, 131072)
    heads = [[0] * 8 for _ in range(32)]
    for i in range(38):
        heads[i % 32][i // 32] = 1
    plan = make_plan(shape, Profile(retrieval=tuple(heads)), n_ctx)
    full, ours = plan.kv_bytes_full / 2**20, plan.kv_bytes / 2**20
    assert f"| {n_ctx:,} | {full:,.0f} MiB | {ours:,.0f} MiB | {plan.share * 100:.0f} % |" in README
    assert not make_plan(shape, Profile(retrieval=tuple(heads)), 4608).active
    assert make_plan(shape, Profile(retrieval=tuple(heads)), 4609).active


def test_the_comparison_gives_a_reason_for_what_others_have():
    page = (Path(__file__).parents[2] / "docs/compare.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) > 20 and {len(row) for row in rows[1:]} == {7}
    for what, *others, ours in rows[1:]:
        if others.count("yes") >= 2:
            assert ours == "yes" or "#what-razor_local-lacks" in ours, what
    named, told = (
        set(re.findall(r"\[\^(\w+)\](?!:)", page)),
        set(re.findall(r"^\[\^(\w+)\]:", page, re.M)),
    )
    assert named == told
