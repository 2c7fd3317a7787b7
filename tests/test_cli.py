"""The command line: commands are found, start fast, and refuse with a message."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from xcit_dino.cli import COMMANDS, find_command, load, main

ROOT = Path(__file__).parents[1]


def run(*words):
    command = [sys.executable, "-m", "xcit_dino.cli", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_every_command_exists():
    for name, command in COMMANDS.items():
        assert callable(load(command.config)), name
        assert callable(load(command.run)), name


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_every_command_needs_no_torch(name):
    program = (
        "import sys; from xcit_dino.cli import main\n"
        f"try: main({[*name.split(), '--help']!r})\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout


def test_help_is_quick():
    def seconds():
        start = time.perf_counter()
        run("--help")
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrian"], "did you mean pretrain"),
        (["shards", "mkae"], "make"),
        (["pretrain", "--arch", "xcit_smal_12_p8"], "xcit_small_12_p8"),
        (["pretrain", "--no_such_option", "3"], "--no_such_option"),
        (["pretrain", "--config", "missing.yaml"], "missing.yaml"),
        (
            ["pretrain", "--arch", "xcit_nano_12_p8", "--local_crops_size", "97"],
            "multiple of its patch",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


def test_two_word_commands_win():
    assert find_command(["shards", "make", "a", "b"]) == ("shards make", ["a", "b"])


def test_version_and_overview(capsys):
    assert main(["--version"]) == 0 and main([]) == 0
    output = capsys.readouterr().out
    assert output.startswith("xcit-dino ") and all(name in output for name in COMMANDS)
