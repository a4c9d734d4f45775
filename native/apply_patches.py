"""Apply unified diffs strictly: every context line must match at the very line the patch names.

Only what the build needs: patches as `git diff` or `git format-patch` write them, that change
existing files. New files belong in native/src, so a patch that adds, removes, renames or copies
files, or that holds binary data, is refused. There is no fuzz and no offset: a patch either is made
for these sources or has to be made anew. No dependency beyond Python, since users may have neither
git nor patch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_UNSUPPORTED = (b"rename ", b"copy ", b"new file ", b"deleted file ", b"GIT binary", b"Binary file")


class PatchError(Exception):
    """A patch is malformed or does not fit; the message is one sentence that says what to do."""


@dataclass
class Hunk:
    """A run of changed lines: `old` must stand at line `start` (1-based) and becomes `new`."""

    start: int
    old: list[bytes] = field(default_factory=list)
    new: list[bytes] = field(default_factory=list)


@dataclass
class FilePatch:
    """All hunks of one patch for one file; `path` is relative to the root of the tree, with /."""

    patch: str
    path: str
    hunks: list[Hunk] = field(default_factory=list)


def parse_patch(text: bytes, name: str) -> list[FilePatch]:
    """Read a patch file.

    `text` is its content, `name` is used in messages. Text outside of the hunks (commit message,
    `index` lines, mail signature) is skipped. Raises PatchError if the patch is malformed, empty,
    or does something other than to change lines of existing files.
    """
    lines = _split(text)
    files: list[FilePatch] = []
    i = 0
    in_diff = False
    while i < len(lines):
        line = lines[i]
        if line.startswith(b"diff --git "):
            in_diff = True
        if in_diff and line.startswith(_UNSUPPORTED):
            word = line.split()[0].decode()
            raise PatchError(
                f"{name} line {i + 1}: '{word} …' is not supported, a patch may only change lines "
                "of existing files (put new files into native/src)"
            )
        if line.startswith(b"--- ") and i + 1 < len(lines) and lines[i + 1].startswith(b"+++ "):
            files.append(FilePatch(name, _target(line, lines[i + 1], name, i + 1)))
            i += 2
            while i < len(lines) and lines[i].startswith(b"@@"):
                i = _read_hunk(lines, i, files[-1])
            if not files[-1].hunks:
                raise PatchError(f"{name} line {i}: no hunk follows, make the patch anew")
            continue
        if line.startswith(b"@@ -"):
            raise PatchError(
                f"{name} line {i + 1}: a hunk without '---' and '+++' lines, make the patch anew"
            )
        i += 1
    if not files:
        raise PatchError(f"{name} changes no file: make the patch anew or delete it")
    return files


def _target(minus: bytes, plus: bytes, name: str, lineno: int) -> str:
    """The path that a pair of '---' and '+++' lines names, without git's a/ and b/."""
    old, new = (x[4:].split(b"\t")[0].strip().decode() for x in (minus, plus))
    if "/dev/null" in (old, new):
        raise PatchError(
            f"{name} line {lineno}: a patch may not add or remove files (put new files into "
            "native/src)"
        )
    path = new[2:] if new.startswith("b/") else new
    if not old.endswith(path) or ".." in path.split("/") or path.startswith("/"):
        raise PatchError(
            f"{name} line {lineno}: expected 'a/PATH' and 'b/PATH' of one file, found '{old}' and "
            f"'{new}', make the patch with git diff"
        )
    return path


def _read_hunk(lines: list[bytes], i: int, target: FilePatch) -> int:
    """Read the hunk whose '@@' line is lines[i] into `target`; returns the index after it."""
    where = f"{target.patch} line {i + 1}"
    match = _HUNK.match(lines[i])
    if match is None:
        raise PatchError(f"{where}: malformed hunk header, make the patch anew")
    start, n_old, _, n_new = (1 if g is None else int(g) for g in match.groups())
    hunk = Hunk(start)
    i += 1
    while len(hunk.old) < n_old or len(hunk.new) < n_new:
        line = lines[i] if i < len(lines) else b""
        kind, rest = line[:1], line[1:]
        if line == b"\n":  # editors strip the blank of an empty context line
            kind, rest = b" ", line
        if kind == b"\\":
            _drop_newline(hunk, lines[i - 1][:1])
        elif kind in (b" ", b"-", b"+"):
            if kind != b"+":
                hunk.old.append(rest)
            if kind != b"-":
                hunk.new.append(rest)
        else:
            raise PatchError(
                f"{where}: the hunk ends after {len(hunk.old)} of {n_old} old and "
                f"{len(hunk.new)} of {n_new} new lines, make the patch anew"
            )
        i += 1
    if len(hunk.old) != n_old or len(hunk.new) != n_new:
        raise PatchError(f"{where}: the line counts of the hunk are wrong, make the patch anew")
    if i < len(lines) and lines[i].startswith(b"\\"):
        _drop_newline(hunk, lines[i - 1][:1])
        i += 1
    if not hunk.old:
        raise PatchError(f"{where}: a hunk without context, make the patch with git diff")
    target.hunks.append(hunk)
    return i


def _drop_newline(hunk: Hunk, kind: bytes) -> None:
    """Honour '\\ No newline at end of file' after a line of the given kind."""
    for side, kinds in ((hunk.old, b" -"), (hunk.new, b" +")):
        if kind in kinds and side:
            side[-1] = side[-1].removesuffix(b"\n")


def apply_file_patch(content: bytes, patch: FilePatch) -> bytes:
    """The content of a file after a patch. Raises PatchError where a line differs."""
    lines = _split(content)
    result: list[bytes] = []
    done = 0  # lines of the old file that are in result
    for n, hunk in enumerate(patch.hunks, 1):
        first = hunk.start - 1
        where = f"{patch.patch} does not apply: hunk {n} of {len(patch.hunks)} for {patch.path}"
        if first < done:
            raise PatchError(f"{where} overlaps the one before it, make the patch anew")
        for k, expected in enumerate(hunk.old):
            found = lines[first + k] if first + k < len(lines) else None
            if found != expected:
                raise PatchError(
                    f"{where} expects {_show(expected)} at line {first + k + 1}, the file has "
                    f"{_show(found)}: make the patch anew for the pinned release (native/README.md)"
                )
        result += lines[done:first] + hunk.new
        done = first + len(hunk.old)
    return b"".join(result + lines[done:])


def _split(content: bytes) -> list[bytes]:
    """Lines with their \\n: bytes.splitlines would also split at a lone \\r."""
    parts = content.split(b"\n")
    return [p + b"\n" for p in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def _show(line: bytes | None) -> str:
    if line is None:
        return "no more lines"
    return "'" + line.decode(errors="replace").rstrip("\r\n").strip()[:60] + "'"
