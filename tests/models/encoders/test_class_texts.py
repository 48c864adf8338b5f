"""Texts for classes: CuPL's form, and every other form refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from imbvlm.base.errors import ConfigError, ImbvlmError
from imbvlm.config.trial_config import TrialConfig
from imbvlm.models.encoders.class_texts import describe_class_texts, read_class_texts

NAMES = ["snow leopard", "lynx", "wolf"]


def write(folder: Path, content: Any) -> str:
    path = folder / "texts.json"
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_sentences_are_read_and_classes_without_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, {"lynx": ["a cat with tufted ears.", "a lynx in snow."]})
    assert read_class_texts(path, NAMES) == {"lynx": ["a cat with tufted ears.", "a lynx in snow."]}
    assert describe_class_texts(path, NAMES) == (
        f"prompts.texts {path}: 1 of 3 classes; 2 without keep the templates: snow leopard, wolf"
    )
    assert describe_class_texts(path, ["lynx"]) == f"prompts.texts {path}: 1 of 1 class"
    assert read_class_texts(None, NAMES) == {}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", r"must be a JSON file, and .* is none: .*\. Write an object such as"),
        ([["lynx", "a"]], r"must have sentences by class, and .* has \[\['lynx', 'a'\]\]\. Write"),
        ({}, r"must have sentences by class, and .* has \{\}\. Write"),
        ({"lynx": "a cat"}, r"a list of sentences for each class, and 'lynx' has 'a cat' in .*\. Write"),
        ({"lynx": []}, r"and 'lynx' has \[\] in"),
        ({"lynx": ["a cat", " "]}, r"and 'lynx' has ' ' among them in"),
        ({"lynx": ["a cat", 7]}, r"and 'lynx' has 7 among them in"),
        ({"lynx": {"a": ["b"]}, "wolf": [3]}, r"and 'lynx' has \{'a': \['b'\]\}, 'wolf' has 3 among them in"),
        ('{"lynx": ["a"], "wolf": ["b"], "lynx": ["c"]}', r"is none: it names 'lynx' more than once\. Write"),
        ({"lynx": ["a \ud800"]}, r"and 'lynx' has 'a \\ud800' among them"),
        ('{"lynx": ["caf\xe9"]}'.encode("latin-1"), r"must be UTF-8, and byte 14 of .* isn't\. Save it as UTF-8"),
    ],
)
def test_another_form_or_class_is_one_sentence(tmp_path: Path, content: Any, sentence: str) -> None:
    with pytest.raises(ImbvlmError, match=sentence) as caught:
        read_class_texts(write(tmp_path, content), NAMES)
    assert "\n" not in str(caught.value)


def test_wrong_sentences_and_unknown_classes_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ImbvlmError) as caught:
        read_class_texts(write(tmp_path, {"linx": ["a cat"], "Wolf": ["a dog"], "lynx": 3}), NAMES)
    first, *others = str(caught.value).splitlines()
    assert "'lynx' has 3 in" in first
    assert others[0].endswith("texts.json has sentences for 2 classes that the manifest doesn't have.")
    assert others[1:] == ["  'Wolf': did you mean 'wolf'?", "  'linx': did you mean 'lynx'?"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImbvlmError, match=r"prompts\.texts must be a JSON file, and .*gone\.json is not there\. Give"):
        read_class_texts(str(tmp_path / "gone.json"), NAMES)


def test_templates_join_only_texts() -> None:
    tree = {"method": "zero_shot", "data": {"manifest": "m.parquet"}, "encoder": {"name": "tinylit_lite0"}}
    with pytest.raises(ConfigError, match=r"prompts\.add_templates has no effect without prompts\.texts"):
        TrialConfig.from_tree({**tree, "prompts": {"add_templates": True}})
