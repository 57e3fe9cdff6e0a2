"""The second layer of the sandbox: if the kernel has Landlock, no code of this process, C included, and no program that
it starts reads, lists, runs or changes a watched file that is not declared.

It names nothing (an open fails with “Permission denied”) and sees everything. It holds for the calling thread and for
all that it starts from then on; what was open stays open. Its rules hold for whole folders: in the folders of outputs,
where temporary files are made, everything may be read and changed. Of the network it knows TCP only, by port: between
ranks, whose ports the system chooses, TCP is not restricted. A kernel holds as many of the rights as it knows;
confine() says which.
"""

import ctypes
import os
import stat
import struct
from collections.abc import Iterator, Set

from kohaku_delta.sandbox.policy import StagePolicy

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # asm-generic/unistd.h: the same on every architecture
# linux/landlock.h. The first thirteen rights are those of version 1; the others came one by one.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR = (1 << bit for bit in range(5))
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
LATER = {"move between folders": (2, REFER), "truncate": (3, TRUNCATE), "device commands": (5, IOCTL_DEV)}
READ = EXECUTE | READ_FILE | READ_DIR
OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV  # the rights that a rule for a file may give
WITH_TCP, BIND_AND_CONNECT = 4, 0b11
WITH_SCOPES, ABSTRACT_SOCKETS_AND_SIGNALS = 6, 0b11
PR_SET_NO_NEW_PRIVS = 38
INHERITED = "KOHAKU_DELTA_CONFINED"  # what a rank's launcher, whose rules hold for the rank too, is held by
SHARED_MEMORY = "/dev/shm"  # torch makes files there and reads them; no rule for those alone can be written beforehand


def abi_version() -> int:
    """The version of the interface; 0 if the kernel has no Landlock, or it is switched off."""
    return max(0, _syscall(CREATE_RULESET, None, 0, 1))


def confine(policy: StagePolicy) -> str:
    """From now on the kernel confines this process to `policy`. Returns what it holds; "" if it does not."""
    if INHERITED in os.environ and _is_confined():
        return os.environ[INHERITED]
    version = abi_version()
    if not version or any(f"{path}/".startswith(f"{SHARED_MEMORY}/") for path in policy.watched):
        return ""
    later = {what: right for what, (since, right) in LATER.items() if version >= since}
    rights = (1 << 13) - 1 | sum(later.values())
    network = BIND_AND_CONNECT if policy.network == "none" and version >= WITH_TCP else 0
    # ranks pass descriptors through abstract sockets (NCCL), and the first one ends the others
    scopes = ABSTRACT_SOCKETS_AND_SIGNALS if policy.network == "none" and version >= WITH_SCOPES else 0
    attributes = struct.pack("QQQ", rights, network, scopes)  # an older kernel ignores zeros that it does not know
    ruleset = _syscall(CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return ""
    try:
        held = (
            all(_add_rule(ruleset, path, rights & each) for path, each in _rules(policy))
            and not ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            and not _syscall(RESTRICT_SELF, ruleset, 0)
        )
    finally:
        os.close(ruleset)
    if not held:
        return ""
    told = ["read", "list", "run", "write", *later]
    told += (["TCP"] if network else []) + (["abstract sockets", "signals"] if scopes else [])
    os.environ[INHERITED] = f"Landlock (version {version}: {', '.join(told)})"
    return os.environ[INHERITED]


def _is_confined() -> bool:
    """Whether the rules of another process hold here: nobody lists the root, which lies above what is watched."""
    try:
        os.close(os.open("/", os.O_RDONLY))
    except PermissionError:
        return True
    return False


def _rules(policy: StagePolicy) -> Iterator[tuple[str, int]]:
    """The paths with the rights that hold for them and for all that is in them. Unwatched folders have all rights."""
    for path in readable_roots(policy.allowed | policy.written, policy.watched):
        yield path, READ
    for path in readable_roots(policy.written, policy.watched):
        yield path, ~READ
    # a folder is opened to flush it to the disk; one of outputs may hold what is watched
    for path in policy.changed | policy.written:
        yield path, ~READ | READ_DIR
    for path in policy.listed:
        yield path, READ_DIR
    for path in policy.emptied:
        yield path, REMOVE_DIR


def readable_roots(allowed: Set[str], watched: Set[str], folder: str = "/", parent_is_open: bool = True) -> list[str]:
    """The files and folders below `folder` that together hold everything that may be read. A rule can only allow, and a
    folder's rule holds for all that is in it.
    """
    is_open = folder in allowed or (parent_is_open and folder not in watched)
    allowed, watched = _below(allowed, folder), _below(watched, folder)
    if is_open and not watched:
        return [folder]
    with_rules = {os.path.relpath(path, folder).split("/")[0] for path in allowed | watched}
    try:
        names = {entry.name for entry in os.scandir(folder) if not entry.is_symlink()} if is_open else with_rules
    except OSError:
        names = with_rules
    roots = []
    for name in sorted(names):
        path = os.path.join(folder, name)
        if name not in with_rules:
            roots.append(path)
        elif os.path.exists(path) and not os.path.islink(path):  # the target of a link is declared too
            roots += readable_roots(allowed, watched, path, is_open)
    return roots


def _below(paths: Set[str], folder: str) -> Set[str]:
    """Those in the folder, without the folder itself."""
    return {path for path in paths if path != folder and path.startswith(f"{folder.rstrip('/')}/")}


def _add_rule(ruleset: int, path: str, rights: int) -> bool:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return True  # deleted meanwhile, or not visible to us: then it cannot be read either
    try:
        rights &= ~0 if stat.S_ISDIR(os.fstat(descriptor).st_mode) else OF_A_FILE
        return not rights or not _syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, descriptor), 0)
    finally:
        os.close(descriptor)


def _syscall(*arguments) -> int:
    return ctypes.CDLL(None).syscall(
        *(
            ctypes.c_char_p(argument) if isinstance(argument, bytes) or argument is None else ctypes.c_long(argument)
            for argument in arguments
        )
    )
