"""Uploading a folder to the Hub: what must be true is asked before anything is written there, then one commit.

Weights go up first, each file apart; what has arrived is not sent again after a break. The commit comes last, so that a
repository never holds half a model. Imports nothing of `vlm`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import enable_progress_bars, validate_repo_id

KEPT_FILES = (".gitattributes",)
"""What the Hub itself puts into an empty repository."""

REFUSAL_STATUS_CODES = (400, 401, 403, 404)
"""Answers after which trying again is of no use."""

HUB_ENDPOINT = constants.HUGGINGFACE_CO_URL_HOME.rstrip("/")

RESUME_HINT = "Run the same command again to continue: files that have arrived are not sent again."


@dataclass(frozen=True)
class UploadTarget:
    """A repository to upload to, as it is now."""

    name: str
    """`owner/name`."""
    exists: bool
    private: bool = False
    files: tuple[str, ...] = ()
    """The files of its branch, without those that the Hub puts there."""


def full_name(repo: str, owner: str | None = None) -> str:
    """Return `owner/name`, where a bare name is the user's own; refuses names that no repository can have."""
    name = repo if "/" in repo or owner is None else f"{owner}/{repo}"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is not a repository name (OWNER/NAME): {error}") from error
    return name


class HubClient:
    """The Hub, as the user whose token is in `HF_TOKEN` or was left by `hf auth login`."""

    def __init__(self) -> None:
        self.api = HfApi()
        self.endpoint = self.api.endpoint

    def get_target(self, repo: str, revision: str | None) -> UploadTarget:
        """Ask who we are and what is there; nothing is written.

        Raises:
            ValueError: no name of a repository, no token or a refused one, no right to write, no connection.
        """
        with self._readable_errors(repo):
            who = self.api.whoami()
            name = full_name(repo, who["name"])
            role = who.get("auth", {}).get("accessToken", {}).get("role")
            owners = [who["name"], *(org["name"] for org in who.get("orgs", []))]
            if role == "read":
                raise ValueError("the token is read-only: create one with write access in your account settings")
            if (owner := name.partition("/")[0]) not in owners:
                raise ValueError(f"{name}: {who['name']} cannot write to {owner}, only to {', '.join(owners)}")
            try:
                info = self.api.model_info(name)
            except RepositoryNotFoundError:
                return UploadTarget(name, exists=False)
            files = info.siblings
            if revision is not None:
                with suppress(RevisionNotFoundError):  # made when it is uploaded to
                    files = self.api.model_info(name, revision=revision).siblings
            names = tuple(file.rfilename for file in files or () if file.rfilename not in KEPT_FILES)
            return UploadTarget(name, exists=True, private=bool(info.private), files=names)

    def upload_folder(
        self, folder: Path, target: UploadTarget, *, private: bool, revision: str | None, obsolete: Sequence[str]
    ) -> str:
        """Upload a folder's files in one commit, and return the address.

        Args:
            folder: its files.
            target: what `get_target` found.
            private: whether a new repository is.
            revision: a branch, which is made where it is not there; None: `main`.
            obsolete: files of the repository that go with the same commit.

        Raises:
            ValueError: in words. A repository made here for an upload that was refused is gone again.
        """
        enable_progress_bars()  # transformers, told to be quiet while a model is read, silences the client too
        with self._readable_errors(target.name):
            files = [CommitOperationAdd(file.name, file) for file in sorted(folder.iterdir())]
            changes = [*files, *map(CommitOperationDelete, obsolete)]
            if not target.exists:
                self.api.create_repo(target.name, private=private)
            try:
                if revision is not None:
                    self.api.create_branch(target.name, branch=revision, exist_ok=True)
                message = "Model, processor and card"
                self.api.create_commit(target.name, changes, commit_message=message, revision=revision)
            except (HfHubHTTPError, RuntimeError) as error:
                cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
                refused = isinstance(cause, HfHubHTTPError) and cause.response.status_code in REFUSAL_STATUS_CODES
                if refused and not target.exists:
                    self._delete_new_repository(target.name)
                raise
        branch = f"/tree/{revision}" if revision else ""
        return f"{self.endpoint}/{target.name}{branch}"

    def _delete_new_repository(self, name: str) -> None:
        """Remove a repository that was made for an upload that may not be."""
        try:
            self.api.delete_repo(name, missing_ok=True)
        except HfHubHTTPError as error:
            raise ValueError(
                f"{name}: it was created, but uploading to it and removing it were both refused: {error.server_message}"
            ) from error

    @contextmanager
    def _readable_errors(self, repo: str) -> Iterator[None]:
        """What the client raises, in words that say what to do."""
        try:
            yield
        except RuntimeError as error:  # around an error of a file's upload
            raise ValueError(self._make_error_message(error.__cause__ or error, repo)) from error
        except (HfHubHTTPError, LocalTokenNotFoundError, httpx2.HTTPError, OSError) as error:
            raise ValueError(self._make_error_message(error, repo)) from error

    def _make_error_message(self, error: BaseException, repo: str) -> str:
        if isinstance(error, LocalTokenNotFoundError):
            return "no token found: log in (hf auth login) or set HF_TOKEN to a token with write access"
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so the Hub is not contacted; unset it"
        if isinstance(error, HfHubHTTPError):
            code, said = error.response.status_code, error.server_message or str(error).splitlines()[0]
            if code == 401:
                return f"{self.endpoint} rejected the token (HF_TOKEN, or the one from hf auth login): {said}"
            if code == 403:
                return f"{repo}: no write access: {said}"
            hint = f" {RESUME_HINT}" if code >= 429 else ""
            return f"{repo}: {self.endpoint} answers {code}: {said}.{hint}"
        if isinstance(error, httpx2.HTTPError):
            return f"no connection to {self.endpoint} ({error or type(error).__name__}). {RESUME_HINT}"
        return f"{repo}: {error}. {RESUME_HINT}{self._xet_hint()}"

    def _xet_hint(self) -> str:
        """Return what to try if the endpoint is not the Hub's own, because mirrors may not support Xet uploads."""
        if self.endpoint == HUB_ENDPOINT or constants.HF_HUB_DISABLE_XET:
            return ""
        return f" If {self.endpoint} does not support Xet, set HF_HUB_DISABLE_XET=1."
