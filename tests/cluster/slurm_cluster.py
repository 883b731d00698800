"""A private Slurm cluster on loopback: own configuration, ports and state, no root, no leftovers.

    with PrivateCluster(Path("/tmp/x"), num_nodes=2) as cluster:
        subprocess.run(["sinfo"], env=cluster.environment)

Its nodes are called 127.0.0.2, 127.0.0.3 ...: names that resolve on every Linux machine, so that MASTER_ADDR and
hostfiles are made from them as from real ones. Each node is a slurmd of its own on this machine, and says that it has
`gpus_per_node` GPUs, which are only counted. Daemons run as the user who starts the tests and are ended by process id.

Authentication: auth/munge with a key, a socket and a munged of its own; auth/none would do as well, but its
credentials are not checked and it is gone from later versions.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 60.0

CONFIGURATION = """\
ClusterName=bpo-tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# The second, in seconds: a requeued job waits until its credentials have expired, two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=6
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=10
MessageTimeout=30
MinJobAge=600
# Jobs take their port from their id: those of two clusters on this machine, one for each worker of pytest, must differ.
FirstJobId={first_job}
# The CPUs configured for the nodes, even if this machine has fewer.
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0
DebugFlags=NO_CONF_HASH
GresTypes=gpu
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
# Its jobs take the nodes from jobs of the other: SIGTERM, GraceTime seconds, SIGKILL.
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr={name} Port={port} CPUs={cpus} RealMemory=1000 Gres=gpu:{gpus} "
    "State=UNKNOWN"
)


def missing_programs() -> list[str]:
    """Which programs of a cluster this machine lacks; sbin may not be on PATH."""
    return [name for name in ("sbatch", "srun", "scontrol", "slurmctld", "slurmd", "munged") if not find_program(name)]


def find_program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))


class ClusterError(RuntimeError):
    """The cluster did not start; the message contains the ends of its logs."""


class PrivateCluster:
    """Starts on entry and stops on exit; `environment` points Slurm's commands at it.

    Args:
        folder: Everything goes here; short, because it holds a socket (108 bytes at most).
        cpus_per_node: CPUs that each node claims.
    """

    def __init__(self, folder: Path, *, num_nodes: int = 2, cpus_per_node: int = 4, gpus_per_node: int = 2):
        self.folder = folder
        self.nodes = [f"127.0.0.{number + 2}" for number in range(num_nodes)]
        self.cpus_per_node, self.gpus_per_node = cpus_per_node, gpus_per_node
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")
        self._daemons: list[tuple[str, subprocess.Popen[bytes]]] = []

    def __enter__(self) -> PrivateCluster:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)  # munged rejects a socket in a folder that other users cannot enter
        self._configure()
        try:
            self._start_daemons()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run("scancel", "--user", str(os.getuid()), check=False)
        self._wait_until(lambda: not self.run("squeue", "-h", check=False), STOP_TIMEOUT_S)
        self._stop()

    def run(self, *command: str, check: bool = True) -> str:
        """Runs one of Slurm's commands; returns what it printed."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=240)
        if check and result.returncode:
            raise ClusterError(f"{' '.join(command)}: exit status {result.returncode}: {result.stderr}")
        return result.stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED ...; of an array, its tasks' states in one line."""
        shown = self.run("scontrol", "show", "job", job, "--oneliner")
        return " ".join(sorted({part[9:] for part in shown.split() if part.startswith("JobState=")}))

    def restarts(self, job: str) -> int:
        shown = self.run("scontrol", "show", "job", job, "--oneliner")
        return max(int(part[9:]) for part in shown.split() if part.startswith("Restarts="))

    def wait_for(self, job: str, states: set[str], timeout_s: float) -> str:
        """Waits until the job is in one of these states and returns which.

        Raises:
            TimeoutError: it is not in time; says in which state it is, and shows the queue.
        """
        end = time.monotonic() + timeout_s
        while (state := self.state(job)) not in states:
            if time.monotonic() > end:
                queue = self.run("squeue", "-o", "%i %j %T %r %S")
                raise TimeoutError(f"job {job} is {state} after {timeout_s:.0f} s, not {states}\n{queue}")
            time.sleep(0.3)
        return state

    def _configure(self) -> None:
        host = socket.gethostname().split(".")[0]
        ports = _free_ports(len(self.nodes) + 1)
        nodes = [
            NODE.format(name=name, host=host, port=port, cpus=self.cpus_per_node, gpus=self.gpus_per_node)
            for name, port in zip(self.nodes, ports[1:], strict=True)
        ]
        user = pwd.getpwuid(os.getuid()).pw_name
        text = CONFIGURATION.format(
            host=host,
            controller_port=ports[0],
            user=user,
            folder=self.folder,
            first_job=1 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")),
            nodes="\n".join(nodes),
        )
        (self.folder / "slurm.conf").write_text(text)
        # Every GPU must be a device file; it is never opened.
        devices = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")[: self.gpus_per_node]
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))
        (self.folder / "state").mkdir()
        for name in self.nodes:
            (self.folder / f"spool-{name}").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)

    def _start_daemons(self) -> None:
        files = {f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "log", "pid", "seed")}
        socket_path = self.folder / "munge.socket"
        self._start("munged", "--foreground", "--force", f"--socket={socket_path}", *sorted(files))
        self._wait_until(socket_path.exists, START_TIMEOUT_S)
        self._start("slurmctld", "-D", "-i")
        for name in self.nodes:
            self._start("slurmd", "-D", "-N", name)
        # One line per node; exactly `idle`, without the suffix of a node that does not respond.
        ready = ["idle"] * len(self.nodes)
        if not self._wait_until(
            lambda: self.run("sinfo", "-h", "-N", "-p", "all", "-o", "%T", check=False).split() == ready,
            START_TIMEOUT_S,
        ):
            raise ClusterError(f"no cluster within {START_TIMEOUT_S:.0f} s\n{self.logs()}")

    def _start(self, program: str, *arguments: str) -> None:
        path = find_program(program)
        assert path is not None, f"{program} is not installed"
        with (self.folder / f"{program}.out").open("ab") as output:
            daemon = subprocess.Popen(
                [path, *arguments], env=self.environment, stdout=output, stderr=output, start_new_session=True
            )
        self._daemons.append((program, daemon))

    def _wait_until(self, condition: Callable[[], object], timeout_s: float) -> bool:
        end = time.monotonic() + timeout_s
        while not condition():
            dead = [name for name, daemon in self._daemons if daemon.poll() is not None]
            if dead:
                raise ClusterError(f"{', '.join(dead)} ended\n{self.logs()}")
            if time.monotonic() > end:
                return False
            time.sleep(0.2)
        return True

    def _stop(self) -> None:
        for _, daemon in reversed(self._daemons):
            daemon.terminate()
        for _, daemon in reversed(self._daemons):
            try:
                daemon.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def logs(self) -> str:
        """The ends of all daemons' logs."""
        paths = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in paths)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
