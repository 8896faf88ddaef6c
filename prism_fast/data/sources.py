"""Finds the files or data sets behind an entry of a recipe: a file, a folder, a glob, or a data set of the hub.

Files are told by their first bytes, not by their names; nothing is unpacked, and nothing that can run code is opened.
`datasets` is imported where a folder or a hub name needs it; it writes to its own cache alone (HF_HOME).
"""

from __future__ import annotations

import difflib
import glob
import json
import re
from pathlib import Path
from typing import Any

from prism_fast.data.entries import Entry
from prism_fast.data.parquet import EncodedCells, ParquetRecords
from prism_fast.data.problems import DataError, Place
from prism_fast.data.records import TEXT_SUFFIXES, ArrowRecords, JsonRecords, Records, damaged

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
KNOWN_SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow")
_CONVERT = "datasets.load_dataset('csv', data_files=FILE)['train'].to_json(NEW, lines=True) writes JSON lines"
_PICKLE = ("is a pickle, which can run code when it is opened", "It is never opened here: write parquet or JSON lines")
_ARCHIVE = ("is an archive", "Unpack it and give the file or folder inside")

# By the first bytes of a file: what it is, and the cure.
_CONTENTS: tuple[tuple[bytes, tuple[str, str]], ...] = (
    (
        b"version https://git-lfs.github.com",
        ("is a pointer of git-LFS, not the file itself", "Fetch the file: git lfs pull, or hf download"),
    ),
    (b"\x1f\x8b", _ARCHIVE),
    (b"\xfd7zXZ", _ARCHIVE),
    (b"\x28\xb5\x2f\xfd", _ARCHIVE),
    (b"Rar!", _ARCHIVE),
    (b"7z\xbc\xaf", _ARCHIVE),
    *((bytes((0x80, version)), _PICKLE) for version in (2, 3, 4, 5)),
    (b"<!DOCTYPE", ("is an HTML page", "Download the file itself, not the page that shows it")),
    (b"<!doctype", ("is an HTML page", "Download the file itself, not the page that shows it")),
    (b"<html", ("is an HTML page", "Download the file itself, not the page that shows it")),
    (b"\x89PNG", ("is an image", "Give the file whose rows name the images")),
    (b"\xff\xd8\xff", ("is an image", "Give the file whose rows name the images")),
    (b"\x89HDF", ("is an HDF5 file", "Write it as parquet")),
    (b"SQLite format 3", ("is a database", "Write it as parquet")),
)
# By the suffix, for what the first bytes do not tell.
_SUFFIXES: dict[str, tuple[str, str]] = {
    **dict.fromkeys((".csv", ".tsv"), ("is a table of comma-separated text, which has no lists of turns", _CONVERT)),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".joblib"), _PICKLE),
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".xz", ".zst", ".7z", ".rar", ".bz2"), _ARCHIVE),
    ".xlsx": ("is a spreadsheet", "Write it as JSON lines"),
    ".safetensors": ("holds weights of a model", "Give the file or folder with the samples"),
}
_PARQUET, _ARROW, _ZIP = b"PAR1", b"ARROW1", b"PK\x03\x04"


def is_hub_name(text: str) -> bool:
    """Whether ``text`` is meant as ``owner/name`` on the hub: no such file or folder is here, and no file is named."""
    return (
        _HUB.fullmatch(text) is not None and Path(text).suffix not in (*KNOWN_SUFFIXES, *_SUFFIXES) and not _here(text)
    )


def is_glob(text: str) -> bool:
    """Whether ``text`` is a pattern of file names; a file of exactly this name comes first."""
    return not _here(text) and glob.has_magic(text)


def missing(entry: Entry) -> bool:
    """Whether the entry names a file or folder that is not here."""
    return not (_here(entry.path) or is_glob(entry.path) or is_hub_name(entry.path))


def open_entry(entry: Entry, split: str) -> list[Records]:
    """The files of an entry, in order. ``split``: the one to take of several where the entry names none.

    Raises:
        DataError: nothing is there, or it is not data in a form that is read.
    """
    path = Path(entry.path)
    place = Place(path)
    if is_glob(entry.path):
        found = [Path(name) for name in sorted(glob.glob(entry.path, recursive=True))]
        files = [file for file in found if file.is_file()]
        if not files:
            raise place.error("", "no file matches the pattern", "Check it; ** stands for any folders")
        return _files(files, entry)
    if not _here(entry.path):
        if is_hub_name(entry.path):
            return [_hub(entry, split)]
        raise not_found(path)
    if path.is_dir():
        return _folder(path, entry, split)
    return _files([path], entry)


def not_found(path: Path) -> DataError:
    """The error of a path that does not exist."""
    return Place(path).error("", "the file does not exist", f"Check the path{nearest(path)}")


def nearest(path: Path) -> str:
    """``; there is PATH`` with the file beside ``path`` whose name is nearest to its own, or nothing."""
    try:
        beside = [item.name for item in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"; there is {path.parent / near[0]}" if near else ""


def _here(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # a name that is too long
        return False


def _files(files: list[Path], entry: Entry) -> list[Records]:
    for option in ("split", "name"):
        if (value := getattr(entry, option)) is not None:
            wrong = f"is a file and has no {option} ({value!r} was asked for)"
            raise Place(files[0]).error("", wrong, f"Leave {option} out, or give a folder or a hub name")
    encoded = EncodedCells()
    return [_file(file, encoded) for file in files]


def _file(path: Path, encoded: EncodedCells) -> Records:
    place = Place(path)
    if not path.is_file():
        raise place.error("", "is neither a file nor a folder", "Give a file with samples")
    with path.open("rb") as file:
        head = file.read(64)
    start = head.lstrip(b"\xef\xbb\xbf \r\n\t")
    found = next((about for begin, about in _CONTENTS if start.startswith(begin)), None)
    if found is None and start.startswith(_ZIP):
        pickled = path.suffix in (".pt", ".pth", ".bin", ".npz")
        found = _PICKLE if pickled else _SUFFIXES.get(path.suffix if path.suffix == ".xlsx" else ".zip")
    if found is None and not head.startswith((_PARQUET, _ARROW)):
        found = _SUFFIXES.get(path.suffix)
    if found is not None:
        raise place.error("", *found)
    if head.startswith(_PARQUET) or path.suffix == ".parquet":
        if not head:
            raise place.error("", "is empty", "Write it as parquet")
        if start[:1] in (b"{", b"["):
            raise place.error("", "is not a parquet file but JSON text", "Name it .jsonl or .json")
        return ParquetRecords(path, encoded)
    if path.suffix == ".arrow" or head.startswith(_ARROW):
        return _arrow_file(path)
    if path.suffix not in TEXT_SUFFIXES:
        known = ", ".join(KNOWN_SUFFIXES)
        raise place.error("", f"no known format ends with {path.suffix!r}", f"Known: {known}, and folders of these")
    return JsonRecords(path)


def _arrow_file(path: Path) -> Records:
    from datasets import Dataset

    try:
        return ArrowRecords(path, Dataset.from_file(str(path)))
    except Exception as error:  # pyarrow's errors, and those of a schema that `datasets` does not know
        raise damaged(path, error) from error


def _folder(path: Path, entry: Entry, split: str) -> list[Records]:
    place = Place(path)
    names = sorted(item.name for item in path.iterdir())
    if "dataset_dict.json" in names:
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return [_saved(path / choose_split(splits, entry, split))]
    if "state.json" in names and "dataset_info.json" in names:
        if entry.split is not None:
            raise place.error(
                "", f"is one saved data set without splits ({entry.split!r} was asked for)", "Leave it out"
            )
        return [_saved(path)]
    if "dataset_info.json" in names:
        described = json.loads((path / "dataset_info.json").read_text(encoding="utf-8"))
        files = [value["file_name"] for value in described.values() if isinstance(value, dict) and "file_name" in value]
        if files:
            wrong = f"is a folder of several LLaMA-Factory data sets ({', '.join(files[:5])})"
            raise place.error("", wrong, "Name the file; its 'columns' of dataset_info.json go to data.columns")
    by_split = _data_files(path, entry, names)
    files = by_split[choose_split(list(by_split), entry, split, place)]
    encoded = EncodedCells()
    return [_file(file, encoded) for file in files]


def _data_files(path: Path, entry: Entry, names: list[str]) -> dict[str, list[Path]]:
    """The data files of a folder by split, as `datasets` finds them (by file names, folders, or the README's table)."""
    from datasets import load_dataset_builder

    place = Place(path)
    inside = [file for file in path.rglob("*") if file.suffix in KNOWN_SUFFIXES or file.suffix in _SUFFIXES]
    if not inside:
        holds = ", ".join(names[:5]) or "nothing"
        raise place.error("", f"is a folder without data files (it holds: {holds})", "Give a folder of parquet or JSON")
    readable = [file for file in inside if file.suffix in KNOWN_SUFFIXES]
    if not readable:
        _file(inside[0], EncodedCells())  # refused, with the reason of this file
    try:
        builder = load_dataset_builder(str(path), entry.name)
    except Exception as error:  # of many kinds: no matching files, an unknown configuration, a damaged README
        wrong = f"cannot be read as a data set folder ({type(error).__name__}: {_line(error)})"
        raise place.error("", wrong, "Give its files instead: a glob such as FOLDER/*.parquet") from error
    files = {str(split): [Path(str(name)) for name in found] for split, found in builder.config.data_files.items()}
    kept = {split: [file for file in found if file.suffix in KNOWN_SUFFIXES] for split, found in files.items()}
    if not all(kept.values()):
        shown = ", ".join(file.name for found in files.values() for file in found[:2])
        raise place.error(
            "", f"holds files of other kinds ({shown})", "Give its data files: FOLDER/*.json or *.parquet"
        )
    return kept


def choose_split(splits: list[str], entry: Entry, default: str, place: Place | None = None) -> str:
    """The split that the entry names, or the only one, or ``default``."""
    place = place or Place(Path(entry.path))
    if entry.split is not None:
        if entry.split not in splits:
            raise place.error("split", f"there is no {entry.split!r}", f"The splits are {', '.join(splits)}")
        return entry.split
    if len(splits) == 1:
        return splits[0]
    if default not in splits:
        wrong = f"has the splits {', '.join(splits)} and none is named {default!r}"
        raise place.error("split", wrong, f"Choose one: {{path: {entry.path}, split: {splits[0]}}}")
    return default


def _saved(path: Path) -> Records:
    from datasets import load_from_disk

    try:
        return ArrowRecords(path, load_from_disk(str(path)))
    except Exception as error:  # files that are missing or damaged, of many kinds
        raise damaged(path, error) from error


def _hub(entry: Entry, split: str) -> Records:
    from datasets import load_dataset

    path = Path(entry.path)
    try:
        found: Any = load_dataset(entry.path, entry.name, split=entry.split)
    except Exception as error:  # of the network, the hub, a configuration that must be chosen, or a script
        wrong = (
            f"is neither a file or folder here nor could it be loaded from the Hugging Face hub "
            f"({type(error).__name__}: {_line(error)})"
        )
        cure = "Check the name, or download the data set and give its folder (hf download --repo-type dataset)"
        raise Place(path).error("", wrong, cure) from error
    if isinstance(found, dict):
        found = found[choose_split(list(found), entry, split)]
    return ArrowRecords(path, found)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
