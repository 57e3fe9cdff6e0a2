"""A stage that opens what it did not declare fails, names it, and leaves no out; honest stages, their workers and their
ranks do not notice.
"""

import itertools
import json
import os
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from kohaku_delta.provenance import import_closure
from kohaku_delta.sandbox import landlock

ROOT = Path(__file__).resolve().parents[2]
yaml = YAML(typ="safe", pure=True)

# A stage that does what it is told, with the audit hook alone or with the kernel's rules under it.
PROBE = """
import os, sys
sys.path[0] = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")
from pathlib import Path
import click
from kohaku_delta import atomic_files
from kohaku_delta.sandbox import landlock
from kohaku_delta.cli.stage_command import StageCommand, print_summary
FILE = click.Path(path_type=Path)
if not __name__:  # what the tests' own lines import belongs to the stage's code too
    from kohaku_delta.dataset import captions, dataset_statistics, filtering
    from kohaku_delta.sdxl import tokenizer
    from kohaku_delta.training import batch_builder, rank_processes, trainer
    from kohaku_delta.formats import parquet

class Stub:
    def __init__(self, path):
        self.path = path
    def batch(self, posts, visits, bucket):
        return open(self.path).read()

@click.command(cls=StageCommand)
@click.option("--params", type=FILE, default="params.yaml")
@click.option("--inputs", type=FILE, default="build/inputs.json")
@click.option("--tars", type=FILE)
@click.option("--text", type=FILE, default="build/text.txt")
@click.option("--forgotten", type=FILE, default="build/forgotten.txt")
@click.option("--ranks", type=int, default=1)
@click.option("--out", type=FILE, default="build/out.txt")
@click.argument("do")
def main(do, out, text, forgotten, **options):
    exec(do)
    with atomic_files.atomic_write(out) as file:
        file.write(b"done")
    print_summary("probe", f"done -> {out}")

if __name__ == "__main__":
    if os.environ.get("ALONE"):
        landlock.confine = lambda declared: False
    main()
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository with the library and one stage, its recipe, a mirror beside it and a home directory, each with a
    file that nobody declared.
    """
    place = tmp_path_factory.mktemp("hermetic").resolve()
    root = place / "repository"
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (root / "stages").mkdir()
    (root / "stages" / "probe.py").write_text(PROBE)
    probe = {"cmd": "", "deps": ["build/inputs.json", "build/text.txt"], "outs": ["build/out.txt"]}
    content = yaml.load(ROOT / "miniature" / "params.yaml")
    content["download"]["mirror"] = "../../mirror"
    files = {
        "repository/recipe/build/inputs.json": json.dumps(
            {
                "inputs": {
                    "tars": [{"path": "../../../mirror/data-0001.tar", "bytes": 3}],
                    "gamma": {"path": "../../../mirror/gamma", "bytes": 3},
                }
            }
        ),
        **{f"repository/recipe/build/{name}": name for name in ("text.txt", "forgotten.txt", "other.txt")},
        **{
            name: name
            for name in (
                "repository/params.yaml",
                "mirror/data-0001.tar",
                "mirror.members.parquet",
                "mirror/gamma",
                "home/.config/settings",
                "home/given.txt",
                "elsewhere/file",
            )
        },
    }
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    for path, what in ((root / "dvc.yaml", {"stages": {"probe": probe}}), (root / "recipe" / "params.yaml", content)):
        with open(path, "w") as file:
            yaml.dump(what, file)
    return place


BOTH = pytest.mark.parametrize("stage", ["hook", "both"], indirect=True)


@pytest.fixture
def stage(request, repository):
    """Runs the stage with the audit hook alone, or with both layers."""
    layers = getattr(request, "param", "hook")
    if layers == "both" and not landlock.abi_version():
        pytest.skip(
            "this kernel has no Landlock, so nothing holds C code and other programs here; the hook alone is tested"
        )

    def run(do, *options):
        (repository / "repository/recipe/build/out.txt").unlink(missing_ok=True)
        environment = os.environ | {
            "HOME": str(repository / "home"),
            "ALONE": "1" if layers == "hook" else "",
            "PYTHONPATH": "",
            "TMPDIR": str(repository),
        }
        command = [
            sys.executable,
            str(repository / "repository/stages/probe.py"),
            *options,
            "--",
            do.replace("PLACE", str(repository)),
        ]
        done = subprocess.run(
            command, cwd=repository / "repository/recipe", capture_output=True, text=True, env=environment
        )
        assert not list(repository.glob("kxl-*")), "the stage's own temporary folder stays behind"
        return done

    return run


def refused(done, repository, *words):
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "The stage probe " in done.stderr and all(word in done.stderr for word in words), done.stderr
    assert [path.name for path in (repository / "repository/recipe/build").iterdir() if "out" in path.name] == []


def allowed(done):
    assert done.returncode == 0, done.stderr
    assert "probe: done" in done.stdout


@pytest.mark.parametrize(
    "do, named",
    [
        ("open('build/other.txt').read()", "repository/recipe/build/other.txt"),
        ("os.open('../params.yaml', os.O_RDONLY)", "repository/params.yaml"),
        ("Path('PLACE/mirror/gamma').read_bytes()", "mirror/gamma"),
        ("Path('~/.config/settings').expanduser().read_text()", "home/.config/settings"),
        ("open('/proc/self/cwd/build/other.txt')", "/proc/self/cwd/build/other.txt"),
        (
            "os.symlink('PLACE/mirror/gamma', os.environ['TMPDIR'] + '/link'); open(os.environ['TMPDIR'] + '/link')",
            "/link",
        ),
        ("open('build/mine.txt', 'w')", "build/mine.txt"),
        ("open(forgotten)", "build/forgotten.txt"),
        ("import kohaku_delta.verify.compare_tensors", "kohaku_delta/verify/__init__.py"),
        ("import ctypes; ctypes.CDLL('PLACE/mirror/gamma')", "mirror/gamma"),
        ("import sqlite3; sqlite3.connect('PLACE/mirror/gamma')", "mirror/gamma"),
        ("from kohaku_delta.formats import parquet; parquet.read('build/other.txt')", "build/other.txt"),
        (
            "from kohaku_delta.sdxl.tokenizer import ClipTokenizer; ClipTokenizer('PLACE/mirror/gamma', text)",
            "mirror/gamma",
        ),
    ],
)
def test_a_file_that_is_not_declared_is_refused_and_named(stage, repository, do, named):
    refused(
        stage(do),
        repository,
        "opened ",
        named,
        "dvc.yaml" if "import kohaku_delta.verify" not in do else "Run `dvc repro`",
    )


@pytest.mark.parametrize(
    "do, named",
    [
        ("os.listdir('build')", "recipe/build"),
        ("list(os.scandir('PLACE/mirror'))", "mirror"),
        ("list(Path('PLACE/home').rglob('*'))", "home"),
    ],
)
def test_a_folder_that_is_not_declared_is_not_listed(stage, repository, do, named):
    refused(stage(do), repository, f"listed {repository}", named)


@BOTH
def test_a_refusal_that_a_library_swallows_fails_the_stage_and_no_out_appears(stage, repository):
    refused(stage("try:\n open('PLACE/mirror/gamma')\nexcept Exception: pass"), repository, "mirror/gamma")


def test_code_that_is_run_and_not_described_is_refused_and_named(stage, repository):
    """build/code/probe.json of an older revision: one of the files that the stage runs now is not in it."""
    path, told = repository / "repository" / "dvc.yaml", repository / "repository/recipe/build/code/probe.json"
    whole, code = path.read_text(), import_closure.file_digests(repository / "repository" / "stages" / "probe.py")
    del code["src/kohaku_delta/errors.py"]
    told.parent.mkdir()
    told.write_text(import_closure.dumps(import_closure.StageCode(stage="probe", files=code, libraries={})))
    try:
        content = yaml.load(whole)
        content["stages"]["probe"]["deps"].append("build/code/probe.json")
        with open(path, "w") as file:
            yaml.dump(content, file)
        refused(stage("pass"), repository, "runs ", "kohaku_delta/errors.py", "Run `dvc repro`")
    finally:
        path.write_text(whole)
        shutil.rmtree(told.parent)


@pytest.mark.ci
@BOTH
def test_compiled_code_kept_apart_is_judged_by_what_it_is_of(stage, repository, monkeypatch):
    """As in the container image, where the home directory holds PYTHONPYCACHEPREFIX: the first run writes what the
    others read.
    """
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(repository / "home" / "pycache"))
    for _ in range(2):
        allowed(stage("import http.client, wave"))
        assert list(repository.glob("home/pycache/**/wave.*.pyc"))
        refused(stage("import kohaku_delta.verify.compare_tensors"), repository, "kohaku_delta/verify/__init__.py")
    shutil.rmtree(repository / "home" / "pycache")


@BOTH
def test_what_is_declared_or_given_by_hand_or_belongs_to_the_system_is_open(stage, repository):
    do = "; ".join(
        [
            "import tempfile, urllib3, sqlite3, http.client",  # urllib3 binds a socket while it is imported
            "assert open(text).read() == 'text.txt' and Path('PLACE/mirror/data-0001.tar').read_text()",
            "assert open(forgotten).read() == 'home/given.txt'",
            "assert Path('PLACE/elsewhere/file').read_text() and open('/etc/hosts').read()",
            "tempfile.TemporaryFile(dir=out.parent).write(b'x')",
            "tempfile.NamedTemporaryFile(dir=out.parent).write(b'x')",
            "name = tempfile.mkstemp()[1]; open(name, 'w').write('x'); assert open(name).read() == 'x'",
            "open(name + '2', 'w').write('x'); os.listdir(os.path.dirname(name)); open('/dev/null')",
            "os.path.exists('PLACE/mirror/gamma')",
        ]
    )
    allowed(stage(do, "--forgotten", str(repository / "home" / "given.txt")))
    allowed(
        stage(
            "assert open(text).read()",
            "--text",
            str(repository / "home" / "given.txt"),
            "--out",
            str(repository / "repository/recipe/build/there/out.txt"),
        )
    )
    refused(
        stage("open('build/text.txt')", "--text", str(repository / "home" / "given.txt")), repository, "build/text.txt"
    )
    allowed(stage("os.listdir('PLACE/mirror'); open('PLACE/mirror/gamma')", "--tars", str(repository / "mirror")))
    shutil.rmtree(repository / "repository/recipe/build/there")


@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


@pytest.mark.ci
@BOTH
def test_a_socket_is_refused_and_named_and_nothing_arrives(stage, repository, server):
    port = server.getsockname()[1]
    for do, named in [
        (f"import socket; socket.create_connection(('127.0.0.1', {port}))", f"127.0.0.1, port {port}"),
        (f"import urllib.request; urllib.request.urlopen('http://localhost:{port}')", f"port {port}"),
        ("import socket; socket.getaddrinfo('example.org', 80)", "look up example.org"),
        ("import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))", "192.0.2.1, port 53"),
        ("import socket; socket.socket().bind(('0.0.0.0', 0))", "0.0.0.0"),
        ("import socket; socket.socket(socket.AF_UNIX).connect('PLACE/elsewhere/daemon')", "elsewhere/daemon"),
    ]:
        refused(stage(do), repository, named)
    with pytest.raises(BlockingIOError):
        server.accept()


@pytest.mark.ci
@BOTH
def test_ranks_are_held_too_and_talk_on_the_loopback_only(stage, repository, server):
    """Two ranks, as train starts them: the loopback is open to them, another host and a file that is not declared are
    not.
    """
    start = (
        "from kohaku_delta.training import rank_processes\nimport socket\n"
        "if not rank_processes.is_rank():\n rank_processes.launch_ranks(2, sys.argv[1:])\nelse:\n "
    )
    reach = f"socket.create_connection(('localhost', {server.getsockname()[1]}))"
    refused(stage(f"{start}{reach}; open('PLACE/mirror/gamma')", "--ranks", "2"), repository, "mirror/gamma", "Rank ")
    assert server.accept()
    refused(
        stage("import socket; socket.create_connection(('192.0.2.1', 80), 1)", "--ranks", "2"),
        repository,
        "192.0.2.1, port 80",
        "loopback only",
    )


def test_workers_of_the_loader_are_held_too(stage, repository):
    do = (
        "from kohaku_delta.training import batch_builder; import pyarrow as pa; "
        "rows = pa.table({'posts': [[1]], 'visits': [[1]], 'width': [8], 'height': [8]}); "
    )
    refused(
        stage(do + "list(batch_builder.load_batches(Stub('PLACE/mirror/gamma'), rows, [0], 1))"),
        repository,
        "mirror/gamma",
    )


def test_the_processes_that_decode_images_are_held_too(stage, repository):
    do = (
        "from kohaku_delta.dataset import image_decoding; import numpy as np; many = np.ones(1001, np.int64); "
        "image_decoding.sizes_by_decoding(many, many, many, many, {1: Path('PLACE/mirror/gamma')}, 100, "
        "image_decoding.Decoding(), None)"
    )
    refused(stage(do), repository, "mirror/gamma")


@pytest.mark.ci
@pytest.mark.parametrize("stage", ["both"], indirect=True)
@pytest.mark.parametrize(
    "do",
    [
        "import subprocess; subprocess.run(['cat', 'PLACE/mirror/gamma'], check=True)",
        "import subprocess; subprocess.run([sys.executable, '-c', 'open(\"PLACE/mirror/gamma\")'], check=True)",
        "import pyarrow as pa; pa.memory_map('PLACE/mirror/gamma').read()",
        "import adbc_driver_sqlite.dbapi as db; database = db.connect('file:PLACE/mirror/some.db?mode=ro'); "
        "database.cursor().execute('select * from it')",
    ],
)
def test_the_kernel_holds_c_code_and_other_programs(stage, repository, do):
    with sqlite3.connect(repository / "mirror" / "some.db") as database:
        database.execute("create table if not exists it (x)")
    assert stage(do).returncode == 1 and not (repository / "repository/recipe/build/out.txt").exists()
    allowed(stage(do, "--tars", str(repository / "mirror")))  # it was for want of a declaration


def test_where_the_kernel_cannot_hold_a_program_only_what_it_names_is_judged(stage, repository):
    """A library that starts `ldconfig` works; the record says that less was held."""
    do = "import subprocess; subprocess.run(['PROGRAM', 'PLACE/mirror/gamma'])"
    refused(stage(do.replace("PROGRAM", "cat")), repository, "mirror/gamma")
    refused(stage("os.system('cat PLACE/mirror/gamma')"), repository, "mirror/gamma")
    program = repository / "home" / "program"
    program.write_text("#!/bin/sh\necho ran")
    program.chmod(0o755)
    refused(stage("import subprocess; subprocess.run(['PLACE/home/program'])"), repository, "home/program")
    done = stage(
        "import subprocess; subprocess.run(['/sbin/ldconfig', '-p'], check=True, stdout=subprocess.DEVNULL); "
        "subprocess.run([sys.executable, '-c', 'pass'], check=True); "
        "from kohaku_delta import sandbox; print(sandbox.describe_confinement())"
    )
    allowed(done)
    assert "audit hook alone: the kernel does not offer Landlock" in done.stdout and "programs" in done.stdout


EACH_IN_A_PROCESS = """
import ctypes, json, shutil, subprocess, traceback
libc = ctypes.CDLL(None, use_errno=True)
child = lambda *words, run=subprocess.run: run(words, capture_output=True)
for name, line in json.loads(CASES).items():
    if not os.fork():
        result = "done"
        try:
            exec(line)
        except BaseException as error:
            result = f"{type(error).__name__} {getattr(error, 'message', error)}"
        os.write(1, f"case {name}: {ascii(result)}\\n".encode())
        os._exit(0)
    os.wait()
"""


def attempts(stage, cases):
    """What came of each of these lines, each in a process of its own."""
    done = stage(EACH_IN_A_PROCESS.replace("CASES", repr(json.dumps(cases))))
    allowed(done)
    told = dict(line[5:].split(": ", 1) for line in done.stdout.splitlines() if line.startswith("case "))
    assert told.keys() == cases.keys(), done.stderr
    return told


def open_folder(path):
    return f"folder = os.open('{path}', os.O_RDONLY); "


HEARD = {  # what Python itself does, with the hook alone → the name in the refusal
    "dir_fd": (open_folder("PLACE/mirror") + "os.open('gamma', os.O_RDONLY, dir_fd=folder)", "mirror/gamma"),
    "dir_fd beside a declared name":
        (open_folder("PLACE/repository/like") + "os.open('build/text.txt', 0, dir_fd=folder)", "like/build/text.txt"),
    "up from the libraries":
        ("open(os.path.dirname(os.__file__) + '/..' * 30 + 'PLACE/mirror/gamma')", "mirror/gamma"),
    "up from a link": (
        "os.symlink('PLACE/mirror', os.environ['TMPDIR'] + '/up'); open(os.environ['TMPDIR'] + '/up/../mirror/gamma')",
        "mirror/gamma"),
    "listed up from a link": ("os.listdir(os.environ['TMPDIR'] + '/up/../mirror')", "mirror"),
    "a link that is led elsewhere":
        ("link = os.environ['TMPDIR'] + '/link'; os.symlink(text.resolve(), link); open(link); os.remove(link); "
         "os.symlink('PLACE/mirror/gamma', link); open(link)", "/link"),
    "a link in place of a declared file":
        ("open(text.resolve()).close(); os.symlink('PLACE/mirror/gamma', 'build/.text.txt.0.aside'); "
         "os.replace('build/.text.txt.0.aside', text.resolve()); open(text.resolve())", "mirror/gamma"),
    "renamed onto an output": ("os.rename('build/other.txt', 'build/out.txt')", "build/other.txt"),
    "a folder renamed": ("os.rename('PLACE/repository/like', 'build/like')", "repository/like"),
    "renamed by dir_fd":
        (open_folder("build") + "os.rename('other.txt', 'out.txt', src_dir_fd=folder, dst_dir_fd=folder)", "other.txt"),
    "replaced": ("os.replace('PLACE/mirror/gamma', 'build/out.txt')", "mirror/gamma"),
    "an output renamed over another file": ("os.rename('build/text.txt', 'build/other.txt')", "build/other.txt"),
    "linked": ("os.link('PLACE/mirror/gamma', 'build/out.txt')", "mirror/gamma"),
    "a link made elsewhere": ("os.symlink('/etc/hosts', 'PLACE/repository/new')", "repository/new"),
    "shortened": ("os.truncate('PLACE/mirror/gamma', 0)", "mirror/gamma"),
    "removed": ("os.remove('PLACE/mirror/gamma')", "mirror/gamma"),
    "removed by dir_fd": (open_folder("PLACE/mirror") + "os.remove('gamma', dir_fd=folder)", "mirror/gamma"),
    "listed by dir_fd": (open_folder("PLACE/mirror") + "os.listdir(folder)", "mirror"),
}  # fmt: skip


def test_what_python_does_to_files_by_other_ways_is_heard(stage, repository):
    like = repository / "repository" / "like" / "build" / "text.txt"
    like.parent.mkdir(parents=True)
    like.write_text("another")
    told = attempts(stage, {name: line for name, (line, _) in HEARD.items()})
    try:
        for name, (_, path) in HEARD.items():
            assert told[name].startswith("'UserError The stage probe ") and path in told[name], (name, told[name])
    finally:
        (repository / "repository/recipe/build/.text.txt.0.aside").unlink(missing_ok=True)
        (repository / "repository/recipe/build/text.txt").unlink()
        (repository / "repository/recipe/build/text.txt").write_text("text.txt")
    assert (repository / "mirror" / "gamma").read_text() == "mirror/gamma"


def test_a_temporary_file_of_the_stage_may_become_its_output(stage):
    allowed(
        stage(
            "import tempfile; made = tempfile.mkstemp(dir='build')[1]; open(made, 'w').write('x'); "
            "os.rename(made, 'build/out.txt'); os.remove('build/out.txt'); os.truncate(text, 8); "
            "folder = tempfile.mkdtemp(); os.symlink('/etc/hosts', folder + '/link'); import shutil; "
            "shutil.rmtree(folder)"
        )
    )


HELD = {  # what C code and other programs do → the line, and what would be there afterwards
    "list": ("sys.exit(child('ls', 'PLACE/mirror').returncode)", 2),
    "list the repository": ("sys.exit(child('ls', 'PLACE/repository').returncode)", 2),
    "run": ("sys.exit(child('sh', '-c', 'PLACE/home/true').returncode)", 126),
    "write": ("sys.exit(child('sh', '-c', 'echo x > PLACE/repository/new').returncode)", 2),
    "overwrite": ("sys.exit(child('sh', '-c', 'echo x > PLACE/mirror/gamma').returncode)", 2),
    "write into the code": ("sys.exit(child('sh', '-c', 'echo x > PLACE/repository/src/new.py').returncode)", 2),
    "truncate": ("sys.exit(libc.truncate(b'PLACE/mirror/gamma', 0))", -1),
    "move in": ("sys.exit(child('mv', 'PLACE/mirror/gamma', 'build/out.txt').returncode)", 1),
    "rename": ("sys.exit(libc.rename(b'PLACE/mirror/gamma', b'build/out.txt'))", -1),
    "link": ("sys.exit(libc.link(b'PLACE/mirror/gamma', b'build/out.txt'))", -1),
    "remove": ("sys.exit(libc.unlink(b'PLACE/mirror/gamma'))", -1),
    "make a folder": ("sys.exit(libc.mkdir(b'PLACE/mirror/new', 0o777))", -1),
    "make a pipe": ("sys.exit(libc.mkfifo(b'PLACE/mirror/new', 0o666))", -1),
    "make a device": ("sys.exit(libc.mknod(b'PLACE/mirror/new', 0o20666, 0x103))", -1),
    "abstract socket": (
        "import socket; other = socket.socket(socket.AF_UNIX); "
        "sys.exit(libc.connect(other.fileno(), b'\\1\\0\\0kohaku-delta-test', 20))", -1),
    "signal": ("sys.exit(libc.kill(PARENT, 0))", -1),
    "TCP": ("sys.exit(child('bash', '-c', 'echo > /dev/tcp/127.0.0.1/PORT').returncode)", 1),
    "fork_exec": (
        "import _posixsubprocess as p; r, w = os.pipe(); "
        "pid = p.fork_exec([b'/bin/cat', b'PLACE/mirror/gamma'], [b'/bin/cat'], True, (), None, None, -1, -1, -1, -1, "
        "-1, -1, r, w, True, False, 0, None, None, None, -1, None, False); "
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))", 1),
    "allowed": ("sys.exit(child('sh', '-c', 'ls build/text.txt && cat build/text.txt > $TMPDIR/x').returncode)", 0),
}  # fmt: skip
SINCE = {"truncate": 3, "TCP": 4, "abstract socket": 6, "signal": 6}  # the version of Landlock that brought it


@pytest.mark.parametrize("stage", ["both"], indirect=True)
def test_the_kernel_holds_c_code_that_lists_writes_runs_and_signals(stage, repository, server):
    shutil.copy("/bin/true", repository / "home" / "true")
    port = str(server.getsockname()[1])
    with socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0kohaku-delta-test")
        abstract.listen()
        lines = {
            name: line.replace("PORT", port).replace("PARENT", str(os.getpid())) for name, (line, _) in HELD.items()
        }
        told = attempts(stage, lines)
    for name, (_, code) in HELD.items():
        if landlock.abi_version() >= SINCE.get(name, 1):
            assert told[name] == f"'SystemExit {code}'", (name, told[name])
    assert (repository / "mirror" / "gamma").read_text() == "mirror/gamma"
    assert not (repository / "repository" / "new").exists() and not (repository / "mirror" / "new").exists()
    assert not (repository / "repository" / "src" / "new.py").exists()


def test_the_kernels_rules_cover_exactly_what_the_nearest_known_folder_decides(tmp_path):
    """Random declarations over a small tree: a file lies under a rule just where its nearest folder that is known is
    open.
    """
    place = tmp_path.resolve()
    for each in itertools.product("ab", repeat=4):
        path = place.joinpath(*each)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    everything = sorted(str(path) for path in place.rglob("*"))
    files = [path for path in everything if os.path.isfile(path)]
    for seed in range(200):
        numbers = random.Random(seed)
        watched, opened = set(numbers.sample(everything, 3)), set(numbers.sample(everything, 3))
        rules = landlock.readable_roots(opened, watched)

        def decided(path, opened=opened, watched=watched):
            while path not in opened | watched:
                if path == "/":
                    return True
                path = os.path.dirname(path)
            return path in opened

        assert {path for path in files if any(f"{path}/".startswith(f"{rule}/") for rule in rules)} == {
            path for path in files if decided(path)
        }, seed


@BOTH
def test_inputs_and_outs_may_be_links_into_a_cache(stage, repository, request):
    """DVC may link what it keeps: a declared path is what it leads to."""
    cache, build = repository / "repository" / "cache", repository / "repository/recipe/build"
    cache.mkdir()
    shutil.move(build / "text.txt", cache / "0123")
    (build / "text.txt").symlink_to(cache / "0123")
    (cache / "4567").write_text("x")
    try:
        done = stage(
            "from kohaku_delta import sandbox; assert open(text).read() == 'text.txt'; "
            "print(sandbox.describe_confinement())"
        )
        allowed(done)
        assert ("and Landlock" in done.stdout) == ("both" in request.node.name)
        refused(stage("open('PLACE/repository/cache/4567')"), repository, "cache/4567")
        folder = repository / "repository" / "pictures" / "inner"
        folder.mkdir(parents=True)
        (folder / "link").symlink_to(cache / "4567")  # a folder's files as well
        (folder / "further").symlink_to(repository / "mirror")
        given = ("--tars", str(folder.parent))
        allowed(stage("Path('PLACE/repository/pictures/inner/link').read_text(); os.listdir('PLACE/mirror')", *given))
    finally:
        (build / "text.txt").unlink()
        shutil.move(cache / "0123", build / "text.txt")
        shutil.rmtree(cache)
        shutil.rmtree(repository / "repository" / "pictures", ignore_errors=True)


@BOTH
def test_a_stage_can_tell_which_layers_hold_it(stage, request):
    done = stage("from kohaku_delta import sandbox; print(sandbox.describe_confinement())")
    allowed(done)
    assert ("and Landlock" in done.stdout) == ("both" in request.node.name) and ("alone" in done.stdout) == (
        "hook" in request.node.name
    )


def test_a_stage_called_as_a_function_leaves_its_caller_free(tmp_path):
    code = (
        "import runpy, sys; sys.path[0] = 'src'; main = runpy.run_path('stages/schedule.py')['main']; "
        f"main(['--posts', '{tmp_path}/none'], standalone_mode=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"try:\n exec({code!r})\nexcept Exception: pass\nprint(open('README.md').read(1))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "#\n", done.stderr
