"""A model file with the changes of its profile that a command line asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model_shape import ModelShape
    from .profile import Profile


DEFAULT_MODEL = Path(__file__).parent / "data" / "razor-default.gguf"  # built in


@dataclass(frozen=True)
class ModelSetup:
    """A model and what a run changes of its profile. window_divisor 0: window_min alone decides.

    lib: folder of a stock build, None for the package's own library.
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

    def read(self) -> tuple[ModelShape, Profile]:
        """Return shape and profile. Raises RazorError without a profile that can change so."""
        from .model_file import ModelFile, read_model_shape, read_profile
        from .profile import read_sidecar

        shape = read_model_shape(self.model)
        profile = read_sidecar(self.sidecar, shape) if self.sidecar else read_profile(self.model)
        if profile is None:
            raise ModelFile(self.model).no_profile()
        if self.retrieval is not None:
            from .scores import with_budget

            profile = with_budget(profile, shape, self.retrieval)
        names = ("window_min", "window_divisor", "sink_tokens")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return shape, replace(profile, **changes)
