"""The adapter for lm-evaluation-harness, on tasks of a folder; skipped where that is not."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from razor_local.errors import UnsupportedError
from razor_local.evals.lm_eval import RazorLM
from tests.support.texts import FACT, text_with

TEXT = text_with(FACT)
OPTIONS = dict(n_ctx=2048, n_threads=1, window_min=128, window_divisor=0)
TASKS = {
    "code_choice": """
task: code_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}\\n\\nWhat is the secret code of {{name}}?"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "code_answer": """
task: code_answer
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}\\n\\nWhat is the secret code of {{name}}?"
doc_to_target: "The secret code of {{name}} is {{choices[label]}}"
generation_kwargs: {until: ["."], max_gen_toks: 40}
metric_list: [{metric: exact_match}]
""",
    "code_text": """
task: code_text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    docs = [
        {
            "text": TEXT.replace("Marlow", name).replace("48213", code),
            "name": name,
            "choices": [code, "11111", "99999"],
            "label": 0,
        }
        for name, code in (("Marlow", "48213"), ("Ingrid", "70916"))
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("DATA", json.dumps(str(data))))
    return folder


@pytest.fixture(scope="module")
def razor():
    return RazorLM(policy="razor-f16", **OPTIONS)


def request(*args):
    return SimpleNamespace(args=args)


def test_log_likelihoods_are_those_of_the_logits(razor) -> None:
    context, continuation = "It was a fine", " day and we went out"
    ((total, greedy),) = razor.loglikelihood([request(context, continuation)], disable_tqdm=True)
    tokens = razor.tok_encode(context + continuation)
    n = len(tokens) - len(razor.tok_encode(context))
    razor.llama.reset()
    rows = np.concatenate([rows.copy() for rows in razor.llama.eval_logits(tokens)])
    rows = rows.astype(np.float64)
    expected = 0.0
    for row, token in zip(rows[-n - 1 : -1], tokens[-n:], strict=True):
        expected += row[token] - row.max() - np.log(np.exp(row - row.max()).sum())
    assert total == pytest.approx(expected, abs=1e-3) and not greedy
    best = razor.llama.piece(int(rows[-1].argmax())).decode()
    whole = context + continuation
    ((_, greedy),) = razor.loglikelihood([request(whole, best)], disable_tqdm=True)
    assert greedy == (razor.tok_encode(whole + best)[:-1] == tokens)


def test_the_likelihood_of_a_text_is_the_sum_of_its_parts(razor) -> None:
    (total,) = razor.loglikelihood_rolling([request("It was a fine day.")], disable_tqdm=True)
    ((first, _),) = razor.loglikelihood([request("", "It was a fine day.")], disable_tqdm=True)
    assert total == pytest.approx(first, abs=1e-3)
    long = "It was a fine day. " * 500  # several contexts
    (total,) = razor.loglikelihood_rolling([request(long)], disable_tqdm=True)
    assert np.isfinite(total) and total < -100


def test_answers_end_where_they_are_told_to(razor) -> None:
    question = f"{TEXT}\n\nWhat is the secret code of Marlow?"
    prompt = razor.apply_chat_template([{"role": "user", "content": question}])

    def ask(**options):
        return razor.generate_until([request(prompt, options)], disable_tqdm=True)[0]

    assert ask(until=["."]) == "The secret code of Marlow is 48213"
    assert ask(until=["48", "code"]) == "The secret "
    assert ask() == "The secret code of Marlow is 48213."
    assert len(razor.tok_encode(ask(max_gen_toks=3), add_special_tokens=False)) == 3
    started = razor.apply_chat_template(
        [{"role": "user", "content": question}, {"role": "assistant", "content": "The secret"}],
        add_generation_prompt=False,
    )
    assert started == prompt + "The secret"
    with pytest.raises(UnsupportedError, match="leaves no room for the question"):
        ask(max_gen_toks=4096)


def test_a_task_of_the_harness_tells_razor_from_streaming(tasks, razor) -> None:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = {}
    for model in (razor, RazorLM(policy="streaming", **OPTIONS)):
        results = simple_evaluate(
            model,
            tasks=list(TASKS),
            task_manager=manager,
            apply_chat_template=True,
            bootstrap_iters=0,
        )["results"]
        found[model.get_model_info()["kv_bytes"]] = results
    streaming, whole = (found[n] for n in sorted(found))
    assert whole["code_answer"]["exact_match,none"] == 1
    assert streaming["code_answer"]["exact_match,none"] == 0
    assert whole["code_text"]["byte_perplexity,none"] > 1
    assert 0 <= whole["code_choice"]["acc,none"] <= 1


def test_the_command_line_of_the_harness_knows_the_model(tasks) -> None:
    args = "policy=razor-q8_0,n_ctx=2048,n_threads=1,window_min=128,window_divisor=0"
    done = subprocess.run(
        [sys.executable, "-m", "razor_local.evals.lm_eval", "--model", "razor", "--model_args",
         args, "--tasks", "code_answer", "--include_path", str(tasks), "--apply_chat_template"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|code_answer|" in done.stdout and "exact_match" in done.stdout
