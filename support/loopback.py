"""A federation of Flower on this machine: certificates, keys, and processes that end with us.

Everything listens on the loopback. tools/hospital.py shows it with `demo`, and the tests run it.
"""

import contextlib
import ctypes
import datetime
import getpass
import inspect
import ipaddress
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from support.errors import UserError

ROOT = Path(__file__).parent.parent
HOST = "127.0.0.1"
DAYS = datetime.timedelta(days=7)  # that the demonstration's certificates are valid


# ------------------------------------------------------------------------- certificates and keys


def make_certificates(folder: Path) -> None:
    """ca.crt, and server.crt and server.key for localhost, in a folder.

    Raises OSError.
    """
    # It comes with Flower, and preflights run without it.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def build(name: str, issuer: str, key: Any, is_authority: bool) -> Any:
        # A little back in time, since clocks do not agree to the second.
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = x509.CertificateBuilder(
            subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
            issuer_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]),
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - datetime.timedelta(minutes=5),
            not_valid_after=now + DAYS,
        )
        constraints = x509.BasicConstraints(ca=is_authority, path_length=None)
        return builder.add_extension(constraints, critical=True)

    def add(builder: Any, extension: Any) -> Any:
        return builder.add_extension(extension, critical=False)

    # The authority's own key is not kept: nobody can make another certificate with it. What is
    # said besides names is what newer versions of Python insist on.
    authority = ec.generate_private_key(ec.SECP256R1())
    identity = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    signs = dict.fromkeys(inspect.signature(x509.KeyUsage).parameters, False)
    signs["key_cert_sign"] = True
    ca = build("FedGS demonstration", "FedGS demonstration", authority, True)
    ca = ca.add_extension(x509.KeyUsage(**signs), critical=True)
    ca = add(ca, identity).sign(authority, hashes.SHA256())
    (folder / "ca.crt").write_bytes(pem(ca))

    # Nodes reach the proxy by its name, and the proxy the SuperLink by its address.
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(HOST))]
    server = build("localhost", "FedGS demonstration", key, False)
    server = add(server, x509.SubjectAlternativeName(names))
    signed_by = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identity)
    server = add(server, signed_by).sign(authority, hashes.SHA256())
    (folder / "server.crt").write_bytes(pem(server))
    write_secret(folder / "server.key", private_bytes(key, "TraditionalOpenSSL"))


def make_node_key(folder: Path, name: str) -> Path:
    """NAME and NAME.pub, as `ssh-keygen -t ecdsa -b 384` makes them. -> the private one"""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    # The only kind that Flower takes.
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    (folder / f"{name}.pub").write_bytes(public + b"\n")
    write_secret(folder / name, private_bytes(key, "OpenSSH"))
    return folder / name


def pem(certificate: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return certificate.public_bytes(serialization.Encoding.PEM)


def private_bytes(key: Any, form: str) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM,
        getattr(serialization.PrivateFormat, form),
        serialization.NoEncryption(),
    )


def write_secret(path: Path, content: bytes) -> None:
    """A file that only its owner reads."""
    # Made so from the first moment: in between somebody could have opened it.
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)


# ---------------------------------------------------------------------------------- processes


class Parts:
    """The parts of a federation that run: all of them end when this is closed.

    folder: where each part has a folder of its own, with its log; ports: {part: where it listens}.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.keys = folder / "keys"
        self.ports: dict[str, int] = {}
        self.processes: dict[str, subprocess.Popen] = {}
        self.begins: dict[str, int] = {}  # where in a part's log its own lines begin

    def start(self, name: str, *command: object, **environment: str) -> None:
        """Start a program in a folder of this name. Its output goes to the folder's log."""
        home = self.folder / name
        home.mkdir(parents=True, exist_ok=True)

        # In a group of its own, so that it can be ended with all that it starts, and Ctrl-C on our
        # terminal reaches us alone. A question that it asked would never be answered.
        with (home / f"{name}.log").open("ab") as log:
            self.begins[name] = log.tell()
            self.processes[name] = subprocess.Popen(
                [program(str(command[0])), *map(str, command[1:])],
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=surroundings(home, environment),
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def log(self, name: str) -> str:
        """What a part has written so far."""
        path = self.folder / name / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def check(self) -> None:
        """Raise UserError where a part has ended by itself."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                # What a program says last is mostly why it ended.
                lines = self.log(name).strip().splitlines()[-3:]
                told = " | ".join(lines) or "it said nothing"
                raise UserError(f"{name} ended by itself: {told} ({self.folder / name})")

    def wait(self, what: str, ready: Callable[[], Any], seconds: float = 60) -> Any:
        """Wait until something is there, as long as all parts run. -> what `ready` returned"""
        deadline = time.monotonic() + seconds
        while not (found := ready()):
            # Without one of them the others would wait for nothing.
            self.check()
            if time.monotonic() > deadline:
                raise UserError(f"{what}: not after {seconds:g} s (logs in {self.folder})")
            time.sleep(0.2)
        return found

    def follow(self, name: str) -> Iterator[str]:
        """The lines that a part writes, until it ends by itself; the others have to go on."""
        # From here on it may end without being missed.
        process = self.processes.pop(name)
        try:
            with (self.folder / name / f"{name}.log").open(encoding="utf-8") as log:
                log.seek(self.begins[name])
                ended = False
                while True:
                    line = log.readline()
                    if line:
                        yield line.rstrip("\n")
                    elif ended:
                        return
                    else:
                        # It may have written a last line before it ended: look once more.
                        ended = process.poll() is not None
                        self.check()
                        time.sleep(0.2)
        finally:
            end(process)

    def close(self) -> None:
        """End everything, and what Flower has started besides."""
        # All at once: a node takes seconds to end.
        for process in self.processes.values():
            signal_group(process, signal.SIGTERM)
        for process in self.processes.values():
            end(process)
        self.processes.clear()

        # Some of those are in groups of their own. They have the variables of their part.
        deadline = time.monotonic() + 10
        while (left := processes_of(self.folder)) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


def end(process: subprocess.Popen, how: int = signal.SIGTERM) -> None:
    """End a process and its group."""
    signal_group(process, how)

    # What has not ended by then, and what it has left behind in its group, is not asked again.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    signal_group(process, signal.SIGKILL)
    process.wait()


def processes_of(folder: Path) -> list[int]:
    """Processes that have, or inherited, the variables of a part in this folder. Linux tells."""
    mark = f"FLWR_HOME={folder}/".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        # Those of other users cannot be read, and some end while we look.
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


@contextlib.contextmanager
def parts(folder: Path) -> Iterator[Parts]:
    """Parts that end with the block, however it ends."""
    running = Parts(folder)
    try:
        yield running
    finally:
        running.close()


def signal_group(process: subprocess.Popen, how: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def end_with_parent() -> None:
    """A process that we are killed before we can stop is told so by Linux."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)


def program(name: str) -> str:
    """A program of the environment in which we run, or of the system. Raises UserError."""
    # An environment works without being on the PATH.
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise UserError(f'{name} is not installed: pip install -e ".[flower]"')
    return found


def surroundings(home: Path, more: Mapping[str, str]) -> dict[str, str]:
    """Variables of a part: Flower's files in its own folder, and nothing asked of its makers."""
    # Flower starts programs of its own by name. They import this project as we do, installed or
    # not.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    python = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": python,
        "FLWR_HOME": str(home / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        **more,
    }


def free_port() -> int:
    """A port of the loopback on which nobody listens."""
    # 0 asks the system for one.
    with socket.socket() as one:
        one.bind((HOST, 0))
        return one.getsockname()[1]


def listens(port: int) -> bool:
    """Whether somebody does."""
    with socket.socket() as one:
        # A port that is filtered would not even refuse.
        one.settimeout(1)
        return one.connect_ex((HOST, port)) == 0


# ------------------------------------------------------------------------------- the federation


def start_superlink(running: Parts) -> None:
    """The coordinator's part. It talks TLS, knows nodes by their keys, and fetches no packages."""
    keys = running.keys

    # Started again it is where it was: the others look for it there.
    port = running.ports.setdefault("superlink", free_port())
    running.start(
        "superlink",
        *("flower-superlink", "--host", HOST, "--port", port),
        *("--ssl-ca-certfile", keys / "ca.crt", "--ssl-certfile", keys / "server.crt"),
        # Nobody takes part whose key was not registered.
        *("--ssl-keyfile", keys / "server.key", "--enable-supernode-auth"),
        *("--database", running.folder / "superlink" / "state.db"),
        "--disable-runtime-dependency-installation",
    )
    running.wait("the SuperLink listens", lambda: listens(port))

    # Flower's own command finds it under the name `here`.
    home = running.folder / "coordinator" / "flwr"
    home.mkdir(parents=True, exist_ok=True)
    certificate = json.dumps(str(keys / "ca.crt"))
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{HOST}:{port}"\n'
        f"root-certificates = {certificate}\n",
        encoding="utf-8",
    )


def start_proxy(running: Parts) -> None:
    """nginx with the configuration of flower/, its ports and files replaced."""
    home = running.folder / "proxy"
    home.mkdir(parents=True, exist_ok=True)
    port = running.ports["proxy"] = free_port()

    # The configuration that is handed out is what runs here, so that it is tried every time.
    site = (ROOT / "flower" / "nginx.conf").read_text(encoding="utf-8")
    site = site.replace("listen 443 ", f"listen {HOST}:{port} ")
    site = site.replace(f"{HOST}:8000", f"{HOST}:{running.ports['superlink']}")
    site = site.replace("fedgs.example.org", "localhost").replace("/etc/fedgs", str(running.keys))
    (home / "site.conf").write_text(site, encoding="utf-8")

    # What a system's own nginx.conf has around it. Started by root it would change its user.
    user = [f"user {getpass.getuser()};"] if os.geteuid() == 0 else []
    lines = [*user, "daemon off;", f"pid {home}/nginx.pid;", "events {}", "http {"]
    lines += ["log_format bytes '$request_method $uri $status in $request_length out $bytes_sent';"]
    lines += [f"access_log {home}/access.log bytes;"]
    # Its own folders belong to root, and we may be anybody.
    for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
        lines.append(f"{kind}_temp_path {home}/{kind};")
    lines += [f"include {home}/site.conf;", "}", ""]
    (home / "nginx.conf").write_text("\n".join(lines), encoding="utf-8")
    running.start("proxy", "nginx", "-p", home, "-e", "stderr", "-c", home / "nginx.conf")
    running.wait("the proxy listens", lambda: listens(port))


def name_of_node(centre: str) -> str:
    """What a hospital's part is called, and its folder."""
    return f"hospital-{centre}"


def start_node(running: Parts, centre: str, settings: Mapping[str, str]) -> None:
    """A hospital's part. settings: its own places, see docs/hospitals.md."""
    # Flower reads it as TOML, whose strings are written like those of JSON.
    values = {"centre": centre, **settings}
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())

    # Where no proxy is, the SuperLink itself has to do.
    door = running.ports.get("proxy", running.ports["superlink"])
    running.start(
        name_of_node(centre),
        *("flower-supernode", "--superlink", f"localhost:{door}"),
        *("--root-certificates", running.keys / "ca.crt"),
        *("--auth-supernode-private-key", running.keys / centre),
        *("--host", HOST, "--port", free_port(), "--node-config", config),
    )


def flwr(running: Parts, *command: object, seconds: float = 120) -> str:
    """Run Flower's command for the coordinator. -> what it says"""
    # With the coordinator's FLWR_HOME, where its connections are.
    home = running.folder / "coordinator"
    done = subprocess.run(
        [program("flwr"), *map(str, command)],
        cwd=home,
        env=surroundings(home, {}),
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds,
    )
    if done.returncode:
        raise UserError(f"flwr {command[0]}: {' '.join(done.stdout.split())[-500:]}")
    return done.stdout


def register(running: Parts, centre: str) -> None:
    """Tell the SuperLink whose key this is."""
    key = running.keys / f"{centre}.pub"
    flwr(running, "supernode", "register", key, "here", "--name", centre)


def follow_run(running: Parts, arguments: Sequence[str]) -> Iterator[str]:
    """Submit a run with these options, and follow what the coordinator's side says."""
    config = f"options={json.dumps(shlex.join(arguments))}"
    app = ROOT / "flower"
    running.start("coordinator", "flwr", "run", app, "here", "--stream", "--run-config", config)
    yield from running.follow("coordinator")


def bytes_of(running: Parts) -> tuple[int, int]:
    """What has gone through the proxy. -> bytes that came in from the hospitals, that went out"""
    # nginx was told to write this of each request: see start_proxy.
    received = sent = 0
    log = running.folder / "proxy" / "access.log"
    for line in log.read_text(encoding="utf-8").splitlines():
        *_, arrived, _, left = line.split()
        received += int(arrived)
        sent += int(left)
    return received, sent
