"""The build: patches, unpacking, errors of the configure step, incremental builds.

Most tests use a sdist of a few files made here, so that they need neither the network nor a
compiler run; the ones marked slow compile llama.cpp.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.native_build import pin

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "native"
sys.path.insert(0, str(NATIVE))

from apply_patches import PatchError, apply_file_patch, parse_patch  # noqa: E402
from unpack import make_tree  # noqa: E402

OLD = b"".join(b"line %d\n" % i for i in range(1, 31))
GOOD = b"""From 123 Mon Sep 17 00:00:00 2001
Subject: [PATCH] two hunks

diff --git a/src/a.txt b/src/a.txt
index 111..222 100644
--- a/src/a.txt
+++ b/src/a.txt
@@ -2,3 +2,4 @@ some function
 line 2
+added
 line 3
 line 4
@@ -20,3 +21,2 @@
 line 20
-line 21
 line 22
--
2.39.5
"""
NEW = OLD.replace(b"line 2\n", b"line 2\nadded\n", 1).replace(b"line 21\n", b"")


# the diff reader


def test_patch_applies() -> None:
    (patch,) = parse_patch(GOOD, "x.patch")
    assert (patch.path, len(patch.hunks)) == ("src/a.txt", 2)
    assert apply_file_patch(OLD, patch) == NEW


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"line 0\n" + OLD, "expects 'line 2' at line 2, the file has 'line 1'"),  # no offset
        (OLD.replace(b"line 3\n", b"line  3\n"), "the file has 'line  3'"),  # no fuzz
        (OLD.replace(b"line 22\n", b"line 22\r\n"), "expects 'line 22' at line 22"),
        (OLD[:14], "the file has no more lines"),
        (NEW, "expects 'line 3' at line 3"),  # twice
    ],
)
def test_patch_that_does_not_fit(content: bytes, says: str) -> None:
    (patch,) = parse_patch(GOOD, "x.patch")
    with pytest.raises(PatchError) as e:
        apply_file_patch(content, patch)
    assert says in str(e.value) and "x.patch does not apply" in str(e.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "changes no file"),
        (b"only words\n", "changes no file"),
        (GOOD[: GOOD.index(b"@@")], "no hunk follows"),
        (GOOD[: GOOD.index(b" line 4")], "the hunk ends after"),
        (GOOD.replace(b"@@ -2,3", b"@@ -2,2"), "line counts of the hunk are wrong"),
        (GOOD.replace(b"@@ -2,3", b"@@ -2,x"), "malformed hunk header"),
        (GOOD.replace(b"--- a/src/a.txt", b"--- /dev/null"), "may not add or remove files"),
        (GOOD.replace(b"index ", b"new file mode 100644\nindex "), "'new ' is not"),
        (GOOD.replace(b"index ", b"rename from x\nindex "), "'rename …' is not supported"),
        (GOOD.replace(b"a.txt\n+++ b/src/a", b"a.txt\n+++ b/src/b"), "of one file"),
        (GOOD.replace(b"/src/a.txt", b"/../a.txt"), "of one file"),
        (GOOD[GOOD.index(b"@@") :], "a hunk without '---' and '+++' lines"),
        (b"--- a/x\n+++ b/x\n@@ -1,0 +1,1 @@\n+new\n", "a hunk without context"),
    ],
)
def test_malformed_patch(text: bytes, says: str) -> None:
    with pytest.raises(PatchError) as e:
        parse_patch(text, "x.patch")
    assert says.replace("'new '", "'new …'") in str(e.value) and str(e.value).startswith("x.patch")


def lines_strategy() -> st.SearchStrategy[list[bytes]]:
    line = st.sampled_from(
        [b"", b"a", b"b", b" ", b"-", b"+", b"\\", b"--- a/x", b"@@ -1 +1 @@", b"\r"]
    )
    return st.lists(line, min_size=1, max_size=30)


@given(old=lines_strategy(), new=lines_strategy(), old_end=st.booleans(), new_end=st.booleans())
def test_patch_equals_difflib(
    old: list[bytes], new: list[bytes], old_end: bool, new_end: bool
) -> None:
    """Any diff that difflib makes gives the new file, with or without a last newline."""
    a, b = ([x + b"\n" for x in lines] for lines in (old, new))
    if not old_end:
        a[-1] = a[-1][:-1]
    if not new_end:
        b[-1] = b[-1][:-1]
    if b"".join(a) == b"".join(b) or b"" in a or b"" in b:
        return
    diff = b""
    for line in difflib.diff_bytes(difflib.unified_diff, a, b, b"a/x", b"b/x", n=40):
        diff += line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n"
    (patch,) = parse_patch(diff, "x.patch")
    assert apply_file_patch(b"".join(a), patch) == b"".join(b)


# unpacking


def make_sdist(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def sdist(tmp_path: Path) -> Path:
    """A sdist as llama-cpp-python's, with three small files of llama.cpp."""
    top = "llama_cpp_python-1.2.3/"
    return make_sdist(
        tmp_path / "llama_cpp_python-1.2.3.tar.gz",
        {
            f"{top}vendor/llama.cpp/src/a.txt": OLD,
            f"{top}vendor/llama.cpp/src/b.txt": b"b\n",
            f"{top}vendor/llama.cpp/tools/c.txt": b"c\n",
            f"{top}src/a.txt": b"not llama.cpp's\n",
        },
    )


def tree_of(folder: Path) -> dict[str, bytes]:
    files = (f for f in folder.rglob("*") if f.is_file() and not f.name.startswith("."))
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}


def age(folder: Path) -> None:
    """Set all file times to 1000 s after the epoch."""
    for file in folder.rglob("*"):
        if file.is_file():
            os.utime(file, (1000, 1000))


def changed_since_age(folder: Path) -> set[str]:
    return {f for f in tree_of(folder) if (folder / f).stat().st_mtime != 1000}


def test_unpack_is_idempotent(sdist: Path, tmp_path: Path) -> None:
    patch = tmp_path / "0001-x.patch"
    patch.write_bytes(GOOD)
    tree = tmp_path / "tree"
    assert make_tree(sdist, tree, [patch], ["src"]) == 2
    assert tree_of(tree) == {"src/a.txt": NEW, "src/b.txt": b"b\n"}
    age(tree)
    assert make_tree(sdist, tree, [patch], ["src"]) == 0
    assert changed_since_age(tree) == set()


def test_unpack_writes_what_changes(sdist: Path, tmp_path: Path) -> None:
    """Another patch, a taken back patch, more parts, fewer parts: other files keep their time."""
    first, second = tmp_path / "0001-x.patch", tmp_path / "0002-y.patch"
    first.write_bytes(GOOD)
    second.write_bytes(b"--- a/src/a.txt\n+++ b/src/a.txt\n@@ -3 +3 @@\n-added\n+changed\n")
    tree = tmp_path / "tree"
    make_tree(sdist, tree, [first], ["src"])
    age(tree)
    make_tree(sdist, tree, [first, second], ["src"])
    assert changed_since_age(tree) == {"src/a.txt"}
    assert tree_of(tree)["src/a.txt"] == NEW.replace(b"added", b"changed")
    age(tree)
    make_tree(sdist, tree, [], ["src", "tools"])
    assert changed_since_age(tree) == {"src/a.txt", "tools/c.txt"}
    assert tree_of(tree) == {"src/a.txt": OLD, "src/b.txt": b"b\n", "tools/c.txt": b"c\n"}
    age(tree)
    make_tree(sdist, tree, [], ["src"])
    assert changed_since_age(tree) == set()
    assert tree_of(tree) == {"src/a.txt": OLD, "src/b.txt": b"b\n"}


def test_patch_that_fails_changes_nothing(sdist: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "0001-x.patch", tmp_path / "0002-y.patch"
    good.write_bytes(GOOD)
    bad.write_bytes(b"--- a/src/b.txt\n+++ b/src/b.txt\n@@ -1 +1 @@\n-x\n+y\n")
    tree = tmp_path / "tree"
    make_tree(sdist, tree, [], ["src"])
    before = tree_of(tree)
    for _ in range(2):
        with pytest.raises(PatchError, match="0002-y.patch does not apply"):
            make_tree(sdist, tree, [good, bad], ["src"])
        assert tree_of(tree) == before
    bad.write_bytes(GOOD.replace(b"/src/a.txt", b"/src/gone.txt"))
    with pytest.raises(PatchError, match=r"has no file src/gone\.txt"):
        make_tree(sdist, tree, [bad], ["src"])


def test_interrupted_unpack_is_repaired(
    sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    replace, calls = os.replace, []

    def fail_second(*args) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError("disk full")
        replace(*args)

    monkeypatch.setattr("os.replace", fail_second)
    with pytest.raises(OSError, match="disk full"):
        make_tree(sdist, tree, [], [])
    monkeypatch.undo()
    make_tree(sdist, tree, [], [])
    assert tree_of(tree) == {"src/a.txt": OLD, "src/b.txt": b"b\n", "tools/c.txt": b"c\n"}


def test_edits_by_hand_are_not_lost(sdist: Path, tmp_path: Path) -> None:
    patch = tmp_path / "0001-x.patch"
    patch.write_bytes(GOOD)
    tree = tmp_path / "tree"
    make_tree(sdist, tree, [patch], [])
    (tree / "src/a.txt").write_bytes(b"mine\n")
    with pytest.raises(PatchError, match="was edited by hand: move the change into a patch"):
        make_tree(sdist, tree, [patch], [])
    (tree / "src/a.txt").unlink()
    make_tree(sdist, tree, [patch], [])
    assert tree_of(tree)["src/a.txt"] == NEW

    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("x")
    with pytest.raises(PatchError, match="name an empty folder"):
        make_tree(sdist, other, [], [])
    assert (other / "precious").exists()


# the configure step, on a copy of the build files whose pin is the small sdist


class Project:
    """A copy of the build files. configure() runs CMake and returns status and output."""

    def __init__(self, folder: Path, sdist: Path) -> None:
        self.folder, self.sdist = folder, sdist
        shutil.copytree(NATIVE, folder / "native", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "CMakeLists.txt", folder)
        digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
        pin_line = f"llama-cpp-python==1.2.3 --hash=sha256:{digest}\n"
        (folder / "native/llama-cpp-python.txt").write_text(pin_line)

    def configure(self, *defines: str, **env: str) -> tuple[int, str]:
        """Output with runs of whitespace made one blank, since CMake wraps its messages."""
        clean = {
            k: v for k, v in os.environ.items() if not k.startswith(("RAZOR_", "PIP_", "CMAKE"))
        }
        clean |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}  # no network in tests
        clean["XDG_CACHE_HOME"] = str(self.folder / "cache")
        command = [tool("cmake"), "-S", self.folder, "-B", self.folder / "build", "-G", "Ninja"]
        command += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
        command += [f"-DPython_EXECUTABLE={sys.executable}", *defines]
        done = subprocess.run(
            command, env=clean | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return done.returncode, " ".join(done.stdout.split())


def tool(name: str) -> str:
    """A program of this Python environment, else of the PATH."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    assert path, f"no {name}: run the tests with 'uv run --group dev pytest', which installs it"
    return path


@pytest.fixture
def project(tmp_path: Path, sdist: Path) -> Project:
    return Project(tmp_path / "project", sdist)


def refused(result: tuple[int, str], sentence: str) -> None:
    status, output = result
    assert status != 0, output
    assert sentence in output, output
    assert "Traceback" not in output


def test_wrong_option_is_refused(project: Project) -> None:
    says = "RAZOR_CUDA is 'maybe', expected ON or OFF: correct or unset it"
    refused(project.configure(RAZOR_CUDA="maybe"), says)
    refused(project.configure("-DRAZOR_CUDA=maybe"), says)


def test_options_come_from_environment_or_definition(project: Project) -> None:
    def options(*defines: str, **env: str) -> str:
        env["RAZOR_LOCAL_SDIST"] = "/nowhere"  # stop after the options
        return re.search(r"build options (\S+)", project.configure(*defines, **env)[1])[1]

    default = options()
    assert default.startswith("cpu,") and default.endswith("native")
    assert options(RAZOR_NATIVE="off") == default.replace("native", "portable")
    assert options() == default, "an unset environment variable is forgotten"
    assert options("-DRAZOR_NATIVE=OFF", RAZOR_NATIVE="1") == default.replace("native", "portable")
    assert options("-DRAZOR_NATIVE=", RAZOR_CUDA="yes") == default.replace("cpu", "cpu,cuda")


def test_no_compiler(project: Project, tmp_path: Path) -> None:
    """A PATH with nothing in it, as in a container that has Python and CMake alone."""
    (tmp_path / "bin").mkdir()
    env = {"CC": "", "CXX": "", "PATH": str(tmp_path / "bin")}
    says = "no C and C++ compiler was found: install one (Debian and Ubuntu: apt install g++"
    result = project.configure(**env)
    refused(result, says)
    assert "this compiles llama.cpp with CMake, Ninja and a C and C++ compiler" in result[1]
    says = "no C and C++ compiler was found (CC is 'no-such-cc', CXX is 'no-such-c++'): install one"
    refused(project.configure(CC="no-such-cc", CXX="no-such-c++"), says)


@pytest.mark.slow
def test_pip_says_that_a_compiler_is_needed(tmp_path: Path) -> None:
    """pip shows the output of a build only if it fails."""
    run = ["uv", "build", "--quiet", "--sdist", f"--out-dir={tmp_path}", ROOT]
    subprocess.run(run, check=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/uname").symlink_to(shutil.which("uname") or "uname")
    kept = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "CMAKE_ARGS")}
    done = subprocess.run(
        [tmp_path / "env/bin/pip", "install", "--no-deps", *tmp_path.glob("*.tar.gz")],
        env={**kept, "PATH": f"{tmp_path}/env/bin:{tmp_path}/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = " ".join(done.stdout.split())
    assert done.returncode != 0 and "Traceback" not in said, said
    assert "razor_local is compiled when it is installed from source, but no C and C++" in said


def test_sdist_option(project: Project, tmp_path: Path) -> None:
    says = "RAZOR_LOCAL_SDIST names /no/such, which is not a file: name a copy of llama_cpp_python-"
    refused(project.configure(RAZOR_LOCAL_SDIST="/no/such"), says)
    refused(project.configure("-DRAZOR_SDIST=/no/such"), says)
    wrong = tmp_path / "wrong.tar.gz"
    wrong.write_bytes(b"wrong")
    found = hashlib.sha256(b"wrong").hexdigest()
    expected = hashlib.sha256(project.sdist.read_bytes()).hexdigest()
    result = project.configure("-DRAZOR_SDIST=", RAZOR_LOCAL_SDIST=str(wrong))
    refused(result, f"wrong.tar.gz has sha256 {found}, expected {expected}")
    assert "name the right file in RAZOR_LOCAL_SDIST, or unset it to download one." in result[1]


def test_patches_are_applied_or_refused(project: Project) -> None:
    """With the small sdist the configure step ends at the missing CMakeLists.txt of llama.cpp."""
    patches = project.folder / "native/patches"
    shutil.rmtree(patches, ignore_errors=True)
    patches.mkdir()
    (patches / "0001-x.patch").write_bytes(GOOD)
    env = {"RAZOR_LOCAL_SDIST": str(project.sdist)}
    output = project.configure(**env)[1]
    assert "unpacked and patched - 2 files changed" in output
    assert "unpacked and patched - nothing to do" in project.configure(**env)[1]
    tree = project.folder / "build/llama.cpp"
    assert tree_of(tree) == {"src/a.txt": NEW, "src/b.txt": b"b\n"}

    assert (
        "unpacked and patched - 1 files changed" in project.configure("-DRAZOR_STOCK=ON", **env)[1]
    )
    assert tree_of(tree)["src/a.txt"] == OLD, "a stock build has no patches"

    (patches / "0001-x.patch").write_bytes(GOOD.replace(b" line 22", b" line 23"))
    says = (
        "0001-x.patch does not apply: hunk 2 of 2 for src/a.txt expects 'line 23' at line 22, the "
        "file has 'line 22': make the patch anew for the pinned release (native/README.md)"
    )
    refused(project.configure("-DRAZOR_STOCK=OFF", **env), says)


def test_cached_sdist_is_used_without_network(project: Project) -> None:
    cache = project.folder / "cache/razor_local"
    cache.mkdir(parents=True)
    shutil.copy(project.sdist, cache)
    _, output = project.configure()
    assert f"{cache / project.sdist.name}, sha256 is right" in output


def test_no_network(project: Project) -> None:
    says = "Could not download llama_cpp_python-1.2.3.tar.gz (pip: ERROR: No matching distribution"
    ends = (
        "connect to the network, or set the environment variable RAZOR_LOCAL_SDIST to a copy of "
        "llama_cpp_python-1.2.3.tar.gz."
    )
    cache = project.folder / "cache/razor_local"
    cache.mkdir(parents=True)
    (cache / project.sdist.name).write_bytes(b"half a file")
    result = project.configure()
    refused(result, says)
    assert "is damaged, downloading it again" in result[1] and ends in result[1]
    assert [f.suffix for f in cache.iterdir()] == [".lock"], "nothing half is left"


def test_index_with_another_file(project: Project, tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    make_sdist(tmp_path / "index" / project.sdist.name, {"llama_cpp_python-1.2.3/x": b"evil"})
    result = project.configure(PIP_FIND_LINKS=str(tmp_path / "index"))
    says = "The llama_cpp_python-1.2.3.tar.gz of your package index has another sha256 than the"
    refused(result, says)
    assert "set the environment variable RAZOR_LOCAL_SDIST" in result[1]


# the repository


def test_pin_equals_the_dependency() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'"llama-cpp-python=={pin()[0]}"' in text


def test_options_are_listed_everywhere() -> None:
    """uv builds anew when one changes, and the README explains it."""
    options = re.findall(
        r"^razor_option\((RAZOR_\w+)", (NATIVE / "options.cmake").read_text(), re.M
    )
    assert len(options) == 9
    pyproject, readme = (ROOT / "pyproject.toml").read_text(), (NATIVE / "README.md").read_text()
    for name in [*options, "RAZOR_LOCAL_SDIST"]:
        assert f'{{ env = "{name}" }}' in pyproject, name
        assert f"`{name}`" in readme, name


@pytest.mark.native
def test_installed_library_is_the_pinned_one() -> None:
    from razor_local import native

    lib = native.load()
    assert (lib.build.version, lib.build.sha256) == pin()
    libraries = [f for f in lib.path.parent.iterdir() if "llama" in f.name or "ggml" in f.name]
    assert len(libraries) >= 4 and not any(f.is_symlink() for f in libraries)


# compiling


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the build files with a finished build of everything, the tools too."""
    folder = tmp_path_factory.mktemp("compiled")
    shutil.copytree(NATIVE, folder / "native", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    run_cmake("-S", folder, "-B", folder / "build", "-G", "Ninja", "-DRAZOR_TOOLS=ON")
    run_cmake("--build", folder / "build")
    return folder


def run_cmake(*args: str | Path) -> str:
    env = os.environ | {"PATH": sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]}
    done = subprocess.run(
        [tool("cmake"), *args], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def compiled_by(folder: Path) -> list[str]:
    """Build again; names of the objects that were compiled."""
    output = run_cmake("--build", folder / "build")
    return [Path(x).name for x in re.findall(r"Building \S+ object (\S+)", output)]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs x86-64")
@pytest.mark.parametrize("date", [None, "0"])
def test_cpu_instructions_depend_on_the_options_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, date: str | None
) -> None:
    """Neither SOURCE_DATE_EPOCH nor an earlier configure of the folder changes them."""
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    if date is not None:
        monkeypatch.setenv("SOURCE_DATE_EPOCH", date)
    haswell = {"-mavx2", "-mbmi2", "-mfma", "-mf16c"}
    for options, flags, says in [
        (["-DRAZOR_NATIVE=ON"], {"-march=native"}, "all of this machine's CPU"),
        (["-DRAZOR_NATIVE=OFF"], haswell, "AVX2, BMI2, FMA and F16C"),
        (["-DRAZOR_NATIVE=OFF", "-DRAZOR_AVX2=OFF"], set(), "those of every x86-64 CPU"),
        (["-DRAZOR_NATIVE=OFF", "-DRAZOR_AVX2=ON"], haswell, "AVX2, BMI2, FMA and F16C"),
    ]:
        output = run_cmake("-S", ROOT, "-B", tmp_path, "-G", "Ninja", *options)
        assert f"razor_local: CPU instructions: {says}" in output
        ninja = (tmp_path / "build.ninja").read_text()
        (used,) = re.findall(r"/ggml-cpu\.c\.o:.*?\n  FLAGS = (.*?)\n", ninja, re.S)
        assert {*used.split()} & {"-march=native", *haswell} == flags


@pytest.mark.slow
def test_changes_compile_only_what_they_touch(compiled: Path) -> None:
    assert compiled_by(compiled) == []

    source = compiled / "native/src/llama-razor.cpp"
    source.write_text(source.read_text() + "// changed\n")
    assert compiled_by(compiled) == ["llama-razor.cpp.o"]

    # a patch of one source file of upstream, then another, then none
    patch = compiled / "native/patches/9999-test.patch"
    first = (compiled / "build/llama.cpp/src/llama-io.cpp").read_text().splitlines()[0]
    for text in ("one", "two"):
        patch.write_text(
            f"--- a/src/llama-io.cpp\n+++ b/src/llama-io.cpp\n@@ -1 +1,2 @@\n {first}\n+// {text}\n"
        )
        assert compiled_by(compiled) == ["llama-io.cpp.o"]
    assert compiled_by(compiled) == []
    patch.unlink()
    assert compiled_by(compiled) == ["llama-io.cpp.o"]


@pytest.mark.slow
def test_tools_and_libraries_run_where_they_are_moved(compiled: Path, tmp_path: Path) -> None:
    run_cmake("--install", compiled / "build", "--prefix", tmp_path / "a", "--component", "razor")
    (tmp_path / "a").rename(tmp_path / "b")
    assert (tmp_path / "b/razor_local/share/llama-server/razor/razor-server.cpp").is_file()
    (compiled / "build/bin").rename(compiled / "build/bin.away")  # no path of the build is used
    try:
        for tool, option in [
            ("llama-bench", "--help"),
            ("llama-perplexity", "--help"),
            ("llama-server", "--version"),
        ]:
            path = tmp_path / "b/razor_local/bin" / tool
            done = subprocess.run([path, option], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    finally:
        (compiled / "build/bin.away").rename(compiled / "build/bin")
