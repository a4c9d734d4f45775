"""A model file with the profile changes that a command line asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model_file import FoundProfile, ModelFile
    from .model_shape import ModelShape
    from .profile import Profile


DEFAULT_MODEL = Path(__file__).parent / "data" / "razor-default.gguf"  # built in


@dataclass(frozen=True)
class ModelSetup:
    """A model and what a run changes of its profile. window_divisor 0: window_min alone decides.

    lib: folder of a stock build, None for the package's own library.
    rpc: addresses of RPC servers, see native.rpc.parse_servers().
    prefill: how prompts are read, see Llama.
    """

    model: str
    sidecar: str | None = None
    retrieval: float | None = None
    window_min: int | None = None
    window_divisor: int | None = None
    sink_tokens: int | None = None
    n_threads: int = 1
    n_gpu_layers: int = 0
    lib: str | None = None
    rpc: str | None = None
    prefill: str = "auto"

    @cached_property
    def file(self) -> ModelFile:
        """The model file, which is read once. Raises GGUFError, OSError."""
        from .model_file import ModelFile

        return ModelFile(self.model)

    @cached_property
    def found(self) -> FoundProfile | None:
        """The profile before the changes, and its source. Raises what read() raises."""
        return self.file.find_profile(self.sidecar, self.retrieval)

    def read(self) -> tuple[ModelShape, Profile]:
        """Return shape and profile. Raises RazorError without a profile that can change so."""
        if self.found is None:
            raise self.file.no_profile()
        from .profile import ONE_WINDOW, check_parameters

        names = ("window_min", "window_divisor", "sink_tokens")
        changes: dict[str, Any] = {
            name: getattr(self, name) for name in names if getattr(self, name) is not None
        }
        check_parameters(**changes)
        if {"window_min", "window_divisor"} & changes.keys():
            changes.update(ONE_WINDOW)
        return self.file.shape, replace(self.found.profile, **changes)
