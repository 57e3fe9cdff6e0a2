"""The sandbox of a stage: it may open only files that it declares, and only `download` may use the network.

Two layers: Python's audit hook (audit_hook), which names the file, and the kernel's Landlock (landlock), which also
sees C code and other programs. docs/sandbox.md says what is allowed, and what neither layer sees. A stage that another
program calls as a function is not confined, because an audit hook cannot be removed.
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
    """Confines this process to what the stage declares, if it was started as that stage. Raises UserError at the end if
    a violation was swallowed on the way.
    """
    script = Path(command.callback.__code__.co_filename).resolve() if command.callback else None
    main_script = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve()
    entry = policy.stage_entry(script) if script and script == main_script else None
    if script is None or entry is None:
        yield
        return
    # a short prefix: sockets between processes lie in the folder, and their paths may have 107 characters
    with tempfile.TemporaryDirectory(prefix="kxl-") as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        os.environ["PYTHONSAFEPATH"] = "1"  # spawned processes would look for modules in the working folder
        rules = policy.policy_for(script, entry, context)
        for path in rules.written:  # Landlock rules need folders that exist; a stage reports one that cannot be made
            with suppress(OSError):
                os.makedirs(path, exist_ok=True)
        audit_hook.install_hook(rules, landlock.confine(rules))
        process_facts.register("confined", lambda device: describe_confinement())
        yield
        audit_hook.raise_if_violated()


def describe_confinement() -> str:
    """The layers that confine this process, for the record of a run."""
    rules, kernel_rights = audit_hook.current_policy()
    if rules is None:
        return "nothing: it was not started as a stage"
    if kernel_rights:
        return f"audit hook and {kernel_rights}"
    return "audit hook alone: the kernel does not offer Landlock here, so what C code and other programs do is not seen"
