"""croissant.json of a release: the tables of the dataset, their columns, counts and hashes, as Croissant 1.0.

The tables themselves are not published: they name other people's pictures and captions. Whoever runs the recipe gets
them, with these hashes, under the same paths. `mlcroissant validate` reads the description (`make proofs`, tests).
"""

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kohaku_delta import paths
from kohaku_delta.provenance.artifact import Artifact
from kohaku_delta.report.build_summary import Build

VERSION = "http://mlcommons.org/croissant/1.0"
CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}  # the specification's own, whole: readers warn of any other
TABLES = {
    paths.SELECTION: "post that was drawn, with how often",
    paths.DROPPED: "drawn post that was not trained on, with the reason",
    paths.POSTS: "post that was trained on: where its picture lies in the tars, and its size",
    paths.CAPTIONS: "post that was trained on: its caption, and the tags that it is made of",
    paths.SCHEDULE: "micro-batch: its step, its bucket, the posts in it",
}  # path → what a row is
TYPES = {pa.int16(): "cr:Int16", pa.int32(): "cr:Int32", pa.int64(): "cr:Int64", pa.string(): "sc:Text"}


def croissant(rebuild: Artifact, build: Build) -> str:
    """The text of croissant.json."""
    footers = {path: pq.read_metadata(rebuild.folder / path) for path in TABLES}
    content = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "name": f"Training dataset of {build.recipe.bake.title or 'an untitled model'}",
        "description": _description(build),
        "conformsTo": VERSION,
        "distribution": [_file(rebuild, path) for path in TABLES],
        "recordSet": [_record_set(path, footers[path]) for path in TABLES],
    }
    return json.dumps(content, indent=1) + "\n"


def _description(build: Build) -> str:
    counts = "The tables of a build."
    if found := build.dataset:
        dropped = "".join(f"; dropped as {reason}: {number:,}" for reason, number in found.dropped.items())
        counts = f"{found.selected:,} posts selected; {found.trained:,} trained on in {found.steps:,} steps{dropped}."
    return f"{counts} The tables are not published: whoever runs the recipe gets them, with these hashes, in build/."


def _name(path: str) -> str:
    return path.removeprefix(f"{paths.BUILD}/")


def _file(rebuild: Artifact, path: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": _name(path),
        "name": _name(path),
        "contentUrl": path,
        "contentSize": f"{rebuild.digests[path].bytes} B",
        "encodingFormat": "application/x-parquet",
        "sha256": rebuild.digests[path].sha256,
    }


def _record_set(path: str, footer: pq.FileMetaData) -> dict[str, Any]:
    table = _name(path).removesuffix(".parquet")
    return {
        "@type": "cr:RecordSet",
        "@id": table,
        "name": table,
        "description": f"{footer.num_rows:,} rows. A row is a {TABLES[path]}.",
        "field": [_field(table, _name(path), column) for column in footer.schema.to_arrow_schema()],
    }


def _field(table: str, file: str, column: pa.Field) -> dict[str, Any]:
    is_list = pa.types.is_list(column.type)
    return {
        "@type": "cr:Field",
        "@id": f"{table}/{column.name}",
        "name": f"{table}/{column.name}",
        "dataType": TYPES[column.type.value_type if is_list else column.type],
        **({"repeated": True} if is_list else {}),
        "source": {"fileObject": {"@id": file}, "extract": {"column": column.name}},
    }
