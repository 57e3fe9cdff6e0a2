"""Tars of several folders as one folder of links, for the stages that look for a tar beside the others.

nyanko7/danbooru2023 has them in original/, recent/ and updates/<date>/. A link has its tar's name, except in updates,
where dataset-0.tar is there for each date: updates/20240319/dataset-0.tar becomes update-20240319-0.tar. Nothing is
copied. A public index beside a tar is linked with it.
"""

import hashlib
import re
from pathlib import Path

from kohaku_delta.danbooru.tars import tars_by_number
from kohaku_delta.errors import UserError
from kohaku_delta.hub import file_download

UPDATE = re.compile(r"(?:.*/)?updates/([0-9A-Za-z_]{1,32})/[^/]*-([0-9]{1,4})\.tar")


def link_name(path: Path) -> str:
    """The name under which a tar is linked."""
    update = UPDATE.fullmatch(path.as_posix())
    return f"update-{update[1]}-{update[2]}.tar" if update else path.name


def need_links(files: list[Path]) -> bool:
    """Whether these tars cannot be used where they are."""
    return len({path.parent for path in files}) > 1 or any(link_name(path) != path.name for path in files)


def check_names(files: list[Path]) -> None:
    """Raises UserError if the stages could not tell these tars apart, or find out which posts they hold. The tars need
    not exist.
    """
    if not need_links(files):
        tars_by_number(files)
        return
    by_name: dict[str, Path] = {}
    for path in files:
        other = by_name.setdefault(link_name(path), path)
        if other != path:
            raise UserError(
                f"{other} and {path} have the same number. Remove one of them from download.inputs.tars; only tars in "
                "folders updates/<date>/ may have the same names."
            )
    tars_by_number([Path(name) for name in by_name])


def link_into_one_folder(files: list[Path], urls: list[str], mirror: Path) -> list[Path]:
    """The tars, linked into one folder of the mirror, in the same order; themselves if they need no links."""
    if not need_links(files):
        return files
    folder = mirror / "linked" / hashlib.sha256("\n".join(urls).encode()).hexdigest()[:16]
    links = [folder / link_name(path) for path in files]
    for link, path in zip(links, files, strict=True):
        file_download.link(link, path)
        index, index_link = path.with_suffix(".json"), link.with_suffix(".json")
        if index.is_file():
            file_download.link(index_link, index)
        else:
            index_link.unlink(missing_ok=True)
    return links
