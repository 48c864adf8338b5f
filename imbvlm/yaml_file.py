"""YAML as 1.2 reads it (`5e-4` is a number, `no` is a word), with duplicate keys refused and every key's line known."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from imbvlm.errors import ConfigError, Problem

KeyPath = tuple[str | int, ...]

# The core schema of YAML 1.2 (section 10.3.2): tag, pattern, first characters.
_CORE_SCHEMA = (
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # Nested aliases grow without bound, and a configuration has no need of them.
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem=f"aliases (*{event.anchor}) are not read; write it out", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    # int(text, 0) refuses leading zeros, which 1.2 reads as decimal.
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


@dataclass(frozen=True)
class YamlTree:
    """The plain data of a YAML document, and the 1-based line of each key and list item by its path."""

    data: Any
    file: str
    lines: Mapping[KeyPath, int] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """`file:line` of a path, or of its nearest written ancestor."""
        for end in range(len(path), -1, -1):
            line = self.lines.get(path[:end])
            if line is not None:
                return f"{self.file}:{line}"
        return self.file


def _walk(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], problems: list[Problem], file: str) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                problems.append(Problem("a key must be a single word, not a list or a mapping", f"{file}:{line}"))
                continue
            key = str(key_node.value)
            if key in first:
                problems.append(
                    Problem(f"{key!r} is given twice, first on line {first[key]}; keep one", f"{file}:{line}")
                )
                continue
            first[key] = line
            lines[(*path, key)] = line
            _walk(value_node, (*path, key), lines, problems, file)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), lines, problems, file)


def parse_yaml(text: str, file: str = "<text>") -> YamlTree:
    """Read one YAML 1.2 document; raises ConfigError for bad syntax, duplicate keys, aliases and unknown tags."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return YamlTree({}, file, {})
        lines: dict[KeyPath, int] = {}
        problems: list[Problem] = []
        _walk(node, (), lines, problems, file)
        if problems:
            raise ConfigError(problems)
        return YamlTree(loader.construct_document(node), file, lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else file
        raise ConfigError([Problem(f"this is not YAML: {error.problem or error.context}", where)]) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([Problem(f"this is not YAML: {error}", file)]) from None
    finally:
        loader.dispose()


def read_yaml(path: str | Path) -> YamlTree:
    """Read a YAML 1.2 file; raises ConfigError when it is missing, not UTF-8, or not YAML."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([Problem(f"can't read this file: {error.strerror or error}", str(path))]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(f"this file is not UTF-8 text: {error.reason}", str(path))]) from None
    return parse_yaml(text, str(path))


def parse_scalar(text: str) -> Any:
    """The value that a word on the command line has in YAML 1.2; raises ConfigError where it is not YAML."""
    return parse_yaml(text, "<value>").data if text.strip() else ""


def dump_yaml(data: Any) -> str:
    """Write plain data as YAML that `parse_yaml` reads back to the same data, keys in their own order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
