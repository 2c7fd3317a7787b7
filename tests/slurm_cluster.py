"""A real SLURM for tests: munge, slurmctld and two slurmd on this machine, with fake GPU files.

Everything lives in one folder and on free ports, beside any SLURM that is there already; what was
started is stopped by its process id, and nothing else. Node names do not resolve here, as on no
machine that was not prepared for it: jobs have to find each other without.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

TOOLS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PACKAGES = ("slurm-wlm", "munge")
NODES = ("node1", "node2")
GPUS = 2  # of each node: empty files
CPUS = 8  # of each node, whatever the machine has

CONF = """
ClusterName=xcit
SlurmctldHost=localhost
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=1
{patience}
InactiveLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
GresTypes=gpu
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={node1} {node}
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={node2} {node}
PartitionName=main Nodes=node1,node2 Default=YES PriorityTier=1 GraceTime=300
PartitionName=urgent Nodes=node1,node2 PriorityTier=10
"""

# A machine that is busy with other things is slow, not dead: nothing is killed for being late.
PATIENCE = """
MessageTimeout=100
SlurmdTimeout=600
BatchStartTimeout=600
UnkillableStepTimeout=600
KillWait=300
"""


class Unavailable(RuntimeError):
    """SLURM cannot run here; the text says why."""


class Cluster:
    """A running SLURM; ``environment`` makes its commands talk to it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.started: list[subprocess.Popen[bytes]] = []
        self.looked, self.hurried = 0.0, dict[str, float]()

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a command of this cluster."""
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, timeout=900
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def facts(self, job_id: str) -> dict[str, str]:
        """``scontrol show job`` as a dict; empty when the job is forgotten."""
        output = self.run("scontrol", "show", "job", "--oneliner", job_id, check=False)
        return dict(word.partition("=")[::2] for word in output.split() if "=" in word)

    def hurry(self) -> None:
        """Let requeued jobs start soon; SLURM would let them wait for two minutes.

        Not at once: a job's credentials count by the second, and those of the attempt before have
        just been revoked.
        """
        now = time.monotonic()
        if now < self.looked + 0.5:
            return
        self.looked = now
        for line in self.run("squeue", "--noheader", "--format=%i %T %r").splitlines():
            job, *why = line.split()
            if why == ["PENDING", "BeginTime"] and now > self.hurried.get(job, 0.0) + 6:
                self.hurried[job] = now
                self.run("scontrol", "update", f"jobid={job}", "StartTime=now+2", check=False)

    def start(self) -> None:
        """Configure and start the daemons.

        Raises:
            Unavailable: with the last words of the daemon that failed.
        """
        for name in ("state", "spool.node1", "spool.node2"):
            (self.folder / name).mkdir(parents=True)
        for number in range(GPUS):
            (self.folder / f"gpu{number}").touch()
        ports = free_ports(3)
        conf = CONF.format(
            folder=self.folder,
            patience=PATIENCE.strip(),
            **dict(zip(("ctld", *NODES), ports, strict=True)),
            node=f"CPUs={CPUS} RealMemory=2000 Gres=gpu:{GPUS} State=UNKNOWN",
        )
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text(
            f"NodeName=node[1-2] Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n"
        )
        (self.folder / "plugstack.conf").touch()
        subprocess.run(["mungekey", "--create", f"--keyfile={self.folder}/munge.key"], check=True)
        self.daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket",
                    f"--key-file={self.folder}/munge.key", f"--pid-file={self.folder}/munge.pid",
                    f"--seed-file={self.folder}/munge.seed",
                    f"--log-file={self.folder}/munge.log")  # fmt: skip
        wait_for(lambda: (self.folder / "munge.socket").exists(), "munged", self.log)
        self.daemon("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.idle() == len(NODES), "the nodes", self.log)

    def start_node(self, node: str, hidden: Sequence[Path] = ()) -> None:
        """Start a node's slurmd; it does not see what is in the folders ``hidden``."""
        command = ["slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf")]
        if hidden:
            hide = [f"mount -t tmpfs none {shlex.quote(str(folder))}" for folder in hidden]
            command = [
                "unshare",
                "--mount",
                "sh",
                "-ec",
                "\n".join([*hide, 'exec "$@"']),
                "sh",
                *command,
            ]
        self.daemon(*command)

    def restart_node(self, node: str, hidden: Sequence[Path] = ()) -> None:
        """Stop a node's slurmd and start it anew."""
        stop([p for p in self.started if node in [str(word) for word in p.args]])  # type: ignore[union-attr]
        self.start_node(node, hidden)
        wait_for(lambda: self.idle() == len(NODES), "the nodes", self.log)

    def daemon(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "ab") as log:
            self.started.append(
                subprocess.Popen(
                    command,
                    env=os.environ | self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def idle(self) -> int:
        """Nodes that are up and have nothing to do."""
        output = self.run("sinfo", "--noheader", "--Node", "--format=%N %t", check=False)
        return len({line for line in output.splitlines() if line.endswith(" idle")})

    def log(self) -> str:
        """Last lines of the daemons' logs."""
        texts = [path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log")]
        return "\n".join(texts + [p.read_text()[-300:] for p in self.folder.glob("*.out")])

    def stop(self) -> None:
        """End all jobs, then the daemons, the last started first."""
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            self.run("scancel", "--partition=main")
            self.run("scancel", "--partition=urgent")
            wait_for(
                lambda: not self.run("squeue", "--noheader").strip(), "the jobs' end", seconds=15
            )
        self.kill_left_over()
        stop(list(reversed(self.started)))

    def processes(self) -> dict[int, float]:
        """``process id -> processor seconds`` of all that jobs of this cluster have started."""
        ours = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "environ").read_bytes().split(b"\0")
                if ours in words and any(word.startswith(b"SLURM_JOB_ID=") for word in words):
                    user, system = stat(int(entry.name))[11:13]
                    found[int(entry.name)] = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        return found

    def rank_pid(self, job_id: str, rank: int) -> int:
        """Process id of a rank of a job: what SLURM itself has started in a step (the job's script
        also calls itself task 0, and so do the loader's workers)."""
        wanted = {f"SLURM_JOB_ID={job_id}".encode(), f"SLURM_PROCID={rank}".encode()}
        for pid in self.processes():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                parent = Path(f"/proc/{stat(pid)[1]}/comm").read_text().strip()
                in_step = any(word.startswith(b"SLURM_STEP_ID=") for word in words)
                if wanted <= set(words) and in_step and parent == "slurmstepd":
                    return pid
        raise AssertionError(f"no rank {rank} of job {job_id}")

    def kill_left_over(self) -> None:
        """Kill processes of jobs that no signal of SLURM's has ended (a test held them)."""
        for pid in self.processes():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def stat(pid: int) -> list[str]:
    """A process's state, parent and so on: ``/proc/PID/stat`` from the third field on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, and SIGKILL after a while, to processes of ours."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nobody has at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(condition, what: str, explain=lambda: "", seconds: float = 300) -> None:
    """Poll until a condition holds.

    Raises:
        Unavailable: it does not in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Unavailable(f"waited {seconds:g} s for {what}\n{explain()}")
        time.sleep(0.1)


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A running SLURM below ``folder``.

    Raises:
        Unavailable: it is not installed, or does not start.
    """
    missing = [tool for tool in TOOLS if shutil.which(tool, path=search_path()) is None]
    if missing:
        raise Unavailable(f"no {', '.join(missing)}; apt-get install {' '.join(PACKAGES)}")
    if os.geteuid():
        raise Unavailable("slurmd needs root")
    os.environ["PATH"] = search_path()
    made = Cluster(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def search_path() -> str:
    """PATH with the folders where Debian keeps daemons."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
