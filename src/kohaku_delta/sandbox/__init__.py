"""Invariant: a stage that opens a file of the repository, the mirror or the home directory that it did not declare, or
a socket, fails and names it.

Two layers: Python's audit hook (`audit_hook`), which names, and the kernel's Landlock (`landlock`), which also sees C
code and other programs. docs/sandbox.md says what is allowed, and what neither sees. A stage that another program
calls as a function is not held: a hook cannot be taken off.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from kohaku_delta import process_facts
from kohaku_delta.sandbox import audit_hook, landlock, policy


@contextmanager
def confined(command: click.Command, context: click.Context) -> Iterator[None]:
    """Holds this process to what the stage declares, if it was started as that stage."""
    script = Path(command.callback.__code__.co_filename).resolve()
    said = (
        policy.stage_entry(script)
        if script == Path(getattr(sys.modules["__main__"], "__file__", "") or "").resolve()
        else None
    )
    if said is None:
        yield
        return
    with tempfile.TemporaryDirectory(
        prefix="kxl-"
    ) as folder:  # short: sockets between processes lie in it, and their paths may have 107 characters
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        os.environ["PYTHONSAFEPATH"] = "1"  # spawned processes would look for modules in the working folder
        rules = policy.policy_for(script, said, context)
        # the kernel's rules are for folders that are there; where one cannot be made, the stage says so if it needs it
        for each in rules.written:
            with suppress(OSError):
                os.makedirs(each, exist_ok=True)
        audit_hook.install_hook(rules, landlock.confine(rules))
        process_facts.register("confined", lambda device: describe_confinement())
        yield
        audit_hook.raise_if_violated()


def describe_confinement() -> str:
    """What holds this process, for the record of a run."""
    rules, confined = audit_hook.current_policy()
    if rules is None:
        return "nothing: it was not started as a stage"
    if confined:
        return f"audit hook and Landlock (version {landlock.abi_version()})"
    return "audit hook alone: the kernel does not offer Landlock here, so what C code opens is not seen"
