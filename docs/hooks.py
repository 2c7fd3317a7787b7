"""Hooks of mkdocs: README and other pages of the root become pages of the site, links that lead out
of docs/ become what the site has, and docstrings become the Python reference."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):$")


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    texts = {page: (ROOT / name).read_text() for name, page in PAGES.items()}
    pages = {
        page: LINK.sub(from_root, text).replace('src="docs/', 'src="')
        for page, text in texts.items()
    }
    for page, content in {**pages, "api.md": reference()}.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return markdown if page.file.src_uri in PAGES.values() else LINK.sub(from_docs, markdown)


# -- links


def from_root(link: re.Match[str]) -> str:
    """``docs/x.md`` becomes ``x.md``."""
    return placed(link, link[3].removeprefix("docs/"), link[3].startswith("docs/"))


def from_docs(link: re.Match[str]) -> str:
    """``../CHANGELOG.md`` becomes ``CHANGELOG.md``."""
    return placed(link, link[3].removeprefix("../"), not link[3].startswith("../"))


def placed(link: re.Match[str], target: str, in_docs: bool) -> str:
    """The link as the site has it; a file that is no page becomes its name."""
    mark, text, given = link.groups()
    if "://" in given or given.startswith("#"):
        return link[0]
    if in_docs:
        return f"{mark}[{text}]({target})"
    name, hash_, anchor = target.partition("#")
    if name in PAGES:
        return f"{mark}[{text}]({PAGES[name]}{hash_}{anchor})"
    return text if name in text else f"{text} (`{name}`)"


# -- reference


def reference() -> str:
    """What ``import xcit_dino`` offers, from signatures and docstrings."""
    import xcit_dino

    parts = [
        "# Python reference",
        "What `import xcit_dino` offers; [From Python](python.md) shows it at work.",
    ]
    for name in sorted(xcit_dino.__all__, key=str.lower):
        thing = getattr(xcit_dino, name)
        parts += described(f"xcit_dino.{name}", thing, "##")
        if inspect.isclass(thing) and not issubclass(thing, Exception):
            methods = inspect.getmembers(thing, inspect.isfunction)
            for method, function in methods:
                if not method.startswith("_"):
                    parts += described(method, function, "###")
    return "\n\n".join(parts)


def described(name: str, thing: Any, heading: str) -> list[str]:
    """Heading, signature and docstring."""
    short = name.rpartition(".")[2]
    try:
        code = signature(short, inspect.signature(thing))
    except ValueError:  # an exception's
        code = short
    return [f"{heading} {name}", f"```python\n{code}\n```", formatted(inspect.getdoc(thing) or "")]


def signature(name: str, of: inspect.Signature) -> str:
    """On one line, or a parameter a line; annotations as they are written."""
    words, keyword_only = [], False
    for parameter in of.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            words, keyword_only = [*words, "*"], True
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        kind = "" if parameter.annotation is of.empty else f": {parameter.annotation}"
        default = "" if parameter.default is of.empty else f" = {parameter.default!r}"
        words.append(f"{star}{parameter.name}{kind}{default}")
    result = "" if of.return_annotation is of.empty else f" -> {of.return_annotation}"
    line = f"{name}({', '.join(words)}){result}"
    if len(line) <= 72:
        return line
    return f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){result}"


def formatted(docstring: str) -> str:
    """Google's sections as lists, cross-references as code."""
    lines = []
    for line in re.sub(r":\w+:`~?([^`]+)`", r"`\1`", docstring).replace("``", "`").splitlines():
        if SECTION.match(line):
            lines += [f"**{line.rstrip(':')}**", ""]
        elif entry := re.match(r"^    (\w[\w, .]*): (.*)", line):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        else:
            lines.append(line if not line.startswith("        ") else "  " + line.strip())
    return "\n".join(lines)
