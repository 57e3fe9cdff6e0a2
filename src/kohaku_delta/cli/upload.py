"""kohaku-delta upload: the folder release/ to a repository on the Hugging Face Hub."""

from pathlib import Path

import click

from kohaku_delta.cli.stage_command import FILE, StageCommand
from kohaku_delta.errors import UserError
from kohaku_delta.printing import print_line
from kohaku_delta.provenance import folder_signature
from kohaku_delta.publishing import hub_upload, release_folder
from kohaku_delta.units import format_size


@click.command(cls=StageCommand)
@click.argument("folder", type=FILE, default=".")
@click.option("--repo", help="Where to: OWNER/NAME of a model repository that exists on the Hub.")
@click.option(
    "--yes", is_flag=True, help="Send the files. Without it they are only listed, and nothing asks the network."
)
def upload(folder: Path, repo: str | None, yes: bool) -> None:
    """List what an upload of FOLDER/release would send, or, with --repo and --yes, send it.

    FOLDER is a recipe's folder in which `kohaku-delta release` was run. The token is HF_TOKEN's. What was interrupted
    goes on with the same command.
    """
    place = folder / release_folder.FOLDER
    files = hub_upload.list_files(place)
    if repo:
        hub_upload.check_repository(repo)
    for name, size in files.items():
        print_line(f"{size:>15,}  {name}")
    total = f"{len(files)} files, {sum(files.values()):,} bytes ({format_size(sum(files.values()))})"
    if folder_signature.FILE not in files:
        print_line("The folder is not signed: `make proofs` does that.")
    if not yes:
        where = repo or "the repository that --repo names"
        print_line(f"{total} would be sent from {place} to {where}. Nothing was sent: --repo and --yes send them.")
        return
    if not repo:
        raise UserError("--yes needs --repo OWNER/NAME: where the files are to go.")
    print_line(f"{total} are sent from {place} to {repo}")
    address = hub_upload.upload_folder(place, repo, "Upload a rebuild")
    print_line(f"sent: {address}")
