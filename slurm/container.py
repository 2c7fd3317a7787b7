"""Processes of a job inside a container: apptainer for ``.sif`` images, else pyxis and enroot.

The job's script and what it records stay on the host; only the command that srun starts runs in the
container. The folders of run, shards, weights and cache are mounted where they are.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from xcit_dino.errors import InputError
from xcit_dino.options import options
from xcit_dino.paths import NOT_PATHS
from xcit_dino.slurm.config import Launch, Stage

PYTHON = "python"  # of the image
FILES = (".sif", ".sqsh")
FOLDERS = ("data_path", "knn_data_path", "cache_dir")
WITHIN = ("init_from", "pretrained_weights", "teacher_path", "head", "shard_url")


def image(container: str) -> str:
    """The image as a job needs it: a file by its absolute path, a name in a registry as it is.

    Raises:
        InputError: a file that is not there.
    """
    if not container.endswith(FILES):
        return container
    path = os.path.abspath(container)
    if not os.path.isfile(path):
        raise InputError(f"--container {container}: no such file; build it from apptainer.def")
    return path


def mounts(launch: Launch) -> list[str]:
    """Folders that the stages read or write.

    Raises:
        InputError: one with a colon or comma, which both runtimes take for a separator.
    """
    from xcit_dino.data.shards.index import is_url  # with numpy, which a dry run does not import

    found = {str(launch.run)}
    for stage in launch.stages:
        values = dict(options(stage.config))
        given = {name: str(values[name]) for name in (*FOLDERS, *WITHIN) if values.get(name)}
        for name, path in given.items():
            if is_url(path) or path.startswith(NOT_PATHS):
                continue
            path = path.partition("/{split}")[0]
            is_file = name in WITHIN and not os.path.isdir(path)
            found.add(os.path.dirname(path) if is_file else path)
    inner = sorted(os.path.abspath(path) for path in found)
    for path in inner:
        if set(path) & set(":,"):
            raise InputError(f"--container: cannot mount {path}, whose name has a colon or comma")
    return [p for p in inner if not any(Path(p).is_relative_to(q) for q in inner if q != p)]


def python(launch: Launch, stage: Stage) -> str | None:
    """The command that starts Python in the container; None: the interpreter of the launcher."""
    container = launch.launch.container
    if container is None:
        return None
    if not container.endswith(".sif"):
        return PYTHON  # srun enters the container
    binds = [word for folder in mounts(launch) for word in ("--bind", folder)]
    gpus = ["--nv"] if stage.resources.ngpus else []
    return shlex.join(["apptainer", "exec", *gpus, *binds, image(container), PYTHON])


def srun_args(launch: Launch) -> list[str]:
    """What srun needs where pyxis makes the container."""
    container = launch.launch.container
    if container is None or container.endswith(".sif"):
        return []
    pairs = ",".join(f"{folder}:{folder}" for folder in mounts(launch))
    return [f"--container-image={image(container)}", f"--container-mounts={pairs}"]
