"""Options that commands share, the look of their help, and how a program runs."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from itertools import pairwise, zip_longest
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from imbvlm.base import interrupts
from imbvlm.base.errors import LINE_BREAKS, ImbvlmError, PluginNeededError, end_sentence, printable

OptionsT = TypeVar("OptionsT")
LATEST = "latest"
# Options that take several values at once, of `manifest build` and of sweeps/*.py.
SEVERAL_VALUES = frozenset(("--list", "--table", "--inaturalist", "--webdataset", "--part", "--test-groups"))

ManifestPath = Annotated[
    str, typer.Argument(metavar="MANIFEST", help="path or s3:// URI of a manifest, or embedded:NAME")
]
MovedManifest = Annotated[
    str | None, typer.Option("--manifest", metavar="FILE", help="the manifest's present location, if it was moved")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON and nothing else")]
PluginFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE",
        help="a plug-in to run, a Python file or package folder; repeatable; needed where a sweep or model used it",
    ),
]
SweepFolder = Annotated[str, typer.Argument(metavar="SWEEP", help="a sweep's folder or s3:// URI")]

_spec, _plan, _resume = (
    partial(typer.Option, rich_help_panel=title) for title in ("Specification", "Plan and prices", "Resume")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecOptions:
    """Options that change a sweep's specification, and those of its plan."""

    manifest: Annotated[
        str | None, _spec(metavar="MANIFEST", help="another data set: path, s3:// URI or embedded:NAME")
    ] = None
    storage: Annotated[str | None, _spec(metavar="FOLDER", help="folder or s3:// URI for sweeps and features")] = None
    smoke: Annotated[
        bool,
        _spec(
            "--smoke",
            help="run a small version of the sweep as a test: with the sweep's `smoke` settings, by default four "
            "trials of two epochs and one seed",
        ),
    ] = False
    plugins: Annotated[
        list[str] | None,
        _spec(
            "--plugin",
            metavar="FILE",
            help="a Python file or package folder of your own to run, with losses, methods, ...; repeatable",
        ),
    ] = None
    settings: Annotated[
        list[str] | None,
        _spec(
            "--set",
            metavar="KEY=VALUE",
            help="set a key of the sweep or of its trials, such as num_trials=20 or optim.lr=0.05; repeatable; "
            "docs/reference lists all keys",
        ),
    ] = None
    warm_start: Annotated[
        list[str] | None,
        _spec(metavar="SWEEP", help="folder of an earlier sweep, with whose results the sampler begins; repeatable"),
    ] = None
    measure: Annotated[
        Literal["here", "cluster", "no"],
        _plan(
            help="where a plan measures a few steps of each kind of trial: on this machine, on the running Ray "
            "cluster, or nowhere"
        ),
    ] = "here"
    gpus: Annotated[
        int | None,
        _plan(
            metavar="N",
            min=1,
            help="plan for another machine with N GPUs; by default a plan that can't run here ends with exit code 1",
        ),
    ] = None
    price: Annotated[float | None, _plan(metavar="PER_GPU_HOUR", help="price of one GPU for an hour")] = None
    machine_price: Annotated[
        float | None,
        _plan(metavar="PER_HOUR", help="price of one machine for an hour, with or without GPUs, in place of --price"),
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions(SpecOptions):
    """Options of every sweep."""

    dry_run: Annotated[bool, _plan("--dry-run", help="show the plan; start and write nothing")] = False
    plan: Annotated[
        bool, _plan("--plan", help="show the plan first, and compare it with the actual times at the end")
    ] = False
    resume: Annotated[
        str | None,
        _resume(metavar="[FOLDER]", help="resume the sweep in FOLDER, by default the newest sweep of this name"),
    ] = None
    add_trials: Annotated[int | None, _resume(metavar="N", min=1, help="with --resume: add N trials")] = None
    fork: Annotated[
        bool,
        _resume(
            "--fork",
            help="with --resume: start a new sweep after changes of specification, code or data; valid trials are kept",
        ),
    ] = False


def takes(options: type[OptionsT]) -> Callable[[Callable[[OptionsT], int]], Callable[..., int]]:
    """Decorate a function of a dataclass as a command whose parameters are the dataclass's fields."""

    def decorate(function: Callable[[OptionsT], int]) -> Callable[..., int]:
        @wraps(function)
        def command(**values: Any) -> int:
            return function(options(**values))

        hints = get_type_hints(options, include_extras=True)
        # Its own attribute rather than the wrapped function's one parameter is what typer reads.
        vars(command)["__signature__"] = inspect.Signature(
            [
                parameter.replace(annotation=hints[name])
                for name, parameter in inspect.signature(options).parameters.items()
            ]
        )
        return command

    return decorate


def with_plugins(function: Callable[..., int]) -> Callable[..., int]:
    """A command with the option --plugin, which runs with these plug-ins active."""

    @wraps(function)
    def command(*, plugin: list[str] | None, **values: Any) -> int:
        if not plugin:
            return function(**values)
        # A command without plug-ins starts without this.
        from imbvlm.base.plugin_files import use_plugins

        with use_plugins(*plugin):
            return function(**values)

    signature, hints = inspect.signature(function), get_type_hints(function, include_extras=True)
    parameters = [each.replace(annotation=hints[each.name]) for each in signature.parameters.values()]
    option = inspect.Parameter("plugin", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=PluginFiles)
    vars(command)["__signature__"] = signature.replace(parameters=[*parameters, option])
    return command


# ------------------------------------------------------------------------------------------------------- help


class _Help(TyperCommand):
    """A command whose help is plain text with its options in named groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_groups(self, ctx, formatter)


class GroupHelp(TyperGroup):
    """A group of commands with the same look of its help."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_groups(self, ctx, formatter)
        self.format_commands(ctx, formatter)


def _write_groups(command: TyperCommand | TyperGroup, ctx: Any, formatter: Any) -> None:
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in sorted(command.get_params(ctx), key=lambda parameter: parameter.param_type_name):
        record = parameter.get_help_record(ctx)
        if record is not None:
            is_argument = parameter.param_type_name == "argument"
            title = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or "Options"
            # Python's type of an argument tells a user nothing.
            name = record[0].partition(" <")[0] if is_argument else record[0]
            groups.setdefault(title, []).append((name, record[1]))
    for title, rows in groups.items():
        with formatter.section(title):
            formatter.write_dl(rows)


def make_app(
    summary: str = "", epilog: str = "", *, cls: type[TyperGroup] = GroupHelp, add_completion: bool = False
) -> typer.Typer:
    """An empty group of commands."""
    return typer.Typer(
        cls=cls,
        help=summary,
        epilog=epilog,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        add_completion=add_completion,
    )


def add_command(
    app: typer.Typer, name: str, function: Callable[..., int], *, summary: str | None = None, epilog: str = ""
) -> None:
    """Add a function as a command, by default with its docstring as the summary; the epilog ends the help."""
    app.command(name, cls=_Help, help=summary, epilog=epilog)(function)


def examples(*commands: str) -> str:
    """Commands for the end of a help, on lines of their own."""
    return "\n".join(["\b", "example:" if len(commands) == 1 else "examples:", *(f"  {text}" for text in commands)])


# ------------------------------------------------------------------------------------------------ programs


def run_program(app: typer.Typer, name: str, arguments: Sequence[str]) -> NoReturn:
    """Run one command; exits with 0, 1 for a failure (a sentence on stderr), 2 for wrong usage, 130, or 143."""
    with interrupts.handled() as signals:
        try:
            code = signals.outlast(
                lambda: get_command(app).main(spell_out(arguments), prog_name=name, standalone_mode=False)
            )
        except typer.TyperException as error:
            print_to_stderr(usage_sentence(error))
            code = error.exit_code
        except ImbvlmError as error:
            print_to_stderr(end_sentence(str(error)))
            if isinstance(error, PluginNeededError):
                print_to_stderr(f"then run: {_with_copies(name, arguments, error.copies)}")
            code = 1
        if code is None:
            signals.end()
            print(f"\nimbvlm: {signals.sentence}", file=sys.stderr)
            code = signals.exit_code
        sys.exit(code)


def _with_copies(program: str, arguments: Sequence[str], copies: Sequence[str]) -> str:
    """A command again, with these plug-ins in place of those that it named."""
    words = [word for word in spell_out(arguments) if not word.startswith("--plugin=")]
    remaining = [word for before, word in pairwise(["", *words]) if word != "--plugin" and before != "--plugin"]
    options = [text for copy in copies for text in ("--plugin", copy)]
    return shlex.join([*(["python", sys.argv[0]] if program.endswith(".py") else [program]), *remaining, *options])


def spell_out(arguments: Sequence[str]) -> list[str]:
    """Give each option one value, as typer needs: `--resume=latest`, and `--list A --list B` for `--list A B`."""
    words: list[str] = []
    option = ""
    for word, following in zip_longest(arguments, arguments[1:], fillvalue="--"):
        # argparse took `-o=FILE`, too.
        word = re.sub(r"^(-\w)=", r"\1", word)
        has_value = not following.startswith("-")
        if not word.startswith("-"):
            words += [option, word] if option else [word]
        elif word in SEVERAL_VALUES and has_value:
            option = word
        else:
            option = ""
            words.append(f"--resume={LATEST}" if word == "--resume" and not has_value else word)
    return words


def usage_sentence(error: typer.TyperException) -> str:
    """Wrong usage as a sentence with the nearest valid name."""
    nearest, ctx = getattr(error, "possibilities", None), getattr(error, "ctx", None)
    text = f"{error.message}; did you mean {nearest[0]}?" if nearest else error.format_message()
    text = end_sentence(text.replace("Value error, ", "").replace("Input should", "it should"))
    return text if ctx is None else f"{text} See {ctx.command_path} --help."


def print_to_stderr(text: str) -> None:
    """Print a message of the command on standard error."""
    print(f"imbvlm: {printable(text, keep=LINE_BREAKS)}", file=sys.stderr, flush=True)
