"""YAML as 1.2 reads it, each mistake with its line, and written files that read back the same."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imbvlm.base.errors import ConfigError
from imbvlm.base.yaml_file import dump_yaml, parse_scalar, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("5.0e-4", 5e-4),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        (".inf", math.inf),
        ("12", 12),
        ("+5", 5),
        ("010", 10),
        ("0o17", 15),
        ("0xff", 255),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("no", "no"),
        ("off", "off"),
        ("yes", "yes"),
        ("On", "On"),
        ("y", "y"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("0b11", "0b11"),
        ("2024-01-01", "2024-01-01"),
        ("<<", "<<"),
        ("=", "="),
        ("'5e-4'", "5e-4"),
        ("inf", "inf"),
        ("nan", "nan"),
        ("local-dir:models/x", "local-dir:models/x"),
    ],
)
def test_scalars_are_those_of_1_2(text: str, value: object) -> None:
    got = parse_yaml(f"key: {text}").data["key"]
    assert got == value
    assert type(got) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(parse_yaml("[.nan]").data[0])


def test_a_key_given_twice_is_refused_at_any_depth_with_both_lines() -> None:
    text = "a:\n  b: [{c: 1,\n    c: 2}]\n  d: 3\na: 4\n"
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "f.yaml")
    assert [str(problem) for problem in error.value.problems] == [
        "f.yaml:3: 'c' is given twice, first on line 2. Keep one.",
        "f.yaml:5: 'a' is given twice, first on line 1. Keep one.",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x", r"f.yaml:2: .*aliases \(\*x\) are not read; write it out"),
        ("a: 1\nb: [1, 2", r"f.yaml:2: this is not YAML"),
        ("a: 1\n b: 2", r"f.yaml:2: this is not YAML"),
        ("a: 1\nb: @x", r"f.yaml:2: this is not YAML"),
        ("a: 1\n---\nb: 2", r"f.yaml:2: this is not YAML"),
        ("a: 1\nb: !!python/object:os.system {}", r"f.yaml:2: the tag .*python/object:os.system is not read"),
        ("a: 1\nb: !!set {x, y}", r"f.yaml:2: the tag .*set is not read"),
        ("a: !!int word", r"f.yaml: this is not YAML"),
        ("a: 1\n1: 2\n0x1: 3", r"f.yaml:2: a key must be a word, not 1; put it in quotes"),
        ("true: 2", r"f.yaml:1: a key must be a word, not true"),
        ("? [a]\n: 2", r"f.yaml:1: a key must be a word, not a list or a mapping"),
        ("a: \x00", r"f.yaml: this is not YAML"),
        ("[" * 5000, r"f.yaml"),
    ],
)
def test_what_is_not_read_says_where(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, "f.yaml")


def test_every_place_is_known() -> None:
    located = parse_yaml("a:\n  b:\n    - 1\n    - c: 2\n", "f.yaml")
    assert located.where(("a", "b", 1, "c")) == "f.yaml:4"
    assert located.where(("a", "b", 0)) == "f.yaml:3"
    assert located.where(("a", "missing")) == "f.yaml:1"
    assert located.where(("missing",)) == "f.yaml:1"


def test_an_empty_file_has_no_keys() -> None:
    assert parse_yaml("# nothing\n").data == {}


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml: can't read this file: No such file"):
        read_yaml(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes("a: Stra\xdfe".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.yaml: this file is not UTF-8"):
        read_yaml(tmp_path / "latin.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfmethod: decoder\n")
    assert read_yaml(tmp_path / "bom.yaml").data == {"method": "decoder"}


@pytest.mark.parametrize(
    ("text", "value"), [("5e-4", 5e-4), ("", ""), (" ", ""), ("# x", ""), ("null", None), ("[a, 1]", ["a", 1])]
)
def test_words_of_the_command_line(text: str, value: object) -> None:
    assert parse_scalar(text) == value


def test_strings_that_look_like_other_things_are_quoted_where_they_must_be() -> None:
    tree = {"a": "5e-4", "b": "no", "c": "null", "d": "1_000", "e": "0o7"}
    assert dump_yaml(tree) == "{a: '5e-4', b: no, c: 'null', d: 1_000, e: '0o7'}\n"


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), TREES, max_size=5))
def test_what_is_written_reads_back_the_same(tree: dict[str, object]) -> None:
    read = parse_yaml(dump_yaml(tree)).data
    assert read == tree
    assert repr(read) == repr(tree)  # 1 is not 1.0, True is not 1
