"""CSV and TSV files: cells are the texts that they are, whatever is between them, or the line at fault is named."""

import gzip
import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from vlm.data.records.open import open_records, stream_records
from vlm.data.records.tables import ROWS_PER_BATCH


def rows_of(folder: Path, name: str, content: str | bytes) -> list[Any]:
    """All rows, by index, which streaming has to give too."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    records = open_records(str(path), folder / "cache")
    rows = [records[index] for index in range(len(records))]
    assert list(stream_records(str(path), folder / "cache")) == rows
    return rows


TEXTS = ["None", "NA", "null", "nan", "N/A", "007", "2.50", "True", "false", "1e5", " x ", "inf", "#N/A", "-", "1_000"]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_cells_are_texts_as_written_and_only_an_empty_one_is_missing(tmp_path: Path, name: str, separator: str):
    lines = [f"a{separator}b", *(f"{text}{separator}" for text in TEXTS), f'""{separator}x']
    rows = rows_of(tmp_path, name, "\n".join(lines))
    assert rows == [*({"a": text, "b": None} for text in TEXTS), {"a": None, "b": "x"}]


TABLE = [{"image": "x.png", "text": "a, b; c"}, {"image": "y.png", "text": "línea"}]
AS_WRITTEN: dict[str, tuple[str, str | bytes]] = {
    "commas": ("a.csv", 'image,text\nx.png,"a, b; c"\ny.png,línea\n'),
    "tabs": ("a.tsv", "image\ttext\nx.png\ta, b; c\ny.png\tlínea"),
    "tabs in a .csv": ("a.csv", "image\ttext\nx.png\ta, b; c\ny.png\tlínea"),
    "commas in a .tsv": ("a.tsv", 'image,text\nx.png,"a, b; c"\ny.png,línea\n'),
    "semicolons": ("a.csv", 'image;text\nx.png;"a, b; c"\ny.png;línea\n'),
    "bars": ("a.csv", "image|text\nx.png|a, b; c\ny.png|línea\n"),
    "a declared separator": ("a.csv", 'sep=;\nimage;text\nx.png;"a, b; c"\ny.png;línea\n'),
    "a byte order mark": ("a.csv", '\ufeffimage,text\nx.png,"a, b; c"\ny.png,línea\n'),
    "UTF-16": ("a.csv", "image\ttext\nx.png\ta, b; c\ny.png\tlínea".encode("utf-16")),
    "Windows' lines": ("a.csv", 'image,text\r\nx.png,"a, b; c"\r\ny.png,línea\r\n'),
    "empty lines": ("a.csv", '\nimage,text\n\nx.png,"a, b; c"\n\ny.png,línea\n\n'),
    "upper case": ("A.CSV", 'image,text\nx.png,"a, b; c"\ny.png,línea\n'),
    "compressed": ("a.csv.gz", gzip.compress('image,text\nx.png,"a, b; c"\ny.png,línea\n'.encode())),
}


@pytest.mark.parametrize("kind", AS_WRITTEN)
def test_the_same_table_however_it_is_written(tmp_path: Path, kind: str):
    assert rows_of(tmp_path, *AS_WRITTEN[kind]) == TABLE


QUOTES = {
    "doubled": ('image,text\nx,"he said ""hi"", twice"\n', 'he said "hi", twice'),
    "several lines": ('image,text\nx,"two\nlines, three"\ny,z\n', "two\nlines, three"),
    "within": ('image,text\nx,a 5" disk\n', 'a 5" disk'),
    "only at the start": ('image,text\nx,"Hello" she said\ny,z\n', '"Hello" she said'),
    "never closed": ('image,text\nx,"begin\ny,z\n', '"begin'),
}


@pytest.mark.parametrize("kind", QUOTES)
def test_quotation_marks_belong_to_the_text_where_they_enclose_no_cell(tmp_path: Path, kind: str):
    content, text = QUOTES[kind]
    assert rows_of(tmp_path, "a.csv", content)[0] == {"image": "x", "text": text}


def test_a_quotation_mark_swallows_no_rows_of_a_table_with_tabs(tmp_path: Path):
    """Read as quoted it would be one row, of which the text has three lines."""
    rows = rows_of(tmp_path, "a.tsv", 'image\ttext\nx\t"begin\ny\tmiddle\nz\tend"\n')
    assert [row["text"] for row in rows] == ['"begin', "middle", 'end"']


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "an unquoted comma": ("image,text\nx,one, two\ny,z\n", r"a.csv, line 2: 3 cell\(s\), but the header has 2"),
    "an unquoted comma everywhere": ("image,text\nx,one, two\ny,three, four\n", r"line 2: 3 cell\(s\)"),
    "too few cells": (
        "image,text,more\nx,y,z\nx,y\n",
        r"line 3: 2 cell\(s\), but the header has 3 \(image, text, more\)",
    ),
    "backslashes": ('image,text\n"x","he said \\"hi\\""\n', "line 2: .* double its own"),
    "Latin-1": ("image,text\nx,un café noir\n".encode("latin-1"), "not UTF-8; if '.*un café noir.*iconv"),
    "Latin-1, late": (b"a,b\n" + b"x,y\n" * 3000 + "x,é\n".encode("latin-1"), "not UTF-8; if .*iconv"),
    "UTF-16 without a mark": ("image,text\nx,y\n".encode("utf-16-le"), "zero bytes.*iconv -f UTF-16LE"),
    "a column twice": ("image,image\nx,y\n", "names 'image' twice"),
    "a page": ("<!DOCTYPE html><html>\n", "a web page"),
    "a pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
    "Parquet": (b"PAR1\x15\x04", "it is Parquet"),
    "nothing but blanks": ("\n\n", "the table has no rows"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_for_certain_is_refused_with_what_to_do(tmp_path: Path, kind: str):
    content, said = REFUSED[kind]
    with pytest.raises(ValueError, match=said):
        rows_of(tmp_path, "a.csv", content)


def test_columns_without_a_name_have_a_number(tmp_path: Path):
    """As pandas writes its index."""
    assert rows_of(tmp_path, "a.csv", ",image\n0,x\n") == [{"column 1": "0", "image": "x"}]


def test_a_table_of_many_rows_and_of_large_cells_survives(tmp_path: Path):
    rows = [{"id": str(number), "text": "x" * (200_000 if number == 7 else 3)} for number in range(ROWS_PER_BATCH + 5)]
    pd.DataFrame(rows).to_csv(tmp_path / "b.csv", index=False)
    assert rows_of(tmp_path, "a.csv", (tmp_path / "b.csv").read_bytes()) == rows
    records = open_records(str(tmp_path / "a.csv"), tmp_path / "cache")
    assert pickle.loads(pickle.dumps(records))[-1] == records[-1] == rows[-1]
    with pytest.raises(IndexError):
        records[len(rows)]
