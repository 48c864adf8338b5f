"""Trees from CSV files, columns of a table and iNaturalist's categories; all mistakes of a file at once, by name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imbvlm.base.csv_cells import csv_line, escape_cell
from imbvlm.cli.app import main
from imbvlm.data.manifest import Manifest, ManifestError, label_rows
from imbvlm.data.sources.inaturalist import from_inaturalist
from imbvlm.data.sources.table_files import from_table
from imbvlm.data.sources.taxonomy_files import read_taxonomy
from imbvlm.longtail.taxonomy import Taxonomy

ROOT = Path(__file__).parents[3]
CLASSES = ("lynx", "cat", "wolf")
TREE = Taxonomy(("family", "genus", "species"), (("Felidae", "Lynx"), ("Felidae", "Felis"), ("Canidae", "Canis")))


def written(folder: Path, text: str) -> str:
    path = folder / "tree.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


def findings_of(folder: Path, text: str, classes: tuple[str, ...] = CLASSES) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        read_taxonomy(written(folder, text), classes)
    return list(caught.value.findings)


def test_a_file_of_lineages_and_one_of_parents_are_one_tree(tmp_path: Path) -> None:
    lineages = "species,family,genus\n wolf ,Canidae,Canis\n\ncat,Felidae,Felis\nlynx,Felidae,Lynx\n"
    assert read_taxonomy(written(tmp_path, lineages), CLASSES) == TREE
    parents = (
        "class,parent\nwolf,Canis\ncat,Felis\nlynx,Lynx\nCanis,Canidae\nFelis,Felidae\nLynx,Felidae\n"
        "Canidae,\nFelidae,\n"
    )
    read = read_taxonomy(written(tmp_path, "\ufeff" + parents), CLASSES)
    assert read == Taxonomy(("level 1", "level 2", "class"), TREE.lineages)


def test_every_mistake_of_a_file_of_lineages_is_named(tmp_path: Path) -> None:
    text = "species,family,genus\nlynx,Felidae,Lynx\nlynx,Canidae,Lynx\ncatt,Felidae,Felis\nwolf,Canidae\n"
    text += "dog,Canidae,Canis\nfox,Vulpidae,Canis\n"
    assert findings_of(tmp_path, text, (*CLASSES, "dog", "fox")) == [
        "'catt' is no class; did you mean 'cat'?",
        "'lynx' lies in 'Felidae / Lynx' and in 'Canidae / Lynx'; give it one place, or each of them a name of its own",
        "'cat' has no row; did you mean 'catt'?",
        "'wolf' has no genus",
        "the genus 'Canis' lies in 'Canidae' and in 'Vulpidae'; give it one place, or each of them a name of its own",
    ]


def test_a_taxon_in_two_places_is_named(tmp_path: Path) -> None:
    text = "species,family,genus\nlynx,Felidae,Felis\ncat,Felidae,Felis\nwolf,Canidae,Felis\n"
    assert findings_of(tmp_path, text) == [
        "the genus 'Felis' lies in 'Felidae' and in 'Canidae'; give it one place, or each of them a name of its own",
        "if family, genus has the lowest rank first, turn it round: the highest comes first",
    ]


def test_every_mistake_of_a_file_of_parents_is_named(tmp_path: Path) -> None:
    text = (
        "class,parent\nlynx,Felidae\ncat,Felis\nFelis,Felidae\nFelidae,\nwolf,Felidea\nfox,Felis\n"
        "egg,hen\nhen,egg\nFelis,Lynxes\nown,own\n"
    )
    assert findings_of(tmp_path, text) == [
        "'Felis' lies in 'Felidae' and in 'Lynxes'; give it one place, or each of them a name of its own",
        "'Felidea' is a parent and has no row; give it one, with an empty parent if it has none; did you mean "
        "'Felidae'?",
        "'fox' is no class; valid: cat, lynx, wolf",
        "'egg' in 'hen' in 'egg' is a circle; correct a parent",
        "'own' in 'own' is a circle; correct a parent",
        "'cat' has 2 ancestors, and the ranks above the classes are level 1",
    ]


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("", "must begin with a heading, such as species,order,family or class,parent, between commas, and is empty"),
        ("species\nlynx\n", "must begin with a heading"),
        ("species;genus\nlynx;Lynx\n", "between commas, got 'species;genus'"),
        ("species,genus\n,Lynx\nlynx,Lynx\n,Felis\n", "2 rows without a name in the first column"),
        ("species,genus\nlynx,Lynx,more\n", "'lynx' has more cells than the heading"),
        ("lynx,Lynx\ncat,Felis\nwolf,Canis\n", "the first row must be a heading, such as species,order,family, got"),
        ("parent,class\nLynx,lynx\nLynx,cat\nLynx,wolf\n", "a name must stand before its parent, got the heading"),
        ('species,genus\nlynx,"Lynx\n', "it can't be read as CSV"),
        ("species,genus,genus\nlynx,a,b\ncat,a,b\nwolf,a,b\n", "each with a name of its own"),
    ],
)
def test_a_file_without_its_form_is_refused(tmp_path: Path, text: str, finding: str) -> None:
    assert finding in findings_of(tmp_path, text)[0]


def test_all_mistakes_of_form_are_named_at_once(tmp_path: Path) -> None:
    findings = findings_of(tmp_path, "species,genus\n,Lynx\nlynx,Lynx,more\ncat,Felis,x,y\n")
    assert [text.partition(";")[0] for text in findings] == [
        "1 row without a name in the first column",
        "'lynx' has more cells than the heading",
        "'cat' has more cells than the heading",
    ]


def test_names_that_only_look_different_are_told_apart(tmp_path: Path) -> None:
    """Accents may be letters of their own, as macOS writes them in names of folders."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    findings = findings_of(tmp_path, f"drink,kind\n{decomposed},hot\nTEA,hot\n", (composed, "tea"))
    assert findings == [
        f"'{decomposed}' is no class; it looks like '{composed}', whose letters are coded in another way (Unicode NFC "
        "and NFD); copy that name",
        "'TEA' is no class; did you mean 'tea'?",
        f"'{composed}' has no row; it looks like '{decomposed}', whose letters are coded in another way (Unicode NFC "
        "and NFD); copy that name",
        "'tea' has no row; did you mean 'TEA'?",
    ]


def test_a_long_circle_and_a_long_list_have_short_texts(tmp_path: Path) -> None:
    text = "class,parent\n" + "".join(f"x{number},x{(number + 1) % 500}\n" for number in range(500))
    (circle,) = [finding for finding in findings_of(tmp_path, text, ("lynx",)) if "circle" in finding]
    assert (
        circle
        == "'x0' in 'x1' in 'x2' in 'x3' in 'x4' in 'x5' in 'x6' in 'x7' in ... in 'x0' is a circle; correct a parent"
    )
    many = str(ManifestError("tree.csv", [f"{number} is wrong" for number in range(1_000)], "tree")).splitlines()
    assert (len(many), many[0], many[-1]) == (202, "1000 things are wrong with the tree tree.csv:", "  and 800 more.")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_an_error_says_that_the_file_is_a_tree_and_what_it_is_written_in(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "tree.csv"
    path.write_text("species,genus\nlynx,Lynx\n", encoding=encoding)
    with pytest.raises(ManifestError, match=r"wrong with the tree .*tree.csv:\n  it is in UTF-16.* save it as UTF-8"):
        read_taxonomy(str(path), CLASSES)
    again = pickle.loads(pickle.dumps(ManifestError("t.csv", ["it is empty"], "tree")))
    assert str(again) == "1 thing is wrong with the tree t.csv:\n  it is empty."


def test_a_name_in_many_places_has_a_short_sentence(tmp_path: Path) -> None:
    text = "species,genus\n" + "".join(f"lynx,{number}\n" for number in range(500)) + "cat,0\nwolf,1\n"
    (finding,) = findings_of(tmp_path, text)
    assert finding.startswith("'lynx' lies in '0' and in '1' and in '2' and in '3' and in '4' and in 495 more; give it")


def test_thousands_of_wrong_names_take_no_search_each(tmp_path: Path) -> None:
    classes = tuple(f"class {number}" for number in range(3_000))
    text = "class,group\n" + "".join(f"kind {number},all\n" for number in range(3_000))
    findings = findings_of(tmp_path, text, classes)
    assert len(findings) == 6_000
    assert sum("names are valid" in finding for finding in findings) == 40


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=5).filter(
    lambda name: name == name.strip() and not name.startswith("\ufeff")
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAMES, NAMES | st.just("")), max_size=12), st.lists(NAMES, max_size=6, unique=True))
def test_wild_parents_are_a_tree_or_mistakes(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], more: list[str]
) -> None:
    """Without a hang or another error, and a tree has the parents of its file."""
    classes = tuple(dict.fromkeys([*more, *(name for name, _ in rows[::2])]))
    text = "class,parent\n" + "".join(csv_line(map(escape_cell, row)) for row in rows)
    try:
        read = read_taxonomy(written(tmp_path_factory.mktemp("wild"), text), classes)
    except ManifestError:
        return
    parents = dict(rows)
    for name, lineage in zip(classes, read.lineages, strict=True):
        path = (name, *reversed(lineage))
        assert all(parents[child] == parent for child, parent in zip(path, (*path[1:], ""), strict=True))


def test_a_table_has_the_tree_in_columns(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    rows = ["a.jpg,Felidae,Felis,cat", "b.jpg,Canidae,Canis,wolf", "c.jpg,Felidae,Lynx,lynx", "d.jpg,Felidae,Felis,cat"]
    table.write_text("path,family,genus,species\n" + "\n".join(rows), encoding="utf-8")
    columns = {"label": "species"}
    read = from_table([str(table)], str(tmp_path), "t", columns=columns, taxonomy=("family", "genus", "species"))
    assert read.class_names == ("cat", "lynx", "wolf")
    assert read.taxonomy == Taxonomy(TREE.ranks, (TREE.lineages[1], TREE.lineages[0], TREE.lineages[2]))
    without = from_table([str(table)], str(tmp_path), "t", columns=columns, taxonomy=("family", "genus"))
    assert without.taxonomy == Taxonomy(("family", "genus", "class"), read.taxonomy.lineages)


@pytest.mark.parametrize(
    ("rows", "taxonomy", "finding"),
    [
        (["a.jpg,F,cat", "b.jpg,G,cat"], ("genus", "label"), "'cat' lies in 'F' and in 'G'"),
        (["a.jpg,F,cat", "b.jpg,,cow"], ("genus", "label"), "'cow' has no genus"),
        (["a.jpg,F,cat"], ("genera",), "there is no column 'genera' for --taxonomy; did you mean 'genus'?"),
        (["a.jpg,F,cat"], ("label",), "a tree needs two ranks or more"),
    ],
)
def test_mistakes_of_a_tables_tree_are_named(
    tmp_path: Path, rows: list[str], taxonomy: tuple[str, ...], finding: str
) -> None:
    table = tmp_path / "t.csv"
    table.write_text("\n".join(["path,genus,label", *rows]), encoding="utf-8")
    with pytest.raises(ManifestError) as caught:
        from_table([str(table)], str(tmp_path), "t", taxonomy=taxonomy)
    assert any(finding in text for text in caught.value.findings), caught.value.findings


TAXA = [
    {"id": number, "name": name, "kingdom": kingdom, "phylum": "p" + kingdom, "class": "c" + kingdom,
     "order": "o" + kingdom, "family": "f" + kingdom, "genus": genus}
    for number, (name, kingdom, genus) in enumerate(
        [("O. crocata", "Plantae", "Oenanthe"), ("O. deserti", "Animalia", "Oenanthe"), ("lynx", "Animalia", "Lynx")]
    )
]  # fmt: skip


def inaturalist(folder: Path, taxa: list[dict[str, object]], rank: str = "species") -> Manifest:
    file = {
        "images": [{"id": taxon["id"], "file_name": f"{taxon['id']}.jpg"} for taxon in taxa],
        "annotations": [{"image_id": taxon["id"], "category_id": taxon["id"]} for taxon in taxa],
        "categories": taxa,
    }
    path = folder / "train.json"
    path.write_text(json.dumps(file))
    return from_inaturalist({"train": str(path)}, str(folder), "inat", rank=rank)


def test_inaturalists_categories_are_a_tree_with_homonyms_apart(tmp_path: Path) -> None:
    read = inaturalist(tmp_path, TAXA)
    assert read.taxonomy is not None
    assert read.taxonomy.ranks == ("kingdom", "phylum", "class", "order", "family", "genus", "species")
    assert [names[-1] for names in read.taxonomy.lineages] == ["Oenanthe (fPlantae)", "Oenanthe (fAnimalia)", "Lynx"]
    read.write(str(tmp_path / "m.parquet"))
    assert Manifest.read(str(tmp_path / "m.parquet")).taxonomy == read.taxonomy
    assert label_rows(str(tmp_path / "m.parquet")).taxonomy == read.taxonomy


def test_inaturalists_higher_classes_have_the_ranks_above_them(tmp_path: Path) -> None:
    read = inaturalist(tmp_path, TAXA, rank="class")
    assert read.taxonomy == Taxonomy(
        ("kingdom", "phylum", "class"), (("Animalia", "pAnimalia"), ("Plantae", "pPlantae"))
    )
    assert inaturalist(tmp_path, TAXA, rank="kingdom").taxonomy is None
    homonyms = inaturalist(tmp_path, TAXA, rank="genus")
    assert homonyms.taxonomy is None
    assert homonyms.notes == ("no taxonomy: 'Oenanthe' lies in several places, as do 0 other classes",)


def test_categories_without_ranks_have_no_tree(tmp_path: Path) -> None:
    plain = [{"id": taxon["id"], "name": taxon["name"]} for taxon in TAXA]
    assert inaturalist(tmp_path, plain).taxonomy is None
    some = inaturalist(tmp_path, [{**TAXA[0], "genus": ""}, *TAXA[1:]])
    assert some.taxonomy is None
    assert some.notes == ("no taxonomy: 1 categories lack a rank, such as 0",)


def test_a_manifest_without_a_tree_has_the_metadata_that_it_had(tmp_path: Path) -> None:
    read = inaturalist(tmp_path, [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}])
    read.write(str(tmp_path / "m.parquet"))
    assert b"taxonomy" not in (tmp_path / "m.parquet").read_bytes()


def exit_code(arguments: list[str]) -> object:
    with pytest.raises(SystemExit) as caught:
        main(["manifest", "build", *arguments])
    return caught.value.code


def test_the_emoji_have_unicodes_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "emoji.parquet")
    tree = ROOT / "sweeps" / "emoji_tree.csv"
    assert exit_code(["--table", "embedded:emoji_lt", "--taxonomy", str(tree), "-o", out]) == 0
    assert "taxonomy          group 8, subgroup 68" in capsys.readouterr().out
    read, embedded = Manifest.read(out), Manifest.read("embedded:emoji_lt")
    assert read.class_names == embedded.class_names
    assert read.table.select(["bytes", "label", "split"]).equals(embedded.table.select(["bytes", "label", "split"]))
    assert read.taxonomy is not None
    assert dict(zip(read.class_names, read.taxonomy.lineages, strict=True))["cat face"] == ("Smileys & Emotion",)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--folders", "photos", "--taxonomy", "family,genus"], "--taxonomy takes a .csv file"),
        (["--table", "t.csv", "--taxonomy", "family,,genus"], "names of columns between commas"),
    ],
)
def test_a_tree_that_a_source_cant_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    (tmp_path / "t.csv").write_text("path,label\na.jpg,a\n")
    arguments = [str(tmp_path / "t.csv") if argument == "t.csv" else argument for argument in arguments]
    assert exit_code([*arguments, "-o", str(tmp_path / "m.parquet")]) == 1
    assert reason in capsys.readouterr().err
