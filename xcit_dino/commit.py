"""Which commit of the code is running."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path


@cache
def commit() -> str:
    """Commit of the checkout (``+changes`` where files differ) or of a snapshot; else "unknown"."""
    root = Path(__file__).resolve().parents[1]
    if (root / "COMMIT").is_file():  # a copy of the code that a launcher made
        return (root / "COMMIT").read_text().strip()
    if not (root / ".git").exists():  # installed: a repository further up would be another's
        return "unknown"
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip()[:12] + ("+changes" if changed.stdout.strip() else "")
