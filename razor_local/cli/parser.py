"""Parse the arguments of commands, with options matched by their whole names as in llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import click

# commands of ollama and other programs, and their names here
OTHER_NAMES = {
    "list": "models",
    "ls": "models",
    "show": "inspect",
    "remove": "rm",
    "download": "pull",
}


class _ExactOptions(click.Command):
    """A command that matches options by their whole names.

    click reads an unknown option with one dash, such as -mg, as a short option with a value: -m g.
    llama.cpp has many such options, so here -mg is an unknown option.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _checked(self, ctx, args))


def _checked(command: click.Command, ctx: click.Context, args: list[str]) -> list[str]:
    """Return the arguments, each -o=value as two. Raises NoSuchOption for unknown options."""
    params = [param for param in command.get_params(ctx) if isinstance(param, click.Option)]
    options = {name: param for param in params for name in param.opts + param.secondary_opts}
    checked: list[str] = []
    rest = list(args)
    while rest and rest[0] != "--":
        arg = rest.pop(0)
        if len(arg) < 2 or arg[0] != "-":
            if not ctx.allow_interspersed_args:  # the name of a subcommand
                rest.insert(0, arg)
                break
            checked.append(arg)
            continue
        name, equals, value = arg.partition("=")
        if name not in options:
            raise click.NoSuchOption(name, possibilities=_nearest(name, options), ctx=ctx)
        option = options[name]
        n_values = 0 if option.is_flag or option.count else option.nargs
        if n_values and equals:
            arg = name
            rest.insert(0, value)
        elif isinstance(option.flag_value, str) and (not rest or rest[0].startswith("-")):
            n_values = 0  # the value is optional
        checked.append(arg)
        checked += rest[:n_values]
        del rest[:n_values]
    return checked + rest


def _nearest(name: str, options: Mapping[str, click.Option]) -> list[str]:
    """Return suggestions for an unknown option."""
    if name[:2] in options and name[2:].isdecimal():
        return [f"{name[:2]} {name[2:]}"]
    return get_close_matches(name, options)


class Command(_ExactOptions):
    """A command whose options can also be set by environment variables.

    Args:
        envvars: the environment variable of each option, by the name of its parameter
    """

    def __init__(
        self, *args: Any, envvars: Mapping[str, str] | None = None, **attributes: Any
    ) -> None:
        super().__init__(*args, **attributes)
        for param in self.params:
            if envvars is not None and param.name in envvars and isinstance(param, click.Option):
                param.envvar, param.show_envvar = envvars[param.name], True


class Group(_ExactOptions, click.Group):
    """A command with subcommands.

    An unknown subcommand is refused with the nearest name, which may be one level below.
    """

    command_class = Command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None:
            ctx.fail(f"No such command '{name}'. {self._instead(ctx, name)}")
        return super().resolve_command(ctx, args)

    def _instead(self, ctx: click.Context, name: str) -> str:
        names = {sub: sub for sub in self.list_commands(ctx)}
        for sub in tuple(names):
            command = self.get_command(ctx, sub)
            if isinstance(command, click.Group):
                names |= {below: f"{sub} {below}" for below in command.list_commands(ctx)} | names
        near = get_close_matches(OTHER_NAMES.get(name, name), names, n=1)
        if near:
            return f"Did you mean '{ctx.command_path} {names[near[0]]}'?"
        return f"'{ctx.command_path} --help' shows the commands."
