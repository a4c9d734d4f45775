"""Make the llama.cpp source tree of the build: the pinned sdist's copy plus our patches.

    python native/unpack.py --sdist llama_cpp_python-X.tar.gz --tree DIR [--patch P]... PATH...

PATH names a file or folder of llama.cpp to unpack (none: all of it). After a run the tree holds
exactly those files, patched. A second run with the same arguments does nothing, a run with other
patches rewrites only the files whose content changes, so that nothing else is compiled again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from apply_patches import FilePatch, PatchError, apply_file_patch, parse_patch

STAMP = ".razor-unpacked.json"  # in the tree: what it was made from
_INSIDE = "/vendor/llama.cpp/"  # of llama.cpp in the sdist, after the sdist's own folder


def make_tree(sdist: Path, tree: Path, patches: list[Path], paths: list[str]) -> int:
    """Bring `tree` to the content of `sdist` plus `patches`, limited to `paths` (none: all).

    Returns the number of files written or removed. Raises PatchError if a patch does not fit or a
    patched file of the tree was edited by hand, OSError and tarfile.TarError if a file is
    unreadable.
    """
    key = _key(sdist, patches, paths)
    stamp = _read_stamp(tree)
    if not stamp and tree.is_dir() and any(tree.iterdir()):  # files not in the sdist are removed
        raise PatchError(f"{tree} holds files that were not unpacked into it: name an empty folder")
    for path, digest in stamp.get("patched", {}).items():
        file = tree / path
        if file.is_file() and _sha256(file.read_bytes()) != digest:
            raise PatchError(
                f"{file} was edited by hand: move the change into a patch in native/patches, then "
                "delete that file and build again"
            )
    if stamp.get("key") == key and all((tree / path).is_file() for path in stamp["patched"]):
        return 0

    by_path: dict[str, list[FilePatch]] = {}
    for file in patches:
        for part in parse_patch(file.read_bytes(), file.name):
            by_path.setdefault(part.path, []).append(part)

    # everything is read and patched before the first write: a patch that fails changes nothing
    wanted = dict(_members(sdist, paths))
    patched: dict[str, str] = {}
    for path, parts in by_path.items():
        if path not in wanted:
            if paths and not _selected(path, paths):
                continue  # of a part that is not unpacked, such as the tools
            raise PatchError(
                f"{parts[0].patch} does not apply: the pinned release has no file {path}, make the "
                "patch anew for it (native/README.md)"
            )
        for part in parts:
            wanted[path] = apply_file_patch(wanted[path], part)
        patched[path] = _sha256(wanted[path])

    changed = 0
    tree.mkdir(parents=True, exist_ok=True)
    (tree / STAMP).write_text('{"key": "unfinished"}')  # seen by the next run if this one stops
    for path, content in wanted.items():
        changed += _write(tree / path, content)
    for file in [f for f in tree.rglob("*") if f.is_file() and f.name != STAMP]:
        if file.relative_to(tree).as_posix() not in wanted:
            file.unlink()
            changed += 1
    (tree / STAMP).write_text(json.dumps({"key": key, "patched": patched}, indent=1))
    return changed


def _members(sdist: Path, paths: list[str]) -> Iterator[tuple[str, bytes]]:
    """Path below llama.cpp and content of each selected regular file of the sdist."""
    with tarfile.open(sdist, "r|*") as tar:
        for member in tar:
            head, _, path = member.name.partition(_INSIDE)
            if not path or "/" in head or not member.isfile() or ".." in path.split("/"):
                continue
            if not paths or _selected(path, paths):
                yield path, tar.extractfile(member).read()


def _selected(path: str, paths: list[str]) -> bool:
    return any(path == p or path.startswith(p + "/") for p in paths)


def _write(file: Path, content: bytes) -> bool:
    """Write unless the file has this content already, so that its time changes only with it."""
    if file.is_file() and file.stat().st_size == len(content) and file.read_bytes() == content:
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    temp = file.with_name(file.name + ".part")
    temp.write_bytes(content)
    os.replace(temp, file)
    return True


def _key(sdist: Path, patches: list[Path], paths: list[str]) -> str:
    """Digest of all that decides what the tree holds."""
    scripts = [Path(__file__), Path(__file__).with_name("apply_patches.py")]
    parts = [_sha256(f.read_bytes()) for f in [sdist, *patches, *scripts]] + paths
    return _sha256("\n".join(parts).encode())


def _read_stamp(tree: Path) -> dict:
    try:
        return json.loads((tree / STAMP).read_text())
    except (OSError, ValueError):
        return {}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, required=True)
    parser.add_argument("--tree", type=Path, required=True)
    parser.add_argument("--patch", type=Path, action="append", default=[], dest="patches")
    parser.add_argument("paths", nargs="*", metavar="PATH")
    args = parser.parse_args()
    try:
        changed = make_tree(args.sdist, args.tree, args.patches, args.paths)
    except PatchError as e:
        sys.exit(str(e))
    except (OSError, EOFError, tarfile.TarError) as e:
        sys.exit(f"cannot unpack {args.sdist} into {args.tree}: {e}")
    print(f"{changed} files changed" if changed else "nothing to do")


if __name__ == "__main__":
    main()
