"""Federations between real hospitals: a hospital's preflight, and all of it on one machine.

    python -m tools.hospital check --centre C3 --data-root /data/C3 --out /var/lib/fedgs \\
        --superlink fedgs.example.org:443 --root-certificates ca.crt --key C3
    python -m tools.hospital demo
    python -m tools.hospital demo --data-root /data/polypgen --centres C1 C2 C6 --rounds 5
    python -m tools.hospital demo --dataset lits

check looks at what a hospital's node will need: programs, kernels, the centre's images, disk, its
key, and the way to the coordinator. Nothing of the images leaves the machine.

demo makes certificates and keys, starts a SuperLink, a proxy and one node a centre on this machine,
runs a federation among them as docs/hospitals.md describes it, and stops all that it started. It
takes the options of fedgs.py, and those that say what happens when a hospital is missing.
"""

import argparse
import contextlib
import csv
import datetime
import http.client
import importlib.metadata
import platform
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch

import data
import fedgs
from support import hardware, loopback, manifest, options, runs, standin, tables, volumes
from support.errors import UserError, for_people, readable_errors

DEMO = {  # where nothing else is said: something for a few minutes
    "preset": "quick",
    "rounds": 2,
    "device": "cpu",
}
TAKE_PART = {  # two hospitals and a held-out centre, with few images
    "polypgen": {"centres": ["C4", "C5", "C6"], "out_centre": "C6"},
    "lits": {"centres": ["C2", "C3", "C5"], "out_centre": "C5"},
}
OF_MANIFEST = ("dataset", "centres", "images", "split", "tau", "log_base")  # what it decides
OF_THIS_MACHINE = ("data_root", "cache")  # each hospital has its own
IMAGES = (
    "dataset",
    "data_root",
    "cache",
    "device",
    "kernels",
    "image_size",
    "tau",
    "split",
    "fold",
    "images",
    "lesion",
    "window",
)
SCARCE = 2**30  # bytes of disk below which a run may not end


# ------------------------------------------------------------------------------------- preflight


def check(centre: str, given: Mapping, out: Path, link: argparse.Namespace) -> None:
    """Look at everything a node needs, a line each. Raises UserError if anything is not right.

    given: options of fedgs.py; link: superlink, root_certificates and key, each may be None.
    """
    # Runs between hospitals have the paper's values where nothing is said.
    config, _ = fedgs.configure({"preset": "paper", **given})
    looks: dict[str, Callable[[], str]] = {
        "programs": look_at_programs,
        "compute": partial(look_at_compute, config),
        "folder": partial(look_at_folder, out),
        "data": partial(look_at_data, config, centre),
    }
    if link.key:
        looks["key"] = partial(look_at_key, Path(link.key))
    if link.superlink:
        looks["link"] = partial(look_at_link, link.superlink, link.root_certificates)

    # All of them, whatever is wrong: an administrator wants to hear it in one go.
    wrong = []
    for name, look in looks.items():
        found, problem = seen(look)
        print(f"{name:<9}{'ok: ' if not problem else 'PROBLEM: '}{found or problem}", flush=True)
        if problem:
            wrong.append(name)
    if wrong:
        raise UserError(f"{', '.join(wrong)}: see above")


def seen(look: Callable[[], str]) -> tuple[str, str]:
    """-> what a look found, or what is wrong; one of the two is empty"""
    try:
        return look(), ""
    except Exception as error:
        # A fault of this program is not the hospital's.
        if not for_people(error):
            raise
        return "", for_people(error)


def look_at_programs() -> str:
    """Versions: hospitals with others are refused."""
    try:
        flower = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            'flwr is not installed: pip install -e ".[flower]", for which Python has to be 3.11 or '
            "newer"
        ) from None
    # After a plus torch names its build, in which hospitals may differ.
    version = torch.__version__.partition("+")[0]
    return f"fedgs {fedgs.__version__}, torch {version}, flwr {flower}, Python " + (
        platform.python_version()
    )


def look_at_compute(config: fedgs.Config) -> str:
    """Device and kernels: those have to be equal at all hospitals."""
    device = hardware.choose_device(config.device)
    kernels, reason = fedgs.choose_kernels(config.kernels, device)
    return f"{hardware.describe_device(device)}; kernels {kernels.name} ({reason})"


def look_at_folder(out: Path) -> str:
    """The node writes its log and its own results there."""
    # Rights can be misread, and disks full or read-only: a file tells.
    out.mkdir(parents=True, exist_ok=True)
    probe = out / ".tmp-probe"
    probe.write_text("a file can be written\n")
    probe.unlink()
    free = shutil.disk_usage(out).free
    if free < SCARCE:
        raise UserError(f"{out}: {free / 2**20:.0f} MiB are free, 1024 are wanted")
    return f"{out}, {free / 2**30:.0f} GiB free"


def look_at_data(config: fedgs.Config, centre: str) -> str:
    """All images of the centre, read and split as in a run."""
    if centre not in config.centres:
        raise UserError(f"--centre {centre}: the data set has {' '.join(config.centres)}")

    # Every file is opened, as a round will do it.
    federation = fedgs.load_data(config, [centre])
    parts = {
        "train": federation.train.get(centre),
        "validation": federation.validation.get(centre),
        "test": federation.in_test.get(centre, federation.out_test),
    }
    rows = [["", "images", "with lesion", "small"]]
    for name, images in parts.items():
        # A held-out centre has nothing but a test.
        if images is not None:
            lesions = int(images.masks.flatten(1).any(dim=1).sum())
            rows.append([name, str(len(images)), str(lesions), str(int(images.small.sum()))])
    notes = "; ".join([federation.source, *federation.notes])
    return f"{notes}\n{tables.aligned(rows)}"


def look_at_key(path: Path) -> str:
    """A private key that Flower takes, and that nobody else on this machine can read."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    # Flower says of another key only that it did not work.
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except ValueError as error:
        raise UserError(f"{path} is no private key in OpenSSH's format ({error})") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"{path}: Flower takes keys of `ssh-keygen -t ecdsa -b 384`")

    # As ssh does it: whoever reads it is this hospital.
    if path.stat().st_mode & 0o077:
        raise UserError(f"{path} can be read by other users: chmod 600 {path}")
    return f"{path} is an elliptic curve key, and its owner's alone"


def look_at_link(superlink: str, root_certificates: str | None) -> str:
    """The coordinator's certificate, and that its proxy passes what a node needs and no more."""
    host, _, port = superlink.rpartition(":")
    if not (host and port.isdigit()):
        raise UserError(f"--superlink {superlink}: give a name and a port, fedgs.example.org:443")

    # With the authority's certificate alone, and not with those that browsers trust.
    context = ssl.create_default_context(cafile=root_certificates)
    try:
        until = certificate_end(host, int(port), context)

        # Empty requests: what counts is who answers them, the proxy or the SuperLink behind it.
        codes = []
        for path in ("fleet/register-node", "control/list-runs", "runtime/acquire-task"):
            connection = http.client.HTTPSConnection(host, int(port), timeout=10, context=context)
            connection.request("POST", f"/v1/{path}", b"")
            codes.append(connection.getresponse().status)
            connection.close()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{superlink}: {error}") from error

    # The SuperLink refuses an empty request with a code of its own; a proxy without one behind it
    # has none of those.
    fleet, *others = codes
    if fleet == 404 or fleet >= 500:
        raise UserError(f"{superlink} answers, but no SuperLink is behind it (code {fleet})")
    if any(code not in (403, 404) for code in others):
        raise UserError(
            f"{superlink} passes Flower's control paths: whoever reaches it could start code here. "
            "Ask the coordinator for the proxy of docs/hospitals.md, and do not connect before"
        )
    return f"{superlink}, certificate valid until {until}; only the fleet's paths are passed"


def certificate_end(host: str, port: int, context: ssl.SSLContext) -> datetime.date:
    """The last day of the certificate with which a server identifies itself. Raises OSError."""
    # No more than the greeting: nothing is asked for.
    with (
        socket.create_connection((host, port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        until = ssl.cert_time_to_seconds(secure.getpeercert()["notAfter"])
    return datetime.datetime.fromtimestamp(until).date()


# --------------------------------------------------------------------------------- demonstration


def demo(config: fedgs.Config, arguments: Sequence[str], folder: Path) -> None:
    """A whole federation on this machine. Raises UserError where it cannot run, or did not end.

    arguments: all options of the run, as they are typed.
    """
    look_at_programs()
    look_at_source()
    runs.check_empty(folder)
    folder = folder.resolve()

    print(f"{len(config.centres)} hospitals and a coordinator start in {folder}", flush=True)
    with federation(config, folder) as running:
        print("they are there; what Flower says of the run follows\n", flush=True)
        run = folder / "run"
        for line in loopback.follow_run(running, [*arguments, "--out", str(run)]):
            # Of Flower's own lines those are left out that say that it goes on.
            if "\x1b[92mINFO" not in line:
                print(line, flush=True)

    # Flower's command ends with 0 for a run that failed, too.
    if not (run / "results.json").exists():
        raise UserError(f"the run did not end well: see above, and the logs in {folder}")
    print(f"\neach hospital's own tables and pictures: {folder}/hospital-*/results")
    if "proxy" in running.ports:
        received, sent = loopback.bytes_of(running)
        print(f"through the proxy: {received / 2**20:.1f} MiB in, {sent / 2**20:.1f} MiB out")


def look_at_source() -> None:
    """The app that Flower sends, and the proxy's configuration. Raises UserError without them."""
    app = loopback.ROOT / "flower"
    if not (app / "pyproject.toml").exists():
        raise UserError(
            f"{app} is missing: the demonstration needs the source, so install it from there, with "
            'pip install -e ".[flower]"'
        )


@contextlib.contextmanager
def federation(config: fedgs.Config, folder: Path) -> Iterator[loopback.Parts]:
    """A SuperLink, a proxy, and a node for each centre, with certificates and keys, in a folder.

    They run until the block ends.
    """
    # In one folder, since it is one machine. Each hospital keeps its own key, and nobody else's.
    keys = folder / "keys"
    keys.mkdir(parents=True)
    roots = share_out(config, folder)
    loopback.make_certificates(keys)

    with loopback.parts(folder) as running:
        loopback.start_superlink(running)
        if shutil.which("nginx"):
            loopback.start_proxy(running)
        else:
            print("nginx is not installed: the hospitals reach all of the SuperLink", flush=True)

        # The coordinator learns whose key is whose before the first node connects.
        for centre in config.centres:
            loopback.make_node_key(keys, centre)
            loopback.register(running, centre)

        for centre in config.centres:
            # All of a hospital's own is in one folder, and nothing is written beside its images.
            home = home_of(centre, folder)
            here = {
                "data-root": str(roots[centre]),
                "cache": str(home / "cache"),
                "device": config.device,
                "out": str(home / "results"),
            }
            loopback.start_node(running, centre, here)
        yield running


# ------------------------------------------------------------------------- each hospital's images


def home_of(centre: str, folder: Path) -> Path:
    """A hospital's own folder in the demonstration's."""
    return folder / loopback.name_of_node(centre)


def share_out(config: fedgs.Config, folder: Path) -> dict[str, Path]:
    """Give each hospital its own centre's images alone. -> {centre: its --data-root}"""
    # Links and not copies: data sets are large.
    root = data.find(config.dataset, config.data_root)
    if root is None:
        root = data.draw_stand_in(config.dataset, config.centres, config.image_size, config.cache)

    roots = {}
    for centre in config.centres:
        own = home_of(centre, folder) / "data"
        own.mkdir(parents=True)
        roots[centre] = own
        if config.dataset == "polypgen":
            link_frames(root, centre, own)
        elif config.dataset == "lits":
            link_volumes(root, centre, own)
        else:
            roots[centre] = own / f"{config.dataset}.csv"
            write_manifest(root, centre, roots[centre])
    return roots


def link_frames(root: Path, centre: str, own: Path) -> None:
    """One centre's part of PolypGen, as links. Groups of frames are in one table for all."""
    flags = Path("metadata") / f"my_dataDetails_{centre}.csv"
    # A folder that has no flags or groups beside its frames goes without.
    for part in (Path(f"data_{centre}"), flags, Path("index.csv")):
        if (root / part).exists():
            (own / part).parent.mkdir(exist_ok=True)
            (own / part).symlink_to((root / part).resolve())


def link_volumes(root: Path, centre: str, own: Path) -> None:
    """One centre's volumes of LiTS, as links. Raises UserError where it has none."""
    paths = []
    for _, number, path in volumes.nifti_files(root):
        if number in data.LITS_VOLUMES[centre]:
            paths.append(path)
    if not paths:
        raise UserError(f"{root} has no volumes of centre {centre}: leave it out with --centres")

    # Drawn volumes stay marked as such: the mark lies beside them.
    marks = {path.parent / standin.MARK for path in paths}
    for path in [*paths, *marks]:
        if path.exists():
            (own / path.name).symlink_to(path.resolve())


def write_manifest(whole: Path, centre: str, own: Path) -> None:
    """One centre's rows of a manifest, which name the same files."""
    rows = [[*manifest.REQUIRED, *manifest.OPTIONAL]]
    for row in manifest.read(whole):
        if row.centre == centre:
            # Absolute, since the table lies elsewhere. Images are named as seen from the folder
            # that a centre's have in common, so that their names stay.
            files = [str(row.image.absolute()), str(row.mask.absolute())]
            small = "" if row.small is None else str(row.small)
            rows.append([centre, *files, row.group, small, row.split])

    # Commas and quotes in names are the csv module's affair.
    with own.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


# ------------------------------------------------------------------------------------ command line


def main(arguments: list[str] | None = None) -> None:
    """The command line. Exits with 2 for an error, 130 when interrupted, one line on stderr."""
    with readable_errors("tools.hospital"):
        parser = options.new_parser(__doc__, "python -m tools.hospital")
        verbs = parser.add_subparsers(dest="verb", required=True, parser_class=options.Parser)
        add_check(verbs)
        add_demo(verbs)
        given = parser.parse_args(arguments)
        given.run(given)


def add_check(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("check", argument_default=argparse.SUPPRESS, allow_abbrev=False)
    # Options that were not given are not there, but for these.
    parser.set_defaults(run=run_check, superlink=None, root_certificates=None, key=None)
    parser.add_argument("--centre", required=True, help="this hospital's centre")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder that the node may fill")
    parser.add_argument("--superlink", help="the coordinator's proxy, NAME:PORT")
    parser.add_argument("--root-certificates", help="the authority's certificate, ca.crt")
    parser.add_argument("--key", help="the node's private key")
    options.add_options(parser, fedgs.Config, IMAGES)


def run_check(given: argparse.Namespace) -> None:
    # What is about the images and their size decides the table, and only that is passed on.
    own = {name: value for name, value in vars(given).items() if name in IMAGES}
    check(given.centre, own, given.out, given)


def add_demo(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("demo", argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.set_defaults(run=run_demo)
    options.add_options(parser, fedgs.Config)

    # Of support.flower.Policy, which cannot be imported without Flower. The coordinator checks
    # their values.
    for name in ("patience", "attempts", "quorum", "threads"):
        parser.add_argument(options.spelling(name), help="see docs/hospitals.md")
    parser.add_argument("--allow-missing", action="store_true", help="see docs/hospitals.md")


def run_demo(given: argparse.Namespace) -> None:
    values = {**DEMO, **vars(given)}
    del values["verb"], values["run"]
    folder = Path(values.pop("out", "runs/hospitals"))

    # Those of the published data sets that take part where nothing is said.
    dataset = values.get("dataset", "polypgen")
    values = {**TAKE_PART.get(dataset, {}), **values}
    names = {f.name for f in fields(fedgs.Config)}
    config, _ = fedgs.configure({name: x for name, x in values.items() if name in names})
    if dataset not in TAKE_PART:
        # The coordinator has no manifest: it is told what ours says.
        for name in OF_MANIFEST:
            values[name] = getattr(config, name)
    demo(config, as_typed(values), folder)


def as_typed(values: Mapping) -> list[str]:
    """Options of a run by name, as the coordinator types them."""
    arguments = []
    for name, value in values.items():
        # What names places here would mean nothing there.
        if name in OF_THIS_MACHINE:
            continue

        # A switch has no value, and one that is off is not typed.
        arguments.append(options.spelling(name))
        if isinstance(value, list | tuple):
            arguments += map(str, value)
        elif value is not True:
            arguments.append(str(value))
    return arguments


if __name__ == "__main__":
    main()
