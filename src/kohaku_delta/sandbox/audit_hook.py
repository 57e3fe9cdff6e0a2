"""The first layer of the sandbox: an audit hook that refuses and names what a stage does not declare.

Python tells the hook of every file that it opens, every folder that it lists and every socket that it uses, before it
does. A library may swallow the error, so the first violation is kept and raised again at the next file, at every rename
(by which outputs appear) and at the stage's end: no output appears after it. A hook cannot be removed. Forked processes
inherit it; spawned ones call install_hook(*current_policy()). Python does not see what C code opens: the callers of
such code raise the event "open" themselves (sys.audit).
"""

import ipaddress
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from typing import NoReturn

from kohaku_delta.errors import UserError
from kohaku_delta.sandbox.policy import StagePolicy, canonical_path

CODE_REMEDY = (
    "Run `dvc repro`: its first stage, `code`, lists in build/code what each stage's imports reach. Code that is "
    "loaded in another way than by an import is closed."
)
_policy: StagePolicy
_installed = False
_with_landlock = False  # Landlock confines this process too, and the programs that it starts
_violation: str | None = None
_allowed: set[str] = set()  # absolute paths, as they were spelled, that were found to be declared


def install_hook(policy: StagePolicy | None, with_landlock: bool = False) -> None:
    """From now on this process opens only what `policy` allows. Raises UserError for a module that is loaded already
    and not declared.
    """
    global _policy, _installed, _with_landlock
    if policy is None:
        return
    _policy, _with_landlock = policy, with_landlock
    if not _installed:
        sys.addaudithook(_on_event)
    _installed = True
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and not policy.may_open(os.path.abspath(file)) and not policy.may_open(canonical_path(file)):
            _refuse(f"runs {file}, which is not among its code. {CODE_REMEDY}")


def current_policy() -> tuple[StagePolicy | None, bool]:
    """The arguments with which a spawned process calls install_hook."""
    return (_policy if _installed else None), _with_landlock


def raise_if_violated() -> None:
    """Raises the first violation, even if it was swallowed."""
    if _violation:
        raise UserError(_violation)


def _refuse(what: str) -> NoReturn:
    global _violation
    _violation = _violation or f"The stage {_policy.stage} {what}"
    raise UserError(_violation)


def _on_event(event: str, arguments: tuple) -> None:
    if check := CHECKS.get(event):
        check(*arguments)


def _check_open(path, mode=None, flags=0) -> None:
    if type(path) is int or (type(path) is str and (path in _allowed or path.startswith(_policy.libraries))):
        return
    if _is_declared(path, flags) and type(path) is str and path.startswith("/"):
        _allowed.add(path)


def _is_declared(path, flags: int) -> bool:
    """Whether the file is declared. Raises UserError if it is not, and exists or would be created."""
    path = os.path.abspath(os.fsdecode(path))
    if os.path.isdir(path) or (not flags & os.O_CREAT and not os.path.isfile(path)):
        # an open folder reveals nothing until it is listed; the system itself reports a file that does not exist
        return False
    if not path.endswith(".py"):  # Python reads source files to print a traceback
        raise_if_violated()
    if _policy.may_open(canonical_path(path)):
        return True
    is_new = flags & os.O_CREAT and flags & os.O_EXCL  # a temporary file, which did not exist before
    if not (is_new and os.path.realpath(os.path.dirname(path)) in _policy.written):
        remedy = (
            CODE_REMEDY
            if path.endswith(".py")
            else "Name another mirror by --mirror, certificates by SSL_CERT_FILE, and a token's file by HF_TOKEN_PATH."
            if _policy.network == "any"
            else "Add it to its deps or outs in dvc.yaml (an input: to download.inputs in params.yaml), or name it by "
            "an option."
        )
        _refuse(f"opened {path}, which it does not declare. {remedy}")
    return False


def _check_list(path=None) -> None:
    path = os.readlink(f"/proc/self/fd/{path}") if type(path) is int else os.path.abspath(os.fsdecode(path or "."))
    real = canonical_path(path)
    if not (_policy.may_open(real) or real in _policy.listed) and os.path.isdir(path):
        _refuse(
            f"listed {path}, which it does not declare: the result would depend on what happens to be in it. Name its "
            "files in dvc.yaml, or the folder by an option."
        )


def _check_rename(source, target, *_) -> None:
    raise_if_violated()
    if type(target) is not int:
        _is_declared(target, os.O_CREAT)


def _check_shared_library(name=None) -> None:
    if isinstance(name, (str, bytes, os.PathLike)) and os.path.dirname(name):
        _is_declared(name, os.O_RDONLY)


def _check_database(name) -> None:
    name = os.fsdecode(name)
    if name not in ("", ":memory:"):
        _is_declared(name.removeprefix("file:").split("?")[0], os.O_RDONLY)


def _check_program(executable, *_) -> None:
    """Other programs are confined by Landlock, or refused; our own interpreter installs the hook itself."""
    executable = os.fsdecode(executable)
    if not _with_landlock and os.path.realpath(executable) != os.path.realpath(sys.executable):
        _refuse(
            f"started the program {executable}, and this kernel cannot confine it (it has no Landlock). Do without it."
        )


def _address(host) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host's name spells out; None for one that must be looked up."""
    try:
        return ipaddress.ip_address(os.fsdecode(host or "127.0.0.1").replace("localhost", "127.0.0.1"))
    except ValueError:
        return None


def _is_loopback(host) -> bool:
    address = _address(host)
    return address is not None and address.is_loopback


def _check_bind(sock, address) -> None:
    # urllib3 binds the loopback while it is imported, to see whether the host knows IPv6: nothing is sent by that
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or not _is_loopback(address[0]):
        _check_connect(sock, address)


def _check_connect(sock, address=None) -> None:
    if _policy.network == "any" or address is None:
        return
    if sock.family == socket.AF_UNIX:  # between a process and its workers, in the stage's own temporary folder
        if not os.path.realpath(os.fsdecode(address)).startswith(f"{os.path.realpath(tempfile.gettempdir())}/"):
            _refuse_socket(f"to {os.fsdecode(address)!r}")
    elif sock.family not in (socket.AF_INET, socket.AF_INET6):
        _refuse_socket(f"{sock.family.name}, {address}")
    elif _policy.network == "none" or not _is_loopback(address[0]):
        _refuse_socket(f"to {address[0]}, port {address[1]}")


def _check_lookup(host, *_) -> None:
    host = host[0] if isinstance(host, tuple) else host
    is_own = _policy.network == "loopback" and host == socket.gethostname()
    if not (_address(host) or _policy.network == "any" or is_own):
        _refuse_socket(f"to look up {host}")


def _refuse_socket(what: str) -> NoReturn:
    ranks = "; ranks may talk on this machine's loopback only" if _policy.network == "loopback" else ""
    _refuse(
        f"opened a socket ({what}). Only download may use the network{ranks}: pin what is needed in params.yaml "
        "(download.inputs)."
    )


CHECKS: dict[str, Callable[..., None]] = {
    "open": _check_open,
    "os.listdir": _check_list,
    "os.scandir": _check_list,
    "os.rename": _check_rename,
    "ctypes.dlopen": _check_shared_library,
    "sqlite3.connect": _check_database,
    "os.spawn": lambda mode, executable, *_: _check_program(executable),
    "socket.bind": _check_bind,
    **dict.fromkeys(("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"), _check_program),
    **dict.fromkeys(("socket.connect", "socket.sendto", "socket.sendmsg"), _check_connect),
    **dict.fromkeys(
        ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"), _check_lookup
    ),
}
