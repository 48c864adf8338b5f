"""Retired names and words stay away from the package, the README and docs/; retired words also from the tests."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Names of every kind that were replaced by those of the field.
NAMES = """
    Course EpochUnderWay TrainedEpoch SecondStageRun StageFeatures OnFrozenLogits Pack Seat Feed StoredFeed
    RememberedFeed ImageFeed Examination _Look examine_views Computing Objective for_epoch World DistributedWorld
    Reducer SINGLE ONE_WORKER copy_from_first average_gradients backward_in_parts train_together train_by_turns
    losses_together BuiltLoss lr_at rate_at Mixer cut_and_pasted VariationTransfer LogitKeeper KeptLogits
    EpochLogits Examples Copies HeldCopy held_here Wanted NoCopyError _Proof _Part _Work check_room stored_images
    plan_bytes image_bytes token_knobs quantised ComputedIn TowerWorker TakenRows each_row opened_manifest Found
    PackWriter shown_path limit_findings not_selectable with_tail tail_counts with_test_split with_copies
    copy_digests count_of find_tower TowerSource load_tower save_tower TowerClassifier ImageClassifier rules_of
    TextSide own_tensors load_own_tensors tower_problem text_refusal MethodEntry ClassTexts full_precision retrained
    Knob PostHoc PostHocStep choose_tau choose_alpha choose_post_hoc choose_fork Draw corner_draws finite_draws
    names_of hangs_on onto value_in NEVER_SET Arms by_need fixed_names lets_go _LETS_GO GONE_WITHOUT_NAME set_keys
    tower_configs tower_key Asked FixedSearcher StudySearcher _forget _Journal Outcome Lane side_folder Packs
    PackSearcher PackScheduler PackCallback NothingKept WithinBudget TimeLimit Shortage NoteGroup FreeGroups
    AshaPerMethod Moment Monitor _Curves Attempts Patience said_while running_cluster call_on_worker is_alone
    has_machine_to_itself nodes_that_miss most_cpus most_gpus MOST_LOST LEAST_SHARDS MOST_OF_DISK LEAST_CROP
    AWAY_SECONDS MOST_WAIT_SECONDS BEAT_SECONDS SILENT_SECONDS give_back Together Speeds shape_of commonest_shapes
    asha_share misfit Spent Paces pace_key _Sweep mean_and_spread not_trained name_earlier EARLIER Scored
    ClassRecord Folded Pairs CardFacts others_to patiently mend DATASETS examine explain explained start_worker
    fairness Source Visual Layout Calibration Adjustment Choice Member Range Tower Compute Stopped Stored Fact Pair
"""
# Names of functions that were replaced; a variable may have them.
FUNCTIONS = "told listed unit flat refusal needed nearest connected joined choose causes opening"
RETIRED_WORDS = r"mend(s|ed|ing)?|lets?\s+go|hangs?\s+on|by\s+itself|of\s+itself|carved\s+off|knobs?"
# Of a search: stratum is the word.
RETIRED_WORDS += r"|arms?"
_OUR = "behavi|col|fav|hon|lab|neighb|rig|rum|vap"
_ISE = (
    "categor|character|emphas|final|general|harmon|initial|local|maxim|memor|minim|modern|normal|optim|organ|parametr|penal|"
    "prior|quant|random|real|recogn|regular|serial|special|standard|summar|synchron|token|util|vector|visual"
)
BRITISH = (
    rf"({_OUR})our\w*|\w*({_ISE})is(e[ds]?|er|ers|ing|ation|ations)|analys(e[ds]?|ing)|cent(re|res|red)|grey(s|ish)?|"
    r"\w*(label|model|cancel|travel|signal|channel|total|level|parallel)l(ed|ing)|licences?|artefacts?|catalogues?|defences?|"
    r"fulfil|judgements?|learnt|spelt|metres?|programmes?|whilst|ageing|storeys?|sceptical"
)
FORBIDDEN = re.compile(rf"\b({RETIRED_WORDS}|{BRITISH})\b", re.IGNORECASE)
# Frozen: a flag and a key of JSON as version 0.1 has them, and the tests of both.
ALLOWED = {
    "imbvlm/cli/doctor.py": {"mend"},
    "imbvlm/cli/export_command.py": {"licence"},
    "tests/cli/test_cli.py": {"licence"},
    "tests/cli/test_doctor.py": {"mend"},
    "tests/sweep/export/test_exporter.py": {"licence"},
}
# Uses of a variable that does not say what it holds, in the whole package.
MAX_VAGUE = 40


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def package() -> list[Path]:
    return sorted((ROOT / "imbvlm").rglob("*.py"))


def texts() -> list[Path]:
    templates = (ROOT / "imbvlm").rglob("templates/*")
    return [*package(), *sorted(templates), ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def files_of_tests() -> list[Path]:
    """All but this file, which lists the words."""
    return sorted({*(ROOT / "tests").rglob("*.py")} - {Path(__file__)})


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def identifiers(module: ast.Module) -> Iterator[str]:
    """Names, attributes, arguments, keywords, imported names, and what functions and classes are called."""
    for node in ast.walk(module):
        match node:
            case ast.Name(id=text) | ast.Attribute(attr=text) | ast.arg(arg=text):
                yield text
            case ast.FunctionDef(name=text) | ast.ClassDef(name=text):
                yield text
            case ast.keyword(arg=str(text)):
                yield text
            case ast.alias(name=text, asname=alias):
                yield from (text.rpartition(".")[2], *([alias] if alias else []))


def prose(path: Path) -> str:
    """All of a text or a template; comments and strings, docstrings among them, of a module."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return source
    comments = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    strings = [
        node.value for node in ast.walk(tree(path)) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return "\n".join(comments + strings)


def retired_words(path: Path) -> list[str]:
    """Those of the prose, and identifiers with a British part."""
    allowed = ALLOWED.get(name(path), set())
    words = [match[0] for match in FORBIDDEN.finditer(prose(path)) if match[0].lower() not in allowed]
    if path.suffix != ".py":
        return words
    names = set(identifiers(tree(path)))
    return words + sorted(
        word for word in names if any(re.fullmatch(BRITISH, part) for part in word.lower().split("_"))
    )


def retired_names(path: Path) -> list[str]:
    names = set(identifiers(tree(path)))
    functions = {node.name for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)}
    return sorted(names & set(NAMES.split()) | functions & set(FUNCTIONS.split()))


@pytest.mark.parametrize("path", [*texts(), *files_of_tests()], ids=name)
def test_no_retired_word_and_no_british_spelling(path: Path) -> None:
    assert retired_words(path) == []


@pytest.mark.parametrize("path", package(), ids=name)
def test_no_retired_name(path: Path) -> None:
    assert retired_names(path) == []


@pytest.mark.parametrize("variable", ["one", "found", "known"])
def test_variables_say_what_they_hold(variable: str) -> None:
    uses = Counter[str]()
    for path in package():
        for node in ast.walk(tree(path)):
            match node:
                case ast.Name(id=text) | ast.arg(arg=text) if text == variable:
                    uses[name(path)] += 1
    assert uses.total() < MAX_VAGUE, uses.most_common()


# -------------------------------------------------------------------------------------------------- messages

ERRORS = ("ImbvlmError", "StorageError", "StoreError", "ManifestError", "ConfigError", "Problem", "plugin_error")
# After the value: another sentence or clause, or a name; or the rule itself, which says what would be right.
FIX = re.compile(r"[.;?] \S|\b(must|needs?)\b|suggest_name|\{(EXPORT_AGAIN|_FIX|fix|rule)\}|fix\(\)\}")
# Ends with a sentence of others, or is what a list of findings is about.
PASSED_ON = re.compile(
    r"\{(\w+\.)*(problem|mistake|message|failure|cause|error)\}\.?['\"]$|'the class order'$|Download "
)


def messages(path: Path) -> Iterator[str]:
    """Place and text of each message for users that a module writes where it raises or collects it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ERRORS:
            for part in [*node.args, *(item for arg in node.args if isinstance(arg, ast.List) for item in arg.elts)]:
                is_text = isinstance(part, ast.Constant) and isinstance(part.value, str)
                if (is_text or isinstance(part, ast.JoinedStr)) and " " in ast.unparse(part):
                    yield f"{name(path)}:{node.lineno}: {ast.unparse(part)}"


def test_a_message_says_how_it_is_fixed() -> None:
    texts = [text for path in package() for text in messages(path)]
    assert len(texts) > 250
    assert [text for text in texts if not FIX.search(text) and not PASSED_ON.search(text)] == []
