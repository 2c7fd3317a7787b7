"""Code, docs and recipes keep to American spelling and to the field's terms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = "data models train eval ssl supervised report slurm bench xcit_dino docs configs".split()
SUFFIXES = {".py", ".md", ".yaml", ".jinja"}
AVOIDED = re.compile(
    r"(?:normal|initial|synchron|optim|serial|organ|recogn|summar|visual|standard|random|general)is"
    r"(?:e|ed|er|es|ing|ation)\b"
    r"|colour|neighbour|behaviour|favour|licence|centred?\b|labelled|signalled|modelled|catalogue"
    r"|\b(?:grey|anew|discs?|sick|sentinel(?!-\d)|leave_word|retouch|with(?:out)? a word|no numbers"
    r"|(?:is|are) asked|takes? for alike|teacher's answers?|in spite of"
    r"|(?:one|once|images?|steps?|bytes|samples) an? (?:second|epoch|rank|core|line))\b",
    re.IGNORECASE,
)
KEPT = {  # names of files, tags and settings that older runs and data sets have
    "data/pack/demo.py": ('"figure colours"',),
    "eval/knn.py": ('"cls, L2-normalised"', '"pixels, L2-normalised"'),
}


def test_words():
    assert not list(found())


@pytest.mark.parametrize(
    "word", ["a normalised image", "neighbour", "written anew", "4 images a second"]
)
def test_a_planted_word_is_found(word, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_words.ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(f"first\n{word}\n")
    assert [line.split(": ")[0] for line in found()] == ["docs/page.md:2"]


def found() -> Iterator[str]:
    """Avoided words as ``file:line: word``."""
    for path in files():
        name, text = str(path.relative_to(ROOT)), path.read_text()
        for kept in KEPT.get(name, ()):
            text = text.replace(kept, "")
        for match in AVOIDED.finditer(text):
            yield f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"


def files() -> Iterator[Path]:
    """Files of text that users and developers read, without the changelog's history."""
    yield from (ROOT / name for name in ("README.md", "CONTRIBUTING.md") if (ROOT / name).exists())
    for folder in FOLDERS:
        paths = (ROOT / folder).rglob("*") if folder != "xcit_dino" else (ROOT / folder).glob("*")
        yield from sorted(path for path in paths if path.suffix in SUFFIXES and path.is_file())
