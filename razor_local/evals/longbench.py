"""LongBench (Bai et al., 2023, arXiv 2308.14508) on the user's files.

A data set is a file NAME.jsonl, or NAME_e.jsonl for LongBench-E. Each line is an object with
context, input, answers and, for classification, all_classes. The metrics are those of LongBench,
with libraries where possible (rouge-score, rapidfuzz, jieba for Chinese). The prompts differ from
LongBench's, with one for each kind of task. Compare the scores with each other, not with published
ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from ..common.inputs import open_input
from ..common.progress import Progress, silent
from ..errors import RazorError, UnsupportedError
from .questions import Prompts, Question, Sample, message

MAX_LINE = 64 << 20  # bytes; the longest of LongBench has about 2 MB
N_CUT = 20  # attempts to cut a context to a length


@dataclass(frozen=True)
class DataSet:
    """The prompt and the metric of a data set.

    Attributes:
        text, question: the prompt, with {context} and {input}.
        metric: one of METRICS.
        max_tokens: maximum tokens of an answer.
        raw: whether the model continues the prompt directly, without a chat template. LongBench
            does this for examples and code.
        first_line: whether only the first line of an answer counts.
    """

    text: str
    question: str
    metric: str
    max_tokens: int
    raw: bool = False
    first_line: bool = False


CONTEXT = "{context}"
QA = (
    "Answer the question from the text above with as few words as possible, without an explanation."
    "\n\nQuestion: {input}\nAnswer:"
)
QA_OPEN = (
    "Answer the question from the article above with a few words or one sentence. Write"
    ' "unanswerable" if the article does not answer it, and "yes" or "no" if that is the answer.'
    "\n\nQuestion: {input}\nAnswer:"
)
QA_ZH = "请根据以上文字简短地回答问题，不要解释。\n\n问题：{input}\n回答："
SUMMARY = "Write a summary of the text above, at most a page long.\n\nSummary:"
ABSTRACT = (
    "This is a summary of one of the paragraphs above:\n\n{input}\n\nWhich paragraph is it? Answer"
    ' with its name alone, such as "Paragraph 1".\n\nAnswer:'
)

DATA_SETS = {
    "narrativeqa": DataSet(CONTEXT, QA, "f1", 128),
    "qasper": DataSet(CONTEXT, QA_OPEN, "f1", 128),
    "multifieldqa_en": DataSet(CONTEXT, QA, "f1", 64),
    "multifieldqa_zh": DataSet(CONTEXT, QA_ZH, "f1_zh", 64),
    "hotpotqa": DataSet(CONTEXT, QA, "f1", 32),
    "2wikimqa": DataSet(CONTEXT, QA, "f1", 32),
    "musique": DataSet(CONTEXT, QA, "f1", 32),
    "dureader": DataSet(CONTEXT, QA_ZH, "rouge_zh", 128),
    "gov_report": DataSet(CONTEXT, SUMMARY, "rouge", 512),
    "qmsum": DataSet(
        CONTEXT,
        "Answer the query about the meeting above in one or a few sentences.\n\nQuery: {input}"
        "\nAnswer:",
        "rouge",
        512,
    ),
    "multi_news": DataSet(CONTEXT, SUMMARY, "rouge", 512),
    "vcsum": DataSet(CONTEXT, "请总结以上会议记录的内容。\n\n总结：", "rouge_zh", 512),
    "trec": DataSet(
        "Say of which type the last question is. Examples:\n\n{context}",
        "{input}", "classes", 64, raw=True, first_line=True,
    ),
    "triviaqa": DataSet(
        "Answer the last question from its passage, with the answer alone. Examples:\n\n{context}",
        "{input}", "f1", 32, raw=True, first_line=True,
    ),
    "samsum": DataSet(
        "Summarize the last dialogue in a few short sentences. Examples:\n\n{context}",
        "{input}", "rouge", 128, raw=True, first_line=True,
    ),
    "lsht": DataSet(
        "请判断最后一则新闻的类别。例子：\n\n{context}", "{input}", "classes", 64,
        raw=True, first_line=True,
    ),
    "passage_count": DataSet(
        CONTEXT,
        "Some of the paragraphs above are the same. How many different paragraphs are there? Answer"
        " with the number alone.\n\nAnswer:",
        "count",
        32,
    ),
    "passage_retrieval_en": DataSet(CONTEXT, ABSTRACT, "retrieval", 32),
    "passage_retrieval_zh": DataSet(
        CONTEXT,
        "以下是其中一段的摘要：\n\n{input}\n\n这是哪一段的摘要？请只回答段落名，例如“段落1”。\n\n回答：",
        "retrieval",
        32,
    ),
    "lcc": DataSet("Write the next line of this code.\n{context}", "", "code", 64, raw=True),
    "repobench-p": DataSet(
        "Write the next line of this code.\n{context}", "{input}", "code", 64, raw=True
    ),
}  # fmt: skip


class LongBench:
    """The samples of a folder of files.

    Args:
        folder: the folder.
        prompts: the model's tokenizer and template.
        n_ctx: tokens of the context.
        names: data sets to read, by default all known files.
        n_samples: maximum samples per data set, drawn at random.
        cut: whether to cut the middle out of contexts that do not fit, as LongBench does, instead
            of leaving the sample out.
        seed: seed of the choice of samples.
        progress: called with the progress.

    Attributes:
        samples: the samples that fit.
        left_out: number of samples that do not fit n_ctx, by data set.
        n_cut: number of samples that were cut, by data set.

    Raises:
        RazorError: a file is damaged, there is no file, or a library is missing.
        OSError: a file cannot be read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        prompts: Prompts,
        n_ctx: int,
        *,
        names: Sequence[str] | None = None,
        n_samples: int | None = None,
        cut: bool = False,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        files = _find_files(Path(folder), names)
        for name in files:
            check_libraries(name)
        self.samples: list[Sample] = []
        self.left_out: dict[str, int] = {}
        self.n_cut: dict[str, int] = {}
        self._classes: dict[tuple[str, int], list[str]] = {}
        digest = hashlib.sha256()
        items = [
            (name, index, item)
            for name, file in files.items()
            for index, item in _chosen(_read(file, digest), n_samples, f"{seed}/{name}")
        ]
        report = progress or silent
        for done, (name, index, item) in enumerate(items):
            report(done, len(items), "writing the texts")
            self._add(prompts, n_ctx, cut, name, index, item)
        self.names = list(files)
        self.digest = digest.hexdigest()[:16]
        if not self.samples:
            raise RazorError(
                f"no sample in {folder} fits a context of {n_ctx:,} tokens; use a larger -c, or"
                " --cut-middle"
            )

    def score(self, sample: Sample, answers: Sequence[str]) -> float:
        """Return the best score of the answer over all expected ones, from 0 to 1."""
        data_set = DATA_SETS[_base(sample.task)]
        answer = answers[0]
        if data_set.first_line:
            answer = answer.lstrip("\n").split("\n")[0]
        metric = METRICS[data_set.metric]
        classes = self._classes[sample.task, sample.index]
        return max(metric(answer, right, classes) for right in sample.questions[0].answers)

    def _add(
        self, prompts: Prompts, n_ctx: int, cut: bool, name: str, index: int, item: dict[str, Any]
    ) -> None:
        data_set = DATA_SETS[_base(name)]
        n_tokens = n_ctx - data_set.max_tokens
        question = data_set.question.replace("{input}", item["input"])

        def text(context: str) -> str:
            return data_set.text.replace(CONTEXT, context)

        def size(context: str) -> int:
            content = message(text(context), question)
            return prompts.n_raw(content) if data_set.raw else prompts.n_prompt(content)

        context, n_prompt = item["context"], size(item["context"])
        if n_prompt > n_tokens and cut:
            context, n_prompt = _cut_middle(prompts, context, size, n_tokens)
            self.n_cut[name] = self.n_cut.get(name, 0) + 1
        if n_prompt > n_tokens:
            self.left_out[name] = self.left_out.get(name, 0) + 1
            return
        self._classes[name, index] = item.get("all_classes") or []
        self.samples.append(
            Sample(
                task=name,
                length=n_ctx,
                depth=None,
                index=index,
                text=text(context),
                questions=(Question(question, tuple(item["answers"])),),
                max_tokens=data_set.max_tokens,
                n_prompt=n_prompt,
                raw=data_set.raw,
            )
        )


def _base(name: str) -> str:
    return name.removesuffix("_e") if name not in DATA_SETS else name


def _find_files(folder: Path, names: Sequence[str] | None) -> dict[str, Path]:
    if not folder.is_dir():
        raise RazorError(f"{folder} is not a folder, expected one with LongBench's .jsonl files")
    found = {
        file.stem: file for file in sorted(folder.glob("*.jsonl")) if _base(file.stem) in DATA_SETS
    }
    for name in names or ():
        if _base(name) not in DATA_SETS:
            raise RazorError(f"{name!r} is not a data set of LongBench: {', '.join(DATA_SETS)}")
        if name not in found:
            raise RazorError(f"{folder} has no {name}.jsonl")
    if not found:
        raise RazorError(f"{folder} has no file of LongBench, such as hotpotqa.jsonl")
    return {name: found[name] for name in names or found}


def _read(file: Path, digest: Any) -> list[dict[str, Any]]:
    items = []
    with open_input(file, "a text file") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE), b""), 1):
            digest.update(line)
            if not line.strip():
                continue
            try:
                item = json.loads(line)
                json.dumps(item, ensure_ascii=False).encode()  # lone surrogates cannot be encoded
                good = (
                    isinstance(item["context"], str)
                    and isinstance(item["input"], str)
                    and isinstance(item["answers"], list)
                    and len(item["answers"]) > 0
                    and all(isinstance(text, str) for text in item["answers"])
                    and isinstance(item.get("all_classes") or [], list)
                    and all(isinstance(text, str) for text in item.get("all_classes") or [])
                )
            except UnicodeEncodeError as error:
                raise RazorError(
                    f"{file}, line {number}: expected valid Unicode, found a lone surrogate"
                    f" ({error.object[error.start]!a}); correct the text"
                ) from None
            except (ValueError, LookupError, TypeError, RecursionError):
                good = False
            if not good:
                raise RazorError(
                    f"{file}, line {number}: expected an object with the texts context and input"
                    " and lists of texts as answers and, if there are any, as all_classes"
                )
            items.append(item)
    return items


def _chosen(
    items: list[dict[str, Any]], n_samples: int | None, seed: str
) -> list[tuple[int, dict[str, Any]]]:
    """Choose at most n_samples with their indices in the file, in its order."""
    indices: Sequence[int] = range(len(items))
    if n_samples is not None and n_samples < len(items):
        indices = sorted(Random(seed).sample(indices, n_samples))
    return [(i, items[i]) for i in indices]


def _cut_middle(
    prompts: Prompts, context: str, size: Callable[[str], int], n_tokens: int
) -> tuple[str, int]:
    """Keep the longest start and end, of the same number of tokens, that fit n_tokens."""
    tokens = prompts.model.tokenize(context.encode(), add_bos=False, special=False)
    keep = len(tokens)
    for _ in range(N_CUT):
        text = (
            context
            if keep >= len(tokens)
            else "".join(
                prompts.model.detokenize(part).decode("utf-8", "ignore")
                for part in (tokens[: keep // 2], tokens[len(tokens) - keep // 2 :])
            )
        )
        found = size(text)
        if found <= n_tokens or keep == 0:
            return text, found
        keep = max(keep - (found - n_tokens), 0)
    return text, found


# -- metrics: (answer, right answer, classes) -> 0 to 1


def check_libraries(name: str) -> None:
    """Raise UnsupportedError if a library for the data set's metric is missing."""
    metric = DATA_SETS[_base(name)].metric
    for module, package in LIBRARIES.get(metric, ()):
        if find_spec(module) is None:
            raise UnsupportedError(
                f"the metric of {name} needs {package}, which is not installed; install it with"
                " 'pip install razor-local[eval]', or name other data sets with --datasets"
            )


def _normalized(text: str) -> str:
    """Normalize a text like SQuAD: drop case, punctuation, articles and double spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _f1_of(found: list[str], expected: list[str]) -> float:
    same = sum((Counter(found) & Counter(expected)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(found), same / len(expected)
    return 2 * precision * recall / (precision + recall)


def f1(answer: str, right: str, classes: Sequence[str]) -> float:
    """F1 of the words."""
    return _f1_of(_normalized(answer).split(), _normalized(right).split())


def _cut_words(text: str) -> list[str]:
    import jieba

    jieba.setLogLevel("WARNING")  # do not log that the dictionary is loaded
    return [word for word in jieba.cut(text, cut_all=False) if word.strip()]


def f1_zh(answer: str, right: str, classes: Sequence[str]) -> float:
    """F1 of the Chinese words, without punctuation."""

    def words(text: str) -> list[str]:
        found = (re.sub(r"[\W_]+", "", word.lower()) for word in _cut_words(text))
        return [word for word in found if word]

    return _f1_of(words(answer), words(right))


@cache
def _rouge_scorer(tokenizer: Any = None) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=tokenizer)


class _Words:
    """A tokenizer of rouge-score that splits at spaces."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


_SPACES = _Words()


def rouge(answer: str, right: str, classes: Sequence[str]) -> float:
    """F-measure of ROUGE-L."""
    return float(_rouge_scorer().score(right, answer)["rougeL"].fmeasure)


def rouge_zh(answer: str, right: str, classes: Sequence[str]) -> float:
    """F-measure of ROUGE-L over Chinese words."""
    texts = (" ".join(_cut_words(text)) for text in (right, answer))
    return float(_rouge_scorer(_SPACES).score(*texts)["rougeL"].fmeasure)


def classes_named(answer: str, right: str, classes: Sequence[str]) -> float:
    """1 / number of classes that the answer names, or 0 if the right one is not among them.

    A class whose name is part of the right one's name does not count.
    """
    named = [name for name in classes if name in answer]
    named = [name for name in named if name == right or name not in right]
    return 1 / len(named) if right in named else 0.0


def _share_of_numbers(answer: str, right: str) -> float:
    numbers = re.findall(r"\d+", answer)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def count_named(answer: str, right: str, classes: Sequence[str]) -> float:
    """The share of the numbers in the answer that are the right one."""
    return _share_of_numbers(answer, right)


def paragraph_named(answer: str, right: str, classes: Sequence[str]) -> float:
    """The share of the numbers in the answer that name the right paragraph ("Paragraph 3")."""
    return _share_of_numbers(answer, "".join(re.findall(r"\d+", right)[:1]))


def code(answer: str, right: str, classes: Sequence[str]) -> float:
    """Edit similarity of the first line that is not a comment or the fence of a code block."""
    from rapidfuzz.fuzz import ratio

    lines = answer.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return ratio(line, right) / 100


METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "f1": f1,
    "f1_zh": f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "classes": classes_named,
    "count": count_named,
    "retrieval": paragraph_named,
    "code": code,
}
LIBRARIES = {
    "f1_zh": [("jieba", "jieba")],
    "rouge": [("rouge_score", "rouge-score")],
    "rouge_zh": [("jieba", "jieba"), ("rouge_score", "rouge-score")],
    "code": [("rapidfuzz", "rapidfuzz")],
}
