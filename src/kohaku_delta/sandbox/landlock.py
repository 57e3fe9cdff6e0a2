"""Invariant: where the kernel has Landlock, no code of this process, C included, and no program that it starts, reads a
watched file that is not declared.

The second layer, under the audit hook: it names nothing (an open is “Permission denied”) and sees all. It holds for the
calling thread and for all that it starts from then on; what was open stays open. Two things it cannot: in the folders
where outs are written all may be read (temporary files are made there), and of the network it knows TCP only, by port:
between ranks, whose ports are the system's choice, it is not asked.
"""

import ctypes
import os
import struct

from kohaku_delta.sandbox.policy import StagePolicy

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # asm-generic/unistd.h: the same on every architecture
READ_FILE, CONNECT_TCP, BIND_TCP = 1 << 2, 1 << 1, 1 << 0  # linux/landlock.h
WITH_TCP = 4  # the first version of the interface that knows TCP
PR_SET_NO_NEW_PRIVS = 38
SHARED_MEMORY = (
    "/dev/shm"  # torch makes files there and reads them; a rule for those alone cannot be written beforehand
)


def abi_version() -> int:
    """Of the interface; 0 where the kernel has no Landlock, or it is not switched on."""
    return max(0, _syscall(CREATE_RULESET, None, 0, 1))


def confine(declared: StagePolicy) -> bool:
    """Whether the kernel holds this process to what is declared from now on."""
    offered = abi_version()
    watched, allowed = declared.watched, declared.allowed | declared.written
    if not offered or any(f"{each}/".startswith(f"{SHARED_MEMORY}/") for each in watched):
        return False
    network = (CONNECT_TCP | BIND_TCP) if declared.network == "none" and offered >= WITH_TCP else 0
    attributes = struct.pack("QQ", READ_FILE, network) if offered >= WITH_TCP else struct.pack("Q", READ_FILE)
    ruleset = _syscall(CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    try:
        for path in readable_roots(allowed, watched):
            if not _add(ruleset, path):
                return False
        return not ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) and not _syscall(RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def readable_roots(allowed: set[str], watched: set[str], folder: str = "/", inherited: bool = True) -> list[str]:
    """The files and folders that together hold all that may be read: a rule can only allow, and a folder's rule holds
    for all that is in it.
    """
    mine = folder in allowed or (inherited and folder not in watched)
    allowed, watched = _inside(allowed, folder), _inside(watched, folder)
    if mine and not watched:
        return [folder]
    known = {os.path.relpath(each, folder).split("/")[0] for each in allowed | watched}
    try:
        names = {each.name for each in os.scandir(folder) if not each.is_symlink()} if mine else known
    except OSError:
        names = known
    found = []
    for name in sorted(names):
        path = os.path.join(folder, name)
        if name not in known:
            found.append(path)
        elif os.path.exists(path) and not os.path.islink(path):  # where a link leads to is declared too
            found += readable_roots(allowed, watched, path, mine)
    return found


def _inside(paths: set[str], folder: str) -> set[str]:
    """Those in the folder, not the folder itself."""
    return {each for each in paths if each != folder and each.startswith(f"{folder.rstrip('/')}/")}


def _add(ruleset: int, path: str) -> bool:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return True  # gone meanwhile, or not ours to see: then it cannot be read either
    try:
        return not _syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", READ_FILE, descriptor), 0)
    finally:
        os.close(descriptor)


def _syscall(number: int, *arguments) -> int:
    given = [
        ctypes.c_char_p(each) if isinstance(each, bytes) or each is None else ctypes.c_long(each)
        for each in (number, *arguments)
    ]
    return ctypes.CDLL(None).syscall(*given)
