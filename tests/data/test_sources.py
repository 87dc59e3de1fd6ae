"""Every kind of file, and every way in which one can be broken."""

from __future__ import annotations

import gzip
import json
import time

import pytest

from tunesmith.core.errors import DataError, RecipeError
from tunesmith.core.recipe import Source
from tunesmith.data.problem import Problem
from tunesmith.data.readers import LONGEST_LINE
from tunesmith.data.sources import files_of, fingerprint, keyed, read

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "ü\u2028\x85d"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def rows_of(path, **settings):
    return list(read(Source(path=path, **settings)))


def only_problem(path):
    problems = [row for _, row in rows_of(path) if isinstance(row, Problem)]
    assert len(problems) == 1
    return problems[0]


def test_jsonl_keys_are_lines_and_blank_lines_are_no_rows(write):
    path = write("a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\n", 1))
    assert rows_of(path) == [(f"{path}:1", ROWS[0]), (f"{path}:3", ROWS[1])]


def test_unicode_line_separators_do_not_end_a_line(write):
    # str.splitlines would cut inside the second row.
    assert [row for _, row in rows_of(write("a.jsonl", LINES))] == ROWS


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.ndjson", "a.json", "b.json", "c.json", "a.parquet", "a.json.gz"])
def test_every_container_gives_the_same_rows(write, name, tmp_path):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    whole = json.dumps({"data": ROWS} if name == "b.json" else ROWS).encode()
    content = {
        "a.jsonl.gz": gzip.compress(LINES, mtime=0),
        # Two frames one after the other, as parallel compressors write them.
        "a.jsonl.zst": b"".join(zstandard.compress(part) for part in LINES.splitlines(keepends=True)),
        "a.ndjson": LINES,
        "c.json": LINES,
        "a.json.gz": gzip.compress(whole, mtime=0),
    }.get(name, whole)
    path = write(name, content)
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert rows_of(path) == [(f"{path}:1", ROWS[0]), (f"{path}:2", ROWS[1])]


def test_csv_with_line_breaks_in_cells_names_the_first_line_of_each_record(write):
    path = write("a.csv", 'prompt,completion\n"a\nb",c\nd,"e ""f"""\n')
    assert rows_of(path) == [(f"{path}:2", {"prompt": "a\nb", "completion": "c"}), (f"{path}:4", {"prompt": "d", "completion": 'e "f"'})]


def test_tsv_and_ragged_rows(write):
    path = write("a.tsv", "prompt\tcompletion\nx\ty\nz\n")
    (_, row), (key, problem) = rows_of(path)
    assert row == {"prompt": "x", "completion": "y"}
    assert (key, problem.code) == (f"{path}:3", "ragged_row")


def test_a_text_file_is_one_document(write):
    path = write("a.txt", "one\n\ntwo\n")
    assert rows_of(path) == [(f"{path}:1", {"text": "one\n\ntwo\n"})]


def test_a_json_object_with_turns_is_one_row(write):
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    path = write("a.json", json.dumps(row))
    assert rows_of(path) == [(f"{path}:1", row)]


def test_a_folder_is_read_in_order_without_hidden_files(write, tmp_path):
    write("d/b.jsonl", [ROWS[1]])
    write("d/a/a.jsonl", [ROWS[0]])
    write("d/.hidden.jsonl", "{")
    write("d/readme.pdf", "x")
    folder = str(tmp_path / "d")
    assert rows_of(folder) == [(f"{folder}/a/a.jsonl:1", ROWS[0]), (f"{folder}/b.jsonl:1", ROWS[1])]


def test_limit(write):
    assert len(rows_of(write("a.jsonl", [ROWS[0]] * 5), limit=2)) == 2


def test_a_broken_line_is_named_with_column_and_words_and_reading_goes_on(write):
    path = write("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a" "completion": 1}\n' + LINES)
    found = rows_of(path)
    assert len(found) == 4
    problem = only_problem(path)
    assert problem.key == f"{path}:2"
    assert problem.code == "broken_json"
    assert "column 16" in problem.message
    assert '"completion": 1' in problem.message


def test_not_utf8_names_the_byte_in_the_file(write):
    first = b'{"prompt": "a", "completion": "b"}\n'
    problem = only_problem(write("a.jsonl", first + b'{"prompt": "\xe9"}\n'))
    assert problem.code == "not_utf8"
    assert f"0xe9 at offset {len(first) + 12}" in problem.message
    problem = only_problem(write("b.jsonl", b"\xef\xbb\xbf" + b'{"prompt": "\xe9"}\n'))
    assert "at offset 15" in problem.message


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"a": NaN}', "not_a_number"),
        (b'{"a": -Infinity}', "not_a_number"),
        (b"[1, 2]", "not_an_object"),
        (b"null", "not_an_object"),
        (b'{"a": 1, "a": 2}', "broken_json"),
        (b'{"a": "\\ud83d"}', "half_character"),
        (b'{"a": "' + b"[" * 5 + b'"', "broken_json"),
        (b"[" * 200_000, "broken_json"),
        (b'{"a": "x\x00y"}', "broken_json"),
    ],
)
def test_bad_lines(write, line, code):
    assert only_problem(write("a.jsonl", LINES + line + b"\n" + LINES)).code == code


def test_a_whole_surrogate_pair_is_a_character(write):
    assert rows_of(write("a.jsonl", b'{"text": "\\ud83d\\ude00"}\n'))[0][1] == {"text": "\U0001f600"}


def test_a_ten_megabyte_line_is_read_quickly_and_a_longer_one_than_the_limit_is_skipped(write):
    start = time.perf_counter()
    rows = rows_of(write("a.jsonl", b'{"text": "' + b"a" * 10_000_000 + b'"}\n' + LINES))
    assert time.perf_counter() - start < 2
    assert len(rows[0][1]["text"]) == 10_000_000
    (_, problem), *rest = rows_of(write("b.jsonl", b'{"text": "' + b"a" * (LONGEST_LINE + 5_000_000) + b'"}\n' + LINES))
    assert problem.code == "line_too_long"
    assert [row for _, row in rest] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("a.jsonl", b"", "empty_file"),
        ("a.jsonl", b"\n \n", "empty_file"),
        ("a.json", b"[]", "empty_file"),
        ("a.json", b"", "empty_file"),
        ("a.txt", b" \n", "empty_file"),
        ("a.csv", b"", "empty_file"),
        ("a.csv", b"a,b\n", "empty_file"),
        ("a.csv", b"a,a\n1,2\n", "bad_header"),
        ("a.csv", b'a,b\n"x,y\n', "broken_csv"),
        ("a.json", b'[{"a": 1},]', "broken_json"),
        ("a.json", b'[{"a": NaN}]', "broken_json"),
        ("a.json", b'"words"', "not_an_object"),
        ("a.json", b'[{"a": "\xff"}]', "not_utf8"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "not_utf8"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-12], "broken_archive"),
        ("a.jsonl.gz", LINES, "broken_archive"),
        ("a.jsonl.zst", LINES, "broken_archive"),
        ("a.parquet", b"PAR1 no", "broken_parquet"),
        ("a.xlsx", b"PK", "unknown_ending"),
        ("a", b"x", "unknown_ending"),
    ],
)
def test_broken_files(write, name, content, code):
    path = write(name, content)
    with pytest.raises(DataError) as caught:
        rows_of(path)
    assert caught.value.code == code
    assert caught.value.where.startswith(path)
    assert caught.value.remedy


def test_a_cut_zst_file_is_an_error_and_not_a_shorter_one(write):
    import zstandard

    lines = b"".join(b'{"text": "%d"}\n' % number for number in range(20_000))
    with pytest.raises(DataError) as caught:
        rows_of(write("a.jsonl.zst", zstandard.compress(lines)[:-20]))
    assert caught.value.code == "broken_archive"


def test_broken_json_array_names_line_and_column(write):
    with pytest.raises(DataError, match=r"line 2, column 8") as caught:
        rows_of(write("a.json", '[{"a": 1},\n {"b": x}]'))
    assert caught.value.where.endswith("a.json:2")


def test_rows_of_a_json_array_that_are_no_objects_are_problems(write):
    found = rows_of(write("a.json", '[{"a": 1}, 3, {"a": "\\ud83d"}]'))
    assert [row.code for _, row in found[1:]] == ["not_an_object", "half_character"]


def test_a_missing_file_names_its_neighbour(write):
    path = write("train.jsonl", LINES)
    with pytest.raises(DataError, match=r"did you mean 'train.jsonl'") as caught:
        rows_of(path.replace("train", "trian"))
    assert caught.value.code == "no_file"
    with pytest.raises(DataError, match="no data file"):
        files_of(str(write("e/x.pdf", "x")).removesuffix("/x.pdf"))


def test_columns_are_renamed_even_when_they_swap(write):
    path = write("a.jsonl", [{"q": "1", "a": "2", "text": "3"}])
    assert rows_of(path, columns={"prompt": "q", "completion": "text"})[0][1] == {"a": "2", "prompt": "1", "completion": "3"}
    path = write("b.jsonl", [{"prompt": "1", "completion": "2"}])
    assert rows_of(path, columns={"prompt": "completion", "completion": "prompt"})[0][1] == {"prompt": "2", "completion": "1"}
    problem = rows_of(path, columns={"prompt": "promt"})[0][1]
    assert problem.code == "no_column"
    assert "did you mean 'prompt'" in problem.message


def test_holes_that_arrow_makes_are_closed(write):
    import pyarrow
    import pyarrow.parquet

    tools = [{"parameters": {"city": {"type": "string"}}}, {"parameters": {"hour": {"type": "number"}}}]
    path = write("a.parquet", b"")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"tools": [tool], "note": None} for tool in tools]), path)
    assert [row["tools"] for _, row in rows_of(path)] == [[tool] for tool in tools]


def test_rows_of_a_loaded_data_set_streamed_or_not():
    import datasets

    whole = datasets.Dataset.from_list(ROWS)
    assert list(keyed(whole, "hub:train")) == [("hub:train:1", ROWS[0]), ("hub:train:2", ROWS[1])]
    assert list(keyed(whole.to_iterable_dataset(), "hub:train")) == list(keyed(whole, "hub:train"))


def test_streaming_needs_a_limit():
    with pytest.raises(RecipeError, match="limit"):
        rows_of("somebody/some-set", streaming=True)


def test_fingerprint_follows_content_and_not_time(write):
    path = write("a.jsonl", LINES)
    before = fingerprint(Source(path=path))
    write("a.jsonl", LINES)
    assert fingerprint(Source(path=path)) == before
    write("a.jsonl", LINES + LINES)
    assert fingerprint(Source(path=path)) != before
