"""Invariant: after the first thing that was not declared no out appears any more, and it is the first that is named.

Python tells an audit hook of every file that it opens, every folder that it lists and every socket that it uses, before
it does. A library may swallow the refusal: so it is kept, and given again at the next file, at every rename (by which
outs appear) and at the stage's end. A hook cannot be removed. It is inherited by processes that are forked; spawned
ones call `hold`. What C code opens by itself the interpreter does not hear of: `opening` is for those who let it.
"""

import ipaddress
import os
import socket
import sys
import tempfile

from kohaku_delta.errors import UserError
from kohaku_delta.sandbox.policy import StagePolicy, canonical_path

CODE_REMEDY = "Run `dvc repro`: its first stage, `code`, lists in build/code what each stage's imports reach. What is loaded by another way than an import is closed."
_held: StagePolicy | None = None
_confined = False  # by the kernel too, and so are the programs that are started
_refused: str | None = None
_known: set = set()  # absolute paths, as they were written, that may be opened


def install_hook(declared: StagePolicy | None, confined: bool = False) -> None:
    """From now on this process opens what is declared, and nothing else. Refuses code that was loaded already and is
    not declared.
    """
    global _held, _confined
    if declared is None:
        return
    if _held is None:
        sys.addaudithook(_on_event)
    _held, _confined = declared, confined
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and not declared.may_open(os.path.abspath(file)) and not declared.may_open(canonical_path(file)):
            _refuse(f"runs {file}, which is not among its code. {CODE_REMEDY}")


def current_policy() -> tuple[StagePolicy | None, bool]:
    """What a spawned process gives to `hold`."""
    return _held, _confined


def raise_if_violated() -> None:
    """Raises what was refused, even where somebody swallowed it."""
    if _refused:
        raise UserError(_refused)


def audit_open(path) -> None:
    """Tells of a file that C code is about to open for reading."""
    sys.audit("open", os.fspath(path), "r", os.O_RDONLY)


def _refuse(what: str) -> None:
    global _refused
    _refused = _refused or f"The stage {_held.stage} {what}"
    raise UserError(_refused)


def _on_event(event: str, given: tuple) -> None:
    judge = JUDGES.get(event)
    if judge is not None:
        judge(*given)


def _open(path, mode=None, flags=0) -> None:
    if type(path) is int or (type(path) is str and (path in _known or path.startswith(_held.libraries))):
        return
    if _file(path, flags) and type(path) is str and path.startswith("/"):
        _known.add(path)


def _file(path, flags: int) -> bool:
    """Whether the file is declared. Raises where it is not, if it is there or would be made."""
    path = os.path.abspath(os.fsdecode(path))
    if os.path.isdir(path) or (not flags & os.O_CREAT and not os.path.isfile(path)):
        # an open folder tells nothing, listing it is asked for below; of what is not there the system tells itself
        return False
    if not path.endswith(".py"):  # read again to tell of an error
        raise_if_violated()
    if _held.may_open(canonical_path(path)):
        return True
    if not (
        flags & os.O_CREAT and flags & os.O_EXCL and os.path.realpath(os.path.dirname(path)) in _held.written
    ):  # a temporary file was not there before
        remedy = (
            CODE_REMEDY
            if path.endswith(".py")
            else "Add it to its deps or outs in dvc.yaml (an input: to download.inputs in params.yaml), or name it by an option."
        )
        _refuse(f"opened {path}, which it does not declare. {remedy}")
    return False


def _list(path=None) -> None:
    path = os.readlink(f"/proc/self/fd/{path}") if type(path) is int else os.path.abspath(os.fsdecode(path or "."))
    real = canonical_path(path)
    if not (_held.may_open(real) or real in _held.listed) and os.path.isdir(path):
        _refuse(
            f"listed {path}, which it does not declare: what happens to lie there would decide. Name its files in dvc.yaml, or the folder by an option."
        )


def _rename(source, target, *_) -> None:
    raise_if_violated()
    if type(target) is not int:
        _file(target, os.O_CREAT)


def _library(name=None) -> None:
    if isinstance(name, (str, bytes, os.PathLike)) and os.path.dirname(name):
        _file(name, os.O_RDONLY)


def _database(name) -> None:
    name = os.fsdecode(name)
    if name not in ("", ":memory:"):
        _file(name.removeprefix("file:").split("?")[0], os.O_RDONLY)


def _program(executable, *_) -> None:
    """Other programs are held by the kernel, or not at all; our own interpreter calls `hold`."""
    if not _confined and os.path.realpath(os.fsdecode(executable)) != os.path.realpath(sys.executable):
        _refuse(
            f"started the program {os.fsdecode(executable)}, and this kernel cannot hold it to what is declared (it has no Landlock). Do without it."
        )


def _spawn(mode, executable, *_) -> None:
    _program(executable)


def _number(host):
    """The address that a host's name spells out; None for one that must be looked up."""
    try:
        return ipaddress.ip_address(os.fsdecode(host or "127.0.0.1").replace("localhost", "127.0.0.1"))
    except ValueError:
        return None


def _is_loopback(host) -> bool:
    """This machine's own loopback."""
    number = _number(host)
    return number is not None and number.is_loopback


def _bind(sock, address) -> None:
    # urllib3 binds the loopback while it is imported, to see whether the host knows IPv6: nothing is sent by that
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or not _is_loopback(address[0]):
        _connect(sock, address)


def _connect(sock, address=None) -> None:
    if _held.network == "any" or address is None:
        return
    if sock.family == socket.AF_UNIX:  # between a process and its workers, in the stage's own temporary folder
        if not os.path.realpath(os.fsdecode(address)).startswith(f"{os.path.realpath(tempfile.gettempdir())}/"):
            _socket(f"to {os.fsdecode(address)!r}")
    elif sock.family not in (socket.AF_INET, socket.AF_INET6):
        _socket(f"{sock.family.name}, {address}")
    elif _held.network == "none" or not _is_loopback(address[0]):
        _socket(f"to {address[0]}, port {address[1]}")


def _lookup(host, *_) -> None:
    host = host[0] if isinstance(host, tuple) else host
    if not (_number(host) or _held.network == "any" or (_held.network == "loopback" and host == socket.gethostname())):
        _socket(f"to look up {host}")


def _socket(what: str) -> None:
    between = "; ranks may talk on this machine's loopback only" if _held.network == "loopback" else ""
    _refuse(
        f"opened a socket ({what}). Only download may use the network{between}: pin what is needed in params.yaml (download.inputs)."
    )


JUDGES = {
    "open": _open, "os.listdir": _list, "os.scandir": _list, "os.rename": _rename, "ctypes.dlopen": _library, "sqlite3.connect": _database,
    "subprocess.Popen": _program, "os.exec": _program, "os.posix_spawn": _program, "os.spawn": _spawn, "os.system": _program,
    "socket.bind": _bind, "socket.connect": _connect, "socket.sendto": _connect, "socket.sendmsg": _connect,
    "socket.getaddrinfo": _lookup, "socket.gethostbyname": _lookup, "socket.gethostbyaddr": _lookup, "socket.getnameinfo": _lookup,
}  # fmt: skip
