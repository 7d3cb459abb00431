"""A real Slurm cluster in a temporary directory: munge, one controller and several slurmd, all on this machine.

Nodes are virtual (the same host under several names and ports) and their cores and memory are invented, which is all
that scheduling needs. Started by root only, as slurmd is; everything that was started is stopped again.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

_DAEMONS = ("munged", "slurmctld", "slurmd")
_CONFIGURATION = """\
ClusterName=plumbline
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5,socket={root}/munge/socket
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/pid/slurmctld.pid
SlurmdPidFile={root}/pid/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MinJobAge=3600
MaxArraySize=64
ReturnToService=2
KillWait=3
SlurmdTimeout=30
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be started here; None if one can."""
    missing = [name for name in (*_DAEMONS, "sbatch") if _found(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "slurmd is started by root only"


def _found(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))


class VirtualCluster:
    """As a context manager: the cluster runs, and SLURM_CONF names it."""

    def __init__(self, root: Path, nodes: int = 2):
        self.root, self.nodes = root, [f"n{number}" for number in range(1, nodes + 1)]
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._before: dict[str, str | None] = {}

    def __enter__(self) -> VirtualCluster:
        for name in ("state", "spool", "log", "pid", "munge"):
            (self.root / name).mkdir(parents=True)
        self._write_configuration()
        self._set("SLURM_CONF", str(self.root / "slurm.conf"))
        try:
            self._start_munge()
            self._start("slurmctld", "-D")
            for node in self.nodes:
                self.start_node(node)
            self.wait(lambda: len(self.ask("sinfo", "-h", "-N", "-t", "idle").splitlines()) == len(self.nodes))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self._processes:
            subprocess.run(["scancel", "--user=root"], capture_output=True, timeout=30)
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for name, value in self._before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

    def ask(self, *line: str) -> str:
        """What one of Slurm's commands prints."""
        return subprocess.run(line, check=True, capture_output=True, text=True, timeout=30).stdout

    def start_node(self, node: str) -> None:
        (self.root / "spool" / node).mkdir(exist_ok=True)
        self._start("slurmd", "-D", "-N", node, label=node)

    def kill_node(self, node: str) -> None:
        """As a machine that loses its power: the daemon and all that runs under it are gone at once."""
        for process in (*_descendants(self._processes[node].pid), *self._steps(node)):
            for each in (*_descendants(process), process):
                _kill(each)
        self._processes[node].kill()
        self._processes.pop(node).wait()

    def _steps(self, node: str) -> list[int]:
        """slurmstepd lives on without its slurmd; the node's name is in what it was started with."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                command, variables = (path / "comm").read_text(), (path / "environ").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if command.startswith("slurmstepd") and f"SLURM_CONF={self.root}".encode() in variables:
                children = [_variables(child) for child in _descendants(int(path.name))]
                if any(f"SLURMD_NODENAME={node}".encode() in each for each in children):
                    found.append(int(path.name))
        return found

    def wait(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Until it holds; TimeoutError with the controller's last lines if it does not."""
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                log = self.root / "log" / "slurmctld.log"
                raise TimeoutError("\n".join(log.read_text().splitlines()[-15:]) if log.exists() else "no controller")
            time.sleep(0.1)

    def _start_munge(self) -> None:
        key, folder = self.root / "munge" / "key", self.root / "munge"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for directory in (folder, self.root):  # clients of every user must reach the socket, munged insists on it
            directory.chmod(0o711 if directory is folder else 0o755)
        self._start("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/socket",
                    f"--pid-file={folder}/pid", f"--log-file={folder}/log", f"--seed-file={folder}/seed")
        probe = ["munge", "-n", "-S", f"{folder}/socket"]
        self.wait(lambda: subprocess.run(probe, capture_output=True).returncode == 0)

    def _start(self, name: str, *options: str, label: str | None = None) -> None:
        path = _found(name)
        assert path is not None
        with (self.root / "log" / f"{label or name}.output").open("ab") as output:
            self._processes[label or name] = subprocess.Popen([path, *options], stdout=output, stderr=output,
                                                              stdin=subprocess.DEVNULL, start_new_session=True)

    def _write_configuration(self) -> None:
        host, ports = socket.gethostname().partition(".")[0], free_ports(1 + len(self.nodes))
        nodes = "\n".join(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=6000"
                          for node, port in zip(self.nodes, ports[1:]))
        (self.root / "slurm.conf").write_text(_CONFIGURATION.format(root=self.root, controller=ports[0], nodes=nodes))

    def _set(self, name: str, value: str) -> None:
        self._before[name] = os.environ.get(name)
        os.environ[name] = value


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _descendants(process: int) -> list[int]:
    """Processes below this one, the nearest last."""
    children = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _parent(path) == process]
    return [each for child in children for each in (*_descendants(child), child)]


def _parent(stat: Path) -> int | None:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def _variables(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        pass
