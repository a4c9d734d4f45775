"""Finding and loading the native library: every wrong one ends in a sentence that says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from razor_local import LibraryError, native
from tests.support.native_build import wheels_script

IMPORT = "from razor_local import Llama"


@pytest.fixture(scope="module")
def library() -> native.Native:
    return native.load()


def run(code: str, cwd: Path | None = None, **env: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a separate Python process that prints RazorErrors as the CLI does."""
    code = f"try:\n {code}\nexcept ImportError as e:\n exit(print(type(e).__name__, e) or 1)"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={k: v for k, v in os.environ.items() if k != "LLAMA_CPP_LIB_PATH"}
        | {k: str(v) for k, v in env.items()},
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def test_the_library_is_ours_and_complete(library):
    assert library.path.is_file() and library.build.version == "0.3.36"
    assert len(library.build.sha256) == 64
    assert library.lib.llama_razor_api_version() == native.API_VERSION
    for symbol in ("llama_decode", "ggml_init", "ggml_backend_dev_count"):
        found = native.file_of(library.lib, symbol)
        assert found.resolve().parent == library.path.resolve().parent


def test_structs_have_the_sizes_of_the_library(library):
    """A struct of another size would be refused, or read beyond its end."""
    from razor_local.cli.chat import DEFAULT_MODEL
    from razor_local.llama import Llama

    llama = Llama(DEFAULT_MODEL, n_ctx=2048)
    assert library.stats(llama.ctx).size and library.layer(llama.ctx, 0).size
    assert library.seq(llama.ctx, 0).size and library.buffers(llama.ctx)
    with pytest.raises(ValueError, match="bytes|size"):
        with library.override(native.Params(size=4)):
            pass


def test_no_library_in_the_folder(tmp_path):
    result = run(IMPORT, RAZOR_LOCAL_LIB=str(tmp_path))
    assert result.returncode == 1 and result.stderr == ""
    assert result.stdout == (
        f"LibraryError there is no libllama.so in {tmp_path}; correct or unset RAZOR_LOCAL_LIB\n"
    )


def test_the_command_line_without_a_library(tmp_path):
    """inspect and --help need none; chat says what is missing."""
    from razor_local.cli.chat import DEFAULT_MODEL

    def command(*args):
        return subprocess.run(
            [sys.executable, "-c", "from razor_local.cli import main; main()", *args],
            env={**os.environ, "RAZOR_LOCAL_LIB": str(tmp_path)},
            input="hello",
            capture_output=True,
            text=True,
        )

    assert command("inspect", str(DEFAULT_MODEL)).returncode == 0
    assert command("chat", "--help").returncode == 0
    chat = command("chat")
    assert chat.returncode == 1 and chat.stdout == ""
    assert chat.stderr == (
        f"Error: there is no libllama.so in {tmp_path}; correct or unset RAZOR_LOCAL_LIB\n"
    )


def test_an_editable_installation_has_the_library_elsewhere(monkeypatch, tmp_path, library):
    """The Python sources stay in the checkout, the distribution's list of files knows the rest."""
    import importlib.metadata

    import razor_local

    lib = tmp_path / "site-packages" / "razor_local" / "lib"
    lib.mkdir(parents=True)
    (lib / "libllama.so").symlink_to(library.path)
    monkeypatch.delenv("RAZOR_LOCAL_LIB", raising=False)
    monkeypatch.setattr(razor_local, "__path__", [str(tmp_path / "checkout" / "razor_local")])
    with monkeypatch.context() as m:
        file = importlib.metadata.PackagePath("razor_local/lib/libllama.so")
        file.dist = type("Dist", (), {"locate_file": lambda self, p: lib.parents[1] / p})()
        m.setattr(importlib.metadata, "files", lambda name: [file])
        assert native.library_folder() == lib
        (lib / "libllama.so").unlink()
        with pytest.raises(LibraryError, match="no libllama.so in .*checkout.* and .*reinstall"):
            native.library_folder()


def test_a_library_that_cannot_be_loaded(tmp_path):
    (tmp_path / "libllama.so").write_text("not a library")
    result = run(IMPORT, RAZOR_LOCAL_LIB=str(tmp_path))
    assert result.returncode == 1 and result.stdout.startswith("LibraryError")
    assert f"{tmp_path}/libllama.so cannot be loaded" in result.stdout


def test_a_stock_library_is_named(stock_folder):
    result = run(IMPORT, RAZOR_LOCAL_LIB=stock_folder)
    assert result.returncode == 1, result.stderr
    assert f"{stock_folder}/libllama.so is a llama.cpp without razor" in result.stdout


def test_llama_cpp_imported_before_with_another_library(stock_folder, library):
    result = run(f"import llama_cpp; {IMPORT}", LLAMA_CPP_LIB_PATH=stock_folder)
    assert result.returncode == 1, result.stderr
    assert f"llama_cpp was imported before razor_local and loaded {stock_folder}" in result.stdout
    assert str(library.path) in result.stdout and "import razor_local.Llama first" in result.stdout


def test_llama_cpp_imported_before_with_our_library(library):
    folder = str(library.path.parent)
    result = run(f"import llama_cpp; {IMPORT}; print('fine')", LLAMA_CPP_LIB_PATH=folder)
    assert result.stdout == "fine\n", result.stdout + result.stderr


def test_llama_cpp_imported_before_without_a_library():
    """uv installs the bindings alone, so their import fails, and razor_local still works."""
    if (Path(find_spec("llama_cpp").origin).parent / "lib").exists():
        pytest.skip("these bindings have a library of their own")
    code = "import importlib, contextlib\n with contextlib.suppress(FileNotFoundError):"
    code += f"\n  importlib.import_module('llama_cpp')\n  exit(2)\n {IMPORT}\n import llama_cpp"
    result = run(f"{code}; print('fine')")
    assert result.stdout == "fine\n", result.stderr


@pytest.mark.parametrize("code", ["import llama_cpp, razor_local", "import razor_local, llama_cpp"])
def test_the_bindings_of_wheels_load_our_library(tmp_path, library, code):
    """.ci/wheels changes them so that razor_local need not be imported first."""
    package = tmp_path / "llama_cpp"
    ignored = shutil.ignore_patterns("lib", "__pycache__")
    shutil.copytree(Path(find_spec("llama_cpp").origin).parent, package, ignore=ignored)
    wheels_script().load_library_of_razor_local(package)
    code += f"; print(llama_cpp.__file__, llama_cpp.llama_cpp._lib._name); {IMPORT}; print('fine')"
    result = run(code, PYTHONPATH=tmp_path)
    assert result.stdout == f"{package}/__init__.py {library.path}\nfine\n", result.stderr


def test_another_llama_cpp_named_in_the_environment_is_not_used(stock_folder):
    code = f"{IMPORT}; import os; print(os.environ['LLAMA_CPP_LIB_PATH'])"
    result = run(code, LLAMA_CPP_LIB_PATH=stock_folder)
    assert result.stdout == f"{stock_folder}\n", "the variable belongs to processes of its own"
    result = run(f"{IMPORT}; import os; print('LLAMA_CPP_LIB_PATH' in os.environ)")
    assert result.stdout == "False\n", result.stdout + result.stderr


def test_another_ggml_never_runs_under_our_library(stock_folder):
    code = f"{IMPORT}; from razor_local import native; n = native.load(); " + (
        "print(native.file_of(n.lib, 'ggml_init').resolve().parent == n.path.resolve().parent)"
    )
    result = run(code, LD_LIBRARY_PATH=stock_folder)
    refused = "instead of the ggml beside it; unset LD_LIBRARY_PATH" in result.stdout
    assert result.stdout == "True\n" or refused, result.stdout + result.stderr


def test_libraries_in_the_current_folder_are_not_loaded(tmp_path, library):
    for file in library.path.parent.glob("lib*.so*"):
        (tmp_path / file.name).write_text("planted")
    result = run(f"{IMPORT}; print('fine')", cwd=tmp_path)
    assert result.stdout == "fine\n", result.stdout + result.stderr


def test_library_and_code_of_different_versions(monkeypatch, library):
    import llama_cpp

    monkeypatch.setattr(native.library, "API_VERSION", 99)
    with pytest.raises(LibraryError, match="razor API version 10, but this Python code needs 99"):
        native.load.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setattr(llama_cpp, "__version__", "0.3.35")
    with pytest.raises(
        LibraryError, match=r"built from llama-cpp-python 0\.3\.36, .* bindings are 0\.3\.35"
    ):
        native.load.__wrapped__()
    monkeypatch.undo()
    assert native.load.__wrapped__() == library


def test_llama_cpp_imported_after_razor_local(library):
    """Without a library of its own it finds ours; the variable is not left behind."""
    code = (
        "import razor_local, llama_cpp, os, sys; print(llama_cpp.llama_cpp._lib._name);"
        "print('LLAMA_CPP_LIB_PATH' in os.environ, 'razor_local.llama' in sys.modules);"
        "from razor_local import Llama; print(Llama.__name__)"
    )
    result = run(code)
    assert result.stdout == f"{library.path}\nFalse False\nLlama\n", result.stdout + result.stderr


@pytest.mark.parametrize("text", ["x = 1", "raise ImportError('mine')"])
def test_a_module_that_hides_the_bindings_is_named(tmp_path, text):
    (tmp_path / "llama_cpp.py").write_text(text)
    script = tmp_path / "app.py"
    script.write_text("from razor_local import Llama, RazorError\nLlama")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    expected = f"{tmp_path / 'llama_cpp.py'} hides the Python package llama_cpp; rename it, or"
    assert result.returncode == 1 and expected in result.stderr, result.stderr


def test_missing_bindings_are_named(library):
    code = "import sys; sys.modules['llama_cpp'] = None; from razor_local import Llama"
    result = run(code)
    assert "the Python package llama_cpp is missing; install it again with" in result.stdout


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_libraries_of_the_current_folder_are_not_loaded(tmp_path) -> None:
    """llama.cpp would load any backend from there."""
    source = tmp_path / "attack.c"
    source.write_text(
        "#include <stdio.h>\n"
        'static void __attribute__((constructor)) run(void) { fclose(fopen("attacked", "w")); }\n'
    )
    for name in ("blas", "cpu", "cuda", "rpc", "vulkan"):
        library = tmp_path / f"libggml-{name}-attack.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    code = (
        "from razor_local.native.loaded import library\n"
        "library.lib.ggml_backend_load_all()\n"
        "print(library.lib.ggml_backend_reg_count() > 0)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout == "True\n"
    assert not (tmp_path / "attacked").exists()
