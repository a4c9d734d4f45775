"""Find the file of a repository that a quantization means, by the rules of llama.cpp.

The rules are those of common/download.cpp in the pinned release, so that a name means the same file
as with `llama-cli -hf`.
"""

from __future__ import annotations

import re

DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")
# projectors, importance matrices and draft heads, which a model may have beside it
_NOT_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.I)


def model_files(paths: list[str]) -> list[str]:
    """The paths of models: GGUF files, of a split model the first one."""

    def is_model(path: str) -> bool:
        name = path.rsplit("/", 1)[-1]
        split = _SPLIT.fullmatch(path)
        first = split is None or int(split[2]) == 1
        return path.endswith(".gguf") and first and not any(part in name for part in _NOT_MODELS)

    return [path for path in paths if is_model(path)]


def choose(paths: list[str], quant: str = "") -> list[str]:
    """The files of the model that quant (any case) names, the first of a split model first.

    Without a quant: Q4_K_M, or else Q8_0, or else the first model. [] if there is none, or a part
    of it is missing.
    """
    models = model_files(paths)
    for wanted in [quant] if quant else DEFAULT_QUANTS:
        pattern = re.compile(re.escape(wanted) + "[.-]", re.I)
        for path in models:
            if pattern.search(path):
                return split_parts(path, paths)
    return split_parts(models[0], paths) if models and not quant else []


def split_parts(first: str, paths: list[str]) -> list[str]:
    """All files of a model given its first one; [] if one is not among the paths."""
    split = _SPLIT.fullmatch(first)
    if split is None:
        return [first]
    count, ending = int(split[3]), first[len(split[1]) + len("-00001") :]
    parts = [f"{split[1]}-{i:05}{ending}" for i in range(1, count + 1)]
    return parts if set(parts) <= set(paths) else []


def quant_of(path: str) -> str:
    """The quantization in the name of a file such as Qwen3-8B-Q4_K_M.gguf; "" if there is none."""
    split = _SPLIT.fullmatch(path)
    stem = split[1] if split else path.removesuffix(".gguf")
    match = re.search(r"[-.]([A-Za-z0-9_]+)$", stem)
    return match[1].upper() if match else ""
