"""A published folder as its checks see it: its files, and what its own proofs say, read in bounds.

A stranger wrote all of it: no link is followed, files have limits, and every JSON file must fit its model.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import FailFast, Field

from kohaku_delta import strict_model
from kohaku_delta.errors import UserError
from kohaku_delta.formats import hashing
from kohaku_delta.provenance import bundles, folder_signature, signature
from kohaku_delta.provenance.signed_statement import SignedStatement, parse_statement
from kohaku_delta.provenance.stage_record import Sha256
from kohaku_delta.publishing import release_folder
from kohaku_delta.strict_model import PartialModel

MAX_JSON_BYTES = 4 << 20  # the release's bom.json has about 1 MB
REMEDY = "Make the release again, or download it again."


class _Hash(PartialModel):
    alg: str
    content: str


class _Reference(PartialModel):
    type: str
    url: str


class _Component(PartialModel):
    """bom_ref: what the component is, see bill_of_materials."""

    bom_ref: str = Field("", alias="bom-ref")
    name: str
    hashes: Annotated[list[_Hash], FailFast()] = []
    references: Annotated[list[_Reference], FailFast(), Field(alias="externalReferences")] = []
    components: Annotated[list["_Component"], FailFast()] = []

    @property
    def sha256(self) -> str | None:
        return next((each.content for each in self.hashes if each.alg == "SHA-256"), None)


class _Bom(PartialModel):
    serialNumber: str
    components: Annotated[list[_Component], FailFast()]


class _Table(PartialModel):
    contentUrl: str
    sha256: Sha256


class _Croissant(PartialModel):
    distribution: Annotated[list[_Table], FailFast()]


@dataclass
class PublishedFolder:
    """key: the signer's public key; without one, what is signed is not trusted."""

    folder: Path
    key: Path | None

    @cached_property
    def files(self) -> dict[str, str]:
        """Name → sha256 of every file. Raises UserError for anything that no release holds."""
        sizes = release_folder.list_files(self.folder)
        if large := [name for name, size in sizes.items() if size > bundles.MAX_MEMBER_BYTES]:
            raise UserError(
                f"{large[0]} has more than {bundles.MAX_MEMBER_BYTES:,} bytes, as no file of a release has."
            )
        names = list(sizes)
        digests = hashing.digest_paths((self.folder / name for name in names), md5=False)
        return {name: digest.sha256 for name, digest in zip(names, digests, strict=True)}

    @property
    def unsigned(self) -> dict[str, str]:
        """The files that are the same for everybody who makes this release: without signatures, and git's own."""
        left_out = {*release_folder.SIGNATURES, *folder_signature.GIT_FILES}
        return {name: sha256 for name, sha256 in self.files.items() if name.split("/")[0] not in left_out}

    @cached_property
    def bom(self) -> _Bom:
        return self._read(release_folder.BOM, _Bom)

    @cached_property
    def dataset(self) -> _Croissant:
        return self._read(release_folder.DATASET, _Croissant)

    @cached_property
    def components(self) -> list[_Component]:
        return [inner for outer in self.bom.components for inner in (outer, *outer.components)]

    def listed(self, kind: str) -> dict[str, str | None]:
        """Name → sha256 of the components of one kind in bom.json."""
        return {
            each.bom_ref.removeprefix(kind): each.sha256 for each in self.components if each.bom_ref.startswith(kind)
        }

    @cached_property
    def statement(self) -> SignedStatement | None:
        """The provenance, verified if there is a key; None if there is none."""
        if bundles.PROVENANCE not in self.files:
            return None
        path = self.folder / bundles.PROVENANCE
        payload = signature.verify_signature(path, self.key) if self.key else signature.unverified_payload(path)
        return parse_statement(path.name, payload, REMEDY)

    @property
    def outputs(self) -> dict[str, str]:
        """Output → sha256, as the provenance says."""
        return self.statement.outputs if self.statement else {}

    def read_json(self, name: str) -> Any:
        """The content of a JSON file, of whatever shape."""
        return self._read(name, Any)

    def _read(self, name: str, kind: Any) -> Any:
        try:
            return strict_model.read_json(self.folder / name, kind, MAX_JSON_BYTES, REMEDY)
        except FileNotFoundError:
            raise UserError(f"{name} is missing. {REMEDY}") from None
