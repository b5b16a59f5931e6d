"""Arguments of the commands, from flags and files. pydantic-settings makes flags of a class's fields and parses them."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

from pydantic import ValidationError, create_model
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from ltsam_fast import command_line
from ltsam_fast.train.config import FIELDS, ConfigError, build, in_words, parsed, read_file, setting
from ltsam_fast.train.recipes import RECIPES

Layers = list[dict[str, Any]]
"""Settings of runs; later ones override earlier ones."""


class Flags(BaseSettings):
    """The arguments of a command that are no settings of runs. The docstring is its description."""

    model_config = SettingsConfigDict(extra="forbid", loc_by_alias=False, validate_default=False, case_sensitive=True)
    settings: ClassVar[Sequence[str]] = ()
    """The settings of runs that are flags of the command, too."""

    @classmethod
    def settings_customise_sources(cls, settings_cls: Any, init_settings: Any, *others: Any, **more: Any) -> Any:
        """Leaves out the environment's variables."""
        return (init_settings,)

    def run(self, layers: Layers) -> int:
        """Runs the command with these settings of runs; returns the exit code."""
        raise NotImplementedError


class FlagsAndFiles(Flags):
    """Those of a command with recipes and files of settings."""

    config: Path | None = setting(None, "settings from a TOML, YAML or JSON file; flags override it")
    recipe: str | None = setting(None, f"published settings, {', '.join(RECIPES)}; default without --data: digits-lt")


_Command = TypeVar("_Command", bound=Flags)


def parse(command: type[_Command], name: str, arguments: Sequence[str]) -> tuple[_Command, Layers]:
    """Returns the arguments of a command, and layers of settings of runs: those in ``--config``, and the flags.

    Flags are accepted with underscores as well, as they stand in files. ``--help`` tells the defaults that apply with the
    other arguments, and ends the program.

    Raises:
        ConfigError: A name is unknown, or a value is not accepted.
    """
    dashed = [_dashed(one) for one in arguments]
    rest = [one for one in dashed if one not in ("-h", "--help")]
    if issubclass(command, FlagsAndFiles) and rest != dashed:
        _print_help(command, name, parse(command, name, rest)[1])
    model = _with_settings(command, {})
    try:
        flags = _source(model, name, dashed)
        file = read_file(path) if (path := flags().get("config")) else {}
        if "config" in file:
            raise ConfigError(f"config {path}: config must be a flag")
        others = {key: value for key, value in file.items() if key not in FIELDS and key != "recipe"}
        options = model(_cli_settings_source=flags, **others)  # type: ignore[call-arg]
    except ValidationError as error:
        raise ConfigError(in_words(error, model.model_fields)) from error
    except SettingsError as error:
        raise ConfigError(str(error)) from error
    given = options.model_dump(include={*FIELDS, "recipe"}, exclude_unset=True)
    return options, [{key: value for key, value in file.items() if key not in others}, given]


def _with_settings(command: type[_Command], defaults: Mapping[str, Any]) -> type[_Command]:
    """Returns the class with its settings of runs as further fields. Their defaults are shown only; None is not."""
    fields = {}
    for name in command.settings:
        field = copy.copy(FIELDS[name])
        field.default = defaults.get(name)
        fields[name] = (field.annotation, field)
    return create_model(command.__name__, __base__=command, __doc__=command.__doc__, **fields)  # type: ignore[call-overload, no-any-return]


def _print_help(command: type[Flags], name: str, layers: Layers) -> NoReturn:
    from ltsam_fast.train.describe import print_everything

    if any("recipe" in layer for layer in layers):
        layers.insert(0, {"data": "DIR"})
    parser = _source(_with_settings(command, build(*layers).as_dict()), name).root_parser
    parser.print_help()
    print_everything(lambda **changes: build(*layers, changes), chosen="method" in command.settings)
    parser.exit()


def _source(model: type[Flags], name: str, arguments: list[str] | None = None) -> CliSettingsSource[_Parser]:
    parser = _Parser(prog=f"ltsam {name}", description=model.__doc__, allow_abbrev=False)
    return CliSettingsSource(
        model,
        cli_parse_args=arguments,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_parse_none_str="None",
        root_parser=parser,
        parse_args_method=_Parser.parse_args,
        add_argument_method=_add_argument,
    )


class _Parser(command_line.Parser):
    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(message)


_BRACKETS = str.maketrans("", "", "[]' ")


def _add_argument(parser: argparse.ArgumentParser, *flags: str, **more: Any) -> None:
    """Adds an argument; its help shows values as they are written on the command line, and None not at all."""
    kind = str(more.get("metavar")).partition("[")[0]
    if kind == "dict":
        more |= {"metavar": "NAME=VALUE", "type": _pair}
    elif kind in ("list", "tuple"):
        more |= {"metavar": "A,B", "type": lambda text: json.dumps(text.split(","))}
    text, _, default = more.pop("help").partition(" (default: ")
    if default not in ("", "None)", "{})"):
        text = f"{text.partition('; default:')[0]} (default: {default.translate(_BRACKETS)}"
    parser.add_argument(*flags, help=text, **more)


def _pair(text: str) -> str:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return json.dumps({name: parsed(value)})


def _dashed(argument: str) -> str:
    flag, sign, value = argument.partition("=")
    return f"{flag.replace('_', '-')}{sign}{value}" if flag.startswith("--") else argument
