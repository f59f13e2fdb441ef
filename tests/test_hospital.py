"""The preflight of a hospital, and a federation of real processes: SuperLink, proxy and nodes."""

import http.client
import os
import shlex
import shutil
import signal
import ssl
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    assert_same_weights,
    exit_code,
    refused,
    rows,
    shrink_stand_ins,
    without_time,
)

pytest.importorskip("flwr", reason="flwr is not installed, or this Python is older than 3.11")

import fedgs
from support import flower, loopback, manifest, runs, volumes
from support.errors import UserError
from tools import flower_apps, hospital

CENTRES = ["C4", "C5", "C6"]
OPTIONS = [
    *("--image-size", "32", "--width", "2", "--batch-size", "4", "--local-epochs", "1"),
    *("--lr", "1e-3", "--tau", "10", "--device", "cpu", "--centres", *CENTRES),
]


# ------------------------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def federation(square_root, tmp_path_factory):
    """A SuperLink, a proxy and three nodes: started once, since that takes a while."""
    if not shutil.which("nginx"):
        pytest.skip("nginx is not installed")
    folder = tmp_path_factory.mktemp("federation")
    config = fedgs.Config(data_root=str(square_root), centres=tuple(CENTRES), device="cpu")
    with hospital.federation(config, folder) as running:
        yield running
    assert loopback.processes_of(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "killed"),
    [(["--rounds", "2"], True), (["--rounds", "1", "--model", "sd-utnet"], False)],
    ids=["utnet", "sd-utnet"],
)
def test_real_hospitals_are_one_process(federation, square_root, tmp_path, options, killed):
    """TLS, keys, a proxy, a folder each: every bit is that of one process with as many threads.

    killed: the SuperLink is, in a round. It is started again, and the run goes on with --resume.
    """
    options = [*OPTIONS, *options]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    where = ["--data-root", square_root, "--workers", 1, "--preset", "paper"]
    assert exit_code(fedgs.main, [*options, *where, "--out", tmp_path / "alone"]) == 0
    torch.set_num_threads(threads)

    arguments = [*options, "--threads", "1", "--patience", "900", "--out", str(tmp_path / "run")]
    if killed:
        for line in loopback.follow_run(federation, arguments):
            if line.startswith("round   1/2"):
                loopback.end(federation.processes.pop("superlink"), signal.SIGKILL)
                loopback.start_superlink(federation)
        assert not (tmp_path / "run" / "results.json").exists()
        assert len(rows(tmp_path / "run" / "rounds.csv")) == 1
        arguments.append("--resume")
    said = "\n".join(loopback.follow_run(federation, arguments))
    assert (tmp_path / "run" / "results.json").exists(), said
    for name in ("last", "best", "best_small"):
        assert_same_weights(tmp_path / "alone" / f"{name}.pt", tmp_path / "run" / f"{name}.pt")
    one, other = (without_time(tmp_path / name / "rounds.csv") for name in ("alone", "run"))
    assert one == other
    one, other = (runs.read_results(tmp_path / name) for name in ("alone", "run"))
    for name in ("data", "notes", "checkpoints", "rounds"):
        assert one[name] == other[name]


@pytest.mark.slow
def test_a_damaged_file_is_told_of_at_the_hospital_alone(federation, square_root, tmp_path):
    """Neither in a log of the coordinator's, nor in what Flower says of the run."""
    data = federation.folder / "hospital-C5" / "data" / "data_C5"
    whole = data.resolve()
    data.unlink()
    shutil.copytree(whole, data)
    damaged = data / "images_C5" / "03.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    try:
        arguments = [*OPTIONS, "--patience", "900", "--out", str(tmp_path / "run")]
        said = "\n".join(loopback.follow_run(federation, arguments))
    finally:
        shutil.rmtree(data)
        data.symlink_to(whole)

    assert "hospital C5 could not do its part: its own log says why" in said
    for log in (said, federation.log("superlink"), federation.log("proxy")):
        for secret in ("03.jpg", str(data), "images_C5", "Truncated"):
            assert secret not in log
    assert str(damaged) in federation.log("hospital-C5")
    assert not (tmp_path / "run").exists()


TRICKS = [
    "/v1/control/list-runs",
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/..%2fcontrol%2flist-runs",
    "/v1/control/list-runs?/v1/fleet/get-run",
    "/v1/fleet/",
    "/v1/fleet/get-run/../../control/list-runs",
    "//v1/control/list-runs",
    "/docs",
    "/openapi.json",
    "/",
]


@pytest.mark.slow
def test_the_proxy_passes_what_a_node_needs_and_no_more(federation):
    """Straight at the SuperLink the same requests are answered, so the answer is the proxy's."""

    def post(port, path):
        context = ssl.create_default_context(cafile=federation.keys / "ca.crt")
        connection = http.client.HTTPSConnection("localhost", port, timeout=10, context=context)
        connection.request("POST", path, b"")
        return connection.getresponse().status

    for path in TRICKS:
        assert post(federation.ports["proxy"], path) == 404, path
    assert post(federation.ports["superlink"], TRICKS[0]) not in (403, 404)
    assert post(federation.ports["proxy"], "/v1/fleet/register-node") not in (403, 404, 502)

    found = hospital.look_at_link(f"localhost:{federation.ports['proxy']}", ca(federation))
    assert "only the fleet's paths are passed" in found
    with pytest.raises(UserError, match="could start code here"):
        hospital.look_at_link(f"localhost:{federation.ports['superlink']}", ca(federation))
    with pytest.raises(UserError, match="CERTIFICATE_VERIFY_FAILED"):
        hospital.look_at_link(f"localhost:{federation.ports['proxy']}", None)


def ca(federation):
    return str(federation.keys / "ca.crt")


# ---------------------------------------------------------------------------- parts that end


WAITS = "import time; print('begun', flush=True); time.sleep(600)"
STARTS = (
    "import subprocess, sys\n"
    f"subprocess.Popen([sys.executable, '-c', {WAITS!r}], start_new_session=True)\n{WAITS}"
)


def test_parts_end_with_their_block_and_all_that_they_started(tmp_path):
    """Also one that has started another in a session of its own."""
    with pytest.raises(KeyboardInterrupt), loopback.parts(tmp_path) as running:
        running.start("part", sys.executable, "-c", STARTS)
        running.wait("both begin", lambda: running.log("part").count("begun") == 2)
        assert len(loopback.processes_of(tmp_path)) == 2
        raise KeyboardInterrupt
    running.wait("both end", lambda: not loopback.processes_of(tmp_path), 10)


def test_parts_end_with_a_process_that_is_killed(tmp_path):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom support import loopback\n"
        "running = loopback.Parts(Path(sys.argv[1]))\n"
        f"running.start('part', sys.executable, '-c', {WAITS!r})\ntime.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program, tmp_path], env=environment)
    watch = loopback.Parts(tmp_path)
    watch.wait("it begins", lambda: "begun" in watch.log("part"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    watch.wait("its part ends", lambda: not loopback.processes_of(tmp_path), 10)


def test_a_part_that_ends_by_itself_is_named(tmp_path):
    with loopback.parts(tmp_path) as running:
        running.start("part", sys.executable, "-c", "raise SystemExit('no such file')")
        with pytest.raises(UserError, match="part ended by itself: no such file"):
            running.wait("it begins", lambda: False)


def test_lines_of_a_part_are_followed_to_the_last(tmp_path):
    program = "import time; print('one', flush=True); time.sleep(0.5); print('two')"
    with loopback.parts(tmp_path) as running:
        for _ in range(2):  # what it has written before is not told again
            running.start("part", sys.executable, "-c", program)
            assert list(running.follow("part")) == ["one", "two"]


# ------------------------------------------------------------------------------------ preflight


def check(*options):
    return exit_code(hospital.main, ["check", "--centre", "C4", *OPTIONS[:2], *options])


def test_a_preflight_shows_a_table_of_the_centre(square_root, tmp_path, capsys):
    loopback.make_node_key(tmp_path, "C4")
    key = ["--key", tmp_path / "C4"]
    assert check("--data-root", square_root, "--out", tmp_path / "new", *key, "--tau", 10) == 0
    said = capsys.readouterr().out
    assert f"fedgs {fedgs.__version__}, torch {torch.__version__.partition('+')[0]}, flwr " in said
    assert "kernels " in said
    lines = [line.split() for line in said.splitlines()]
    assert ["train", "9", "9", "9"] in lines
    assert ["validation", "1", "1", "1"] in lines
    assert ["test", "2", "2", "2"] in lines
    assert "PROBLEM" not in said


def test_a_preflight_says_of_everything_what_is_wrong(square_root, tmp_path, capsys):
    """And goes on to the next thing."""
    root = tmp_path / "frames"
    shutil.copytree(square_root, root)
    (root / "data_C4" / "images_C4" / "03.jpg").write_bytes(b"")
    key = tmp_path / "C4"
    key.write_text("no key")
    nobody = f"localhost:{loopback.free_port()}"
    (tmp_path / "file").write_text("")
    options = ["--data-root", root, "--out", tmp_path / "file", "--key", key]
    code = check(*options, "--superlink", nobody)
    output = capsys.readouterr()
    assert code == 2
    assert output.err.endswith("folder, data, key, link: see above\n")
    assert "03.jpg" in output.out
    assert "refused" in output.out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda key: key.chmod(0o644), "can be read by other users"),
        (lambda key: key.write_bytes(b"nothing"), "is no private key"),
    ],
)
def test_a_key_that_does_not_do(tmp_path, change, words):
    key = loopback.make_node_key(tmp_path, "C4")
    assert "its owner's alone" in hospital.look_at_key(key)
    change(key)
    with pytest.raises(UserError, match=words):
        hospital.look_at_key(key)


def test_a_centre_that_is_not_in_the_data_set_is_refused(square_root, tmp_path, capsys):
    options = ["--centre", "C9", "--data-root", square_root, "--out", tmp_path]
    assert exit_code(hospital.main, ["check", *options]) == 2
    assert "--centre C9: the data set has C1 C2" in capsys.readouterr().out


# -------------------------------------------------------------------------------- demonstration


def test_a_centres_folder_holds_that_centre_alone(square_root, tmp_path):
    config = fedgs.Config(data_root=str(square_root), centres=("C4", "C6"))
    roots = hospital.share_out(config, tmp_path)
    assert [path.name for path in Path(roots["C4"]).iterdir()] == ["data_C4"]
    one = fedgs.load_data(replace(config, data_root=str(roots["C4"]), image_size=32), ["C4"])
    assert one.facts["C4"].train == 9


def test_a_demonstration_passes_on_what_was_typed(monkeypatch, square_root, tmp_path):
    """Options of the run go to the coordinator; places of this machine do not."""
    seen = SimpleNamespace()

    def demo(config, arguments, folder):
        seen.config, seen.arguments, seen.folder = config, arguments, folder

    monkeypatch.setattr(hospital, "demo", demo)
    options = ["--rounds", "3", "--data-root", square_root, "--out", tmp_path, "--patience", "9"]
    assert exit_code(hospital.main, ["demo", *options, "--allow-missing"]) == 0
    assert seen.folder == tmp_path
    assert seen.config.data_root == str(square_root)
    text = " ".join(seen.arguments)
    assert "--rounds 3" in text
    assert "--centres C4 C5 C6" in text
    assert "--patience 9" in text
    assert "--allow-missing" in text
    assert "data-root" not in text
    assert "--out" not in seen.arguments
    read, policy = flower_apps.configure(shlex.join(seen.arguments))
    assert replace(read, data_root=str(square_root)) == seen.config
    assert (policy.patience, policy.allow_missing) == (9.0, True)


def test_a_demonstration_of_ones_own_images_says_what_they_are(monkeypatch, square_root, tmp_path):
    """The coordinator has no manifest, and each hospital one of its own."""
    lines = ["centre,image,mask,group,small,split"]
    for centre in ("C4", "C5"):
        for i in range(10):
            files = [f"images_{centre}/{i:02}.jpg", f"masks_{centre}/{i:02}_mask.jpg"]
            names = [str(square_root / f"data_{centre}" / file) for file in files]
            split = "train" if i < 6 else "validation" if i < 8 else "test"
            lines.append(",".join([f"St {centre}", *names, f"patient {i // 2}", str(i > 3), split]))
    whole = tmp_path / "cohort.csv"
    whole.write_text("\n".join(lines))
    seen = []
    monkeypatch.setattr(hospital, "demo", lambda *what: seen.extend(what))
    options = [
        "--dataset",
        whole,
        "--out",
        tmp_path / "new",
        "--out-centre",
        "",
        "--image-size",
        32,
    ]
    assert exit_code(hospital.main, ["demo", *options]) == 0
    config, arguments, _ = seen
    read, _ = flower_apps.configure(shlex.join(arguments))
    assert replace(read, data_root=str(whole)) == config
    assert config.centres == ("St C4", "St C5")

    roots = hospital.share_out(config, tmp_path / "shared")
    for centre, root in roots.items():
        assert manifest.centres_of(manifest.read(root)) == (centre,)
        here = {"data-root": str(root)}
        own = flower.own_config(flower.settings(read), here, fedgs)
        found = fedgs.load_data(own, [centre])
        assert found.facts[centre] == fedgs.load_data(config, [centre]).facts[centre]
        assert found.source == "cohort"
        assert found.facts[centre].flagged == 10


def test_a_volume_is_given_to_its_centres_hospital_alone(monkeypatch, cache, tmp_path):
    """And stays marked as a drawn one."""
    shrink_stand_ins(monkeypatch, frames=20, volumes=2, slices=6)
    options = {"dataset": "lits", "centres": ["C2", "C5"], "out_centre": "C5", "preset": "quick"}
    config, _ = fedgs.configure({**options, "cache": str(cache), "data_root": "stand-in"})
    roots = hospital.share_out(config, tmp_path)
    for centre, first in {"C2": 30, "C5": 120}.items():
        own = replace(config, data_root=str(roots[centre]), cache=str(tmp_path / "slices"))
        numbers = {number for _, number, _ in volumes.nifti_files(roots[centre])}
        assert numbers == {first, first + 1}
        here = fedgs.load_data(own, [centre])
        assert here.source == "LiTS stand-in"
        assert here.facts[centre] == fedgs.load_data(config, [centre]).facts[centre]

    with pytest.raises(UserError, match="has no volumes of centre C3: leave it out"):
        hospital.link_volumes(roots["C2"], "C3", tmp_path)


def test_a_demonstration_needs_the_source(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loopback, "ROOT", tmp_path)
    code = exit_code(hospital.main, ["demo", "--out", tmp_path / "new"])
    refused(capsys, code, "the demonstration needs the source")


def test_a_demonstration_needs_an_empty_folder(tmp_path, capsys):
    (tmp_path / "mine").write_text("")
    refused(capsys, exit_code(hospital.main, ["demo", "--out", tmp_path]), "is not empty")
