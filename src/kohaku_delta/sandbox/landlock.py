"""The second layer of the sandbox: if the kernel has Landlock, no code of this process, C included, and no program that
it starts reads a watched file that is not declared.

It names nothing (an open fails with “Permission denied”) and sees everything. It holds for the calling thread and for
all that it starts from then on; what was open stays open. Two limits: in the folders of outputs everything may be read
(temporary files are made there), and of the network it knows TCP only, by port: between ranks, whose ports the system
chooses, TCP is not restricted.
"""

import ctypes
import os
import struct
from collections.abc import Set

from kohaku_delta.sandbox.policy import StagePolicy

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # asm-generic/unistd.h: the same on every architecture
READ_FILE, CONNECT_TCP, BIND_TCP = 1 << 2, 1 << 1, 1 << 0  # linux/landlock.h
WITH_TCP = 4  # the first version of the interface that knows TCP
PR_SET_NO_NEW_PRIVS = 38
SHARED_MEMORY = "/dev/shm"  # torch makes files there and reads them; no rule for those alone can be written beforehand


def abi_version() -> int:
    """The version of the interface; 0 if the kernel has no Landlock, or it is switched off."""
    return max(0, _syscall(CREATE_RULESET, None, 0, 1))


def confine(policy: StagePolicy) -> bool:
    """Whether the kernel confines this process to `policy` from now on."""
    version = abi_version()
    if not version or any(f"{path}/".startswith(f"{SHARED_MEMORY}/") for path in policy.watched):
        return False
    network = (CONNECT_TCP | BIND_TCP) if policy.network == "none" and version >= WITH_TCP else 0
    attributes = struct.pack("QQ", READ_FILE, network) if version >= WITH_TCP else struct.pack("Q", READ_FILE)
    ruleset = _syscall(CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    try:
        return (
            all(_add_rule(ruleset, path) for path in readable_roots(policy.allowed | policy.written, policy.watched))
            and not ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            and not _syscall(RESTRICT_SELF, ruleset, 0)
        )
    finally:
        os.close(ruleset)


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


def _add_rule(ruleset: int, path: str) -> bool:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return True  # deleted meanwhile, or not visible to us: then it cannot be read either
    try:
        return not _syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", READ_FILE, descriptor), 0)
    finally:
        os.close(descriptor)


def _syscall(*arguments) -> int:
    return ctypes.CDLL(None).syscall(
        *(
            ctypes.c_char_p(argument) if isinstance(argument, bytes) or argument is None else ctypes.c_long(argument)
            for argument in arguments
        )
    )
