"""The first layer of the sandbox: an audit hook that refuses and names what a stage does not declare.

Python tells the hook of every file that it opens, renames, links, shortens or removes, every folder that it lists and
every socket that it uses, before it does. A library may swallow the error, so the first violation is kept and raised
again at the next file, at every rename (by which outputs appear) and at the stage's end: no output appears after it. A
hook cannot be removed. Forked processes inherit it; spawned ones call install_hook(*current_policy()). Python does not
see what C code opens: the callers of such code raise the event "open" themselves (sys.audit).
"""

import ipaddress
import os
import shlex
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import NoReturn

from kohaku_delta.errors import UserError
from kohaku_delta.sandbox.policy import StagePolicy, canonical_path

CODE_REMEDY = (
    "Run `dvc repro`: its first stage, `code`, lists in build/code what each stage's imports reach. Code that is "
    "loaded in another way than by an import is closed."
)
_policy: StagePolicy
_installed = False
_kernel_rights = ""  # what Landlock holds of this process too, and of the programs that it starts
_violation: str | None = None
_allowed: set[str] = set()  # absolute paths, as they were spelled, that were found to be declared
_made: set[str] = set()  # the temporary files that this process made in the folders of its outputs


def install_hook(policy: StagePolicy | None, kernel_rights: str = "") -> None:
    """From now on this process opens only what `policy` allows. Raises UserError for a module that is loaded already
    and not declared.
    """
    global _policy, _installed, _kernel_rights
    if policy is None:
        return
    _policy, _kernel_rights = policy, kernel_rights
    if not _installed:
        sys.addaudithook(_on_event)
    _installed = True
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and not policy.may_open(os.path.abspath(file)) and not policy.may_open(canonical_path(file)):
            _refuse(f"runs {file}, which is not among its code. {CODE_REMEDY}")


def current_policy() -> tuple[StagePolicy | None, str]:
    """The arguments with which a spawned process calls install_hook."""
    return (_policy if _installed else None), _kernel_rights


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
    if type(path) is int or (type(path) is str and (path in _allowed or _is_of_a_library(path))):
        return
    if not os.path.isabs(os.fsdecode(path)):
        for each in _candidates(path):
            _is_declared(each, flags)
    elif _is_declared(path, flags) and type(path) is str:
        _allowed.add(path)


def _is_of_a_library(path: str) -> bool:
    return path.startswith(_policy.libraries) and "/../" not in path


def _candidates(path) -> Iterator[str]:
    """What a relative path may mean: Python does not tell from which open folder (`dir_fd`) it is seen."""
    path = os.fsdecode(path)
    yield path
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            is_folder = stat.S_ISDIR(os.stat(int(descriptor)).st_mode)
            other = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), path)
        except OSError:  # the descriptor of the list itself
            continue
        if is_folder and os.path.isdir(os.path.dirname(other)):
            yield other


def _absolute(path) -> str:
    """The path from the root on. `..` leads up from where a link leads to, as for the system."""
    path = os.path.join(os.getcwd(), os.fsdecode(path))
    if "/.." not in path:
        return os.path.normpath(path)
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def _is_declared(path, flags: int) -> bool:
    """Whether the file is declared. Raises UserError if it is not, and exists or would be created."""
    path = _absolute(path)
    if os.path.isdir(path) or (not flags & os.O_CREAT and not os.path.isfile(path)):
        # an open folder reveals nothing until it is listed; the system itself reports a file that does not exist
        return False
    if not path.endswith(".py"):  # Python reads source files to print a traceback
        raise_if_violated()
    return _judge(path, canonical_path(path), bool(flags & os.O_CREAT and flags & os.O_EXCL))


def _judge(path: str, known_as: str, is_new: bool = False) -> bool:
    if _policy.may_open(known_as):
        return True
    if os.path.dirname(known_as) in _policy.written:
        if is_new:  # a temporary file, which did not exist before
            _made.add(known_as)
        if known_as in _made:
            return False
    remedy = (
        CODE_REMEDY
        if path.endswith(".py")
        else "Name another mirror by --mirror, certificates by SSL_CERT_FILE, and a token's file by HF_TOKEN_PATH."
        if _policy.network == "any"
        else "Add it to its deps or outs in dvc.yaml (an input: to download.inputs in params.yaml), or name it by "
        "an option."
    )
    _refuse(f"opened {path}, which it does not declare. {remedy}")


def _check_list(path=None) -> None:
    path = os.readlink(f"/proc/self/fd/{path}") if type(path) is int else _absolute(path or ".")
    real = canonical_path(path)
    if not (_policy.may_open(real) or real in _policy.listed) and os.path.isdir(path):
        _refuse(
            f"listed {path}, which it does not declare: the result would depend on what happens to be in it. Name its "
            "files in dvc.yaml, or the folder by an option."
        )


def _check_name(path, dir_fd=-1, is_new: bool = False) -> None:
    """A file that is removed must be declared like one that is opened; so must both names of one that is renamed or
    linked.
    """
    _allowed.clear()  # what a name leads to may be another file from now on
    path = os.fsdecode(path)
    if type(dir_fd) is int and dir_fd >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
    path = _absolute(path)
    if is_new or os.path.lexists(path):
        _judge(path, canonical_path(path, follow=False))


def _check_rename(source, target, source_fd=-1, target_fd=-1) -> None:
    raise_if_violated()
    _check_name(source, source_fd)
    _check_name(target, target_fd, is_new=True)


def _check_symlink(source, target, dir_fd=-1) -> None:
    raise_if_violated()
    _check_name(target, dir_fd, is_new=True)


def _check_truncate(path, length) -> None:
    if type(path) is not int:
        _is_declared(path, os.O_WRONLY)


def _check_shared_library(name=None) -> None:
    if isinstance(name, (str, bytes, os.PathLike)) and os.path.dirname(name):
        _is_declared(name, os.O_RDONLY)


def _check_database(name) -> None:
    name = os.fsdecode(name)
    if name not in ("", ":memory:"):
        _is_declared(name.removeprefix("file:").split("?")[0], os.O_RDONLY)


def _check_program(executable, arguments=(), *_) -> None:
    """Other programs are confined by Landlock; our own interpreter installs the hook itself. Without Landlock a program
    runs if it and the files that its arguments name are declared: what else it opens is not seen.
    """
    if _kernel_rights:
        return
    words = [
        os.fsdecode(word) for word in (executable, *(arguments or ())) if isinstance(word, (str, bytes, os.PathLike))
    ]
    if os.path.realpath(words[0]) == os.path.realpath(sys.executable):
        return
    for word in words:
        if os.path.isfile(word):
            _is_declared(word, os.O_RDONLY)


def _check_command(command) -> None:
    words = shlex.split(os.fsdecode(command))
    _check_program(words[0] if words else "", words)


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
    **dict.fromkeys(("os.rename", "os.link"), _check_rename),
    "os.symlink": _check_symlink,
    "os.truncate": _check_truncate,
    "os.remove": _check_name,
    "ctypes.dlopen": _check_shared_library,
    "sqlite3.connect": _check_database,
    "os.spawn": lambda mode, executable, arguments, *_: _check_program(executable, arguments),
    "os.system": _check_command,
    "socket.bind": _check_bind,
    **dict.fromkeys(("subprocess.Popen", "os.exec", "os.posix_spawn"), _check_program),
    **dict.fromkeys(("socket.connect", "socket.sendto", "socket.sendmsg"), _check_connect),
    **dict.fromkeys(
        ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"), _check_lookup
    ),
}
