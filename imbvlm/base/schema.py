"""Strict sections, of which every configuration consists, dotted keys into them, and each mistake as a sentence."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, ValidationInfo, model_validator

from imbvlm.base.errors import ConfigError, Problem, suggest_name
from imbvlm.base.yaml_file import KeyPath, YamlTree

Tree = dict[str, Any]

# Annotation of an optional section: setting its name or kind to null removes the section.
NULL_NAME_REMOVES = "null name removes"
# Annotation of a field that a version after 0.1 added: digests leave it out at its default, so that they stay valid.
ADDED_LATER = "added later"
# Key of a validation context: where it is True, sections drop every retired key, as for an earlier version's record.
DROP_RETIRED_KEYS = "drop retired keys"


class Section(BaseModel):
    """A part of a configuration: unknown keys are rejected, types are not coerced, values don't change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )

    # Keys of an earlier version. Null is dropped, and another value is rejected with the reason given here. Without a
    # reason, the key never had an effect, and any value is dropped.
    retired_keys: ClassVar[Mapping[str, str | None]] = {}

    # Type checkers still see each field's name and type.
    if not TYPE_CHECKING:

        def __init__(self, /, **values: Any) -> None:
            """Check values given in Python; raises ConfigError with every mistake and the nearest valid name."""
            try:
                self.__pydantic_validator__.validate_python(values, self_instance=self)
            except ValidationError as error:
                raise ConfigError(to_problems(type(self), error, YamlTree(values, ""), values)) from None

        # Trees from files bypass this constructor, so that their mistakes keep their lines.
        __init__.__pydantic_base_init__ = True

    @model_validator(mode="before")
    @classmethod
    def _drop_retired_keys(cls, data: Any, info: ValidationInfo) -> Any:
        if not cls.retired_keys or not isinstance(data, Mapping):
            return data
        drops_all = info.context is not None and info.context.get(DROP_RETIRED_KEYS, False)
        dropped = {
            key for key, reason in cls.retired_keys.items() if drops_all or reason is None or data.get(key) is None
        }
        return {key: value for key, value in data.items() if key not in dropped}


# ------------------------------------------------------------------------------------------------- valid keys


def variants(annotation: Any) -> list[type[Section]]:
    """The section classes that an annotation admits; none for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [variant for part in get_args(annotation) for variant in variants(part)]


def section_classes(root: type[Section], path: KeyPath) -> list[type[Section]]:
    """The section classes that may stand at a path below `root`; none where a plain value stands."""
    classes = [root]
    for part in path:
        fields = [cls.model_fields[str(part)] for cls in classes if str(part) in cls.model_fields]
        classes = [variant for info in fields for variant in variants(info.annotation)]
    return classes


def tag_of(cls: type[Section]) -> tuple[str, str] | None:
    """Key and value that select this variant of a section, such as ("name", "focal"); None without variants."""
    for key in ("name", "kind"):
        info = cls.model_fields.get(key)
        if info is not None and get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1:
            return key, str(get_args(info.annotation)[0])
    return None


def _removes_section(root: type[Section], dotted: str, value: Any) -> bool:
    """Whether the value is null and the dotted key is the name or kind of a section marked NULL_NAME_REMOVES."""
    *above, section, last = ["", *dotted.split(".")]
    if value is not None or last not in ("name", "kind"):
        return False
    fields = [cls.model_fields.get(section) for cls in section_classes(root, tuple(above[1:]))]
    return any(info is not None and NULL_NAME_REMOVES in info.metadata for info in fields)


def dotted_keys_of(root: type[Section]) -> list[str]:
    """Every dotted key of a plain value below `root`, over all variants."""
    keys: dict[str, None] = {}

    def walk(cls: type[Section], prefix: str) -> None:
        for name, info in cls.model_fields.items():
            inner = variants(info.annotation)
            for variant in inner:
                walk(variant, f"{prefix}{name}.")
            if not inner:
                keys[f"{prefix}{name}"] = None

    walk(root, "")
    return list(keys)


def violated_rule(root: type[Section], dotted: str, value: Any) -> str | None:
    """The rule that a value of a dotted key breaks, such as `greater than 0`; None where some variant admits it."""
    if _removes_section(root, dotted, value):
        return None
    *above, last = dotted.split(".")
    rules: dict[str, None] = {}
    for cls in section_classes(root, tuple(above)):
        info = cls.model_fields.get(last)
        if info is None:
            continue
        annotated: Any = Annotated[info.annotation, info]
        adapter: TypeAdapter[Any] = TypeAdapter(annotated, config=cls.model_config)
        try:
            adapter.validate_python(value)
            return None
        except ValidationError as error:
            rules |= dict.fromkeys(_rule(item) for item in error.errors(include_url=False))
    return " or ".join(rules) if rules else "a key of a trial"


def flatten(tree: Tree, prefix: str = "") -> Tree:
    """Dotted keys and plain values of nested data."""
    flat: Tree = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def digest_tree(section: Section) -> Tree:
    """Plain data of a section for a digest: a field marked ADDED_LATER is left out at its default."""
    tree = section.model_dump(mode="json")
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if ADDED_LATER in info.metadata and value == info.get_default(call_default_factory=True):
            del tree[name]
        elif isinstance(value, Section):
            tree[name] = digest_tree(value)
    return tree


# ------------------------------------------------------------------------------------------------ dotted keys


def with_dotted_keys(
    root: type[Section], tree: Tree, values: Mapping[str, Any], resets: Mapping[str, tuple[str, ...]] | None = None
) -> Tree:
    """A deep copy of plain data with dotted keys set; creates the sections on the way.

    Selecting another variant drops the old one's options, except those with the same default in the new one. Setting a
    key of `resets` drops the keys listed there, unless `values` sets them too. A null name removes a section that is
    marked NULL_NAME_REMOVES.
    """
    result = copy.deepcopy(tree)
    values = {
        key.rpartition(".")[0] if _removes_section(root, key, value) else key: value for key, value in values.items()
    }
    for dotted in sorted(values, key=lambda key: key.rpartition(".")[2] not in ("name", "kind")):
        *above, last = dotted.split(".")
        section = result
        for part in above:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        value = copy.deepcopy(values[dotted])
        if section.get(last) != value:
            _drop_old_options(section_classes(root, tuple(above)), section, last, value)
            for other in (resets or {}).get(dotted, ()):
                if value is not None and other not in values:
                    section.pop(other.rpartition(".")[2], None)
        section[last] = value
    return result


def _drop_old_options(classes: list[type[Section]], section: Tree, tag: str, value: Any) -> None:
    new = next((cls for cls in classes if tag_of(cls) == (tag, value)), None)
    old = next((cls for cls in classes if tag_of(cls) == (tag, section.get(tag))), None)
    if new is None:
        return
    for option in list(section):
        info = new.model_fields.get(option)
        before = old.model_fields.get(option) if old is not None else info
        if info is None or (before is not None and before.default != info.default):
            del section[option]


# --------------------------------------------------------------------------------------------------- mistakes


def to_problems(root: type[Section], error: ValidationError, located: YamlTree, data: Any) -> list[Problem]:
    """Each mistake once, with its line and its fix; `data` was checked against `root`."""
    grouped: dict[KeyPath, list[Any]] = {}
    for item in error.errors(include_url=False):
        grouped.setdefault(_written_path(item, data), []).append(item)
    problems = []
    for path, items in grouped.items():
        # pydantic reports a list with a wrong item, too; only the item is a mistake.
        if not any(other != path and other[: len(path)] == path for other in grouped):
            problems.append(Problem(_sentence(root, path, items, data), located.where(path)))
            if items[0]["type"] in ("union_tag_invalid", "union_tag_not_found"):
                problems += _problems_of_all_variants(root, path, located, data)
    return problems


def _problems_of_all_variants(root: type[Section], tag: KeyPath, located: YamlTree, data: Any) -> list[Problem]:
    """Mistakes that no variant admits, for a section with a wrong name or kind: pydantic checks nothing else of it."""
    section = data
    for part in tag[:-1]:
        section = section[part]
    valid = {name: None for cls in section_classes(root, tag[:-1]) for name in cls.model_fields}
    problems = []
    for key, value in section.items():
        dotted = ".".join(map(str, (*tag[:-1], key)))
        if key == tag[-1] or isinstance(value, dict):
            continue
        if key not in valid:
            mistake = f"unknown key {dotted!r}; {suggest_name(str(key), valid)}"
        elif rule := violated_rule(root, dotted, value):
            mistake = f"{dotted} must be {rule}, and is {shown(value)}"
        else:
            continue
        problems.append(Problem(mistake, located.where((*tag[:-1], key))))
    return problems


def _written_path(item: Any, data: Any) -> KeyPath:
    """pydantic's location of a mistake without the names of variants that it adds."""
    path: list[str | int] = []
    value = data
    for index, part in enumerate(item["loc"]):
        is_missing = item["type"] == "missing" and index == len(item["loc"]) - 1
        if isinstance(value, dict) and (part in value or is_missing):
            path.append(part)
            value = value.get(part)
        elif isinstance(value, (list, tuple)) and isinstance(part, int) and part < len(value):
            path.append(part)
            value = value[part]
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path.append(item["ctx"]["discriminator"].strip("'"))
    return tuple(path)


def _sentence(root: type[Section], path: KeyPath, items: list[Any], data: Any) -> str:
    dotted = ".".join(map(str, path)) or "the file"
    item = items[0]
    kind, context, value = item["type"], item.get("ctx", {}), shown(item.get("input"))
    if len(items) > 1:
        return f"{dotted} must be {' or '.join(dict.fromkeys(map(_rule, items)))}, and is {value}"
    if kind == "extra_forbidden":
        return _unknown_key(root, path, data)
    if kind == "invalid_key":
        return f"key {dotted} must be a word"
    if kind == "missing":
        return f"{dotted!r} is required and is not given"
    if kind == "value_error":
        return str(context["error"])
    if kind == "union_tag_not_found":
        valid = sorted(tag[1] for cls in section_classes(root, path[:-1]) if (tag := tag_of(cls)) is not None)
        return f"{dotted!r} is required and is not given; valid: {', '.join(valid)}"
    if kind in ("union_tag_invalid", "literal_error"):
        names = str(context.get("expected_tags") or context["expected"]).replace(" or ", ", ").split(",")
        got = item["input"].get(path[-1]) if kind == "union_tag_invalid" else item["input"]
        fix = suggest_name(str(got), [name.strip().strip("'") for name in names])
        return f"{dotted} is {shown(got)}, which is not one of its values; {fix}"
    rule = _rule(item)
    return f"{dotted} must be {rule}, and is {value}" if rule != item["msg"] else f"{dotted} is {value}: {rule}"


def _rule(item: Any) -> str:
    """pydantic's rule in YAML's words, such as `a section of keys`."""
    if item["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "a section of keys"
    return str(item["msg"]).removeprefix("Input should be ").replace("tuple", "list").replace("Tuple", "list")


def _unknown_key(root: type[Section], path: KeyPath, data: Any) -> str:
    dotted = ".".join(map(str, path))
    classes = section_classes(root, path[:-1])
    reason = next(filter(None, (cls.retired_keys.get(str(path[-1])) for cls in classes)), None)
    if reason is not None:
        return f"{dotted} {reason}"
    section = data
    for part in path[:-1]:
        section = section[part]
    chosen = [cls for cls in classes if (tag := tag_of(cls)) is not None and section.get(tag[0]) == tag[1]]
    valid = [name for cls in chosen or classes for name in cls.model_fields]
    owner = "".join(f" for {'.'.join(map(str, path[:-1]))} {tag_of(cls)[1]}" for cls in chosen)  # type: ignore[index]
    others = [tag[1] for cls in classes if path[-1] in cls.model_fields and (tag := tag_of(cls)) is not None]
    fix = f"only {', '.join(others)} has it" if others else suggest_name(str(path[-1]), valid)
    return f"unknown key {dotted!r}{owner}; {fix}"


def shown(value: Any) -> str:
    """A value as a message shows it; a long one is cut."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
