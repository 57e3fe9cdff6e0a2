"""List a file system, from a tar on standard input: two with the same listing have the same names, kinds, modes,
owners, times, links and bytes.

docker export CONTAINER | python3 container/listing.py > listing.txt
"""

import hashlib
import sys
import tarfile

KINDS = {tarfile.REGTYPE: "file", tarfile.DIRTYPE: "folder", tarfile.SYMTYPE: "link to", tarfile.LNKTYPE: "same as"}


def lines(archive: tarfile.TarFile) -> list[str]:
    """A line per member, sorted by name: name, kind, mode, owner, time, size, and the sha256 or the link's target."""
    found = []
    for member in archive:
        kind = KINDS.get(member.type, f"device or pipe {member.devmajor}:{member.devminor}")
        content = (
            hashlib.file_digest(archive.extractfile(member), "sha256").hexdigest()
            if member.isreg()
            else member.linkname
        )
        found.append(
            f"{member.name}\t{kind}\t{member.mode:o}\t{member.uid}:{member.gid}\t{member.mtime}\t{member.size}\t{content}"
        )
    return sorted(found)


if __name__ == "__main__":
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
        print("\n".join(lines(archive)))
