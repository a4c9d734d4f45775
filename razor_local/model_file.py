"""A model file whose header is read once; derived values are computed on demand."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from . import known_profiles, profile_cache
from .errors import ProfileError, option
from .gguf.header import Header, read_header
from .gguf.split import read_parts
from .model_shape import ModelShape, shape_from_parts, why_not_converted
from .profile import Profile, profile_from_header, read_sidecar


@dataclass(frozen=True)
class FoundProfile:
    """A profile and where it comes from.

    Attributes:
        source: "file" (the metadata of the model), "sidecar", "cache" (profile_cache.py), "list"
            (known_profiles.py) or "measured" (just now).
        where: the path of its file, or the name of the model to which the list belongs.
    """

    profile: Profile
    source: str
    where: str

    @property
    def origin(self) -> str:
        """The source in a few words, without paths."""
        return {
            "file": "the metadata of the model file",
            "sidecar": "a sidecar",
            "cache": "the profile cache",
            "list": f"the list that razor-local ships for {self.where}",
            "measured": "measured now",
        }[self.source]

    def check_budget(self, model: str | os.PathLike[str]) -> None:
        """Raise ProfileError for a list of heads without scores: a budget chooses by scores."""
        if self.source == "list" and self.profile.echo_score is None:
            raise ProfileError(
                f"{self.origin} has no head scores by which {option('budget')} could choose;"
                f" measure them once with 'razor-local convert {shlex.quote(os.fspath(model))}',"
                f" or leave out {option('budget')}"
            )

    def __str__(self) -> str:
        """The source in a few words, such as "a sidecar (m.razor.gguf)"."""
        has_path = self.source in ("sidecar", "cache", "measured")
        return f"{self.origin} ({self.where or 'not saved'})" if has_path else self.origin


class ModelFile(os.PathLike[str]):
    """A model file, or the first file of a split model, whose header was read and checked.

    This is a path: a function that takes the path of a model takes a ModelFile too, and does not
    read the header again. Raises GGUFError, OSError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.header = read_header(self.path)

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def parts(self) -> tuple[Header, ...]:
        """The headers of all files of the model. Raises GGUFError, OSError."""
        return read_parts(self.header)

    @cached_property
    def shape(self) -> ModelShape:
        """Raises GGUFError or ProfileError (one sentence), OSError."""
        return shape_from_parts(self.parts)

    @cached_property
    def profile(self) -> Profile | None:
        """The profile in the file, None without razor keys. Raises what shape raises."""
        return profile_from_header(self.header, self.shape)

    def find_profile(
        self, sidecar: str | os.PathLike[str] | None = None, budget: float | None = None
    ) -> FoundProfile | None:
        """Return the profile to run the model with and its source, None if there is none.

        It is the first of these: the metadata of the file, NAME.razor.gguf beside it, the profile
        that was measured on this machine, and the list that the package has for the model.

        Args:
            sidecar: the sidecar to use instead of all of these.
            budget: the share of retrieval heads, instead of the profile's.

        Raises:
            GGUFError, ProfileError: a file is damaged, or the sidecar belongs to another model.
            OSError: a file cannot be read.
        """
        found = self._find_profile(sidecar)
        if found is None:
            return None
        if budget is not None:
            found.check_budget(self)
        profile = self.choose_profile(found.profile, budget)
        return None if profile is None else replace(found, profile=profile)

    def _find_profile(self, sidecar: str | os.PathLike[str] | None) -> FoundProfile | None:
        if sidecar is None and self.profile is not None:
            return FoundProfile(self.profile, "file", str(self))
        beside = self.sidecar_path if sidecar is None else Path(sidecar)
        if sidecar is not None or beside.is_file():
            return FoundProfile(read_sidecar(beside, self.shape), "sidecar", str(beside))
        cached = profile_cache.find(self.shape)
        if cached is not None:
            return FoundProfile(cached[0], "cache", str(cached[1]))
        known = known_profiles.find(self.shape)
        return None if known is None else FoundProfile(known.profile(), "list", known.model)

    @property
    def sidecar_path(self) -> Path:
        """The path NAME.razor.gguf beside the model, which may not exist."""
        name = re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", self.path.name)
        return self.path.with_name(f"{name}.razor.gguf")

    def choose_profile(
        self,
        other: str | os.PathLike[str] | Profile | None = None,
        budget: float | None = None,
    ) -> Profile | None:
        """Return the profile in the model file, or another one; None if there is none.

        Raises what profile raises.

        Args:
            other: a sidecar, or a Profile, instead of the profile in the model file.
            budget: the share of retrieval heads, instead of the profile's.
        """
        if other is None:
            profile = self.profile
        else:
            profile = other if isinstance(other, Profile) else read_sidecar(other, self.shape)
        if profile is not None and budget is not None:
            from .scores import with_budget

            profile = with_budget(profile, self.shape, budget)
        return profile

    def no_profile(self) -> ProfileError:
        """Return the error for a missing profile, which explains how to get one."""
        why = why_not_converted(self.header, self.shape)
        make = "make one with 'razor-local convert MODEL.gguf', or"
        if why is not None:
            make = f"'razor-local convert' refuses to make one ({why});"
        damaged = profile_cache.damaged(self.shape)
        lost = "" if damaged is None else f" (the one in the profile cache, {damaged}, is damaged)"
        return ProfileError(f"{self} has no razor profile{lost}; {make} name one with --sidecar")


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """Return the ModelFile of a path. A path that already is a ModelFile is not read again."""
    return path if isinstance(path, ModelFile) else ModelFile(path)


def read_model_shape(path: str | os.PathLike[str]) -> ModelShape:
    """Return the shape of a model file. Raises GGUFError, ProfileError, OSError."""
    return open_model(path).shape


def read_profile(path: str | os.PathLike[str]) -> Profile | None:
    """Return the profile in a model file, None without razor keys.

    Raises what profile_from_header() raises.
    """
    return open_model(path).profile
