"""The docs agree with the code: links resolve, commands parse, files exist, README runs.

``python tests/test_docs.py`` updates the list of files in docs/architecture.md.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import xcit_dino
from tests.browser import Browser, find_chromium
from xcit_dino.cli import COMMANDS, find_command, load, main
from xcit_dino.command_line import parse
from xcit_dino.ssl.pretrain import pretrain_with_knn as pretrain

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = (
    "xcit_dino",
    "data",
    "models",
    "train",
    "eval",
    "ssl",
    "supervised",
    "report",
    "slurm",
    "bench",
)
OURS = ("xcit-dino ", "python slurm/launch.py", "torchrun ")
TOPICS = (
    "getting_started install data pretraining slurm evaluation distillation weights health "
    "performance reliability architecture"
)
TREE_PAGE = ROOT / "docs" / "architecture.md"
TREE = ("<!-- files -->\n```\n", "```\n<!-- /files -->")


def folders() -> list[str]:
    """Folders of code and those inside of them, as paths from the root."""
    found = []
    for name in CODE:
        inner = [] if name == "xcit_dino" else sorted((ROOT / name).rglob("*"))
        found += [str(p.relative_to(ROOT)) for p in [ROOT / name, *inner] if any(p.glob("*.py"))]
    return found


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# -- links -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text):
        link = "".join(target)
        if link.startswith(("http://", "https://")):
            continue
        path, _, heading = link.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{name_of(page)}: {link}"
        if heading:
            assert heading in anchors(other), f"{name_of(page)}: no heading {link}"


def anchors(page: Path) -> set[str]:
    """Names of a page's headings in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a broken link fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_every_link_picture_and_name(site):
    """README is its front page; the Python reference has every public name and its arguments."""
    for page in site.glob("*.html"):
        links = re.findall(r'<(?:img|a)[^>]* (?:src|href)="([^"]+)"', page.read_text())
        own = [link.partition("#")[0] for link in links if not re.match(r"\w+:|/", link)]
        for link in filter(None, own):
            assert (site / link).is_file(), f"{page.name}: {link}"  # opened without a server
    assert "<img" in (site / "index.html").read_text()
    reference = (site / "api.html").read_text()
    for name in xcit_dino.__all__:
        assert f"xcit_dino.{name}<" in reference, name
    assert "batch_size" in reference


@pytest.mark.browser
@pytest.mark.skipif(find_chromium() is None, reason="needs Chromium (Debian: apt chromium)")
@pytest.mark.parametrize("page", ["index", "evaluation", "health", "architecture", "install"])
def test_a_page_fits_a_phone(site, page):
    with Browser() as browser:
        browser.open(site / f"{page}.html", 390)
        assert browser.run("document.documentElement.scrollWidth") <= 390
        broken = browser.run(
            """[...document.querySelectorAll('td code')].filter(e => !/[\\s-]/.test(e.textContent)
              && e.getClientRects().length > 1).map(e => e.textContent)"""
        )
        assert broken == []  # a name in a table is in one piece


def test_every_topic_has_a_page_that_readme_names():
    readme = (ROOT / "README.md").read_text()
    for topic in (*TOPICS.split(), "glossary", "benchmarks"):
        assert (ROOT / "docs" / f"{topic}.md").is_file() and f"docs/{topic}.md" in readme, topic


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page):
    for name in re.findall(r"`((?:\w+/)+[\w.]+\.(?:py|yaml|md|html))`", page.read_text()):
        generated = name.startswith("runs/") or re.search(r"[A-Z]{2}|\b[A-Z]\b", name)
        generated = generated or name.endswith("__init__.py")  # which must not be there
        assert generated or (ROOT / name).is_file(), f"{name_of(page)}: {name}"


def test_functions_that_are_named_exist():
    """``file.py:Class.name`` of docs/architecture.md, in the path of an image and elsewhere."""
    text = TREE_PAGE.read_text()
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", text)
    steps = re.findall(r"^\d+\. `([\w/]+\.py):([\w.]+)`", text, re.MULTILINE)
    assert 1 < len(steps) <= 10 and len(named) > len(steps)
    for file, name in named:
        nodes = ast.parse((ROOT / file).read_text()).body
        for word in name.split("."):
            found = [node for node in nodes if word in names_of(node)]
            assert found, f"{file} has no {name}"
            nodes = getattr(found[0], "body", [])


def names_of(node: ast.stmt) -> list[str]:
    """What a statement defines."""
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef) else []


def test_tests_that_are_named_exist():
    """Each `tests/test_x.py -k words` of docs/reliability.md selects something."""
    named = re.findall(
        r"`(tests/(?:\w+/)?test_\w+\.py)(?: -m faults)?(?: -k (?:\"([\w ]+)\"|(\w+)))?`",
        (ROOT / "docs/reliability.md").read_text(),
    )
    assert len(named) > 40
    for name, words, word in named:
        tests = " ".join(re.findall(r"def test_\w+", (ROOT / name).read_text()))
        for each in words.split(" or ") if words else [word]:
            assert each in tests, f"{name}: no test has {each} in its name"


# -- commands --------------------------------------------------------------------------------------


BLOCK = r"^ *```(\w*)\n(.*?)^ *```$"
SHELL = ("", "bash", "sh")


def commands(page: Path) -> Iterator[str]:
    """Our command lines in code blocks and in running text, continued lines joined."""
    text = page.read_text()
    for language, block in re.findall(BLOCK, text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines() if language in SHELL else ():
            yield line.strip()
    text = re.sub(BLOCK, "", text, flags=re.DOTALL | re.MULTILINE)
    yield from (line.replace("\n", " ") for line in re.findall(r"`([^`]+)`", text))


def whole(line: str) -> bool:
    """Whether a command is meant to be typed as it stands: no ellipsis, choice or bare name."""
    return line.startswith(OURS) and not re.search(r"\.\.\.|\||\[|…|COMMAND", line)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))  # no launcher defaults of the user's
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # as in the checkout
    (tmp_path / "photos.yaml").write_text("arch: xcit_pico_6_p8\n")  # as recipe writes it
    monkeypatch.chdir(tmp_path)
    for line in filter(whole, commands(page)):
        words = shlex.split(line, comments=True)
        if words[0] == "torchrun":
            words = ["xcit-dino", *words[words.index("xcit_dino.cli") + 1 :]]
        elif words[0] == "python":
            words = ["xcit-dino", "launch", *words[2:]]
        check(words[1:], f"{name_of(page)}: {line}")


def check(words: list[str], where: str) -> None:
    """The command exists and takes these words."""
    if not words or words == ["--help"]:
        return
    group = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if len(words) == 1 and (group or words[0] in COMMANDS):
        return  # a command is spoken of
    name, rest = find_command(words)
    assert name is not None, where
    if not rest:
        return
    make = load(COMMANDS[name].config)
    try:
        parse(make(), rest, name, "") if isinstance(make, type) else make(rest, name)
    except Exception as error:
        raise AssertionError(f"{where}\n{error}") from error


def test_a_wrong_command_would_be_noticed():
    for words in (["knn", "--nb_kn", "3"], ["launch", "--stages", "pretrain,knm"], ["shards", "x"]):
        with pytest.raises(Exception, match=".+"):
            check(words, "here")


def test_make_targets_exist():
    made = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"(?:`|^)make ([\w-]+)", page.read_text(), re.MULTILINE):
            assert target in made, f"{name_of(page)}: make {target}"


# -- the list of files, and README's commands ------------------------------------------------------


def tree() -> str:
    """Every file of code with the first phrase of its docstring."""
    lines = []
    for folder in folders():
        lines.append(f"{folder}/")
        for path in sorted((ROOT / folder).glob("*.py")):
            lines.append(f"  {path.name:<22} {phrase(path)}")
    return "\n".join(lines) + "\n"


def phrase(path: Path) -> str:
    """The first sentence of a module, plain and short."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    text = re.sub(r"[`*]|:\w+:", "", text)
    text = re.sub(r" \([^)]*(?:arXiv|DINO|XCiT|SSVM)[^)]*\)", "", text)
    text = re.split(r"(?<=[\w)])[.;?](?: |$)", text)[0].rstrip(":")
    while len(text) > 88:  # drop clauses, then words
        cut = max(text.rfind(mark, 0, len(text) - 1) for mark in (", ", ": ", " (", " - "))
        text = text[:cut] if cut > 25 else text[:86].rpartition(" ")[0]
    return text


def test_every_file_is_listed():
    listed = TREE_PAGE.read_text().split(TREE[0])[1].split(TREE[1])[0]
    there = {(folder, path.name) for folder in folders() for path in (ROOT / folder).glob("*.py")}
    folder, found = "", set()
    for line in listed.splitlines():
        if line.startswith("  "):
            found.add((folder, line.split()[0]))
            assert len(line.split()) > 1, line
        else:
            folder = line.rstrip("/")
    assert found == there, "update it: python tests/test_docs.py"


def test_readme_numbers_are_those_of_the_benchmarks():
    """Results and the comparison with the official code agree with docs/benchmarks.md."""
    readme, measured = (ROOT / "README.md").read_text(), (ROOT / "docs/benchmarks.md").read_text()
    parts = [readme.split(title)[1].split("\n## ")[0] for title in ("## Results", "## Compared")]
    results, compared = (part.splitlines() for part in parts)
    found = [number for row in results for number in re.findall(r"(?<=\| )[\d.]+(?= \|)", row)]
    linked = [re.sub(r"\([^)]*\)", "", row) for row in compared if "docs/benchmarks.md" in row]
    found += [number for row in linked for number in re.findall(r"\d+\.\d+", row)]
    assert len(found) >= 16
    for number in found:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", measured), number


TINY = (
    "--arch xcit_pico_6_p8 --epochs 1 --warmup_epochs 0 --batch_size_per_gpu 32 --out_dim 64 "
    "--head_hidden_dim 32 --head_bottleneck_dim 16 --global_crops_size 32 --local_crops_size 16 "
    "--local_crops_number 2 --num_workers 0 --device cpu --precision fp32 --log_every 1"
).split()
SMALL = {"knn": ["--nb_knn", "10", "20"], "embed": []}
ON_CPU = ["--num_workers", "0", "--device", "cpu"]


def test_the_commands_of_readme_run(tmp_path, monkeypatch, capsys):
    """README's commands for your own images, unchanged, on a few small images; what needs a cluster
    is tried with --dry_run, then run with a tiny network in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    photographs(tmp_path / "photos")
    block = (ROOT / "README.md").read_text().split("## Your own images")[1].split("```")[1]
    ours = [line for line in block.strip().splitlines() if line.startswith(OURS)]
    assert len(ours) == 5
    for line in ours:
        words = [str(Path(word).expanduser()) for word in shlex.split(line, comments=True)]
        if words[0] == "python":
            assert main(["launch", *words[2:], "--dry_run"]) == 0
            assert "--nodes=4" in capsys.readouterr().out
            data = words[words.index("--data_path") + 1]
            run = ["--output_dir", "runs/xcit_small_12_p8", "--data_path", data]
            config = COMMANDS["pretrain"].config
            pretrain(load(config)([*TINY, *run], "pretrain"))
        else:
            more = [*SMALL[words[1]], *ON_CPU] if words[1] in SMALL else []
            assert main([*words[1:], *more]) == 0, line
    page = (tmp_path / "runs/xcit_small_12_p8/report.html").read_text()
    for title in ("k-NN, k = 20, top-1", "Nearest neighb", "What the network sees"):
        assert title in page
    assert "Not shown" not in page


def photographs(folder: Path, train: int = 32, val: int = 8) -> None:
    """Write three classes of small images, ``train`` and ``val`` of each."""
    numbers = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for n in range(count):
                pixels = numbers.integers(0, 128, (40, 48, 3), dtype=np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(folder / split / name / f"{n}.jpg")


def test_the_python_of_readme_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(code, {})


def write_tree() -> None:
    """Update the list of files in its page."""
    head, rest = TREE_PAGE.read_text().split(TREE[0])
    TREE_PAGE.write_text(head + TREE[0] + tree() + TREE[1] + rest.split(TREE[1])[1])


if __name__ == "__main__":
    write_tree()
