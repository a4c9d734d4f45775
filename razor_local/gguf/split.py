"""Find and read the files of models that llama-gguf-split has split.

NAME-00001-of-00003.gguf holds the metadata and usually tensors. The other files hold only tensors
and the keys split.no (u16, from 0) and split.count (u16). llama.cpp opens the first file and finds
the others by their names.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import GGUFError
from .header import I32, MAX_TENSORS, U16, Header, read_header

KEY_NO = "split.no"
KEY_COUNT = "split.count"
KEY_TENSORS = "split.tensors.count"
MAX_PARTS = 1024  # llama.cpp's names allow 99999; the largest models have a few hundred


def part_paths(first: Path, n: int) -> tuple[Path, ...]:
    """Return the paths of the n files of a split model, from the name of the first.

    A name without -00001-of-0000N gets one. With n = 1 the only path is first.
    """
    if n == 1:
        return (first,)
    suffix = f"-00001-of-{n:05}.gguf"
    name = first.name
    prefix = name.removesuffix(suffix) if name.endswith(suffix) else name.removesuffix(".gguf")
    return tuple(first.with_name(f"{prefix}-{i + 1:05}-of-{n:05}.gguf") for i in range(n))


def read_parts(header: Header) -> tuple[Header, ...]:
    """Return the headers of all files of a model, from the header of its first or only file.

    Raises GGUFError if header is not that of the first file, or if a file is missing or does not
    belong to the others; OSError.
    """

    def bad(text: str) -> GGUFError:
        return GGUFError(f"{header.path}: {text}")

    n = int(header.number(KEY_COUNT, (U16,)) or 1)
    if n == 1:
        return (header,)
    if n > MAX_PARTS:
        raise bad(f"is one of {n} files of a split model, expected at most {MAX_PARTS}")
    no = header.number(KEY_NO, (U16,))
    name = header.path.name
    if no:
        first = re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", r"-00001\1", name)
        raise bad(f"is file {no + 1} of {n} of a split model; pass the first one, {first}")
    if no is None:
        raise bad(f"has {KEY_COUNT} but no {KEY_NO}; split the model again")
    if not name.endswith(f"-00001-of-{n:05}.gguf"):
        raise bad(
            f"is the first of {n} files of a split model, so its name must end in"
            f" -00001-of-{n:05}.gguf; rename the files"
        )
    paths = part_paths(header.path, n)
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise bad(
            f"is the first of {n} files of a split model, but {', '.join(missing[:5])}{more}"
            f" {'is' if len(missing) == 1 else 'are'} missing beside it; download all files"
        )
    parts, n_tensors, names = [header], len(header.tensors), {t.name for t in header.tensors}
    for i, path in enumerate(paths[1:], 1):
        part = read_header(path)
        found = (part.number(KEY_NO, (U16,)), part.number(KEY_COUNT, (U16,)))
        if found != (i, n):
            raise GGUFError(
                f"{path}: expected file {i + 1} of {n} of a split model, but its keys {KEY_NO} and"
                f" {KEY_COUNT} are {found[0]} and {found[1]}; it belongs to another model"
            )
        parts.append(part)
        n_tensors += len(part.tensors)
        names |= {tensor.name for tensor in part.tensors}
        if n_tensors > MAX_TENSORS:
            raise bad(f"its files hold more than {MAX_TENSORS} tensors")
    if len(names) != n_tensors:
        raise bad("two of its files hold the same tensor; they belong to different models")
    claimed = header.number(KEY_TENSORS, (I32, U16))
    if claimed is not None and claimed != n_tensors:
        raise bad(
            f"its {n} files hold {n_tensors} tensors, but {KEY_TENSORS} is {claimed}; they belong"
            " to different models"
        )
    return tuple(parts)
