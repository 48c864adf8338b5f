"""YAML 1.2 (`5e-4` is a number, `no` a string), with the line of every key; duplicate keys are rejected."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from imbvlm.base.errors import ConfigError, Problem

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


_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null"))


# Far above the size of a cluster file; nested aliases could expand beyond memory.
MAX_NODES = 100_000


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # Nested aliases expand without bound, and a configuration doesn't need them.
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem=f"aliases (*{event.anchor}) are not read; write it out", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


# PyYAML's own resolvers read YAML 1.1: `off` as false, `1_000` and `1:30` as numbers, `<<` as a merge.
_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    # int(text, 0) rejects leading zeros, which YAML 1.2 reads as decimal.
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)

_FIX = "Indent by spaces, and put text with a colon in quotes."

# Line breaks that PyYAML folds to spaces in any but double quotes.
_UNUSUAL_BREAKS = re.compile("[\x85\u2028\u2029]")


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if _UNUSUAL_BREAKS.search(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_str)


@dataclass(frozen=True)
class YamlTree:
    """The plain data of a YAML document, and the location (`file:line`) of each key and list item by its path."""

    data: Any
    file: str
    places: Mapping[KeyPath, str] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """The location of a path, or of its nearest ancestor in the file."""
        locations = (self.places.get(path[:end]) for end in range(len(path), -1, -1))
        return next((location for location in locations if location is not None), self.file)

    def part(self, key: str | int, data: Any) -> "YamlTree":
        """The data of one key, with the locations of the keys in it."""
        return YamlTree(data, self.file, {path[1:]: place for path, place in self.places.items() if path[:1] == (key,)})


def _places(node: yaml.Node, file: str) -> dict[KeyPath, str]:
    """The location of each key and list item; raises ConfigError for duplicate keys and unknown tags."""
    places: dict[KeyPath, str] = {}
    problems: list[Problem] = []
    _walk(node, (), places, problems, file)
    if problems:
        raise ConfigError(problems)
    return places


def _walk(node: yaml.Node, path: KeyPath, places: dict[KeyPath, str], problems: list[Problem], file: str) -> None:
    places.setdefault(path, _location(node, file))
    if node.tag not in _TAGS:
        problems.append(Problem(f"the tag {node.tag} is not read. Write plain values.", _location(node, file)))
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            place = _location(key_node, file)
            if key_node.tag != "tag:yaml.org,2002:str":
                problems.append(Problem(f"a key must be a word, not {_describe_key(key_node)}.", place))
            elif key_node.value in first:
                line = first[key_node.value]
                problems.append(Problem(f"{key_node.value!r} is given twice, first on line {line}. Keep one.", place))
            else:
                first[key_node.value] = key_node.start_mark.line + 1
                places[(*path, key_node.value)] = place
                _walk(value_node, (*path, key_node.value), places, problems, file)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), places, problems, file)


def _location(node: yaml.Node, file: str) -> str:
    return f"{file}:{node.start_mark.line + 1}"


def _describe_key(key: yaml.Node) -> str:
    return f"{key.value}; put it in quotes" if isinstance(key, yaml.ScalarNode) else "a list or a mapping"


def parse_yaml(text: str, file: str = "<text>") -> YamlTree:
    """Read one YAML 1.2 document; raises ConfigError for bad syntax, duplicate keys, aliases and unknown tags."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return YamlTree({}, file, {})
        places = _places(node, file)
        return YamlTree(loader.construct_document(node), file, places)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else file
        raise ConfigError([Problem(f"this is not YAML: {error.problem or error.context}. {_FIX}", where)]) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([Problem(f"this is not YAML: {error}. {_FIX}", file)]) from None


def read_yaml(path: str | Path) -> YamlTree:
    """Read a YAML 1.2 file; raises ConfigError when it is missing, not UTF-8, or not YAML."""
    return parse_yaml(_read_text(path), str(path))


def read_foreign_yaml(path: str | Path) -> YamlTree:
    """Read another tool's file as that tool does: YAML 1.1 with aliases. Raises ConfigError."""
    text, file = _read_text(path), str(path)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _num_nodes(node, {}) > MAX_NODES:
            raise ConfigError(
                [Problem(f"its aliases expand to more than {MAX_NODES:,} values. Write fewer of them.", file)]
            )
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError([Problem(f"this is not YAML: {error}. {_FIX}", file)]) from None
    return YamlTree(data, file, {} if node is None else _places(node, file))


def _num_nodes(node: yaml.Node, counts: dict[int, int]) -> int:
    """Number of values in a node with its aliases expanded; raises RecursionError for a node within itself."""
    if id(node) not in counts:
        children = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        counts[id(node)] = 1 + sum(_num_nodes(child, counts) for child in children)
    return counts[id(node)]


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            [Problem(f"can't read this file: {error.strerror or error}. Check its name and access.", str(path))]
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            [Problem(f"this file is not UTF-8 text: {error.reason}. Save it as UTF-8.", str(path))]
        ) from None


def parse_scalar(text: str) -> Any:
    """The value of a command-line word in YAML 1.2; raises ConfigError where it is not YAML."""
    located = parse_yaml(text, "<value>")
    return located.data if located.places else ""


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that `parse_yaml` reads back to the same data, keys in their own order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
