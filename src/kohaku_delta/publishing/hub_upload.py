"""Sends the folder `release/` to a repository on the Hugging Face Hub, with huggingface_hub's own upload.

What is interrupted goes on with the next call: the Hub keeps what arrived, and huggingface_hub its own cache in
HF_HOME; nothing is written into the folder. The token is in no message, and neither is the text of a caught error,
which may hold a signed address or anything that a server sent.
"""

import re
from pathlib import Path

from kohaku_delta.errors import UserError
from kohaku_delta.hub import connection, hub_errors
from kohaku_delta.hub.pins import HubFile
from kohaku_delta.printing import printable
from kohaku_delta.publishing import release_folder

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
AGAIN = "Run the same command again when the cause is gone: what has arrived is not sent again."
WRITE = "It must have write access to the repository (huggingface.co/settings/tokens)."


def list_files(folder: Path) -> dict[str, int]:
    """Name → bytes of every file in the folder. Raises UserError for a folder that is missing or has other things."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist. Run `kohaku-delta release` in the recipe's folder first.")
    files = release_folder.list_files(folder)
    if release_folder.CARD not in files:
        raise UserError(f"{folder} has no README.md, so it is not a release. Run `kohaku-delta release` again.")
    return files


def check_repository(repository: str) -> None:
    """Raises UserError if this cannot be the name of a repository."""
    if not REPOSITORY.fullmatch(repository) or "--" in repository or ".." in repository:
        raise UserError(f"--repo is {repository!a:.80}; it must be OWNER/NAME, as the Hub's address of it has it.")


def upload_folder(folder: Path, repository: str, message: str) -> str:
    """Sends all files of the folder to main of the repository, which must exist; returns the commit's address. Raises
    UserError.
    """
    check_repository(repository)
    connection.require_online("The upload needs the Hub")
    if connection.token() is None:
        raise UserError(f"There is no token: set HF_TOKEN to one of your account. {WRITE}")
    from huggingface_hub import errors
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its warnings of retries show signed addresses
    target = HubFile(repository, "model", None, "README.md")
    try:
        with hub_errors.translate_errors(target):
            try:
                info = connection.api().upload_folder(
                    repo_id=repository, folder_path=folder, repo_type="model", commit_message=message
                )
            except errors.HfHubHTTPError as error:
                if sentence := _refusal(error, repository):
                    raise UserError(sentence) from None
                raise
    except hub_errors.TransientError as error:
        raise UserError(f"The hub {error}. {AGAIN}") from None
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, OSError) as error:
        # an answer that huggingface_hub did not expect, or what its transfer library (hf_xet) raises, without an errno
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"The upload ended with an error of huggingface_hub ({type(error).__name__}). {AGAIN}"
        ) from None
    return printable(str(info.commit_url))


def _refusal(error: Exception, repository: str) -> str | None:
    """What to say of a status that only an upload meets; None for those that every request may meet."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return (
            f"{repository} does not exist on the Hub, or not for the account of your token. Create it there first "
            f"(`hf repos create {repository}`, or on the website), or correct --repo."
        )
    if status == 401:
        return f"The token is not valid (401). Make a new one and set HF_TOKEN. {WRITE}"
    if status == 403:
        return f"The token may not write to {repository} (403). {WRITE}"
    if status in (409, 412):
        return f"Somebody else wrote to {repository} at the same time ({status}). {AGAIN}"
    if status == 413:
        return f"{repository} takes no more data (413): the storage of its account is full, or a file is too large."
    if status in (400, 422):
        return f"The Hub did not accept the files ({status}). Look at the front matter of README.md. {AGAIN}"
    return None
