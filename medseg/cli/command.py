"""Commands as typer reads them: groups of options, help in panels, words of other tools."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand, TyperGroup


class _Helped:
    """What has a help option."""

    def get_help_option(self, ctx: Any) -> Any:
        """As usual, but not asked for by default, instead of None: for that typer would load
        pydantic, which takes longer than the help.
        """
        option: Any = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None and option.default is None:
            option.default = False
        return option


class Command(_Helped, TyperCommand):
    """A command whose numbers are read as everywhere in medseg; Python's `int` takes 1_0 for 10."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as usual, then look once more at what stands behind the options that gave a
        number.
        """
        from medseg.cli.words import check_not_empty, check_options, options_in

        words = list(args)
        if {"--help", "-h"} & set(options_in(self.get_params(ctx), words)):
            # Before any value is read, for which typer would load what takes longer than the rest.
            typer.echo(self.get_help(ctx))
            raise typer.Exit
        check_options(self, ctx, words)
        if not self.hidden:  # `complete` is told what is typed, which may be nothing yet
            check_not_empty(self, ctx, words)
        rest = super().parse_args(ctx, args)
        for option in self.params:
            if getattr(option, "count", False):  # nothing stands behind it
                continue
            value = ctx.params.get(option.name)
            numbers = value if isinstance(value, list | tuple) else [value]
            if all(isinstance(one, int | float) and not isinstance(one, bool) for one in numbers):
                _check_numbers(ctx, option.opts, words)
        return rest

    def get_usage(self, ctx: Any) -> str:
        """How it is called, for who called it otherwise."""
        from medseg.cli.help import usage_of_command

        return usage_of_command(self, ctx)

    def get_help(self, ctx: Any) -> str:
        """The help in panels."""
        from medseg.cli.help import help_of_command

        return help_of_command(self, ctx)


class Program(_Helped, TyperGroup):
    """All commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as usual, what is meant for another tool aside."""
        from medseg.cli.words import check_command

        check_command(self, ctx, args)
        return super().parse_args(ctx, args)

    def get_help(self, ctx: Any) -> str:
        """The commands in panels."""
        from medseg.cli.help import help_of_program

        return help_of_program(self, ctx)


def _check_numbers(ctx: Any, names: Sequence[str], words: Sequence[str]) -> None:
    from medseg.text import decimal_number

    for text in _behind(names, words):
        try:
            decimal_number(text)
        except ValueError as error:
            raise typer.BadParameter(str(error), ctx=ctx, param_hint=names[0]) from None


def _behind(names: Sequence[str], words: Sequence[str]) -> Iterator[str]:
    """What the words of a command line give an option of these names."""
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        name, equals, text = word.partition("=")
        if name in names:
            yield text if equals else following


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """A command as typer reads it: each parameter that is a group of options, a data class, is
    taken apart into its fields, and put together again when the command is called.

    Every command gets the options of `Telling`.
    """
    from medseg.cli.options import Telling

    parameters: list[inspect.Parameter] = []
    groups: dict[str, type[Any]] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation  # type: ignore[assignment]
            parameters += _parameters_of(parameter.annotation)  # type: ignore[arg-type]
        else:
            parameters.append(
                inspect.Parameter(
                    parameter.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=parameter.default,
                    annotation=parameter.annotation,
                )
            )
    parameters += _parameters_of(Telling)

    def run(**values: Any) -> None:
        telling = _gathered(Telling, values)
        whole = {name: _gathered(kind, values) for name, kind in groups.items()}
        with telling.listening(command.__name__):
            command(**values, **whole)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def _parameters_of(group: type[Any]) -> Iterator[inspect.Parameter]:
    """The options of a group, in its panel unless they name one."""
    for field in fields(group):
        kind, *about = get_args(field.type)
        option = copy(about[-1])
        option.rich_help_panel = option.rich_help_panel or group.PANEL
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[kind, option],
        )


def _gathered(group: type[Any], values: dict[str, Any]) -> Any:
    """A group of its options' values, which are taken out of all values."""
    return group(**{field.name: values.pop(field.name) for field in fields(group)})
